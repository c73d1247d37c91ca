"""Mean and deviation of the inputs, computed from the data if there are no pretrained weights."""

import numpy as np
import numpy.typing as npt

from trainables.data.image_file import Images
from trainables.recipe import Recipe

Statistics = tuple[tuple[float, float, float], tuple[float, float, float]]
"""(mean, standard deviation) per RGB channel, of pixels in 0..1."""

MAX_IMAGES = 1000


def from_data(recipe: Recipe) -> bool:
    return recipe.normalize == "data" or (recipe.normalize == "auto" and not recipe.pretrained)


def channel_statistics(images: Images, indices: npt.NDArray[np.int64]) -> Statistics:
    """Over all pixels of at most MAX_IMAGES images, evenly chosen from `indices`."""
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
    deviation = np.sqrt(np.maximum(squares / count - mean**2, 1e-6))  # no division by 0 for uniform images
    (red, green, blue), (red_std, green_std, blue_std) = mean.tolist(), deviation.tolist()
    return (red, green, blue), (red_std, green_std, blue_std)
