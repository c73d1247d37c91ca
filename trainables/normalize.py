"""Mean and deviation of the inputs, computed from the data where no pretrained weights say them."""

from collections.abc import Sequence

import numpy as np

from trainables.recipe import Recipe

Statistics = tuple[tuple[float, float, float], tuple[float, float, float]]
"""(mean, standard deviation) per RGB channel, of pixels in 0..1."""

MAX_IMAGES = 1000
STRIDE = 4


def from_data(recipe: Recipe) -> bool:
    return recipe.normalize == "data" or (recipe.normalize == "auto" and not recipe.pretrained)


def channel_statistics(images: Sequence[np.ndarray], indices: np.ndarray) -> Statistics:
    """Statistics of `images[i]`, (h, w, 3) uint8: of every fourth row and column of at most 1000, evenly chosen."""
    chosen = indices[np.linspace(0, len(indices) - 1, min(len(indices), MAX_IMAGES)).round().astype(int)]
    count, total, squares = 0, np.zeros(3), np.zeros(3)
    for index in chosen:
        pixels = images[index][::STRIDE, ::STRIDE].reshape(-1, 3).astype(np.float64) / 255
        count += len(pixels)
        total += pixels.sum(axis=0)
        squares += np.square(pixels).sum(axis=0)
    mean = total / count
    deviation = np.sqrt(np.maximum(squares / count - mean**2, 1e-6))  # a grey data set is no reason to divide by 0
    return tuple(mean.tolist()), tuple(deviation.tolist())
