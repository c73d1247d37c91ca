"""The screen: before anything is fine-tuned, a probe of every architecture and image size of a space.

The backbone decides more than all other settings together, and a probe costs one forward pass over the images. So only
the architectures with the best probes are fine-tuned. And the first probe is a model that the search can deliver.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from search.runs.result_rows import expected_alone
from search.spaces.space import Choice, Space
from search.tuning.study_configs import Config
from trainables.network.pretrained_weights import find_weights
from trainables.ray.trial import OBJECTIVE, SCREENS

MIN_ARCHITECTURES = 3
"""That are fine-tuned, by default."""
SHARE = 1 / 3
"""Of the architectures that are fine-tuned, by default."""
SIZE_STEP = 32
"""px; a range of image sizes is screened at its ends and in the middle, at multiples of this."""
COST_RATIO = 1.3
"""Of an architecture to the one before it in the space, where the sizes of their weights are not known."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """The result of a probe of the screen."""

    objective: float
    """What the search minimises."""
    expected_objective: float
    valid_loss: float
    forward_seconds: float
    """Of one image through the backbone."""


Promise = Callable[[Config, Probe], float]
"""The objective to expect of fine-tuning from the probe of a pair."""


@dataclass(kw_only=True)
class Screen:
    """The probes of a search and how far they are, which is saved with the searcher."""

    pairs: list[Config]
    """An architecture and an image size each, from cheap to expensive."""
    costs: list[float]
    """Of a probe of each pair, in any unit."""
    keep: int | None = None
    """How many architectures are fine-tuned; None: the best third, at least `MIN_ARCHITECTURES`."""
    views: int = 0
    """With these `probe_views` the pair of trial 0 is probed once more at the end; 0: it is not. The others have centre
    views alone, which are enough to compare them."""
    begun: dict[str, int] = field(default_factory=dict)
    """Tune's trial id -> place among the pairs; the second probe of one of them comes last."""
    ended: dict[int, Probe | None] = field(default_factory=dict)
    """Place -> result; None for a probe that failed."""
    chosen: Config | None = None
    """The pair of the second probe, once that has begun."""
    skipped: set[int] = field(default_factory=set)
    """Places for which a time budget leaves no time."""

    @property
    def num_probes(self) -> int:
        return len(self.pairs) + bool(self.views)

    @property
    def last(self) -> int:
        """The place of the second probe of a pair."""
        return len(self.pairs)

    @property
    def next_place(self) -> int | None:
        """Of the probe that can begin now; None where none is left, or the second one has to wait for the others."""
        taken = {*self.begun.values(), *self.skipped}
        if left := set(range(self.last)) - taken:
            smallest, best = self._archs()
            return min(left, key=lambda place: self._turn(place, smallest, best))
        can_refine = self.views and self.last not in taken and self._all_ended and self.probes
        return self.last if can_refine else None

    def _archs(self) -> tuple[dict[str, int], dict[str, float]]:
        """Of each architecture the place of its smallest size, and the best objective of its probes so far."""
        smallest: dict[str, int] = {}
        best: dict[str, float] = {}
        for place, pair in enumerate(self.pairs):
            arch, probe = pair["arch"], self.ended.get(place)
            smallest.setdefault(arch, place)
            best[arch] = min(best.get(arch, math.inf), probe.expected_objective if probe else math.inf)
        return smallest, best

    def _turn(self, place: int, smallest: dict[str, int], best: dict[str, float]) -> tuple[bool, float, int]:
        """Orders the pairs: each architecture at its smallest size, then the other sizes of the best ones so far. A
        time budget may leave no time for all, and the architecture decides more than the size."""
        arch = self.pairs[place]["arch"]
        return (False, 0.0, place) if place == smallest[arch] else (True, best[arch], place)

    @property
    def is_over(self) -> bool:
        return self.next_place is None and self._all_ended

    @property
    def _all_ended(self) -> bool:
        return len(self.ended) == len(self.begun)

    @property
    def probes(self) -> list[tuple[Config, Probe]]:
        """The pairs of the successful probes, best first."""
        found = [(place, probe) for place, probe in self.ended.items() if probe]
        found.sort(key=lambda item: (item[1].expected_objective, item[1].objective, item[1].valid_loss, item[0]))
        return [(self._pair(place), probe) for place, probe in found]

    def _pair(self, place: int) -> Config:
        return self.pairs[place] if place < self.last else self.chosen or self.probes[0][0]

    def most_promising(self, promise: Promise) -> Config:
        """The pair with which fine-tuning promises the lowest error; the better probe's among equals."""
        pair, _ = min(self.probes, key=lambda found: promise(*found))
        return pair

    def config(self, place: int) -> Config:
        """Of a probe, as a trial's. Its number is below 0, so that trial 0 is the first fine-tuning."""
        views = self.views if place == self.last else 0
        none = {"epochs": 0, "freeze_epochs": 0}
        return self._pair(place) | none | {"probe_views": views, SCREENS: place - self.num_probes}

    def expected_seconds(self, place: int) -> float:
        """Of a probe per image, from the dearest one that has ended; 0 before the first has. The second probe of a pair
        may be that of the best one."""
        if place == self.last:
            return self.probes[0][1].forward_seconds * self.views
        measured = [
            (self.costs[i], probe.forward_seconds) for i, probe in self.ended.items() if probe and i < self.last
        ]
        cost, seconds = max(measured, default=(1.0, 0.0))
        return seconds * self.costs[place] / cost

    def begin(self, trial_id: str, place: int) -> None:
        if place == self.last:
            self.chosen = self._pair(place)
        self.begun[trial_id] = place

    def skip(self, place: int) -> None:
        """A time budget leaves no time for this probe, nor for those that cost more."""
        self.skipped |= set(range(place, self.last)) or {place}

    def forget_running(self, *, begun_again: bool) -> None:
        """Forget the probes that have not ended, with the search that has: a resumed one repeats them, and those
        that were skipped if it has `begun_again` before any fine-tuning."""
        self.begun = {trial_id: place for trial_id, place in self.begun.items() if place in self.ended}
        if begun_again:
            self.skipped = set()

    def end(self, trial_id: str, result: Mapping[str, Any]) -> Probe | None:
        """Note how a probe has ended; None if it failed."""
        probe = None
        if not result.get("failure") and math.isfinite(result.get(OBJECTIVE, math.nan)):
            probe = Probe(
                objective=result[OBJECTIVE],
                expected_objective=expected_alone(result),
                valid_loss=result["valid_loss"],
                forward_seconds=result["feature_seconds"] / (result["train_images"] + result["valid_images"]),
            )
        self.ended[self.begun[trial_id]] = probe
        return probe

    def narrowed(self, space: Space, promise: Promise) -> Space:
        """The space of the fine-tunings: the architectures with the best probes, and trial 0 at the pair that promises
        most."""
        ranked = self.probes
        if not ranked:
            return space
        best, dimensions = self.most_promising(promise), dict(space.dimensions)
        archs = dimensions.get("arch")
        if isinstance(archs, Choice):
            order = list(dict.fromkeys(config["arch"] for config, _ in ranked))
            chosen = order[: self.keep or max(MIN_ARCHITECTURES, math.ceil(SHARE * len(archs.values)))]
            dimensions["arch"] = Choice(tuple(arch for arch in archs.values if arch in {*chosen, best["arch"]}))
        return replace(space, settings=space.settings | best, dimensions=dimensions)


def new_screen(space: Space, keep: int | None, weights: Path | None) -> Screen | None:
    """The screen of a space; None where its trials start from no probe. `weights` is their folder, if there is one."""
    settings = space.full_settings
    starts = getattr(space.dimensions.get("head_init"), "values", (settings["head_init"],))
    if "probe" not in starts or not settings["pretrained"]:
        return None
    archs, sizes = _archs(space), _sizes(space)
    costs = dict(zip(archs, costs_of(archs, weights), strict=True))
    pairs = sorted((costs[arch] * size**2, arch, size) for arch, size in itertools.product(archs, sizes))
    return Screen(
        pairs=[{"arch": arch, "image_size": size} for _, arch, size in pairs],
        costs=[cost for cost, _, _ in pairs],
        keep=keep,
        views=settings["probe_views"],
    )


def _archs(space: Space) -> tuple[str, ...]:
    searched = space.dimensions.get("arch")
    return searched.values if isinstance(searched, Choice) else (space.full_settings["arch"],)


def _sizes(space: Space) -> list[int]:
    searched = space.dimensions.get("image_size")
    if searched is None:
        return [space.full_settings["image_size"]]
    if isinstance(searched, Choice):
        return sorted(searched.values)
    low, high = int(searched.low), int(searched.high)
    middle = round((low + high) / 2 / SIZE_STEP) * SIZE_STEP
    return sorted({low, min(max(middle, low), high), high})


def costs_of(archs: Sequence[str], folder: Path | None) -> list[float]:
    """Of a forward pass at the same size: as the bytes of their weights, or else by their order in the space."""
    files = [find_weights(arch, folder) for arch in archs]
    if all(files):
        return [float(file.path.stat().st_size) for file in files if file]
    return [COST_RATIO**place for place in range(len(archs))]
