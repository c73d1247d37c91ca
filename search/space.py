"""Space: a data set, the dimensions that a search varies, and the recipes that it tries first."""

import importlib
import itertools
import pkgutil
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from trainables.recipe import Recipe, checked_value, parse_value, spec_of


@dataclass(frozen=True)
class Range:
    """Numbers from low to high, both included; whole ones for a whole-number setting, in the logarithm if `log`."""

    low: float
    high: float
    log: bool = False

    def __str__(self) -> str:
        return f"{self.low:g}..{self.high:g}{' (log)' if self.log else ''}"

    def clip(self, value: float) -> float:
        return min(max(value, self.low), self.high)


@dataclass(frozen=True)
class Choice:
    """One of some values."""

    values: tuple

    def __str__(self) -> str:
        return ", ".join(str(value) for value in self.values)

    def clip(self, value: Any) -> Any:
        return value if value in self.values else self.values[0]


Dimension = Range | Choice

TIED = ("epochs", "freeze_epochs", "image_size", "presize")
"""Settings whose values must fit each other, see `Recipe`."""


@dataclass(frozen=True, kw_only=True)
class Space:
    """What one search is about. `settings` are the recipe of trial 0; a dimension varies one of them."""

    name: str
    doc: str
    dataset: str  # a name in trainables.datasets.DATASETS
    settings: dict[str, Any]
    dimensions: dict[str, Dimension]
    first: tuple[dict[str, Any], ...] = ()  # recipes tried after trial 0, as changes to `settings`
    num_trials: int = 20
    seed: int = 0  # of proposals and trainings, where the command line gives none
    split_seed: int = field(default=0)

    def __post_init__(self) -> None:
        Recipe.from_dict(self.settings)
        for name, dimension in self.dimensions.items():
            check_dimension(name, dimension)
        tied = [name for name in TIED if name in self.dimensions]
        for corner in itertools.product(*(ends(self.dimensions[name]) for name in tied)):
            Recipe.from_dict(self.settings | dict(zip(tied, corner, strict=True)))

    def first_configs(self) -> list[dict[str, Any]]:
        """A value for every dimension of each recipe tried first, trial 0 before all; clipped to the dimensions."""
        defaults = Recipe.from_dict(self.settings).to_dict()
        configs = []
        for changes in ({}, *self.first):
            values = defaults | changes
            config = {name: dimension.clip(values[name]) for name, dimension in self.dimensions.items()}
            if config not in configs:
                configs.append(config)
        return configs

    def with_settings(self, texts: Iterable[str]) -> "Space":
        """This space with each `NAME=VALUE` pinned and each `NAME=LOW..HIGH` or `NAME=A,B` searched.

        Raises one `ValueError` with the problems of all. What settings must be to each other is checked when all are
        in, so their order does not matter.
        """
        settings, dimensions, problems = Recipe.from_dict(self.settings).to_dict(), dict(self.dimensions), []
        for text in texts:
            try:
                name, value = self._parse(text)
            except ValueError as error:
                problems.append(str(error))
                continue
            if isinstance(value, Dimension):
                dimensions[name] = value
                value = value.clip(settings[name])
            else:
                dimensions.pop(name, None)
            settings[name] = value
        if problems:
            raise ValueError("; ".join(problems))
        return replace(self, settings=settings, dimensions=dimensions)

    def _parse(self, text: str) -> tuple[str, Any]:
        """The name in a `--set`, and its value or `Dimension`."""
        name, _, value = text.partition("=")
        if not all(value.split(",")):
            raise ValueError(f"--set {text}: expected NAME=VALUE, NAME=LOW..HIGH or NAME=A,B")
        spec = spec_of(name)
        if ".." in value and spec.type in (int, float):
            low, high = (parse_value(name, end) for end in value.split("..", 1))
            if low >= high:
                raise ValueError(f"--set {text}: the first number must be the smaller one")
            searched = self.dimensions.get(name)
            return name, Range(low, high, searched.log if isinstance(searched, Range) else spec.metadata["log"])
        values = tuple(dict.fromkeys(parse_value(name, part) for part in value.split(",")))
        return name, Choice(values) if len(values) > 1 else values[0]


def check_dimension(name: str, dimension: Dimension) -> None:
    """Raises `ValueError` where a dimension holds values that its setting cannot take."""
    for value in ends(dimension):
        checked_value(name, value)


def ends(dimension: Dimension) -> tuple:
    """The values between which a dimension lies; all of a choice."""
    return (dimension.low, dimension.high) if isinstance(dimension, Range) else dimension.values


def space_names() -> list[str]:
    """The spaces that there are, without importing them."""
    import search.spaces

    return sorted(module.name for module in pkgutil.iter_modules(search.spaces.__path__))


def load_space(name: str) -> Space:
    """The space called `name`; raises `ValueError` that lists those that there are."""
    if name not in space_names():
        raise ValueError(f"--space {name}: there is no such space. There are: {', '.join(space_names())}.")
    return importlib.import_module(f"search.spaces.{name}").SPACE
