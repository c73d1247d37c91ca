"""What still fits into a time budget."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from search.runs.time_budget import TimeBudget
from search.spaces.space import Space
from search.tuning.pace import Pace
from search.tuning.screen import Probe, Screen
from search.tuning.study_configs import Config

FINE_TUNING_SHARE = 0.5
"""Of a time budget, which the screen leaves to fine-tuning where much is expected of it."""
WORTHWHILE_EPOCHS = 2
"""A budget that leaves less for fine-tuning is better spent on more probes."""
ENOUGH_EPOCHS = 5
"""Of a trial: with so many it has nearly all of its gain, and the rest of the time is for others and the refit."""
GAIN, EPOCHS_FOR_GAIN = 0.5, 2.0
"""The share of a probe's error that a long fine-tuning is expected to take away where there are `MANY` images a class,
and the epochs for 63 % of that."""
FEW, MANY = 8, 30
"""Images a class: from so few, features learn nothing. (Four epochs of EfficientNet-Lite0 at 160 px, with WiSE-FT and
averaged with others, took away two fifths of the error with 60 flowers or 90 satellite tiles a class, a quarter with 15
objects, nothing with 8 cats or dogs.)"""


@dataclass(frozen=True)
class TimeLeft:
    """Of a budget, at the pace of the search so far; without a budget everything fits."""

    budget: TimeBudget | None
    pace: Pace
    num_classes: int = 1
    refit: float | None = None
    """Seconds to train the best trial or probe so far again, on all images, which is the end of a search; None: it is
    not."""
    least_refit: float | None = None
    """The same with as few epochs as are worth it; None: with all of its epochs."""

    @property
    def gain(self) -> float:
        """The share of its error that a probe is expected to lose in a long fine-tuning."""
        images = max(1, self.pace.images[0]) / self.num_classes
        return GAIN * min(max(math.log(images / FEW) / math.log(MANY / FEW), 0.0), 1.0)

    @property
    def seconds(self) -> float:
        """For probes and trials: without those of the refit, if it fits."""
        return max(0.0, self.all_seconds - (self.refit or 0.0)) if self.for_refit else self.all_seconds

    @property
    def all_seconds(self) -> float:
        return self.budget.seconds_left if self.budget else math.inf

    @property
    def for_refit(self) -> bool:
        """Whether the refit fits, if not with all of its epochs."""
        least = self.refit if self.least_refit is None else self.least_refit
        return (least or 0.0) <= self.all_seconds

    def epochs(self, settings: Mapping[str, Any], share: float = 1.0) -> float:
        """How many unfrozen epochs of a recipe fit into a share of it."""
        return math.inf if math.isinf(self.seconds) else self.pace.epochs_within(share * self.seconds, settings)

    def most_epochs(self, settings: Mapping[str, Any]) -> float:
        """That a trial may have: what fits into half of it, so that the search is no single trial, or so that it can be
        trained again on all images; into all of it where that would be too few."""
        share = 0.5 if self.refit is None else 1 / (1 + self.pace.refit_seconds(1.0))
        most = self.epochs(settings, share)
        return most if most >= ENOUGH_EPOCHS else self.epochs(settings)

    def for_probe(self, screen: Screen, place: int, space: Space) -> bool:
        """Whether a probe fits. The screen leaves a part of the budget to fine-tuning, if that is enough for some
        epochs of any pair, and time for the second probe of one, which is worth more than another pair's."""
        if self.budget is None or self.budget.limit is None:
            return True
        left, expected = self.seconds, self.pace.probe_seconds(screen, place)
        second = self.pace.probe_seconds(screen, screen.last) if place != screen.last and screen.probes else 0.0
        if expected + second > left:
            return False
        settings = space.full_settings
        if all(self.epochs(settings | pair) < WORTHWHILE_EPOCHS for pair, _ in screen.probes):
            return True
        most = 1 - FINE_TUNING_SHARE * self.gain / GAIN
        return self.budget.limit - left + expected <= most * self.budget.limit

    def promised_error(self, pair: Config, probe: Probe, space: Space) -> float:
        """The objective to expect of the space's recipe at this pair with as many epochs as fit: a cheap backbone that
        is fine-tuned beats a dear one for which there is no time. Without a limit, the better probe's is lower."""
        settings = space.full_settings | pair
        epochs = min(self.most_epochs(settings), settings["epochs"])
        return probe.expected_objective * (1 - self.gain * (1 - math.exp(-epochs / EPOCHS_FOR_GAIN)))
