"""A time budget is that of a search as a whole, however often it is started."""

import pickle
from pathlib import Path

import pytest

from search.runs import time_budget
from search.runs.paths import RunFolder
from search.runs.time_budget import TimeBudget, for_trials, seconds_spent

FOLDER = RunFolder(Path("results/budgeted"))


@pytest.fixture
def clock(monkeypatch):
    """Ten seconds from one look to the next."""
    seconds = iter(range(1000, 10_000, 10))
    monkeypatch.setattr(time_budget.time, "monotonic", lambda: float(next(seconds)))


def looks(budget: TimeBudget, count: int) -> list[bool]:
    return [budget.stop_all() for _ in range(count)]


def resumed(saved: bytes, limit: float | None) -> TimeBudget:
    """As Tune does it: what this start wants is there first, then what was saved takes its place."""
    TimeBudget(FOLDER, limit)
    return pickle.loads(saved)


def test_a_search_ends_when_its_time_is_spent(clock):
    assert looks(TimeBudget(FOLDER, 30), 5) == [False, False, False, True, True]
    assert seconds_spent(FOLDER) == 40
    assert looks(TimeBudget(FOLDER, None), 5) == [False] * 5


def test_what_was_spent_before_counts_and_the_break_does_not(clock):
    first = TimeBudget(FOLDER, 50)
    looks(first, 4)
    time_budget.time.monotonic()  # nobody looks
    assert looks(resumed(pickle.dumps(first), 50), 3) == [False, False, True]


def test_a_search_that_ended_by_its_time_goes_on_with_a_longer_one_only(clock):
    first = TimeBudget(FOLDER, 30)
    assert looks(first, 4)[-1]
    saved = pickle.dumps(first)
    assert looks(resumed(saved, 30), 1) == [True]
    assert looks(resumed(saved, 50), 3) == [False, False, True]
    assert looks(resumed(saved, None), 9) == [False] * 9


@pytest.mark.parametrize(("budget", "seconds"), [(60.0, 55.2), (600.0, 584.0), (None, None)])
def test_a_part_of_a_budget_is_for_the_end_of_the_search(budget, seconds):
    assert for_trials(budget) == pytest.approx(seconds)
