"""Where augmented images are read from, for `warp_cpu` and `warp_gpu`, which make the pixels."""

from typing import NamedTuple

import numpy as np

from trainables.batches.augmentation import Augmentations


class Reading(NamedTuple):
    """What each of n outputs is read from: an area of its image, averaged over `bins`; x before y throughout."""

    maps: np.ndarray  # (n, 3, 3) output pixel -> bin, both from 0
    start: np.ndarray  # (n, 2) px; where the area begins in the image, below 0 in the padding
    length: np.ndarray  # (n, 2) px; the sides of the area, beyond which it reflects
    bins: np.ndarray  # (n, 2) over each side; as many as pixels where nothing is averaged

    def of(self, row: int) -> "Reading":
        return Reading(*(each[row] for each in self))


def readings(shapes: np.ndarray, augmentations: Augmentations, size: int) -> Reading:
    """Where n images of `shapes` (n, 2: height, width) are read for outputs of `size` px.

    Pixels that bilinear reading of 2 x 2 would skip are averaged first, as in fastai: by the height of the crop, and
    within it unless it shows reflections too.
    """
    side = shapes.max(axis=1) if augmentations.pad else shapes.min(axis=1)
    start = np.trunc((shapes[:, ::-1] - side[:, None]) * augmentations.window[:, None])
    corners = augmentations.maps @ np.array([[-1, 1, -1, 1], [-1, -1, 1, 1], [1, 1, 1, 1]])
    seen = corners[:, :2] / corners[:, 2:]  # (n, 2, 4) of the output
    shrink = side * augmentations.crop / (2 * size)
    averaged = (shrink > 1) & (side * np.ptp(seen, axis=(1, 2)) / (4 * size) > 1)  # a zoom may show too little to skip
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


def to_pixels(side: np.ndarray) -> np.ndarray:
    """Maps (n, 3, 3) from -1..1 to pixel centres 0..side - 1, for sides (n,)."""
    maps = np.tile(np.eye(3), (len(side), 1, 1))
    maps[:, [0, 1], [0, 1]] = maps[:, :2, 2] = (side[:, None] - 1) / 2
    return maps
