"""Early termination: late, at equal progress of each trial's own schedule, and on record."""

import json
import math
from types import SimpleNamespace

import pytest
from ray.tune.schedulers import TrialScheduler

from search.scheduler import ProgressHalvingScheduler, cut_off, new_scheduler, rung_at, stop_reasons

STOP, CONTINUE = TrialScheduler.STOP, TrialScheduler.CONTINUE


@pytest.fixture
def state_file(tmp_path):
    return tmp_path / "rungs.json"


@pytest.fixture
def scheduler(state_file):
    return made(state_file)


def made(state_file, **options) -> ProgressHalvingScheduler:
    scheduler = ProgressHalvingScheduler("error_rate", state_file, **options)
    scheduler.set_search_properties(None, None)
    return scheduler


def report(scheduler, trial_id: str, progress: int, error_rate: float) -> str:
    result = {"progress": progress, "error_rate": error_rate}
    return scheduler.on_trial_result(None, SimpleNamespace(trial_id=trial_id, config={}), result)


def test_the_cut_off_keeps_the_best_share():
    assert cut_off([0.1, 0.2, 0.3, 0.4, 0.5], 0.6) == pytest.approx(0.34)
    assert cut_off([0.5, 0.1, 0.3], 0.5) == 0.3


def test_nobody_is_cut_off_while_too_few_have_come_by():
    assert cut_off([], 0.6) is None
    assert cut_off([0.1, 0.2], 0.6) is None
    assert cut_off([0.1, 0.2, 0.3], 0.6) is not None


@pytest.mark.parametrize(
    ("progress", "rung"), [(0, None), (49, None), (50, 50), (74, 50), (75, 75), (99, 75), (100, None)]
)
def test_a_rung_counts_from_its_percent_on_and_not_at_the_end(progress, rung):
    assert rung_at(progress, (50, 75)) == rung


def test_a_hopeless_trial_stops_and_a_good_one_goes_on(scheduler):
    assert {report(scheduler, name, 50, e) for name, e in (("a", 0.1), ("b", 0.2), ("c", 0.15))} == {CONTINUE}
    assert report(scheduler, "d", 50, 0.5) == STOP
    assert report(scheduler, "e", 50, 0.05) == CONTINUE


def test_no_trial_stops_in_its_frozen_stage_or_early(scheduler):
    for name in "abcd":
        report(scheduler, name, 50, 0.1)
    for progress in (0, 0, 10, 33, 49):
        assert report(scheduler, "e", progress, 0.99) == CONTINUE


def test_a_finished_trial_is_never_stopped(scheduler):
    for name in "abcd":
        report(scheduler, name, 75, 0.1)
    assert report(scheduler, "e", 100, 0.99) == CONTINUE


def test_trials_are_compared_within_one_rung_only(scheduler):
    for name in "abcd":
        report(scheduler, name, 75, 0.1)
    assert report(scheduler, "e", 50, 0.9) == CONTINUE
    assert report(scheduler, "e", 75, 0.9) == STOP


def test_only_a_trials_first_result_at_a_rung_counts(scheduler):
    """A trial of many epochs has no more weight than one of few."""
    for name in "abc":
        report(scheduler, name, 50, 0.1)
    assert report(scheduler, "d", 50, 0.1) == CONTINUE
    for progress in (55, 60, 65, 70):
        assert report(scheduler, "d", progress, 0.9) == CONTINUE
    assert report(scheduler, "e", 55, 0.2) == STOP


def test_a_trial_is_not_compared_with_itself(scheduler):
    report(scheduler, "a", 50, 0.1)
    assert report(scheduler, "b", 50, 0.9) == CONTINUE


def test_results_that_are_no_numbers_neither_stop_nor_count(scheduler, state_file):
    for name in "abc":
        report(scheduler, name, 50, 0.1)
    assert report(scheduler, "d", 50, math.nan) == CONTINUE
    assert report(scheduler, "e", 50, math.inf) == CONTINUE
    assert set(json.loads(state_file.read_text())["recorded"]["50"]) == {"a", "b", "c"}


def test_a_stop_says_why(scheduler, state_file):
    for name, error in (("a", 0.1), ("b", 0.2), ("c", 0.3), ("d", 0.5)):
        report(scheduler, name, 50, error)
    assert stop_reasons(state_file) == {"d": "error_rate 0.5000 above the cut-off 0.2600 of rung 50 %"}


def test_nothing_was_stopped_where_nothing_is_on_record(tmp_path):
    assert stop_reasons(tmp_path / "none.json") == {}


def test_a_search_that_goes_on_knows_the_rungs_of_before(scheduler, state_file):
    for name, error in (("a", 0.1), ("b", 0.2), ("c", 0.3), ("d", 0.5)):
        report(scheduler, name, 50, error)
    later = made(state_file)
    assert later.recorded == scheduler.recorded
    assert report(later, "b", 50, 0.9) == CONTINUE  # recorded already
    assert report(later, "e", 50, 0.5) == STOP
    assert set(stop_reasons(state_file)) == {"d", "e"}


def test_rungs_and_share_can_be_chosen(state_file):
    scheduler = made(state_file, rungs=(30,), keep=0.5)
    for name, error in (("a", 0.1), ("b", 0.2), ("c", 0.3)):
        assert report(scheduler, name, 30, error) == CONTINUE
    assert report(scheduler, "d", 30, 0.21) == STOP
    assert report(scheduler, "e", 90, 0.1) == CONTINUE


def test_the_record_is_whole_after_every_result(scheduler, state_file):
    for i in range(20):
        report(scheduler, f"t{i}", 50, i / 20)
        assert json.loads(state_file.read_text())["recorded"]["50"][f"t{i}"] == i / 20


def test_a_retraining_neither_stops_nor_counts(scheduler, state_file):
    for name in "abcd":
        report(scheduler, name, 50, 0.1)
    again = SimpleNamespace(trial_id="e", config={"retrains": "ta", "seed": 1})
    assert scheduler.on_trial_result(None, again, {"progress": 50, "error_rate": 0.9}) == CONTINUE
    assert set(json.loads(state_file.read_text())["recorded"]["50"]) == set("abcd")


def test_median_stopping_ends_what_is_worse_than_half_at_any_time(state_file):
    scheduler = new_scheduler("median", "error_rate", state_file)
    for name, error in zip("abc", (0.1, 0.2, 0.3), strict=True):
        for progress in (20, 90):
            report(scheduler, name, progress, error - progress / 1000)
    assert report(scheduler, "d", 25, 0.19) == STOP
    assert report(scheduler, "e", 25, 0.12) == CONTINUE
    assert report(scheduler, "e", 95, 0.3) == STOP
    assert stop_reasons(state_file)["d"] == "error_rate 0.1900 above the cut-off 0.1800 of rung 20 %"


@pytest.mark.parametrize("name", ["none", "annealed"])
def test_without_rungs_nothing_is_stopped(name, state_file):
    scheduler = new_scheduler(name, "error_rate", state_file)
    assert [report(scheduler, str(i), 75, i / 10) for i in range(10)] == [CONTINUE] * 10
