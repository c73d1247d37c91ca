"""How long this machine takes for the parts of a training, and how much memory: measured on a few of its images.

The module imports no torch, which `measure` needs: call it in a process of its own.
"""

import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from trainables.data.labelled_images import ImageFolder
from trainables.recipe import Recipe

if TYPE_CHECKING:
    from trainables.data.presized_images import PresizedImages

IMAGES = {"cpu": 64, "cuda": 256}
"""That a measured epoch trains on, or one batch of a larger size."""
ROUNDS = 3
"""The middle one counts: the first makes much that is kept, and another process may disturb one."""
TTA_VIEWS = 4
"""Forward passes are measured by this many views of the validation images, and the centre one."""
MOST_FITTED = 2000
"""Images with which the fit of a probe is measured; with more it takes longer in proportion."""
SPREAD = 0.3
"""Distance of the classes in these images' features by the deviation within one, so that some are hard to tell."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Of one architecture at one image size, in seconds."""

    arch: str
    image_size: int
    forward: float
    """An image through the network, from the presized images."""
    training: float
    """An image that trains."""
    building: float
    """Until the network is ready to train."""
    judging: float
    """An epoch's metrics, besides forward passes."""
    memory: int
    """Bytes at most, on the device: of a CPU, of the whole process so far."""
    num_features: int


@dataclass(frozen=True, kw_only=True)
class Measurement:
    ready: float
    """When the process could train: seconds since 1970."""
    presizing: float
    """Seconds of an image."""
    fitting: float
    """Seconds of the fit of a linear probe, its penalty chosen, to all images for training."""
    speeds: tuple[Speed, ...]
    """Of the recipes for which there was time, in their order."""


def measure(
    images: ImageFolder,
    recipes: Sequence[dict[str, Any]],
    *,
    num_train: int,
    device: str,
    num_threads: int,
    storage: str,
    seconds: float,
) -> Measurement:
    """Measures recipes, given by all their settings, one after another: the first one, and others for that many
    `seconds`. Leaves nothing behind."""
    import torch

    from trainables.training import fine_tune  # noqa: F401, it imports what takes long

    ready, started = time.time(), time.monotonic()
    torch.set_num_threads(num_threads)
    first = Recipe.from_dict(recipes[0])
    with tempfile.TemporaryDirectory(prefix="timing-") as folder:
        presized, presizing = _presized(_sample(images, first, device), first, storage, Path(folder))
        speeds: list[Speed] = []
        for settings in recipes:
            if not speeds or time.monotonic() - started < seconds:
                speeds += _speed(Recipe.from_dict(settings), presized, device, num_threads)
    fitting = _fitting(num_train, max((speed.num_features for speed in speeds), default=1), images.num_classes, device)
    return Measurement(ready=ready, presizing=presizing, fitting=fitting, speeds=tuple(speeds))


def _sample(images: ImageFolder, recipe: Recipe, device: str) -> ImageFolder:
    """Images from all of the set, in two classes: their number does not matter here."""
    count = min(len(images.paths), 2 + max(recipe.batch_size, IMAGES[device]) * 5 // 4)
    some = images.only(place * len(images.paths) // count for place in range(count))
    labels = tuple(place % 2 for place in range(count))
    plain: dict[str, Any] = {"valid": None, "groups": None, "label_sets": None}
    return replace(some, labels=labels, classes=("0", "1"), **plain)


def _presized(sample: ImageFolder, recipe: Recipe, storage: str, cache: Path) -> "tuple[PresizedImages, float]":
    from trainables.data.presize import presize

    started = time.perf_counter()
    presized = presize(sample, recipe.presize, recipe.resize_method, storage=storage, max_unreadable=0.9, cache=cache)
    return presized, (time.perf_counter() - started) / len(sample.paths)


def _speed(recipe: Recipe, images: "PresizedImages", device: str, num_threads: int) -> list[Speed]:
    """Of the recipe's network, from random weights, which are as quick as pretrained ones; none where the device has
    too little memory."""
    import torch

    from trainables.training.fine_tune import FineTune

    smallest = min(recipe.batch_size, len(images) * 4 // 5)
    changes: dict[str, Any] = {
        "pretrained": False,
        "normalize": "weights",
        "freeze_epochs": 0,
        "epochs": 9,
        "start_size": 0,
    }
    plain = replace(recipe, **changes, batch_size=max(2, smallest), tta_views=TTA_VIEWS)
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    try:
        training = FineTune(plain, images, device=device, num_threads=num_threads)
        building = time.perf_counter() - started
        views, trained, judged = [], [], []
        for _ in range(ROUNDS):
            epoch: dict[str, Any] = training.run_epoch()
            trained.append(epoch["train_seconds"] / (training.steps_per_epoch * training.batch_size))
            judged.append(epoch["valid_seconds"])
            started = time.perf_counter()
            training.tta_error_rate()
            views.append(time.perf_counter() - started)
    except torch.OutOfMemoryError:
        return []
    num_features = int(getattr(training.network.model, "num_features", 1)) * (1 + recipe.concat_pool)
    training.close()
    forward = median(views) / len(training.valid_indices) / (1 + TTA_VIEWS)
    return [
        Speed(
            arch=recipe.arch,
            image_size=recipe.image_size,
            forward=forward,
            training=median(trained),
            building=building,
            judging=max(0.0, median(judged) - forward * len(training.valid_indices)),
            memory=torch.cuda.max_memory_reserved() if device == "cuda" else _process_memory(),
            num_features=num_features,
        )
    ]


def _fitting(num_train: int, num_features: int, num_classes: int, device: str) -> float:
    import torch

    from trainables.probe.logistic_regression import fit

    count = max(2 * num_classes, min(num_train, MOST_FITTED))
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % num_classes
    centres = torch.randn(num_classes, num_features, generator=draw)
    rows = (SPREAD * centres[labels] + torch.randn(count, num_features, generator=draw)).half()
    started = time.perf_counter()
    fit(rows, labels, num_classes, device=device)
    return (time.perf_counter() - started) * max(1.0, num_train / count)


def _process_memory() -> int:
    """The most bytes of memory that this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
