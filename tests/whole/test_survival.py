"""What a search survives, to the last bit, and what it takes of the disk while it does. Whole searches on a real Ray.

bench/chaos.py does the same at random moments, and more of it.
"""

import hashlib
import json
import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from processes import stopped
from searches import EPOCH_TIMES, PINNED, TIMES, Search, settings, tables, without
from tiny_run import draw_images

pytestmark = pytest.mark.ray

COMMON = ("--space", "quickstart", "--report", "off", "--max-concurrent", 1, "--cpus-per-worker", 1, "--seed", 3)


@pytest.fixture(scope="module")
def class_folders(search_cache, tmp_path_factory) -> Path:
    return draw_images(tmp_path_factory.mktemp("survival") / "data", each=60)


# --- Exactly ----------------------------------------------------------------------------------------------------------

# All that a training has beside its weights: momenta, dropout, mixup, running statistics, images that grow, a batch
# size that shrinks with them.
EVERYTHING = f"{PINNED} weight_decay=0.01 arch=test_resnet.r160_in1k freeze_epochs=2 epochs=4 head=mlp hidden=16 "
EVERYTHING += "dropout=0.5 mixup_alpha=0.4 smoothing=0.1 train_bn=unfrozen start_size=16 start_share=0.5 "
EVERYTHING += "start_batch_size=8 lr_max=0.001,0.01 lr_max_frozen=0.01 lr_ratio=10"


def exactly(folder: Path) -> tuple:
    trials, epochs = tables(folder)
    weights = hashlib.sha256((folder / "best" / "model.safetensors").read_bytes()).hexdigest()
    return without(trials, TIMES), without(epochs, EPOCH_TIMES), weights


def test_a_search_killed_in_the_frozen_and_the_unfrozen_stage_ends_as_if_nothing_had_been(
    class_folders, ray_head, tmp_path
):
    """Nor does a Ctrl-C before its first epoch. Meanwhile nobody else may resume it, nor with other images."""
    arguments = (*COMMON, "--data", class_folders, "--trials", 1, "--address", ray_head, *settings(EVERYTHING))
    undisturbed = Search(tmp_path / "undisturbed", *arguments)
    assert undisturbed.wait() == 0, undisturbed.text

    search = Search(tmp_path / "killed", *arguments)
    search.wait_for("trial 0 .*starts")
    search.process.send_signal(signal.SIGINT)
    assert search.wait() == 130, search.text

    search = Search(search.folder, *arguments)
    search.wait_for(r"trial 0 .*epoch 1/6 \(frozen\)")
    with stopped(search.processes("ray::RayTrainWorker")):
        second = Search(search.folder, "--resume", "--address", ray_head)
        assert second.wait() != 0
        assert "is being written by another search" in second.text
    time.sleep(0.2)  # in the second frozen epoch
    kill(search, undisturbed)
    with without_one_image(class_folders):
        changed = Search(search.folder, "--resume", "--address", ray_head)
        assert changed.wait() != 0
        assert "its images have changed: 179 instead of 180" in changed.text

    search = Search(search.folder, *arguments)  # the same command again goes on
    search.wait_for(r"trial 0 .*epoch 4/6 \(unfrozen\)")
    time.sleep(0.2)  # after the images have grown
    kill(search, undisturbed)
    search = Search(search.folder, *arguments)
    assert search.wait() == 0, search.text
    assert f"resuming {search.folder}/" in search.text
    assert exactly(search.folder) == exactly(undisturbed.folder)


def kill(search: Search, undisturbed: Search) -> None:
    search.process.kill()
    search.wait()
    assert len(tables(search.folder)[1]) < len(tables(undisturbed.folder)[1])


@contextmanager
def without_one_image(folder: Path) -> Iterator[None]:
    image = next(folder.glob("*/*.jpg"))
    aside = image.rename(folder.parent / image.name)
    yield
    aside.rename(image)


# --- Bad trials -------------------------------------------------------------------------------------------------------

DEADLY, EXPLODING, GOOD = "0.00666", "10", "0.001"
# With so much weight decay a rate of 10 multiplies the weights by -99 in every step.
BAD_TRIALS = f"{PINNED} arch=test_resnet.r160_in1k epochs=1 lr_ratio=10 lr_max={GOOD},{DEADLY},{EXPLODING} tta_views=0"

ENDS_ITS_PROCESS = f"""
import importlib.abc, importlib.util, os, signal, sys


class Loader(importlib.abc.Loader):
    def __init__(self, loader): self.loader = loader
    def create_module(self, spec): return self.loader.create_module(spec)
    def exec_module(self, module):
        self.loader.exec_module(module)
        run_epoch = module.FineTune.run_epoch
        def deadly(self):
            if self.recipe.lr_max == {DEADLY}:
                os.kill(os.getpid(), signal.SIGKILL)
            return run_epoch(self)
        module.FineTune.run_epoch = deadly


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "trainables.training.fine_tune":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        spec.loader = Loader(spec.loader)
        return spec


sys.meta_path.insert(0, Finder())
"""
"""As sitecustomize.py: a recipe with one rate kills the process that trains it, as a fault in a driver would."""


def test_a_trial_that_kills_its_workers_and_one_that_diverges_fail_alone(class_folders, tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(ENDS_ITS_PROCESS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    arguments = ("--data", class_folders, "--trials", 5, "--searcher", "random", "--scheduler", "none")
    search = Search(tmp_path / "bad", *COMMON, *arguments, *settings(BAD_TRIALS))
    assert search.wait(600) == 0, search.text
    by_rate = {rate: [row for row in tables(search.folder)[0] if row["lr_max"] == rate]
               for rate in (GOOD, DEADLY, EXPLODING)}  # fmt: skip
    assert all(by_rate.values())
    assert {row["status"] for row in by_rate[GOOD]} == {"completed"}
    for rate, reason in (
        (DEADLY, r"lost its workers 3 times in epoch 1$"),
        (EXPLODING, r"diverged: .* loss is (nan|inf)"),
    ):
        for row in by_rate[rate]:
            assert row["status"] == "failed" and re.match(reason, row["reason"]), row
            assert f"trial {row['number']} failed: {row['reason']}" in search.text


# --- The disk ---------------------------------------------------------------------------------------------------------


def test_forty_trials_never_take_more_than_three_training_states_beside_the_cache(ray_head, tmp_path):
    """A network of real size, so that its state is what counts; hard links count once."""
    recipe = f"{PINNED} weight_decay=0.01 arch=tf_efficientnet_lite0 epochs=2 tta_views=0 lr_max=0.0001..0.001 "
    data = draw_images(tmp_path / "data", each=4)
    recipe += "freeze_epochs=0"
    arguments = ("--data", data, "--trials", 40, "--keep", 2, "--searcher", "random", "--scheduler", "none")
    search = Search(tmp_path / "runs" / "kept", *COMMON, *arguments, "--address", ray_head, *settings(recipe))
    largest_state, largest = 0, 0
    deadline = time.monotonic() + 900
    while search.process.poll() is None:
        assert time.monotonic() < deadline, f"not ended after 900 s:\n{search.text}"
        largest = max(largest, allocated(search.folder))
        states = [allocated(state) for state in search.folder.glob("checkpoints/*/epoch_*")]
        largest_state = max([largest_state, *states])
        time.sleep(0.02)
    assert search.wait() == 0, search.text
    trials, _ = tables(search.folder)
    assert [row["status"] for row in trials] == ["completed"] * 40
    assert largest_state > 30e6
    assert largest < 3 * largest_state, f"{largest / largest_state:.2f} states"
    best = sorted(trials, key=lambda row: (float(row["error_rate"]), float(row["valid_loss"])))[:2]
    assert {path.name for path in (search.folder / "models").iterdir()} == {row["number"] for row in best}
    metrics = json.loads((search.folder / "best" / "metrics.json").read_text())
    assert str(metrics["number"]) == best[0]["number"]
    # Two kept models and that of the refit, each a third of a state, and tables.
    assert allocated(search.folder) < 1.1 * largest_state


def allocated(folder: Path) -> int:
    """Bytes of the disk that a folder's files take; a content with several names counts once."""
    found = {}
    for where, _, names in os.walk(folder):
        for name in names:
            try:
                status = os.lstat(os.path.join(where, name))  # noqa: PTH118
            except FileNotFoundError:
                continue
            found[status.st_ino] = 512 * status.st_blocks
    return sum(found.values())
