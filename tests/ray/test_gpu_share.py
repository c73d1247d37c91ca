"""Trials that share a GPU, on real workers. The GPU is one that Ray is told of: they train on the CPU."""

import time
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import replace

import pytest
import ray
from ray import tune
from ray.cluster_utils import Cluster

from trainables.ray.trial import FineTuneTrial, TrialOptions
from trainables.ray.worker import DEVICE
from trainables.ray.worker_group import GroupSize

pytestmark = pytest.mark.ray

SETTINGS = {"arch": "test_resnet", "pretrained": False, "presize": 48, "image_size": 32, "batch_size": 8}
SETTINGS |= {"freeze_epochs": 0, "epochs": 2, "precision": "fp32", "head": "linear", "hidden": 16}
START_SECONDS = 240.0
MORE_SECONDS = 3.0
"""In which the third trial could begin if there were room; less than an idle worker stays."""


@pytest.fixture
def told_gpu(search_cache, monkeypatch):
    """A Ray with one GPU, and CPUs for more trials than may share it."""
    monkeypatch.setenv(DEVICE, "cpu")
    head = {"num_cpus": 4, "num_gpus": 1, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()
    cluster.shutdown()


def test_two_trials_share_a_gpu_and_a_third_one_waits(told_gpu, colour_folder, tmp_path):
    """Nor do they need a process group: NCCL, that of GPUs, would fail here."""
    options = TrialOptions(
        settings=SETTINGS,
        data=str(colour_folder),
        weights=None,
        checkpoints=str(tmp_path),
        group_size=GroupSize(gpus_per_worker=1),
        shared_sizes={2: GroupSize(cpus_per_worker=1, gpus_per_worker=0.5)},
    )
    trials = []
    for n in range(3):
        own = replace(options, checkpoints=str(tmp_path / str(n)))  # outside of Tune, all have one id
        trials.append(tune.with_parameters(FineTuneTrial, options=own)({"trials_per_gpu": 2, "seed": n}))
    pool = ThreadPoolExecutor()
    try:
        epochs = [pool.submit(trial.step) for trial in trials]
        deadline = time.monotonic() + START_SECONDS
        while sum(epoch.done() for epoch in epochs) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        done, waiting = wait_for(epochs, MORE_SECONDS)
        assert len(waiting) == 1 and ray.available_resources().get("GPU", 0) == 0
        results = [epoch.result() for epoch in done]
        assert [result["failure"] for result in results] == ["", ""]
        assert len({result["gpu"] for result in results}) == 1
        assert {result["gpu_kind"] for result in results} == {"cpu"}
        trials[epochs.index(done.pop())].cleanup()  # its workers leave
        assert waiting.pop().result(START_SECONDS)["failure"] == ""
        for trial in trials:
            trial.cleanup()
    finally:
        pool.shutdown(wait=False)  # without Ray, none goes on
