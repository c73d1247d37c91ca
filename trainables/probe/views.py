"""How a probe sees the images: all as in validation, and those for training also cropped and flipped at random."""

from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
import numpy.typing as npt

from trainables.batches import augmentation
from trainables.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class View:
    """Some images, each as one augmentation shows it."""

    indices: npt.NDArray[np.int64]
    augmentations: augmentation.Augmentations
    key: tuple[Any, ...]
    """What tells it from other views of the same presized images; empty for the centre view."""

    @property
    def is_augmented(self) -> bool:
        return bool(self.key)


def centre_view(num_images: int, recipe: Recipe) -> View:
    """All images as validation sees them."""
    augmentations = augmentation.centre(num_images, recipe.resize_method)
    return View(indices=np.arange(num_images), augmentations=augmentations, key=())


def part_of_centre_view(indices: npt.NDArray[np.int64], recipe: Recipe) -> View:
    """Some of the images as validation sees them."""
    key = ("part", sha256(np.ascontiguousarray(indices).tobytes()).hexdigest())
    return View(indices=indices, augmentations=augmentation.centre(len(indices), recipe.resize_method), key=key)


def augmented_view(number: int, train: npt.NDArray[np.int64], recipe: Recipe) -> View:
    """View 1, 2, ... of the images `train`: a crop of at least three quarters of the area, half of them flipped.

    Not as the recipe augments, so that all recipes share it; one that flips no images has views of its own.
    """
    drawn = Recipe(affine_p=0.0, lighting_p=0.0, flip=recipe.flip, resize_method=recipe.resize_method)
    augmentations = augmentation.draw(np.random.default_rng([number]), len(train), drawn)
    key = (number, recipe.flip, sha256(np.ascontiguousarray(train).tobytes()).hexdigest())
    return View(indices=train, augmentations=augmentations, key=key)
