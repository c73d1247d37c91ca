"""Which networks of a space are tested before Ray starts, see `trainables.network.architecture`."""

import itertools
from typing import Any

from search.spaces.space import OWN_IMAGES, Range, Space, load_space, space_names
from trainables.network.architecture import DECISIVE, require_trainable, untrainable
from trainables.recipe import Recipe


def check_architectures(space: Space) -> None:
    """Raises `ValueError` that names each architecture that cannot be trained as `space` says, and why."""
    require_trainable(to_try(space))


def refused(space: Space) -> dict[str, str]:
    """The architectures that cannot be trained as `space` says, each with the reason."""
    return untrainable(to_try(space))


def to_try(space: Space) -> list[dict[str, Any]]:
    """The decisive settings of the recipes to test: for each architecture all heads at one size, and all sizes.

    Those of the built-in spaces work with every size and head; those of `images`, as tested there, with its own.
    """
    defaults = Recipe.from_dict(space.settings).to_dict()
    values = {name: _values(space, name, defaults[name]) for name in DECISIVE}
    if True not in _values(space, "pretrained", defaults["pretrained"]):
        values["head_init"] = ("zeros",)  # a probe has no effect
    found = []
    for arch in [arch for arch in values.pop("arch") if arch not in known()]:
        first = {"arch": arch, **{name: of[0] for name, of in values.items()}}
        heads = itertools.product(values["head"], values["head_init"], values["concat_pool"])
        found += [first | {"head": head, "head_init": init, "concat_pool": pool} for head, init, pool in heads]
        sizes = itertools.product(values["image_size"], values["start_size"])
        found += [first | {"image_size": size, "start_size": start} for size, start in sizes]
    own = _recipes_of(load_space(OWN_IMAGES))
    return [recipe for place, recipe in enumerate(found) if recipe not in found[:place] and recipe not in own]


def _recipes_of(space: Space) -> list[dict[str, Any]]:
    """The decisive settings of all recipes of a space that searches only architectures and sizes among them."""
    defaults = Recipe.from_dict(space.settings).to_dict()
    names = ("arch", "image_size")
    pairs = itertools.product(*(_values(space, name, defaults[name]) for name in names))
    return [{name: defaults[name] for name in DECISIVE} | dict(zip(names, pair, strict=True)) for pair in pairs]


def _values(space: Space, name: str, default: Any) -> tuple[Any, ...]:
    """All values of a choice; of a range its ends, and a number that is a multiple of nothing."""
    dimension = space.dimensions.get(name)
    if isinstance(dimension, Range):
        low, high = int(dimension.low), int(dimension.high)
        return tuple(dict.fromkeys((*[0] * dimension.off, low, min(low + 1, high), high)))
    return dimension.values if dimension else (default,)


def known() -> set[str]:
    """The architectures that work with every size and head: those of the built-in spaces, except `images`."""
    archs = set()
    for space in (load_space(name) for name in space_names() if name != OWN_IMAGES):
        archs |= {space.settings["arch"], *getattr(space.dimensions.get("arch"), "values", ())}
        archs |= {recipe.settings.get("arch") for recipes in space.recipes.values() for recipe in recipes}
    return archs
