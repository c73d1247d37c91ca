"""Augmentation of one image on a CPU: one warp of uint8 pixels by OpenCV, straight from the whole rectangle."""

from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from trainables.batches.augmentation import Augmentations
from trainables.batches.sampling_grid import Reading, readings

Array = npt.NDArray[Any]

# One thread makes one image: OpenCV's own threads would compete with ours for the cores.
cv2.setNumThreads(0)


def apply(image: Array, augmentation: Augmentations, size: int) -> Array:
    """The image (size, size, 3) under its row of `augmentation`; it reflects at its edges."""
    reading = readings(np.array([image.shape[:2]]), augmentation[None], size)
    return read(image, reading.of(0), augmentation.lighting, size)


def read(image: Array, reading: Reading, lighting: npt.NDArray[np.uint8], size: int) -> Array:
    """The same for a row of a batch's `readings`, which takes a tenth of the time per row."""
    area = _area(image, *reading.start, *reading.length)
    if (reading.bins < reading.length).any():
        area = _averaged(area, *reading.bins)
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    warped = cv2.warpPerspective(area, reading.maps, (size, size), flags=flags, borderMode=cv2.BORDER_REFLECT_101)
    lit: Array = cv2.LUT(warped, lighting)
    return lit


def _area(image: Array, left: int, top: int, width: int, height: int) -> Array:
    """A part of `image`, which reflects at its edges. A view if it lies inside."""
    above, before = max(0, -top), max(0, -left)
    below, after = max(0, top + height - image.shape[0]), max(0, left + width - image.shape[1])
    if above or below or before or after:
        image = cv2.copyMakeBorder(image, above, below, before, after, cv2.BORDER_REFLECT_101)
    return image[top + above :, left + before :][:height, :width]


def _averaged(image: Array, width: int, height: int) -> Array:
    """`image` shrunk by means over whole pixels: torch's adaptive average pooling, as in fastai."""

    def bins(length: int, count: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        numbers = np.arange(count)
        return numbers * length // count, -(-(numbers + 1) * length // count)

    (top, bottom), (left, right) = bins(image.shape[0], height), bins(image.shape[1], width)
    sums = cv2.integral(image)  # int32, which may wrap around in huge images; the differences do not
    sums = cv2.transpose(sums[bottom] - sums[top])  # selecting rows is much faster than columns
    sums = sums[right] - sums[left]
    share = (1 / np.multiply.outer(right - left, bottom - top)).astype(np.float32)
    averaged: Array = cv2.transpose(cv2.multiply(sums, cv2.merge([share] * 3), dtype=cv2.CV_8U))
    return averaged
