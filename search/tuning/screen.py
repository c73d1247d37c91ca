"""The screen: before anything is fine-tuned, a probe of every architecture and image size of a space, cheapest first.

The backbone decides more than all other settings together, and a probe costs one forward pass over the images. So only
the architectures with the best probes are fine-tuned. And the first probe is a model that the search can deliver.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from search.spaces.space import Choice, Space
from search.tuning.study_configs import Config
from trainables.network.pretrained_weights import find_weights
from trainables.ray.trial import SCREENS

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

    error_rate: float
    valid_loss: float
    forward_seconds: float
    """Of one image through the backbone."""


@dataclass(kw_only=True)
class Screen:
    """The probes of a search and how far they are, which is saved with the searcher."""

    configs: list[Config]
    """What is probed, cheapest first: an architecture and an image size each."""
    costs: list[float]
    """Of each probe, in any unit."""
    keep: int | None = None
    """How many architectures are fine-tuned; None: the best third, at least `MIN_ARCHITECTURES`."""
    begun: dict[str, int] = field(default_factory=dict)
    """Tune's trial id -> place in `configs`."""
    ended: dict[int, Probe | None] = field(default_factory=dict)
    """Place -> result; None for a probe that failed."""
    is_cut: bool = False
    """Whether a time budget has ended it before its last probe."""

    @property
    def num_left(self) -> int:
        """Probes that have not begun."""
        return 0 if self.is_cut else len(self.configs) - len(self.begun)

    @property
    def is_over(self) -> bool:
        return self.num_left == 0 and len(self.ended) == len(self.begun)

    @property
    def probes(self) -> list[tuple[Config, Probe]]:
        """The successful probes, best first."""
        found = [(place, probe) for place, probe in self.ended.items() if probe]
        found.sort(key=lambda item: (item[1].error_rate, item[1].valid_loss, item[0]))
        return [(self.configs[place], probe) for place, probe in found]

    @property
    def next_config(self) -> Config:
        """Of the next probe, as a trial's config. Its number is below 0, so that trial 0 is the first fine-tuning."""
        place = self._next_place
        return self.configs[place] | {"epochs": 0, "freeze_epochs": 0, SCREENS: place - len(self.configs)}

    @property
    def expected_seconds(self) -> float:
        """Of the next probe per image, from the dearest one that has ended; 0 before the first has."""
        measured = [(self.costs[place], probe.forward_seconds) for place, probe in self.ended.items() if probe]
        cost, seconds = max(measured, default=(1.0, 0.0))
        return seconds * self.costs[self._next_place] / cost

    @property
    def _next_place(self) -> int:
        return min(set(range(len(self.configs))) - set(self.begun.values()))

    def begin(self, trial_id: str) -> None:
        self.begun[trial_id] = self._next_place

    def forget_running(self) -> None:
        """Forget the probes that have not ended, with the search that has: a resumed one repeats them."""
        self.begun = {trial_id: place for trial_id, place in self.begun.items() if place in self.ended}

    def end(self, trial_id: str, result: Mapping[str, Any]) -> Probe | None:
        """Note how a probe has ended; None if it failed."""
        probe = None
        if not result.get("failure") and math.isfinite(result.get("error_rate", math.nan)):
            probe = Probe(
                error_rate=result["error_rate"],
                valid_loss=result["valid_loss"],
                forward_seconds=result["feature_seconds"] / (result["train_images"] + result["valid_images"]),
            )
        self.ended[self.begun[trial_id]] = probe
        return probe

    def narrowed(self, space: Space) -> Space:
        """The space of the fine-tunings: the architectures with the best probes, and trial 0 at the best probe's."""
        ranked = self.probes
        if not ranked:
            return space
        best, dimensions = ranked[0][0], dict(space.dimensions)
        archs = dimensions.get("arch")
        if isinstance(archs, Choice):
            order = list(dict.fromkeys(config["arch"] for config, _ in ranked))
            chosen = order[: self.keep or max(MIN_ARCHITECTURES, math.ceil(SHARE * len(archs.values)))]
            dimensions["arch"] = Choice(tuple(arch for arch in archs.values if arch in chosen))
        return replace(space, settings=space.settings | best, dimensions=dimensions)


def new_screen(space: Space, keep: int | None, weights: Path | None) -> Screen | None:
    """The screen of a space; None where its trials start from no probe. `weights` is their folder, if there is one."""
    settings = space.full_settings
    starts = getattr(space.dimensions.get("head_init"), "values", (settings["head_init"],))
    if "probe" not in starts or not settings["pretrained"]:
        return None
    archs, sizes = _archs(space), _sizes(space)
    costs = dict(zip(archs, _costs(archs, weights), strict=True))
    pairs = sorted((costs[arch] * size**2, arch, size) for arch, size in itertools.product(archs, sizes))
    configs: list[Config] = [{"arch": arch, "image_size": size} for _, arch, size in pairs]
    return Screen(configs=configs, costs=[cost for cost, _, _ in pairs], keep=keep)


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


def _costs(archs: Sequence[str], folder: Path | None) -> list[float]:
    """Of a forward pass at the same size: as the bytes of their weights, or else by their order in the space."""
    files = [find_weights(arch, folder) for arch in archs]
    if all(files):
        return [float(file.path.stat().st_size) for file in files if file]
    return [COST_RATIO**place for place in range(len(archs))]
