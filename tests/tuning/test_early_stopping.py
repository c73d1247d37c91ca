"""Early termination: late, at equal progress of each trial's own schedule, and on record."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from ray.tune.schedulers import TrialScheduler

from search.runs import rungs_file
from search.runs.paths import RunFolder
from search.runs.rungs_file import RungsFile
from search.spaces.space import Range, Space
from search.tuning import early_stopping
from search.tuning.early_stopping import (
    Curve,
    ProgressHalvingScheduler,
    cut_off,
    new_scheduler,
    rung_at,
)

SPACE = Space(
    name="small",
    doc="for tests",
    dataset="quickstart",
    settings={"epochs": 2},
    dimensions={"epochs": Range(1, 5), "lr_max": Range(1e-4, 1e-2, log=True)},
)
STOP, CONTINUE = TrialScheduler.STOP, TrialScheduler.CONTINUE


@pytest.fixture
def state_file(tmp_path):
    return tmp_path / "rungs.json"


def reasons(state_file) -> dict[str, str]:
    return RunFolder(state_file.parent).stop_reasons()


@pytest.fixture
def scheduler(state_file):
    return made(state_file)


def made(state_file, **options) -> ProgressHalvingScheduler:
    scheduler = ProgressHalvingScheduler("error_rate", SPACE, state_file, **options)
    scheduler.set_search_properties(None, None)
    return scheduler


def report(scheduler, trial_id: str, progress: int, error_rate: float, **config) -> str:
    result = {"progress": progress, "error_rate": error_rate}
    return scheduler.on_trial_result(None, SimpleNamespace(trial_id=trial_id, config=config), result)


def complete(scheduler, trial_id: str, error_rate: float) -> None:
    result = {"progress": 100, "error_rate": error_rate}
    scheduler.on_trial_complete(None, SimpleNamespace(trial_id=trial_id, config={}), result)


def saved(state_file) -> dict:
    return RungsFile(state_file).read()


def test_the_cut_off_keeps_the_best_share():
    assert cut_off([0.1, 0.2, 0.3, 0.4, 0.5], 0.6) == pytest.approx(0.34)
    assert cut_off([0.5, 0.1, 0.3], 0.5) == 0.3


def test_nobody_is_cut_off_while_too_few_have_come_by():
    assert cut_off([], 0.6) is None
    assert cut_off([0.1, 0.2], 0.6) is None
    assert cut_off([0.1, 0.2, 0.3], 0.6) is not None


@pytest.mark.parametrize(
    ("progress", "rung"), [(0, None), (59, None), (60, 60), (79, 60), (80, 80), (99, 80), (100, None)]
)
def test_a_rung_counts_from_its_percent_on_and_not_at_the_end(progress, rung):
    assert rung_at(progress, (60, 80)) == rung


def test_a_hopeless_trial_stops_and_a_good_one_goes_on(scheduler):
    assert {report(scheduler, name, 60, e) for name, e in (("a", 0.1), ("b", 0.2), ("c", 0.15))} == {CONTINUE}
    assert report(scheduler, "d", 60, 0.5) == STOP
    assert report(scheduler, "e", 60, 0.05) == CONTINUE


def test_no_trial_stops_in_its_frozen_stage_or_early(scheduler):
    for name in "abcd":
        report(scheduler, name, 60, 0.1)
    for progress in (0, 0, 10, 33, 59):
        assert report(scheduler, "e", progress, 0.99) == CONTINUE


def test_a_finished_trial_is_never_stopped(scheduler):
    for name in "abcd":
        report(scheduler, name, 80, 0.1)
    assert report(scheduler, "e", 100, 0.99) == CONTINUE


def test_trials_are_compared_within_one_rung_only(scheduler):
    for name in "abcd":
        report(scheduler, name, 80, 0.1)
    assert report(scheduler, "e", 60, 0.9) == CONTINUE
    assert report(scheduler, "e", 80, 0.9) == STOP


def test_only_a_trials_first_result_at_a_rung_counts(scheduler):
    """A trial of many epochs has no more weight than one of few."""
    for name in "abc":
        report(scheduler, name, 60, 0.1)
    assert report(scheduler, "d", 60, 0.1) == CONTINUE
    for progress in (62, 65, 70, 75):
        assert report(scheduler, "d", progress, 0.9) == CONTINUE
    assert report(scheduler, "e", 65, 0.2) == STOP


def test_a_trial_is_not_compared_with_itself(scheduler):
    """Two others are too few to stop it, and it is no third one."""
    report(scheduler, "a", 60, 0.1)
    report(scheduler, "b", 60, 0.1)
    assert report(scheduler, "c", 60, 0.9) == CONTINUE


def test_results_that_are_no_numbers_neither_stop_nor_count(scheduler, state_file):
    for name in "abc":
        report(scheduler, name, 60, 0.1)
    assert report(scheduler, "d", 60, math.nan) == CONTINUE
    assert report(scheduler, "e", 60, math.inf) == CONTINUE
    assert set(saved(state_file)["curves"]) == {"a", "b", "c"}


def test_a_stop_says_why_and_at_which_rung(scheduler, state_file):
    for name, error in (("a", 0.1), ("b", 0.2), ("c", 0.3), ("d", 0.5)):
        report(scheduler, name, 60, error)
    assert reasons(state_file) == {"d": "error_rate 0.5000 above the cut-off 0.2600 of rung 60 %"}
    assert RunFolder(state_file.parent).stop_rungs() == {"d": 60}


def test_nothing_was_stopped_where_nothing_is_on_record(tmp_path):
    assert RunFolder(tmp_path).stop_reasons() == {}


def test_a_search_that_goes_on_knows_the_rungs_of_before(scheduler, state_file):
    for name, error in (("a", 0.1), ("b", 0.2), ("c", 0.3), ("d", 0.5)):
        report(scheduler, name, 60, error)
    later = made(state_file)
    assert later.curves == scheduler.curves
    assert report(later, "b", 60, 0.9) == CONTINUE  # recorded already
    assert report(later, "e", 60, 0.5) == STOP
    assert set(reasons(state_file)) == {"d", "e"}


def a_search(seed: int, num_trials: int = 60):
    """Results of trials in an order as if four ran at a time: trial, progress, error, config."""
    rng = np.random.default_rng(seed)
    running, begun = [], 0
    while begun < num_trials or running:
        if begun < num_trials and len(running) < 4:
            epochs, rate = int(rng.integers(1, 6)), float(10 ** rng.uniform(-4, -2))
            results = [(100 * n // epochs, 0.5 - 0.3 * n / epochs + 0.1 * rng.random()) for n in range(1, epochs + 1)]
            running.append((f"t{begun}", {"epochs": epochs, "lr_max": rate}, results))
            begun += 1
        trial_id, config, results = running[rng.integers(len(running))]
        yield trial_id, *results.pop(0), config
        running = [trial for trial in running if trial[2]]


def follow(scheduler, results) -> dict[str, str]:
    """The reasons of the stops."""
    for trial_id, progress, error, config in results:
        if trial_id not in scheduler.reasons:
            report(scheduler, trial_id, progress, error, **config)
            if progress == 100:
                complete(scheduler, trial_id, error)
    return scheduler.reasons


def test_what_is_kept_between_results_changes_no_decision(scheduler, state_file, tmp_path):
    """As a scheduler decides that reads all of it from its file before each result."""
    forgetful, reasons = tmp_path / "forgetful.json", {}
    for result in a_search(seed=2):
        reasons |= follow(made(forgetful), [result])
    assert follow(scheduler, a_search(seed=2)) == reasons and len(reasons) > 5
    assert saved(state_file) == saved(forgetful)
    curves = {trial: Curve.from_json(curve) for trial, curve in saved(state_file)["curves"].items()}
    assert curves == scheduler.curves


def test_a_result_costs_no_more_work_after_many_trials(scheduler, state_file, monkeypatch):
    follow(scheduler, a_search(seed=2))
    work = {"dumps": 0, "seen": 0}

    def counted(name, function):
        def count(*args):
            work[name] += 1
            return function(*args)

        return count

    monkeypatch.setattr(rungs_file.json, "dumps", counted("dumps", json.dumps))
    monkeypatch.setattr(early_stopping, "AtRung", counted("seen", early_stopping.AtRung))
    report(scheduler, "first at this rung", 60, 0.2, epochs=5, lr_max=1e-3)
    work.update(dumps=0, seen=0)
    report(scheduler, "next", 60, 0.2, epochs=5, lr_max=1e-3)
    assert work == {"dumps": 1, "seen": 1}
    assert len(state_file.read_text().splitlines()[-1]) < 300


def test_rungs_and_share_can_be_chosen(state_file):
    scheduler = made(state_file, rungs=(30,), keep=0.5)
    for name, error in (("a", 0.1), ("b", 0.2), ("c", 0.3)):
        assert report(scheduler, name, 30, error) == CONTINUE
    assert report(scheduler, "d", 30, 0.21) == STOP
    assert report(scheduler, "e", 90, 0.1) == CONTINUE


def with_high_rates_that_end_best(scheduler) -> None:
    """Trials whose error at a rung is the higher, and in the end the lower, the higher their rate is."""
    for number, lr_max in enumerate((1e-4, 3e-4, 1e-3, 3e-3, 1e-2)):
        for trial_id in (f"{number}a", f"{number}b"):
            report(scheduler, trial_id, 60, 0.3 + 0.02 * number, epochs=5, lr_max=lr_max)
            complete(scheduler, trial_id, 0.25 - 0.04 * number)


def test_a_trial_is_judged_by_how_it_is_expected_to_end(scheduler, state_file):
    """A high rate hides what has been learned until it comes down."""
    with_high_rates_that_end_best(scheduler)
    assert report(scheduler, "high", 60, 0.39, epochs=5, lr_max=1e-2) == CONTINUE  # worse than all
    assert report(scheduler, "low", 60, 0.31, epochs=5, lr_max=1e-4) == STOP
    assert reasons(state_file)["low"].startswith("error_rate 0.3100, 0.24")


def test_how_trials_ended_is_known_to_a_search_that_goes_on(scheduler, state_file):
    with_high_rates_that_end_best(scheduler)
    later = made(state_file)
    assert later.curves == scheduler.curves and later.curves["4b"].final == pytest.approx(0.09)
    assert report(later, "high", 60, 0.39, epochs=5, lr_max=1e-2) == CONTINUE


def test_what_an_older_version_left_is_no_hindrance(state_file):
    state_file.write_text(json.dumps({"recorded": {"50": {"a": 0.1}}, "reasons": {"b": "too bad"}}))
    scheduler = made(state_file)
    assert report(scheduler, "b", 60, 0.1) == STOP and report(scheduler, "c", 60, 0.9) == CONTINUE


def test_a_result_before_the_rungs_outlasts_a_kill(scheduler, state_file):
    """It is all that a trial of two epochs tells of its way."""
    report(scheduler, "a", 50, 0.3)
    later = made(state_file)
    complete(later, "a", 0.2)
    assert made(state_file).curves["a"].final == 0.2


def test_trials_too_short_for_a_rung_tell_how_others_end(scheduler):
    """Half-way is as late as a trial of two epochs can be seen."""
    for number, lr_max in enumerate((1e-4, 3e-4, 1e-3, 3e-3, 1e-2)):
        report(scheduler, f"short{number}", 50, 0.3 + 0.02 * number, epochs=2, lr_max=lr_max)
        complete(scheduler, f"short{number}", 0.25 - 0.04 * number)
    for name in "abcd":
        assert report(scheduler, name, 60, 0.32, epochs=5, lr_max=1e-3) == CONTINUE
    assert report(scheduler, "high", 60, 0.33, epochs=5, lr_max=1e-2) == CONTINUE
    assert report(scheduler, "low", 60, 0.32, epochs=5, lr_max=1e-4) == STOP


@pytest.mark.parametrize("result", [{"progress": 60, "error_rate": 0.1}, {"error_rate": math.nan}])
def test_only_a_trial_that_was_trained_to_its_end_tells_how_others_end(scheduler, result):
    report(scheduler, "a", 60, 0.1)
    scheduler.on_trial_complete(None, SimpleNamespace(trial_id="a", config={}), result)
    assert scheduler.curves["a"].final is None


def test_the_record_is_whole_after_every_result(scheduler, state_file):
    for i in range(20):
        report(scheduler, f"t{i}", 60, i / 20)
        assert saved(state_file)["curves"][f"t{i}"]["results"] == {"60": [60, i / 20]}


def test_a_retraining_neither_stops_nor_counts(scheduler, state_file):
    for name in "abcd":
        report(scheduler, name, 60, 0.1)
    again = SimpleNamespace(trial_id="e", config={"retrains": "ta", "seed": 1})
    assert scheduler.on_trial_result(None, again, {"progress": 60, "error_rate": 0.9}) == CONTINUE
    scheduler.on_trial_complete(None, again, {"progress": 100, "error_rate": 0.9})
    assert set(saved(state_file)["curves"]) == set("abcd")


def test_median_stopping_ends_what_is_worse_than_half_at_any_time(state_file):
    scheduler = new_scheduler("median", "error_rate", SPACE, state_file)
    for name, error in zip("abc", (0.1, 0.2, 0.3), strict=True):
        for progress in (20, 90):
            report(scheduler, name, progress, error - progress / 1000)
    assert report(scheduler, "d", 25, 0.19) == STOP
    assert report(scheduler, "e", 25, 0.12) == CONTINUE
    assert report(scheduler, "e", 95, 0.3) == STOP
    assert reasons(state_file)["d"] == "error_rate 0.1900 above the cut-off 0.1800 of rung 20 %"


@pytest.mark.parametrize("name", ["none", "halving"])
def test_without_rungs_nothing_is_stopped(name, state_file):
    scheduler = new_scheduler(name, "error_rate", SPACE, state_file)
    assert [report(scheduler, str(i), 80, i / 10) for i in range(10)] == [CONTINUE] * 10


def test_the_probe_that_a_trial_started_from_outlasts_a_kill(scheduler, state_file):
    trial = SimpleNamespace(trial_id="a", config={"epochs": 2})
    probe = {"stage": "probe", "progress": 0, "error_rate": 0.25}
    assert scheduler.on_trial_result(None, trial, probe) == CONTINUE
    later = made(state_file)
    report(later, "a", 66, 0.2)
    assert later.curves["a"].at_rung(60).probe == 0.25
    report(later, "b", 66, 0.2)
    assert later.curves["b"].at_rung(60).probe is None


def test_a_probe_of_the_screen_leaves_no_curve(scheduler):
    trial = SimpleNamespace(trial_id="p", config={"epochs": 0})
    assert scheduler.on_trial_result(None, trial, {"stage": "probe", "progress": 100, "error_rate": 0.3}) == CONTINUE
    assert not scheduler.curves
