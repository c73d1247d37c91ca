"""Early termination by forecasts: from the first epochs on, with a chance that a person can read, and on record."""

import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
from ray.tune.schedulers import TrialScheduler

from search.runs.objective import Objective
from search.runs.paths import RunFolder
from search.spaces.space import Range, Space
from search.tuning.early_stopping import new_scheduler
from search.tuning.forecast_stopping import MOST_FINISHED, ForecastScheduler, Goal, expected_seconds

SPACE = Space(
    name="small",
    doc="for tests",
    dataset="quickstart",
    settings={"epochs": 2},
    dimensions={"epochs": Range(1, 20), "lr_max": Range(1e-4, 1e-2, log=True)},
)
STOP, CONTINUE = TrialScheduler.STOP, TrialScheduler.CONTINUE
EPOCHS = 5


@pytest.fixture
def state_file(tmp_path):
    return tmp_path / "rungs.json"


@pytest.fixture
def scheduler(state_file):
    return made(state_file)


def made(state_file, metric="error_rate", num_classes=10, **options) -> ForecastScheduler:
    goal = Goal("objective", Objective(metric), num_classes, **options)
    scheduler = new_scheduler("forecast", "objective", SPACE, state_file, goal)
    scheduler.set_search_properties(None, None)
    return scheduler


def result(epoch: int, error: float, epochs: int = EPOCHS, **more) -> dict:
    stage = {"stage": "unfrozen", "balanced_error": error, "valid_images": 500, "epochs_total": epochs}
    curve = {"epoch": epoch, "progress": 100 * epoch // max(1, epochs), "objective": error, "valid_loss": 3 * error}
    return stage | curve | {"seconds": 2.0 * epoch} | more


def report(scheduler, trial_id: str, told: dict, **config) -> str:
    """What Tune makes of a trial's result."""
    trial = SimpleNamespace(trial_id=trial_id, config={"epochs": EPOCHS, "lr_max": 1e-3} | config)
    if told["progress"] == 100:
        scheduler.on_trial_complete(None, trial, told)
        return CONTINUE
    decision = scheduler.on_trial_result(None, trial, told)
    if decision == STOP:
        scheduler.on_trial_complete(None, trial, told)
    return decision


def train(scheduler, trial_id: str, errors, **config) -> int:
    """The epochs that a trial had before it was stopped, or all."""
    for epoch, error in enumerate(errors, start=1):
        if report(scheduler, trial_id, result(epoch, error, len(errors)), **config) == STOP:
            return epoch
    return len(errors)


def curve(end: float, epochs: int = EPOCHS, start: float = 0.6) -> list[float]:
    return [end + (start - end) * (1 - n / epochs) ** 2 for n in range(1, epochs + 1)]


def with_good_trials(scheduler):
    ends = {"a": 0.1, "b": 0.12, "c": 0.11}
    assert [train(scheduler, name, curve(end)) for name, end in ends.items()] == [EPOCHS] * 3
    return scheduler


def reasons(state_file) -> dict[str, str]:
    return RunFolder(state_file.parent).stop_reasons()


def test_a_hopeless_trial_stops_in_its_first_epochs_and_one_like_the_best_is_trained(scheduler):
    with_good_trials(scheduler)
    assert train(scheduler, "bad", [0.7, 0.68, 0.67, 0.66, 0.65]) <= 2
    assert train(scheduler, "good", curve(0.09)) == EPOCHS


def test_the_reason_is_a_chance_and_what_is_expected(scheduler, state_file):
    train(with_good_trials(scheduler), "bad", [0.7, 0.68, 0.67, 0.66, 0.65])
    found = re.fullmatch(
        r"(less than 1|\d+) % likely to beat 10\.0 %: expected (\d+\.\d) ± (\d+\.\d) %", reasons(state_file)["bad"]
    )
    assert found and 15 < float(found[2]) < 75 and 0 < float(found[3]) < 40


def test_the_first_trials_of_a_search_are_trained_whatever_is_forecast(scheduler):
    train(scheduler, "a", curve(0.1))
    train(scheduler, "b", curve(0.1))
    assert train(scheduler, "c", [0.7, 0.68, 0.67, 0.66, 0.65]) == EPOCHS


def test_a_probe_of_the_screen_is_an_incumbent(scheduler):
    with_good_trials(scheduler)
    report(scheduler, "probe", result(0, 0.01, 0, progress=100, stage="probe"), epochs=0)
    assert train(scheduler, "like the others", curve(0.11)) < EPOCHS


def test_the_probe_and_frozen_epochs_count(scheduler):
    with_good_trials(scheduler)
    before = len(scheduler.chances)
    report(scheduler, "d", result(0, 0.2, progress=0, stage="probe"))
    for epoch in (1, 2):
        report(scheduler, "d", result(epoch, 0.2, progress=0, stage="frozen"))
    assert [(trial, progress) for trial, progress, _ in scheduler.chances[before:]] == [("d", 0)] * 3
    assert scheduler.curves["d"].probe == 0.2


@pytest.mark.parametrize(
    ("errors", "probe", "epochs"),
    [
        ([0.9, 0.89, 0.9, 0.9, 0.9], None, 3),  # still guesses, half-way
        ([0.85, 0.7, 0.6, 0.5, 0.4], None, EPOCHS),  # begins from zeros
        ([0.85, 0.7, 0.6, 0.5, 0.4], 0.2, 1),  # has lost its probe
        ([0.5, 0.5, 0.4, 0.3, 0.2], 0.2, EPOCHS),
    ],
)
def test_without_an_incumbent_a_trial_that_is_lost_stops(scheduler, errors, probe, epochs):
    if probe:
        report(scheduler, "a", result(0, probe, progress=0, stage="probe"))
    assert train(scheduler, "a", errors) == epochs


def test_a_lost_trial_says_what_guessing_has(scheduler, state_file):
    report(scheduler, "a", result(0, 0.2, progress=0, stage="probe"))
    train(scheduler, "a", [0.88, 0.7, 0.6, 0.5, 0.4])
    text = "error 88.0 % at 20 % of the schedule, after 20.0 % of its probe: guessing has 90.0 %"
    assert reasons(state_file) == {"a": text}


@pytest.mark.parametrize("metric", ["auroc", "log_loss", "top5_error", "map"])
def test_other_metrics_are_forecast_too_and_nobody_knows_what_guessing_has(metric, state_file):
    scheduler = made(state_file, metric)
    assert train(scheduler, "all bad", [0.95] * EPOCHS) == EPOCHS
    with_good_trials(scheduler)
    assert train(scheduler, "bad", [0.9, 0.9, 0.9, 0.9, 0.9]) <= 2
    assert "likely to beat 0.100: expected" in (text := reasons(state_file)["bad"]) or metric != "log_loss", text


def test_images_with_several_labels_have_no_guess(scheduler):
    told = [result(n, 0.95) for n in range(1, EPOCHS)]
    for one in told:
        del one["balanced_error"]
    assert [report(scheduler, "a", one) for one in told] == [CONTINUE] * (EPOCHS - 1)


def test_with_two_objectives_a_quick_trial_may_join_the_front(state_file):
    scheduler = made(state_file, both=True)
    with_good_trials(scheduler)  # 2 seconds an epoch
    bad = [0.7, 0.68, 0.67, 0.66, 0.65]
    quick = [result(n, error, seconds=0.1 * n) for n, error in enumerate(bad, start=1)]
    assert {report(scheduler, "quick", one) for one in quick} == {CONTINUE}
    slow = [result(n, error, seconds=9.0 * n) for n, error in enumerate(bad[:-1], start=1)]
    assert STOP in [report(scheduler, "slow", one) for one in slow]
    quicker = [result(n, error, seconds=0.5 * n) for n, error in enumerate([0.9] * 4, start=1)]
    assert STOP in [report(scheduler, "dominated by the quick one", one) for one in quicker]


def test_the_seconds_of_a_whole_training_are_known_from_its_first_epochs():
    assert expected_seconds({"seconds": 6.0, "epoch": 2, "epochs_total": 5}) == 15
    assert expected_seconds({"seconds": 1.0, "epoch": 0, "epochs_total": 0}) == 1


def test_nan_a_retraining_and_a_refit_neither_stop_nor_count(scheduler):
    with_good_trials(scheduler)
    assert report(scheduler, "nan", result(1, math.nan)) == CONTINUE
    assert report(scheduler, "inf", result(1, 0.5, valid_loss=math.inf)) == CONTINUE
    assert train(scheduler, "again", [0.8] * EPOCHS, retrains="a") == EPOCHS
    assert train(scheduler, "refit", [0.8] * EPOCHS, refits="a") == EPOCHS
    assert set(scheduler.curves) == {"a", "b", "c"}


# --- A search that was killed -----------------------------------------------------------------------------------------


def a_search(seed: int, num_trials: int = 40):
    """Results of trials in an order as if four ran at a time: trial, result, config."""
    rng = np.random.default_rng(seed)
    running, begun = [], 0
    while begun < num_trials or running:
        if begun < num_trials and len(running) < 4:
            epochs, rate = int(rng.integers(2, 9)), float(10 ** rng.uniform(-4, -2))
            errors = np.array(curve(rng.uniform(0.05, 0.5), epochs)) * rng.uniform(0.9, 1.1, epochs)
            told = [result(n, error, epochs, seconds=n * rate) for n, error in enumerate(errors.tolist(), start=1)]
            running.append((f"t{begun}", {"epochs": epochs, "lr_max": rate}, told))
            begun += 1
        trial_id, config, results = running[rng.integers(len(running))]
        yield trial_id, results.pop(0), config
        running = [trial for trial in running if trial[2]]


def follow(scheduler, results) -> None:
    for trial_id, told, config in results:
        if trial_id not in scheduler.reasons:
            report(scheduler, trial_id, told, **config)


@pytest.mark.parametrize("both", [False, True])
def test_a_search_that_was_killed_decides_to_the_last_bit_as_it_would_have(scheduler, both, state_file, tmp_path):
    whole, killed = made(state_file, both=both), tmp_path / "killed.json"
    follow(whole, a_search(seed=1))
    results = list(a_search(seed=1))
    for start in range(0, len(results), 7):
        again = made(killed, both=both)
        follow(again, results[start : start + 7])
    again = made(killed, both=both)
    assert again.reasons == whole.reasons and len(whole.reasons) > 5
    assert again.curves == whole.curves
    asked = again.curves["t7"]
    forecasts = []
    for scheduler in (again, whole):
        scheduler._unlikely("t7", asked, 3)
        forecasts.append(scheduler.chances[-1])
    assert forecasts[0] == forecasts[1]


def test_a_restored_trial_repeats_its_last_result_without_another_decision(scheduler, state_file):
    report(scheduler, "slow", result(1, 0.5))
    with_good_trials(scheduler)
    later = made(state_file)
    before = state_file.read_bytes()
    assert report(later, "slow", result(1, 0.9)) == CONTINUE
    assert state_file.read_bytes() == before


def test_a_stop_that_tune_had_not_saved_is_repeated(scheduler, state_file):
    stopped_at = train(with_good_trials(scheduler), "bad", [0.7, 0.68, 0.67, 0.66, 0.65])
    assert report(made(state_file), "bad", result(stopped_at, 0.05)) == STOP


def test_what_another_scheduler_left_is_no_hindrance(state_file):
    curves = {"x": {"point": [0, 0], "results": {"60": [60, 0.2]}, "final": None, "probe": None}}
    state_file.write_text(json.dumps({"curves": curves, "reasons": {"y": "too bad"}, "rungs": {"y": 60}}) + "\n")
    scheduler = made(state_file)
    assert not scheduler.curves and report(scheduler, "y", result(1, 0.2)) == STOP
    train(scheduler, "a", curve(0.1))
    others = new_scheduler("rungs", "objective", SPACE, state_file)
    others.set_search_properties(None, None)
    assert set(others.curves) == {"x"}


def test_a_decision_takes_no_longer_after_a_thousand_trials(scheduler, monkeypatch):
    rng = np.random.default_rng(0)
    for number in range(MOST_FINISHED + 50):
        trial = SimpleNamespace(trial_id=str(number), config={"epochs": 5, "lr_max": 1e-3})
        for epoch, error in enumerate(curve(rng.uniform(0.1, 0.3))[:-1], start=1):
            told = result(epoch, error)
            scheduler.curves.setdefault(trial.trial_id, scheduler._new_curve(trial, told)).add(
                epoch, told["progress"], error, 3 * error
            )
        scheduler.curves[trial.trial_id].final = (error, 3 * error)
    scheduler._learn()
    scheduler._unlikely("0", scheduler.curves["0"], 3)
    fitted = scheduler._regressions.values()
    assert len(list(fitted)) == 1
    monkeypatch.setattr("search.tuning.forecast_stopping.Regression", None)
    assert report(scheduler, "next", result(1, 0.2)) in (STOP, CONTINUE)  # asks what was fitted before


def test_where_little_is_left_to_save_a_stop_has_to_be_surer(scheduler):
    with_good_trials(scheduler)
    told = [result(epoch, 0.3, 20) | {"progress": 50} for epoch in (10, 19)]
    assert [report(scheduler, f"after {one['epoch']}", one) for one in told] == [STOP, CONTINUE]
    assert scheduler.chances[-1][2] == scheduler.chances[-2][2] > 0.01
