"""Whether a network trains as a recipe says: found out before any worker starts, without data or weights.

The network runs on torch's meta device, which knows the shapes of tensors and not their numbers, so that even a large
one takes a second. `require_trainable` imports no torch; a child process does.
"""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from textwrap import shorten
from typing import Any

from trainables.recipe import Recipe
from trainables.system.cache import cache_dir

logger = logging.getLogger(__name__)

DECISIVE = ("arch", "head", "concat_pool", "image_size", "start_size")
"""The settings on which it depends whether a network can be built and trained."""
STRIDE = 32
"""px; most networks that do not take every size take its multiples."""
OTHER_SIZES = 2
"""So many sizes are offered where one is refused."""


def require_trainable(recipes: Iterable[dict[str, Any]]) -> None:
    """Raises one `ValueError` that says which `recipes`, given by their `DECISIVE` settings, no network can train.

    What has passed with the same versions of torch and timm is remembered and not tried again.
    """
    untried = [recipe for recipe in recipes if not _pass(recipe).exists()]
    if not untried:
        return
    archs = ", ".join(dict.fromkeys(recipe["arch"] for recipe in untried))
    logger.info("trying out whether these can be trained: %s", archs)
    package_root = str(Path(__file__).resolve().parents[2])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([package_root, os.environ.get("PYTHONPATH", "")])}
    child = subprocess.run(
        [sys.executable, "-m", "trainables.network.architecture"],
        input=json.dumps(untried),
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        check=False,
    )
    if child.returncode:
        ended = f"{archs} could not be tried out: the process that does it ended with exit code {child.returncode}"
        raise ValueError(child.stdout.strip() or ended)
    with suppress(OSError):  # then they are tried again the next time
        for recipe in untried:
            _pass(recipe).parent.mkdir(parents=True, exist_ok=True)
            _pass(recipe).touch()


def _pass(recipe: dict[str, Any]) -> Path:
    """The file that is there once `recipe` has passed."""
    of = json.dumps([version("torch"), version("timm"), recipe], sort_keys=True)
    return cache_dir() / "architectures" / sha256(of.encode()).hexdigest()[:32]


def main() -> int:
    """The child process of `require_trainable`: recipes as JSON on stdin; prints the first problem of each network."""
    problems: dict[str, str] = {}
    for recipe in json.load(sys.stdin):
        if recipe["arch"] not in problems:
            try:
                try_out(Recipe(**recipe, presize=4096))
            except ValueError as error:
                problems[recipe["arch"]] = " ".join(str(error).split())
    print(" ".join(problems.values()))
    return 2 if problems else 0


def try_out(recipe: Recipe) -> None:
    """Raises `ValueError` that says why the network of `recipe` cannot be trained, and what to choose instead."""
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
    """Why the network of `recipe` cannot be built, or makes no step in one of its stages; None where it trains."""
    import torch

    from trainables.network.model import build

    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            network = build(replace(recipe, pretrained=False), 3)
            for size in {recipe.image_size, recipe.start_size or recipe.image_size}:
                _step(network, torch.empty(2, 3, size, size), recipe)
    except ValueError as error:
        return str(error).rstrip(".")
    except Exception as error:  # each network has its own way to fail
        text = shorten(str(error).rstrip("."), 100, placeholder="...")
        return f"the network stops with {type(error).__name__}{text and f' ({text})'}"
    return None


def _step(network, images, recipe: Recipe) -> None:
    """One frozen and one unfrozen step, and an evaluation."""
    network.layer_groups(recipe.layer_groups)
    for frozen in (True, False):
        network.freeze_backbone(recipe.train_bn) if frozen else network.unfreeze()
        network.train(frozen=frozen, train_bn=recipe.train_bn)
        _logits(network.model, images).sum().backward()
    network.model.eval()
    _logits(network.model, images)


def _logits(model, images):
    found = model(images)
    if tuple(getattr(found, "shape", ())) != (len(images), 3):
        what = f"a tensor of shape {tuple(found.shape)}" if hasattr(found, "shape") else f"a {type(found).__name__}"
        raise ValueError(f"it returns {what}, expected one score per image and class")
    return found


def _other_sizes(recipe: Recipe) -> Sequence[int]:
    """Image sizes at which the network trains, the next ones first."""
    import timm

    config = timm.get_pretrained_cfg(recipe.arch)
    size, own = recipe.image_size, [shape[-1] for shape in (config.input_size, config.min_input_size) if shape]
    below = size // STRIDE * STRIDE
    candidates = sorted({*own, below, below + STRIDE} - {size, 0}, key=lambda other: abs(other - size))
    recipe = replace(recipe, start_size=0, presize=4096)
    works = (other for other in candidates if _problem(replace(recipe, image_size=other)) is None)
    return sorted(other for other, _ in zip(works, range(OTHER_SIZES), strict=False))


if __name__ == "__main__":
    sys.exit(main())
