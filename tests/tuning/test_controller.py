"""Tune's loop forgets what has ended, and nothing that a resumed search needs."""

import json
import time

import pytest
from ray.air.execution import PlacementGroupResourceManager
from ray.train._internal.storage import StorageContext
from ray.tune.experiment import Trial
from ray.tune.search import SearchGenerator

from search.runs.tune_files import atomic_filesystem
from search.spaces.space import Range, Space
from search.tuning import controller
from search.tuning.controller import ShortController
from search.tuning.searcher import OptunaSearcher

SPACE = Space(name="s", doc="", dataset="quickstart", settings={}, dimensions={"lr_max": Range(1e-4, 1e-2, log=True)})


@pytest.fixture
def tune_controller(tmp_path):
    storage = StorageContext(str(tmp_path), experiment_dir_name="tune", storage_filesystem=atomic_filesystem())
    return ShortController(
        search_alg=SearchGenerator(OptunaSearcher(SPACE, tmp_path / "study.journal", seed=0)),
        resource_manager_factory=PlacementGroupResourceManager,  # the fixed one would start a Ray
        checkpoint_period=1,
        storage=storage,
    )


def trial(tune_controller, age: float, status: str, *, live: bool = False) -> Trial:
    """A trial whose last result is so many seconds old."""
    made = Trial("trainable", stub=True, storage=tune_controller._storage)
    made.status = status
    tune_controller.add_trial(made)
    made.update_last_result({"training_iteration": 1, "error_rate": 0.5})
    made.run_metadata.last_result_time = time.time() - age
    if live:
        tune_controller._live_trials.add(made)
    return made


def test_trials_that_ended_a_while_ago_are_forgotten_and_no_others(tune_controller):
    old, young = 2 * controller.FORGET_SECONDS, controller.FORGET_SECONDS / 2
    for _ in range(5):
        trial(tune_controller, old, Trial.TERMINATED)
    kept = [
        trial(tune_controller, young, Trial.TERMINATED),
        trial(tune_controller, old, Trial.TERMINATED, live=True),  # the search's end has stopped it, as nobody knows
        trial(tune_controller, old, Trial.ERROR),
        trial(tune_controller, old, Trial.PENDING),
    ]
    tune_controller.forget_ended()
    assert tune_controller.get_trials() == kept
    assert tune_controller._stopped_trials == set(kept[:2])


def test_one_trial_is_always_left_to_be_restored(tune_controller):
    ended = [trial(tune_controller, 1000, Trial.TERMINATED) for _ in range(3)]
    tune_controller.forget_ended()
    assert tune_controller.get_trials() == ended[-1:]


def test_the_state_of_a_trial_has_its_last_result_and_no_statistics(tune_controller):
    made = trial(tune_controller, 0, Trial.RUNNING)
    state = json.loads(made.get_json_state()[1])
    assert state["last_result"]["error_rate"] == 0.5
    assert state["metric_analysis"] == state["metric_n_steps"] == {}
    made.restore_run_metadata(made.get_json_state()[1])
    assert made.last_result["error_rate"] == 0.5


def test_saves_take_a_small_share_of_the_time_however_long_one_is(tune_controller, monkeypatch):
    clock = iter([10.0, 10.4])
    monkeypatch.setattr(controller.time, "thread_time", lambda: next(clock))
    monkeypatch.setattr(controller.TuneController, "save_to_dir", lambda self: None)
    tune_controller.save_to_dir()
    assert tune_controller._checkpoint_manager._checkpoint_period == pytest.approx(8)  # 0.4 s of them, a twentieth
