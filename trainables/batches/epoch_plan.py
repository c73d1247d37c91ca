"""The random choices of an epoch: order, augmentation, mixup. They depend only on (seed, epoch).

Every worker draws the same plan for the whole batch and takes its own rows, so a training continues exactly from the
end of any epoch and does not depend on the number of workers.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trainables.batches import augmentation
from trainables.recipe import Recipe


@dataclass(frozen=True)
class Step:
    """One worker's part of an optimizer step: the images that it loads, and which of them are its rows of the batch."""

    indices: npt.NDArray[np.int64]
    augmentations: augmentation.Augmentations
    first: npt.NDArray[np.int64]  # this worker's rows
    second: npt.NDArray[np.int64] | None = None  # their mixup partners, which may be another worker's rows
    lam: npt.NDArray[np.float64] | None = None  # weight of the first image in the mixture


def plan_epoch(
    recipe: Recipe,
    train_indices: npt.NDArray[np.int64],
    *,
    labels: npt.NDArray[np.int64],
    epoch: int,
    batch_size: int,
    rows: slice,
) -> Iterator[Step]:
    """The steps of epoch 0, 1, ... for the worker that trains `rows` of each batch; `labels` are those of the images
    `train_indices`.

    Whole batches only: a small one would give a noisy step and noisy statistics.
    """
    rng = np.random.default_rng([recipe.seed, epoch])
    order = rng.permutation(train_indices) if recipe.sampler == "uniform" else balanced(rng, train_indices, labels)
    for start in range(0, len(order) // batch_size * batch_size, batch_size):
        indices = order[start : start + batch_size]
        augmentations = augmentation.draw(rng, batch_size, recipe)
        mine = np.arange(batch_size)[rows]
        if recipe.mixup_alpha == 0:
            yield Step(indices[mine], augmentations[mine], np.arange(len(mine)))
            continue
        lam = rng.beta(recipe.mixup_alpha, recipe.mixup_alpha, batch_size)
        lam = np.maximum(lam, 1 - lam)  # as in fastai: the first image is the larger part
        partners = rng.permutation(batch_size)[rows]
        needed, places = np.unique(np.concatenate([mine, partners]), return_inverse=True)
        first, second = np.split(places, 2)
        yield Step(indices[needed], augmentations[needed], first, second, lam[rows])


def balanced(
    rng: np.random.Generator, indices: npt.NDArray[np.int64], labels: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """As many of the `indices` as there are, in random order and the same number of each class, but for one. A class
    shows all of its images before it repeats one."""
    classes = rng.permutation(np.unique(labels))
    quotas = np.bincount(np.arange(len(indices)) % len(classes), minlength=len(classes))
    drawn = [_repeated(rng, indices[labels == label], quota) for label, quota in zip(classes, quotas, strict=True)]
    return rng.permutation(np.concatenate(drawn))


def _repeated(rng: np.random.Generator, indices: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
    rounds = [rng.permutation(indices) for _ in range(-(-count // len(indices)))]
    return np.concatenate([indices[:0], *rounds])[:count]
