"""Space: a data set, the dimensions that a search varies, and the recipes that it tries first. (The file is long since
everything about `--set` is here, too.)"""

import importlib
import itertools
import math
import pkgutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from numbers import Real
from typing import Any

from trainables.recipe import Recipe, checked_value, has_effect, needed_by, parse_value, spec_of

OWN_IMAGES = "images"
"""The space for `--data` without `--space`."""
SWITCH = " > 0"
"""Suffix of a setting's name: the study's parameter that says whether it is off or a number, see `Range.off`."""


@dataclass(frozen=True)
class Range:
    """Numbers from low to high, both included; whole ones for a whole-number setting, in the logarithm if `log`.

    With `off`, half of the proposals made at random are 0 instead, which turns the setting off. Raises `ValueError`
    where there is nothing between the numbers, and where `log` or `off` come with numbers that are not above 0.
    """

    low: float
    high: float
    log: bool = False
    off: bool = False

    def __post_init__(self) -> None:
        if not all(isinstance(end, Real) and not isinstance(end, bool) for end in (self.low, self.high)):
            raise ValueError(f"a range from {self.low!r} to {self.high!r}: expected two numbers")
        if not -math.inf < self.low < self.high < math.inf:  # written so that nan fails too
            raise ValueError(f"a range from {self.low:g} to {self.high:g}: the first number must be the smaller one")
        if (self.log or self.off) and self.low <= 0:
            why = "a logarithmic range" if self.log else "a range with 0, which is off,"
            raise ValueError(f"{why} from {self.low:g} to {self.high:g}: both numbers must be above 0")

    def __str__(self) -> str:
        return f"{'0 or ' if self.off else ''}{self.low:g}..{self.high:g}{' (log)' if self.log else ''}"

    def clip(self, value: float) -> float:
        return value if self.off and value == 0 else min(max(value, self.low), self.high)

    def coordinate(self, value: float) -> float:
        """0 to 1, from low to high as it is searched; what is off counts as low."""
        scale = math.log if self.log else float
        low, high = scale(self.low), scale(self.high)
        return (scale(max(value, self.low)) - low) / (high - low)


@dataclass(frozen=True)
class Choice:
    """One of some values; raises `ValueError` where there are none, or one of them twice."""

    values: tuple[Any, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.values, tuple) or not self.values:
            raise ValueError(f"a choice of {self.values!r}: expected a tuple of values")
        if len(set(self.values)) < len(self.values):
            raise ValueError(f"a choice of {self}: expected each value once")

    def __str__(self) -> str:
        return ", ".join(str(value) for value in self.values)

    def clip(self, value: Any) -> Any:
        return value if value in self.values else self.values[0]

    def coordinate(self, value: Any) -> float:
        """0 to 1, the values in their order."""
        return self.values.index(value) / max(1, len(self.values) - 1)


Dimension = Range | Choice

TIED = ("epochs", "freeze_epochs", "image_size", "start_size", "presize")
"""Settings whose values must be compatible, see `Recipe`."""

FORMS = "NAME=VALUE, NAME=LOW..HIGH, NAME=0,LOW..HIGH or NAME=A,B"
"""What a `--set` can be."""


@dataclass(frozen=True, kw_only=True)
class NamedRecipe:
    """A published recipe, with the error that it reached."""

    name: str
    settings: dict[str, Any]  # as changes to those of the space
    error_rate: float | None = None
    tta_error_rate: float | None = None
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class Space:
    """What one search varies, and around which recipe.

    Args:
        name: The name for `--space`.
        doc: One line about it.
        dataset: A name in `trainables.data.datasets.DATASETS`; empty where the user must give images.
        settings: The recipe of trial 0; settings that it lacks have their defaults.
        dimensions: The settings that are searched, each with a `Range` or a `Choice`.
        first: Recipes to try after trial 0, as changes to `settings`.
        recipes: For `--recipes`, by their common name.
        pinned: Settings to which the user gave one value.
        num_trials: How many trials a search has by default.
        seed: Of proposals and trainings, by default.
        split_seed: Of the split into training and validation images.
        epochs_of: The number of training images that `epochs` is for, see `search.spaces.epochs`; 0 if it does not
            depend on them.

    Raises:
        ValueError: A setting is unknown or has a value that it cannot take, alone or together with others.

    Example:
        >>> space = Space(name="mine", doc="birds", dataset="pets", settings={"arch": "resnet18", "epochs": 3},
        ...               dimensions={"lr_max": Range(1e-4, 1e-2, log=True)})
        >>> space.first_configs()
        [{'lr_max': 0.001}]
        >>> space.with_settings(["epochs=3..6", "lr_max=0.002"]).dimensions
        {'epochs': Range(low=3, high=6, log=False, off=False)}
    """

    name: str
    doc: str
    dataset: str
    settings: dict[str, Any]
    dimensions: dict[str, Dimension]
    first: tuple[dict[str, Any], ...] = ()
    recipes: dict[str, tuple[NamedRecipe, ...]] = field(default_factory=dict)
    pinned: tuple[str, ...] = ()
    num_trials: int = 20
    seed: int = 0
    split_seed: int = 0
    epochs_of: int = 0

    def __post_init__(self) -> None:
        Recipe.from_dict(self.settings)
        for name, dimension in self.dimensions.items():
            check_dimension(name, dimension)
        tied = [name for name in TIED if name in self.dimensions]
        for corner in itertools.product(*(ends(self.dimensions[name]) for name in tied)):
            Recipe.from_dict(self.settings | dict(zip(tied, corner, strict=True)))
        Recipe.from_dict(self.full_settings)

    def first_configs(self) -> list[dict[str, Any]]:
        """A value for every dimension of each recipe tried first, trial 0 before all; clipped to the dimensions."""
        configs = []
        for changes in ({}, *self.first):
            values = self._defaults | changes
            config = {name: dimension.clip(values[name]) for name, dimension in self.dimensions.items()}
            if config not in configs:
                configs.append(config)
        return configs

    @cached_property
    def _defaults(self) -> dict[str, Any]:
        return Recipe.from_dict(self.settings).to_dict()

    @cached_property
    def full_settings(self) -> dict[str, Any]:
        """Every setting of a trial, searched or not, as trial 0 has it."""
        return Recipe.from_dict(self.settings | self.first_configs()[0]).to_dict()

    def full(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Every setting of a trial with this config."""
        return self._defaults | dict(config)

    def coordinates(self, config: Mapping[str, Any]) -> list[float | None]:
        """Where in the space a config is, 0 to 1 in each dimension; None in those that it lacks."""
        return [d.coordinate(config[name]) if name in config else None for name, d in self.dimensions.items()]

    def in_order(self) -> list[str]:
        """The dimensions, each after the one that decides whether it has an effect."""
        names = itertools.chain.from_iterable(map(_with_needed, self.dimensions))
        return [name for name in dict.fromkeys(names) if name in self.dimensions]

    def with_settings(self, texts: Iterable[str]) -> "Space":
        """This space with each `NAME=VALUE` pinned and each `=LOW..HIGH`, `=0,LOW..HIGH` or `=A,B` searched.

        Raises one `ValueError` with all problems. How settings must relate to each other is checked when all are known,
        so their order does not matter.
        """
        settings, dimensions, problems = Recipe.from_dict(self.settings).to_dict(), dict(self.dimensions), []
        pinned, texts = dict.fromkeys(self.pinned), list(texts)
        for text in texts:
            try:
                name, value = self._parse(text)
            except ValueError as error:
                problems.append(str(error))
                continue
            if isinstance(value, Dimension):
                dimensions[name] = value
                pinned.pop(name, None)
                value = value.clip(settings[name])
            else:
                dimensions.pop(name, None)
                pinned[name] = None
            settings[name] = value
        given = {text.partition("=")[0].strip() for text in texts}
        for name in [name for name in dimensions if _is_idle(name, dimensions, settings)]:
            if name in given:
                needed = needed_by(name)
                problems.append(f"--set {name}: has no effect with {needed}={settings[needed]}")
            del dimensions[name]
        if problems:
            raise ValueError("; ".join(problems))
        epochs_of = 0 if "epochs" in given else self.epochs_of
        return replace(self, settings=settings, dimensions=dimensions, pinned=tuple(pinned), epochs_of=epochs_of)

    def of_recipes(self, name: str, texts: Iterable[str] = ()) -> "Space":
        """The space whose trials are exactly the recipes called `name`; each `NAME=VALUE` holds in all of them.

        Its recipes have all their settings, not only changes.
        """
        if name not in self.recipes:
            known = ", ".join(self.recipes) or "none"
            raise ValueError(f"--recipes {name}: the space {self.name} has no such recipes. It has: {known}.")
        base = replace(self, dimensions={}).with_settings(texts)
        if base.dimensions:
            searched = next(iter(base.dimensions))
            raise ValueError(f"--set {searched}=... gives several values; with --recipes, give a single one")
        pinned = {setting: base.settings[setting] for setting in base.pinned}
        configs = [
            Recipe.from_dict(base.settings | recipe.settings | pinned).to_dict() for recipe in self.recipes[name]
        ]
        recipes = {name: tuple(replace(r, settings=c) for r, c in zip(self.recipes[name], configs, strict=True))}
        values = {setting: tuple(dict.fromkeys(config[setting] for config in configs)) for setting in configs[0]}
        dimensions: dict[str, Dimension] = {
            setting: Choice(found) for setting, found in values.items() if len(found) > 1
        }
        space = replace(base, settings=configs[0], dimensions=dimensions, first=tuple(configs[1:]), recipes=recipes)
        return replace(space, num_trials=len(space.first_configs()))

    def to_record(self) -> dict[str, Any]:
        """The space as a run's space.json keeps it."""
        record = asdict(self)
        del record["recipes"], record["epochs_of"]  # what could have run
        return record

    def describe(self) -> str:
        """The dimensions, and every setting with its default in this space."""
        defaults = Recipe.from_dict(self.settings).to_dict()
        lines = [f"{self.name}: {self.doc}", "", "searched:"]
        lines += [f"  {name:18} {dimension}{self._depends(name)}" for name, dimension in self.dimensions.items()]
        if self.recipes:
            lines += ["", "recipes:"]
            lines += [f"  {name:18} {recipe.name}" for name, found in self.recipes.items() for recipe in found]
        lines += ["", "all settings, with this space's default:"]
        for spec in fields(Recipe):
            meta, kind = spec.metadata, getattr(spec.type, "__name__", str(spec.type))
            numbers = kind if meta["low"] is None else f"{kind} {meta['low']:g}..{meta['high']:g}"
            allowed = ", ".join(meta["choices"]) or numbers
            lines.append(f"  {spec.name:18} {defaults[spec.name]!s:22} {meta['doc']} [{allowed}]")
        return "\n".join(lines)

    def _depends(self, name: str) -> str:
        """What a dimension depends on, for `describe`; empty if on nothing."""
        if name != "epochs" or not self.epochs_of:
            return ""
        return f"  for {self.epochs_of} training images; with fewer images more epochs, with more images fewer"

    def _parse(self, text: str) -> tuple[str, Any]:
        """The name in a `--set`, and its value or `Dimension`."""
        name, _, value = text.partition("=")
        name, parts = name.strip(), [part.strip() for part in value.split(",")]
        if not all(parts):
            raise ValueError(f"--set {text}: expected {FORMS}")
        if spec_of(name).type in (int, float) and any(".." in part for part in parts):
            return name, self._parse_range(text, name, parts)
        values = tuple(dict.fromkeys(parse_value(name, part) for part in parts))
        return name, Choice(values) if len(values) > 1 else values[0]

    def _parse_range(self, text: str, name: str, parts: list[str]) -> Range:
        """The range that a `--set` gives, as `parts` between its commas, to a number."""
        *before, last = parts
        numbers = [number.strip() for number in last.split("..")]
        if "..." in last:
            raise ValueError(
                f"--set {text}: expected two dots between two numbers, as in {name}=LOW..HIGH, and found three. "
                "Write a number below 1 with its 0: 0.5, not .5"
            )
        if len(numbers) != 2 or not all(numbers) or len(before) > 1:
            raise ValueError(f"--set {text}: expected {FORMS}")
        off = [parse_value(name, part) for part in before] == [0]
        if before and not off:
            raise ValueError(f"--set {text}: only 0, which is off, can be combined with a range; expected {FORMS}")
        low, high = (parse_value(name, number) for number in numbers)
        if low >= high:
            single = f"; {name}={low:g} is a single value" if low == high else ""
            raise ValueError(f"--set {text}: the first number must be the smaller one{single}")
        if off and low <= 0:
            raise ValueError(f"--set {text}: the numbers after 0, which is off, must be above it")
        searched = self.dimensions.get(name)
        log = searched.log if isinstance(searched, Range) else spec_of(name).metadata["log"]
        found = Range(low, high, log and low > 0, off)
        check_dimension(name, found)
        return found


def dimension_text(saved: Mapping[str, Any] | str) -> str:
    """A dimension in a run's space.json as text, which is all that earlier versions saved."""
    if isinstance(saved, str):
        return saved
    return str(Choice(tuple(saved["values"])) if "values" in saved else Range(**saved))


def _is_idle(name: str, dimensions: Mapping[str, Dimension], settings: Mapping[str, Any]) -> bool:
    """Whether a dimension has no effect in any trial, because of what another setting is pinned to."""
    return not set(_with_needed(name)[:-1]) & set(dimensions) and not has_effect(name, settings)


def _with_needed(name: str) -> list[str]:
    """A setting after those that decide whether it has an effect."""
    return [*_with_needed(needed), name] if (needed := needed_by(name)) else [name]


def check_dimension(name: str, dimension: Dimension) -> None:
    """Raises `ValueError` where a dimension holds values that its setting cannot take, or makes too many caches."""
    if name == "presize" and isinstance(dimension, Range):
        low, high = int(dimension.low), int(dimension.high)
        sizes = ",".join(str(size) for size in sorted({low, (low + high) // 2, high}))
        raise ValueError(
            f"presize={dimension}: each size that a trial has makes a lasting cache of all images on every node. "
            f"Give the few sizes to try, such as presize={sizes}"
        )
    for value in ends(dimension):
        checked_value(name, value)


def ends(dimension: Dimension) -> tuple[Any, ...]:
    """The values between which a dimension lies; all of a choice."""
    if isinstance(dimension, Choice):
        return dimension.values
    return (*[0] * dimension.off, dimension.low, dimension.high)


def space_names() -> list[str]:
    """The spaces that there are, without importing them."""
    import search.spaces.builtin

    return sorted(module.name for module in pkgutil.iter_modules(search.spaces.builtin.__path__))


def space_name(given: str | None, data: object) -> str:
    """The name of the space: `--space`, or that for one's own images where only `--data` is given. Raises
    `ValueError`."""
    if given is None and data is None:
        raise ValueError(
            f"--space is required without --data: one of {', '.join(space_names())}. With --data DIR alone, your own "
            f"images are searched in the space {OWN_IMAGES}"
        )
    return OWN_IMAGES if given is None else given


def load_space(name: str) -> Space:
    """The space called `name`; raises `ValueError` that lists all of them."""
    if name not in space_names():
        raise ValueError(f"--space {name}: there is no such space. The spaces are: {', '.join(space_names())}.")
    found: Space = importlib.import_module(f"search.spaces.builtin.{name}").SPACE
    return found
