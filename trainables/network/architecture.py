"""Checks before any worker starts that a network trains as a recipe says, without data or weights.

The network runs on torch's meta device, whose tensors have shapes but no values, so that even a large one takes only a
second. `untrainable` imports no torch; a child process does.
"""

import json
import logging
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from trainables.recipe import Recipe
from trainables.system.cache import cache_dir
from trainables.system.new_process import run_module
from trainables.system.text import last_line

if TYPE_CHECKING:
    import torch

    from trainables.network.model import Network

logger = logging.getLogger(__name__)

DECISIVE = ("arch", "head", "head_init", "concat_pool", "image_size", "start_size")
"""The settings that decide whether a network can be built and trained."""
ANY_SIZE_FILE = Path(__file__).with_name("any_size.json")
"""The architectures that train at every size with every head, as bench/any_size.py has tried for a version of timm."""
STRIDE = 32
"""px; most networks that do not accept every size accept multiples of it."""
NUM_SUGGESTED = 2
"""Sizes that are suggested instead of a refused one."""


def require_trainable(recipes: Iterable[dict[str, Any]]) -> None:
    """Raises one `ValueError` for all `recipes` that cannot be trained, see `untrainable`."""
    if problems := untrainable(recipes):
        raise ValueError(" ".join(problems.values()))


def untrainable(recipes: Iterable[dict[str, Any]]) -> dict[str, str]:
    """The first problem of each architecture with which one of `recipes`, given by their `DECISIVE` settings, cannot be
    trained. Raises `ValueError` where that could not be found out.

    Those that have passed with the same versions of torch and timm are not tried again, nor those that every setting
    suits.
    """
    at_any_size = _that_train_at_any_size()
    untried = [recipe for recipe in recipes if recipe["arch"] not in at_any_size and not _pass(recipe).exists()]
    if not untried:
        return {}
    archs = ", ".join(dict.fromkeys(recipe["arch"] for recipe in untried))
    logger.info("checking that these can be trained: %s", archs)
    child = run_module("trainables.network.architecture", stdin=json.dumps(untried))
    if child.returncode:
        raise ValueError(f"{archs} could not be checked: the process for it ended with exit code {child.returncode}")
    problems: dict[str, str] = json.loads(last_line(child.stdout))
    with suppress(OSError):  # without a record they are tried again next time
        for recipe in untried:
            if recipe["arch"] not in problems:
                _pass(recipe).parent.mkdir(parents=True, exist_ok=True)
                _pass(recipe).touch()
    return problems


def _that_train_at_any_size() -> set[str]:
    tried = json.loads(ANY_SIZE_FILE.read_text())
    return set(tried["names"]) if tried["timm"] == version("timm") else set()


def _pass(recipe: dict[str, Any]) -> Path:
    """The file that records that `recipe` has passed."""
    of = json.dumps([version("torch"), version("timm"), recipe], sort_keys=True)
    return cache_dir() / "architectures" / sha256(of.encode()).hexdigest()[:32]


def main() -> None:
    """The child process of `untrainable`: recipes as JSON on stdin; prints the first problem of each network as
    JSON."""
    problems: dict[str, str] = {}
    for recipe in json.load(sys.stdin):
        if recipe["arch"] not in problems:
            try:
                try_out(Recipe(**recipe, presize=4096))
            except ValueError as error:
                problems[recipe["arch"]] = " ".join(str(error).split())
    print(json.dumps(problems))


def try_out(recipe: Recipe) -> None:
    """Raises `ValueError` if the network of `recipe` cannot be trained, with the reason and what to choose instead."""
    from trainables.network.model import check_architecture

    check_architecture(recipe.arch)
    if problem := _problem(replace(recipe, start_size=0)):
        sizes = " or ".join(map(str, _other_sizes(recipe)))
        at = f" at image_size={recipe.image_size}" if sizes else ""
        choose = f"image_size={sizes} or another architecture" if sizes else "another architecture or setting"
        raise ValueError(f"arch={recipe.arch} cannot be trained{at}: {problem}. Choose {choose}.")
    if recipe.start_size and (problem := _problem(recipe)):
        raise ValueError(
            f"arch={recipe.arch} cannot be trained at start_size={recipe.start_size}: {problem}. Choose another "
            "start_size, 0 (off) or another architecture."
        )


def _problem(recipe: Recipe) -> str | None:
    """Why the network of `recipe` cannot be built or make a step in one of its stages; None if it trains."""
    import torch

    from trainables.network.model import build, check_probed

    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            network = build(replace(recipe, pretrained=False, epochs=1), 3)  # a probe has no epoch without weights
            if recipe.starts_with_probe:
                check_probed(network, recipe)
            for size in {recipe.image_size, recipe.start_size or recipe.image_size}:
                _step(network, torch.empty(2, 3, size, size), recipe)
    except ValueError as error:
        return str(error).rstrip(".")
    except Exception as error:  # networks raise errors of any kind
        text = shorten(str(error).rstrip("."), 100, placeholder="...")
        return f"the network stops with {type(error).__name__}{text and f' ({text})'}"
    return None


def _step(network: "Network", images: "torch.Tensor", recipe: Recipe) -> None:
    """One frozen and one unfrozen step, and an evaluation."""
    network.layer_groups(recipe.layer_groups)
    for frozen in (True, False):
        network.freeze_backbone(recipe.train_bn) if frozen else network.unfreeze()
        network.train(frozen=frozen, train_bn=recipe.train_bn)
        _logits(network.model, images).sum().backward()
    network.model.eval()
    _logits(network.model, images)


def _logits(model: "torch.nn.Module", images: "torch.Tensor") -> "torch.Tensor":
    logits: torch.Tensor = model(images)
    if tuple(getattr(logits, "shape", ())) != (len(images), 3):
        what = f"a tensor of shape {tuple(logits.shape)}" if hasattr(logits, "shape") else f"a {type(logits).__name__}"
        raise ValueError(f"it returns {what}, expected one score per image and class")
    return logits


def _other_sizes(recipe: Recipe) -> Sequence[int]:
    """Image sizes close to the recipe's at which the network trains."""
    import timm

    config = timm.get_pretrained_cfg(recipe.arch)
    shapes = (config.input_size, config.min_input_size) if config else ()
    size, own = recipe.image_size, [shape[-1] for shape in shapes if shape]
    below = size // STRIDE * STRIDE
    candidates = sorted({*own, below, below + STRIDE} - {size, 0}, key=lambda other: abs(other - size))
    recipe = replace(recipe, start_size=0, presize=4096)
    works = (other for other in candidates if _problem(replace(recipe, image_size=other)) is None)
    return sorted(other for other, _ in zip(works, range(NUM_SUGGESTED), strict=False))


if __name__ == "__main__":
    main()
