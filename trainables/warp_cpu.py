"""Augmentation of one image on a CPU: one warp of uint8 pixels by OpenCV, straight from the whole rectangle."""

import cv2
import numpy as np

from trainables.augment import Augmentations

# One thread makes one image; OpenCV's own threads would fight ours for the cores.
cv2.setNumThreads(0)


def apply(image: np.ndarray, augmentation: Augmentations, size: int) -> np.ndarray:
    """Image (h, w, 3) uint8 through its row of `augmentation` to (size, size, 3) uint8; it reflects at its edges."""
    window = padded_square if augmentation.pad else square_window
    square, square_pixels = _shrunk(window(image, float(augmentation.window)), augmentation, size)
    pixels = square_pixels @ augmentation.maps @ np.linalg.inv(to_pixels(size))
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    warped = cv2.warpPerspective(square, pixels, (size, size), flags=flags, borderMode=cv2.BORDER_REFLECT_101)
    return cv2.LUT(warped, augmentation.lighting)


def _shrunk(square: np.ndarray, augmentation: Augmentations, size: int) -> tuple[np.ndarray, np.ndarray]:
    """What bilinear reading of 2 x 2 pixels needs of `square`, and the map from -1..1 to its pixels.

    Pixels that the reading would skip are averaged first, as in fastai: by the height of the crop, and within it
    unless it shows reflections too.
    """
    side, crop = square.shape[0], float(augmentation.crop)
    shrink = side * crop / (2 * size)
    if shrink <= 1:
        return square, to_pixels(side)
    x, y, depth = augmentation.maps @ np.array([[-1, 1, -1, 1], [-1, -1, 1, 1], [1, 1, 1, 1]])
    seen = np.stack([x, y]) / depth  # the corners of the output
    if side * np.ptp(seen) / (4 * size) <= 1:  # a zoom shows so little that no pixel is skipped
        return square, to_pixels(side)
    left, top, right, bottom = 0, 0, side, side
    if crop < 1 and abs(seen).max() < 1 + 1e-9:
        corners = ((seen + 1) * (side - 1) / 2).round(6)
        left, top = np.floor(corners.min(axis=1)).astype(int)
        right, bottom = np.ceil(corners.max(axis=1)).astype(int) + 1
    averaged = _averaged(square[top:bottom, left:right], shrink)
    scale_x, scale_y = (averaged.shape[1] - 1) / (right - left - 1), (averaged.shape[0] - 1) / (bottom - top - 1)
    moved = np.array([[scale_x, 0, -left * scale_x], [0, scale_y, -top * scale_y], [0, 0, 1]])
    return averaged, moved @ to_pixels(side)


def _averaged(image: np.ndarray, shrink: float) -> np.ndarray:
    """`image` shrunk by means over whole pixels, torch's adaptive average pooling, which fastai uses."""

    def bins(length: int) -> tuple[np.ndarray, np.ndarray]:
        count = max(1, int(length / shrink + 1e-6))
        numbers = np.arange(count)
        return numbers * length // count, -(-(numbers + 1) * length // count)

    (top, bottom), (left, right) = bins(image.shape[0]), bins(image.shape[1])
    sums = cv2.integral(image)  # int32; it may wrap around in huge images, the differences do not
    sums = cv2.transpose(sums[bottom] - sums[top])  # taking whole rows is much faster than columns
    sums = sums[right] - sums[left]
    share = (1 / np.multiply.outer(right - left, bottom - top)).astype(np.float32)
    return cv2.transpose(cv2.multiply(sums, cv2.merge([share] * 3), dtype=cv2.CV_8U))


def square_window(image: np.ndarray, position: float) -> np.ndarray:
    """The square over the full shorter side of `image`; `position` 0 to 1 along the longer side. A view, not a copy."""
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = int((height - side) * position), int((width - side) * position)
    return image[top : top + side, left : left + side]


def padded_square(image: np.ndarray, position: float) -> np.ndarray:
    """`image` made a square over its longer side by reflection; `position` 0 to 1 is the padding's share before it."""
    height, width = image.shape[:2]
    side = max(height, width)
    top, left = int((side - height) * position), int((side - width) * position)
    after = side - height - top, side - width - left
    return cv2.copyMakeBorder(image, top, after[0], left, after[1], cv2.BORDER_REFLECT_101)


def to_pixels(side: int) -> np.ndarray:
    """From -1..1 to pixel centres 0..side - 1."""
    half = (side - 1) / 2
    return np.array([[half, 0, half], [0, half, half], [0, 0, 1]])
