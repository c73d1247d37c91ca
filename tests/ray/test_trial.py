"""A trial and the hosts of its worker groups, which are played here; real ones are in test_search.py."""

import json
import math
import time
from types import SimpleNamespace

import pytest
import ray

from trainables.ray import trial as module
from trainables.ray.messages import Outcome
from trainables.ray.retry_limits import MAX_HOSTS
from trainables.ray.trial import DEADLINE, FineTuneTrial, TrialOptions
from trainables.ray.worker_group import GroupSize
from trainables.recipe import Recipe
from trainables.training import checkpoint
from trainables.training.checkpoint import BEST_FILE, TRAINING_FILE, WEIGHTS_FILE

DONE = Outcome(metrics={"epoch": 1})


class Host:
    """Its node, as the trial picked it, may go away before the host is up; the host may be lost in training."""

    def __init__(self, node: str, *, comes_up: bool = True, trains: bool = True) -> None:
        self.picked = node
        self.node = self._remote(comes_up, node)
        self.begin = self._remote(True, None)
        self.run_epoch = self._remote(trains, DONE)

    @staticmethod
    def _remote(works: bool, value):
        def get():
            if not works:
                raise ray.exceptions.RayActorError
            return value

        return SimpleNamespace(remote=lambda *_: get)


@pytest.fixture
def run_epoch(monkeypatch):
    """The outcome of an epoch on one host after the other, while the nodes that Ray lists are those of each moment."""
    monkeypatch.setattr(module.ray, "get", lambda call: call())

    def run(hosts: list[Host], listed: list[set[str]]) -> Outcome:
        moments = iter(listed)
        monkeypatch.setattr(module, "living_nodes", lambda: {node: {} for node in next(moments)})

        class Trial(FineTuneTrial):
            def __init__(self) -> None:
                self.host, self.handed_over, self.epochs_done, self.files = None, False, 0, None

            def _start_host(self) -> Host:
                self.host = hosts.pop(0)
                self.host_node = self.host.picked
                return self.host

            def _spec(self) -> None:
                pass

        return Trial()._run_epoch()

    return run


def test_a_node_that_takes_one_host_after_another_with_it_costs_the_trial_no_try(run_epoch):
    """Its hosts are gone before Ray lists it as lost, and one that was to start on it never comes up."""
    of_node = [Host("spot", trains=False), Host("spot", comes_up=False)]
    others = [Host("head", trains=False) for _ in range(MAX_HOSTS - 1)]
    listed = [{"head", "spot"}, *MAX_HOSTS * [{"head"}]]
    assert run_epoch([*of_node, *others, Host("head")], listed) == DONE


def test_a_trial_that_loses_host_after_host_on_nodes_that_stay_gives_up(run_epoch):
    outcome = run_epoch(MAX_HOSTS * [Host("head", trains=False)], MAX_HOSTS * [{"head"}])
    assert outcome.failure.startswith(f"lost its worker group {MAX_HOSTS} times")


# --- What a trial reports of its best epoch --------------------------------------------------------------------------

SETTINGS = Recipe(epochs=3, freeze_epochs=0, head_init="probe").to_dict()


def stepping(tmp_path, errors: dict[int, float], more: dict[int, dict[str, float]] | None = None, **options):
    """A trial whose epochs have these errors, and `more` metrics, each with weights of its own."""

    class Trial(FineTuneTrial):
        trial_id = "a"

        def __init__(self) -> None:
            self.options = TrialOptions(
                settings=SETTINGS, data="", weights=None, checkpoints=str(tmp_path), group_size=GroupSize(), **options
            )
            self._begin({})

        def _run_epoch(self) -> Outcome:
            epoch = self.epochs_done + 1
            times = {"overhead_seconds": 1.0, "train_seconds": 2.0, "valid_seconds": 0.5}
            metrics = {"epoch": epoch, "error_rate": errors[epoch], "valid_loss": errors[epoch], **times}
            metrics |= (more or {}).get(epoch, {})
            state = {WEIGHTS_FILE: f"epoch {epoch}".encode(), TRAINING_FILE: b"moments"}
            return Outcome(metrics=metrics, state=state)

    return Trial()


def test_a_trial_takes_the_share_of_a_gpu_that_it_was_proposed_with(tmp_path):
    shares = {1: GroupSize(gpus_per_worker=1), 2: GroupSize(gpus_per_worker=0.5)}
    trial = stepping(tmp_path, {}, shared_sizes=shares)
    for config, size in (({"trials_per_gpu": 2}, shares[2]), ({"trials_per_gpu": 1}, shares[1]), ({}, GroupSize())):
        trial._begin(config)
        assert trial.size == size and "trials_per_gpu" not in trial.recipe


def test_a_deadline_that_passed_while_the_search_was_dead_counts_no_more(tmp_path):
    trial, now = stepping(tmp_path, {}), time.time()
    for config, deadline in (({DEADLINE: now + 60}, now + 60), ({DEADLINE: now - 60}, None), ({}, None)):
        trial._begin(config)
        assert trial._spec().probe_deadline == deadline and DEADLINE not in trial.recipe


def kept(tmp_path) -> dict[str, bytes]:
    return checkpoint.last_whole(tmp_path / "ta")[0]


def test_a_trial_reports_its_best_epoch_the_probe_included(tmp_path):
    trial = stepping(tmp_path, {0: 0.2, 1: 0.5, 2: 0.1, 3: 0.3})
    results = [trial.step() for _ in range(4)]
    assert [(result["epoch"], result["best_epoch"], result["best_error_rate"]) for result in results] == [
        (0, 0, 0.2), (1, 0, 0.2), (2, 2, 0.1), (3, 2, 0.1)
    ]  # fmt: skip
    assert [result["done"] for result in results] == [False, False, False, True]
    assert results[0]["overhead_seconds"] == results[3]["overhead_seconds"] == 1.0
    assert kept(tmp_path) == {WEIGHTS_FILE: b"epoch 3"}


def test_with_keep_epoch_best_the_weights_of_the_best_epoch_go_with_a_trial_through_a_kill(tmp_path):
    errors = {0: 0.2, 1: 0.5, 2: 0.4, 3: 0.3}
    trial = stepping(tmp_path, errors, keep_epoch="best")
    for _ in range(2):
        trial.step()
    later = stepping(tmp_path, errors, keep_epoch="best")
    results = [later.step() for _ in range(3)]
    assert [(result["epoch"], result["best_epoch"]) for result in results] == [(1, 0), (2, 0), (3, 0)]
    assert kept(tmp_path) == {WEIGHTS_FILE: b"epoch 3", BEST_FILE: b"epoch 0"}


def test_thresholds_stay_with_the_weights_of_their_epoch_and_go_to_a_refit(tmp_path):
    for thresholds in (None, (0.25, 0.5)):
        stored = {} if thresholds is None else {"thresholds": thresholds}
        files = {checkpoint.PREPROCESSING_FILE: json.dumps(stored).encode(), WEIGHTS_FILE: b"weights"}
        checkpoint.save(tmp_path / "ta", 3, files, {})
        checkpoint.drop(tmp_path / "ta")
        assert checkpoint.thresholds(tmp_path / "ta") == thresholds
    assert checkpoint.thresholds(tmp_path / "tb") is None

    errors = {0: 0.2, 1: 0.5, 2: 0.1, 3: 0.3}
    trial = stepping(tmp_path / "best", errors, keep_epoch="best")
    run_epoch = trial._run_epoch

    def with_thresholds() -> Outcome:
        outcome = run_epoch()
        outcome.state[checkpoint.PREPROCESSING_FILE] = f"epoch {outcome.metrics['epoch']}".encode()
        return outcome

    trial._run_epoch = with_thresholds
    of_epochs = [(trial.step(), kept(tmp_path / "best")[checkpoint.PREPROCESSING_FILE])[1] for _ in range(4)]
    assert of_epochs == [b"epoch 0", b"epoch 0", b"epoch 2", b"epoch 2"]


def test_equal_errors_are_told_apart_by_the_validation_loss(tmp_path):
    trial = stepping(tmp_path, {0: 0.2, 1: 0.2, 2: 0.2, 3: 0.2})
    assert [trial.step()["best_epoch"] for _ in range(4)] == [0, 0, 0, 0]


def test_the_metric_of_the_search_decides_which_epoch_is_the_best(tmp_path):
    more = {0: {"macro_f1": 0.4}, 1: {"macro_f1": 0.7}, 2: {"macro_f1": 0.6}, 3: {"macro_f1": 0.5}}
    trial = stepping(tmp_path, {0: 0.2, 1: 0.3, 2: 0.1, 3: 0.3}, more, metric="macro_f1")
    results = [trial.step() for _ in range(4)]
    assert [result["objective"] for result in results] == pytest.approx([0.6, 0.3, 0.4, 0.5])
    assert [result["best_epoch"] for result in results] == [0, 1, 1, 1]
    assert results[-1]["best_error_rate"] == 0.3


def test_what_a_probe_tells_of_the_balanced_error_is_the_objective_to_expect(tmp_path):
    more = {0: {"balanced_error": 0.4, "expected_balanced_error": 0.5}}
    result = stepping(tmp_path, {0: 0.2}, more, metric="balanced_error").step()
    assert (result["objective"], result["expected_objective"]) == (0.4, 0.5)
    assert "expected_objective" not in stepping(tmp_path / "other", {0: 0.2}, more).step()


def test_a_metric_that_is_not_defined_fails_the_trial(tmp_path):
    result = stepping(tmp_path, {0: 0.2}, {0: {"auroc": math.nan}}, metric="auroc").step()
    assert result["failure"] == "auroc is not defined: all validation images are of one class"


def test_a_result_of_an_earlier_version_counts_by_its_error_rate(tmp_path):
    trial = stepping(tmp_path, {0: 0.2, 1: 0.5})
    saved = trial.step()
    earlier = {name: value for name, value in saved.items() if "objective" not in name}
    checkpoint.save(tmp_path / "ta", 0, checkpoint.last_whole(tmp_path / "ta")[0], earlier)
    again = stepping(tmp_path, {0: 0.2, 1: 0.5})
    assert again.step()["objective"] == 0.2
    assert again.step()["best_epoch"] == 0


def test_a_trial_without_a_probe_begins_with_epoch_1(tmp_path, monkeypatch):
    monkeypatch.setitem(SETTINGS, "head_init", "zeros")
    assert stepping(tmp_path, {1: 0.2}).step()["epoch"] == 1
