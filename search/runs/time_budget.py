"""`--time-budget`: how long a search has run in all its starts together, and when that is enough."""

import math
import time
from typing import Any

from ray import tune

from search.runs.paths import RunFolder

END_SECONDS, END_SHARE = 16.0, 0.08
"""For the end of a search, of its budget: Tune gives a running trial ten seconds, Ray ends, the report is written."""


def for_trials(budget: float | None) -> float | None:
    """The seconds of a search with this `--time-budget` after which it begins to end."""
    return budget and budget - min(END_SECONDS, END_SHARE * budget)


class TimeBudget(tune.Stopper):
    """Counts the seconds of a search, and ends it after `limit` of them; never where that is None.

    Tune saves it with its state and restores it; the limit is still that of this start, which began at `since`
    (`time.monotonic`; by default with the first look).
    """

    def __init__(self, folder: RunFolder, limit: float | None, since: float | None = None) -> None:
        self.folder = folder
        self.limit = limit
        self.spent = 0.0
        self.checked_at = since
        _budgets[folder.run_id] = self

    def __reduce__(self) -> tuple[Any, ...]:
        return _budget_of, (self.folder, self.limit, self.spent)

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self.is_over()

    @property
    def seconds_left(self) -> float:
        if self.limit is None:
            return math.inf
        return 0.0 if self.is_over() else self.limit - self.spent

    def is_over(self) -> bool:
        now = time.monotonic()
        self.spent += now - (self.checked_at or now)
        self.checked_at = now
        return self.limit is not None and self.spent >= self.limit


_budgets: dict[str, TimeBudget] = {}
"""Of each search in this process, by its run's id: the folder may have moved."""


def _budget_of(folder: RunFolder, limit: float | None, spent: float) -> TimeBudget:
    budget = _budgets.get(folder.run_id) or TimeBudget(folder, limit)
    budget.spent = max(budget.spent, spent)
    return budget


def seconds_spent(folder: RunFolder) -> float:
    """How long a search of this process has run, earlier starts included."""
    budget = _budgets.get(folder.run_id)
    return budget.spent if budget else 0.0
