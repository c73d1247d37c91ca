"""What still fits into a time budget."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from search.runs.time_budget import TimeBudget
from search.spaces.space import Space
from search.tuning.pace import Pace
from search.tuning.screen import Screen

SCREEN_SHARE = 0.5
"""Of a time budget, which the screen leaves to fine-tuning."""
WORTHWHILE_EPOCHS = 2
"""A budget that leaves less for fine-tuning is better spent on more probes."""


@dataclass(frozen=True)
class TimeLeft:
    """Of a budget, at the pace of the search so far; without a budget everything fits."""

    budget: TimeBudget | None
    pace: Pace

    @property
    def seconds(self) -> float:
        return self.budget.seconds_left if self.budget else math.inf

    def epochs(self, settings: Mapping[str, Any]) -> float:
        """How many unfrozen epochs of a recipe fit."""
        return math.inf if math.isinf(self.seconds) else self.pace.epochs_within(self.seconds, settings)

    def for_probe(self, screen: Screen, place: int, space: Space) -> bool:
        """Whether a probe fits. The screen leaves a part of the budget to fine-tuning, if that is enough for some
        epochs, and time for the best pair's second probe, which is worth more than one of another pair."""
        if self.budget is None or self.budget.limit is None:
            return True
        left, expected = self.seconds, self.pace.probe_seconds(screen, place)
        second = self.pace.probe_seconds(screen, screen.last) if place != screen.last and screen.probes else 0.0
        if expected + second > left:
            return False
        if self.epochs(screen.narrowed(space).full_settings) < WORTHWHILE_EPOCHS:
            return True
        return self.budget.limit - left + expected <= SCREEN_SHARE * self.budget.limit
