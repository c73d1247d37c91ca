"""`--time-budget`: how long a search has gone on, all its starts together, and when that is enough."""

import time

from ray import tune

from search.runs.paths import RunFolder


class TimeBudget(tune.Stopper):
    """Counts the seconds of a search, and ends it after `limit` of them; never where that is None.

    Tune saves it with its state and brings it back as it was saved. The limit is that of this start all the same.
    """

    def __init__(self, folder: RunFolder, limit: float | None) -> None:
        self.folder = folder
        self.limit = limit
        self.spent = 0.0
        self.looked: float | None = None
        _budgets[folder.path.name] = self

    def __reduce__(self) -> tuple:
        return _budget_of, (self.folder, self.limit, self.spent)

    def __call__(self, trial_id: str, result: dict) -> bool:
        return False

    def stop_all(self) -> bool:
        return self.is_over()

    def is_over(self) -> bool:
        now = time.monotonic()
        self.spent += now - (self.looked or now)
        self.looked = now
        return self.limit is not None and self.spent >= self.limit


_budgets: dict[str, TimeBudget] = {}
"""Of each search in this process, by the run's name: its folder may lie elsewhere now."""


def _budget_of(folder: RunFolder, limit: float | None, spent: float) -> TimeBudget:
    budget = _budgets.get(folder.path.name) or TimeBudget(folder, limit)
    budget.spent = max(budget.spent, spent)
    return budget


def seconds_spent(folder: RunFolder) -> float:
    """How long a search that this process has started has gone on, the starts before it included."""
    budget = _budgets.get(folder.path.name)
    return budget.spent if budget else 0.0
