"""What an epoch does, drawn before it starts: order, augmentation, mixup. It comes from (seed, epoch) alone.

Every worker draws the same plan for the whole batch and takes its own rows, so a training continues exactly from any
epoch's end and does not depend on the number of workers.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from trainables.batches import augmentation
from trainables.recipe import Recipe


@dataclass(frozen=True)
class Step:
    """One optimizer step, as one worker sees it: the images it loads, and its rows of the batch among them."""

    indices: np.ndarray
    augmentations: augmentation.Augmentations
    first: np.ndarray  # rows of this worker
    second: np.ndarray | None  # their mixup partners, which may be another worker's rows
    share: np.ndarray | None  # lambda: the part of the first image in the mixture


def plan_epoch(
    recipe: Recipe, train_indices: np.ndarray, *, epoch: int, batch_size: int, share: slice
) -> Iterator[Step]:
    """The steps of epoch 0, 1, ..., as the worker sees them that trains the rows `share` of each batch.

    Whole batches only: a small one would make a noisy step and noisy statistics.
    """
    rng = np.random.default_rng([recipe.seed, epoch])
    order = rng.permutation(train_indices)
    for start in range(0, len(order) // batch_size * batch_size, batch_size):
        indices = order[start : start + batch_size]
        augmentations = augmentation.draw(rng, batch_size, recipe)
        rows = np.arange(batch_size)[share]
        if recipe.mixup_alpha == 0:
            yield Step(indices[rows], augmentations[rows], np.arange(len(rows)), None, None)
            continue
        mixed = rng.beta(recipe.mixup_alpha, recipe.mixup_alpha, batch_size)
        mixed = np.maximum(mixed, 1 - mixed)  # as in fastai: the first image is the larger part
        partners = rng.permutation(batch_size)[share]
        needed, places = np.unique(np.concatenate([rows, partners]), return_inverse=True)
        first, second = np.split(places, 2)
        yield Step(indices[needed], augmentations[needed], first, second, mixed[share])
