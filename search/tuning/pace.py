"""How many epochs still fit into a time budget, from what probes and epochs have taken so far."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from search.tuning.screen import Screen

TRAINING_COST = 4.5
"""Seconds of training on an image by those of a forward pass, until epochs have been measured."""
WISE_PASSES = 2
"""Over the validation images, that WiSE-FT is expected to take: one that helps, and one that does not."""
SLACK = 0.9
"""Share of the time left that a trial may be expected to take."""

Pair = tuple[str, int]
"""Architecture and image size."""


@dataclass(kw_only=True)
class Pace:
    """What the trials of a search have taken, saved with the searcher."""

    forward: dict[Pair, float] = field(default_factory=dict)
    """Seconds of an image through the backbone."""
    training: dict[Pair, float] = field(default_factory=dict)
    """Seconds of training on an image without frozen layers, by those of a forward pass: the slowest epoch."""
    viewed: set[Pair] = field(default_factory=set)
    """Whose features of augmented views are cached."""
    fitting: float = 0.0
    """Seconds of a probe beside its features: the slowest."""
    images: tuple[int, int] = 0, 0
    """For training and for validation."""

    def add(self, recipe: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """Learn from an epoch's result."""
        pair = recipe["arch"], recipe["image_size"]
        if result.get("stage") == "probe":
            self._add_probe(pair, recipe["probe_views"], result)
        elif result.get("stage") == "unfrozen" and (forward := self.forward.get(pair)):
            ratio = result["train_seconds"] / self.images[0] / forward
            # Frozen layers have a forward pass alone. They are at least as much work as their share says.
            whole = max(1.0, 1 + (ratio - 1) / (1 - recipe["frozen_layers"]))
            self.training[pair] = max(whole, self.training.get(pair, 0.0))

    def _add_probe(self, pair: Pair, views: int, result: Mapping[str, Any]) -> None:
        train, valid, skipped = result["train_images"], result["valid_images"], result.get("skipped_images", 0)
        self.images = train + skipped, valid
        self.forward[pair] = result["feature_seconds"] / (train + valid)
        if views:  # they take forward passes of their own
            self.viewed.add(pair)
            return
        fitting = result["train_seconds"] + result["valid_seconds"] - result["feature_seconds"]
        if skipped:  # the features of all images are still to be computed before it can be fitted to them
            fitting = fitting * (train + skipped) / train + self.forward[pair] * sum(self.images)
        self.fitting = max(self.fitting, fitting)

    def probe_seconds(self, screen: Screen, place: int) -> float:
        """That a probe of the screen is expected to take; the last one sees images for training alone."""
        train, valid = self.images
        return screen.expected_seconds(place) * (train if place == screen.last else train + valid) + self.fitting

    def validation_seconds(self, pair: Pair) -> float:
        """Of all images for validation."""
        return self.forward.get(pair, 0.0) * self.images[1]

    def refit_seconds(self, seconds: float) -> float:
        """That something is expected to take on all images which took so many on those for training."""
        train, valid = self.images
        return seconds * (train + valid) / max(1, train) / SLACK

    def epochs_within(self, seconds: float, recipe: Mapping[str, Any]) -> float:
        """How many unfrozen epochs of a recipe fit into the seconds; infinitely many where nothing is known."""
        pair = recipe["arch"], recipe["image_size"]
        forward = self.forward.get(pair) or self._scaled(pair)
        if not forward:
            return math.inf
        train, valid = self.images
        whole = self.training.get(pair) or max(self.training.values(), default=TRAINING_COST)
        ratio = 1 + (whole - 1) * (1 - float(recipe["frozen_layers"]))
        epoch = forward * (ratio * train + valid)
        at_end = recipe["tta_views"] + WISE_PASSES * recipe["wise_ft"]
        views = 0 if pair in self.viewed else recipe["probe_views"]
        once = forward * (valid * at_end + train * (views + recipe["freeze_epochs"]))
        return max(0.0, float(SLACK * seconds - once) / epoch)

    def _scaled(self, pair: Pair) -> float:
        """The forward seconds of an architecture, from another size."""
        arch, size = pair
        known = [(other, seconds) for (of, other), seconds in self.forward.items() if of == arch]
        nearest, seconds = min(known, key=lambda found: abs(found[0] - size), default=(size, 0.0))
        return seconds * (size / nearest) ** 2
