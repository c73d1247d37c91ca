"""Where the pixels of augmented images are read, for `warp_cpu` and `warp_gpu`."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from trainables.batches.augmentation import Augmentations


class Reading(NamedTuple):
    """The area of its image that each of n outputs is read from, averaged over `bins`; always x before y."""

    maps: npt.NDArray[np.float64]  # (n, 3, 3) output pixel -> bin, both from 0
    start: npt.NDArray[np.int64]  # (n, 2) px; where the area begins in the image, below 0 in the padding
    length: npt.NDArray[np.int64]  # (n, 2) px; sides of the area, beyond which it reflects
    bins: npt.NDArray[np.int64]  # (n, 2) per side; as many as pixels if nothing is averaged

    def of(self, row: int) -> "Reading":
        return Reading(*(each[row] for each in self))


def readings(shapes: npt.NDArray[np.int64], augmentations: Augmentations, size: int) -> Reading:
    """The areas of n images of `shapes` (n, 2: height, width) for outputs of `size` px.

    Pixels that a bilinear reading of 2 x 2 would skip are averaged first, as in fastai: by the height of the crop, and
    only within it unless it shows reflections.
    """
    side = shapes.max(axis=1) if augmentations.pad else shapes.min(axis=1)
    start = np.trunc((shapes[:, ::-1] - side[:, None]) * augmentations.window[:, None])
    corners = augmentations.maps @ np.array([[-1, 1, -1, 1], [-1, -1, 1, 1], [1, 1, 1, 1]])
    seen = corners[:, :2] / corners[:, 2:]  # (n, 2, 4) of the output
    shrink = side * augmentations.crop / (2 * size)
    averaged = (shrink > 1) & (side * np.ptp(seen, axis=(1, 2)) / (4 * size) > 1)  # a zoom may show few
    part = averaged & (augmentations.crop < 1) & (abs(seen).max(axis=(1, 2)) < 1 + 1e-9)
    shown = ((seen + 1) * (side[:, None, None] - 1) / 2).round(6)
    low = np.where(part[:, None], np.floor(shown.min(axis=2)), 0)
    length = np.where(part[:, None], np.ceil(shown.max(axis=2)) + 1 - low, side[:, None])
    bins = np.where(averaged[:, None], np.maximum(1, np.floor(length / shrink[:, None] + 1e-6)), length)
    to_bins = np.tile(np.eye(3), (len(side), 1, 1))
    to_bins[:, [0, 1], [0, 1]] = scale = np.where(bins < length, (bins - 1) / np.maximum(1, length - 1), 1)
    to_bins[:, :2, 2] = -low * scale
    maps = to_bins @ to_pixels(side) @ augmentations.maps @ np.linalg.inv(to_pixels(np.array([size])))
    return Reading(maps, (start + low).astype(int), length.astype(int), bins.astype(int))


def to_pixels(side: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Maps (n, 3, 3) from -1..1 to pixel centres 0..side - 1, for sides (n,)."""
    maps = np.tile(np.eye(3), (len(side), 1, 1))
    maps[:, [0, 1], [0, 1]] = maps[:, :2, 2] = (side[:, None] - 1) / 2
    return maps
