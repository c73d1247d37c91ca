"""Mean and deviation of the inputs, computed from the data where no pretrained weights say them."""

from collections.abc import Sequence

import numpy as np

from trainables.recipe import Recipe

Statistics = tuple[tuple[float, float, float], tuple[float, float, float]]
"""(mean, standard deviation) per RGB channel, of pixels in 0..1."""

MAX_IMAGES = 1000


def from_data(recipe: Recipe) -> bool:
    return recipe.normalize == "data" or (recipe.normalize == "auto" and not recipe.pretrained)


def channel_statistics(images: Sequence[np.ndarray], indices: np.ndarray) -> Statistics:
    """Statistics of `images[i]`, (h, w, 3) uint8: over all pixels of at most 1000 images, evenly chosen."""
    import cv2  # here, since training on a GPU with given statistics does not need it

    chosen = indices[np.linspace(0, len(indices) - 1, min(len(indices), MAX_IMAGES)).round().astype(int)]
    count, total, squares = 0, np.zeros(3), np.zeros(3)
    for index in chosen:
        image = images[index]
        pixels = image.shape[0] * image.shape[1]
        mean, deviation = (values.ravel() / 255 for values in cv2.meanStdDev(image))
        count += pixels
        total += pixels * mean
        squares += pixels * (deviation**2 + mean**2)
    mean = total / count
    deviation = np.sqrt(np.maximum(squares / count - mean**2, 1e-6))  # a grey data set is no reason to divide by 0
    return tuple(mean.tolist()), tuple(deviation.tolist())
