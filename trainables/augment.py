"""Batch augmentation: every geometric change of an image as one map of coordinates, read with one interpolation.

The changes and their ranges are those of fastai's `aug_transforms` (fastai book, chapter 5). A map takes a point of the
output square, both axes running from -1 to 1, to the point of the input square that it shows: a 3 x 3 homography.
"""

from dataclasses import dataclass

import cv2
import numpy as np

from trainables.recipe import Recipe


@dataclass(frozen=True)
class Augmentations:
    """What happens to each of n images, drawn for a whole batch so that it depends on the seed alone."""

    window: np.ndarray  # (n,) where the square window lies along the longer side, 0 to 1
    maps: np.ndarray  # (n, 3, 3) output point -> point of the window
    lighting: np.ndarray  # (n, 256) uint8: the new value of each pixel value
    crop: np.ndarray  # (n,) the height of the random crop that is part of the map; 1 = none
    pad: bool = False  # the window lies over the full longer side instead, and images reflect beyond their edges

    def __getitem__(self, rows) -> "Augmentations":
        return Augmentations(self.window[rows], self.maps[rows], self.lighting[rows], self.crop[rows], self.pad)


def draw(rng: np.random.Generator, n: int, recipe: Recipe) -> Augmentations:
    """Random training augmentations for n images."""
    window = rng.random(n)
    crop = random_crops(rng, n, recipe.min_scale, recipe.max_aspect)
    warp_x = _maybe(rng, recipe.affine_p, rng.uniform(-1, 1, n) * recipe.max_warp, 0.0)
    warp_y = _maybe(rng, recipe.affine_p, rng.uniform(-1, 1, n) * recipe.max_warp, 0.0)
    angle = _maybe(rng, recipe.affine_p, rng.uniform(-1, 1, n) * recipe.max_rotate, 0.0)
    factor = _maybe(rng, recipe.affine_p, rng.uniform(1, recipe.max_zoom, n), 1.0)
    zoom = zooms(factor, rng.uniform(-1, 1, (n, 2)))
    flip = flips(rng.random(n) < 0.5 if recipe.flip else np.zeros(n, bool))
    brightness = _maybe(rng, recipe.lighting_p, rng.uniform(-1, 1, n) * recipe.max_lighting, 0.0)
    contrast = np.exp(_maybe(rng, recipe.lighting_p, rng.uniform(-1, 1, n) * np.log(1 - recipe.max_lighting), 0.0))
    maps = compose(flip=flip, rotation=rotations(angle), zoom=zoom, warp=warps(warp_x, warp_y), crop=crop)
    lighting = lighting_tables(brightness, contrast)
    return Augmentations(window, maps, lighting, crop[:, 1, 1], recipe.resize_method == "pad")


def compose(*, flip: np.ndarray, rotation: np.ndarray, zoom: np.ndarray, warp: np.ndarray, crop: np.ndarray):
    """One map (n, 3, 3) of all, in fastai's order: the image is warped, flipped, rotated, zoomed, then cropped."""
    return warp @ flip @ rotation @ zoom @ crop


def centre(n: int, resize_method: str = "crop") -> Augmentations:
    """What validation sees: the centre square, as it is."""
    maps = np.broadcast_to(np.eye(3), (n, 3, 3))
    unchanged = np.broadcast_to(np.arange(256, dtype=np.uint8), (n, 256))
    return Augmentations(np.full(n, 0.5), maps, unchanged, np.ones(n), resize_method == "pad")


def apply(image: np.ndarray, augmentation: Augmentations, size: int) -> np.ndarray:
    """Image (h, w, 3) uint8 through its row of `augmentation` to (size, size, 3) uint8; it reflects at its edges."""
    window = padded_square if augmentation.pad else square_window
    square, to_pixels = _shrunk(window(image, float(augmentation.window)), augmentation, size)
    pixels = to_pixels @ augmentation.maps @ np.linalg.inv(_to_pixels(size))
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
        return square, _to_pixels(side)
    x, y, depth = augmentation.maps @ np.array([[-1, 1, -1, 1], [-1, -1, 1, 1], [1, 1, 1, 1]])
    seen = np.stack([x, y]) / depth  # the corners of the output
    if side * np.ptp(seen) / (4 * size) <= 1:  # a zoom shows so little that no pixel is skipped
        return square, _to_pixels(side)
    left, top, right, bottom = 0, 0, side, side
    if crop < 1 and abs(seen).max() < 1 + 1e-9:
        corners = ((seen + 1) * (side - 1) / 2).round(6)
        left, top = np.floor(corners.min(axis=1)).astype(int)
        right, bottom = np.ceil(corners.max(axis=1)).astype(int) + 1
    averaged = _averaged(square[top:bottom, left:right], shrink)
    scale_x, scale_y = (averaged.shape[1] - 1) / (right - left - 1), (averaged.shape[0] - 1) / (bottom - top - 1)
    moved = np.array([[scale_x, 0, -left * scale_x], [0, scale_y, -top * scale_y], [0, 0, 1]])
    return averaged, moved @ _to_pixels(side)


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


def random_crops(rng: np.random.Generator, n: int, min_scale: float, max_aspect: float = 1.0) -> np.ndarray:
    """Maps to crops that keep `min_scale` to all of the area, anywhere inside; their sides differ by `max_aspect`.

    As in fastai, a crop that does not fit inside is drawn again, and after ten such draws nothing is cropped.
    """
    limit = np.log(max_aspect)
    area, aspect = rng.uniform(min_scale, 1, (10, n)), np.exp(rng.uniform(-limit, limit, (10, n)))
    sides = np.sqrt(np.stack([area * aspect, area / aspect], axis=2))
    fits = sides.max(axis=2) <= 1
    sides = np.where(fits.any(axis=0)[:, None], sides[fits.argmax(axis=0), np.arange(n)], 1.0)
    maps = _identity(n)
    maps[:, [0, 1], [0, 1]] = sides
    maps[:, :2, 2] = rng.uniform(-1, 1, (n, 2)) * (1 - sides)
    return maps


def rotations(degrees: np.ndarray) -> np.ndarray:
    """Maps that turn the picture clockwise."""
    maps = _identity(len(degrees))
    angle = np.deg2rad(degrees)
    maps[:, 0, 0] = maps[:, 1, 1] = np.cos(angle)
    maps[:, 0, 1] = np.sin(angle)
    maps[:, 1, 0] = -maps[:, 0, 1]
    return maps


def zooms(factors: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Maps that enlarge by `factors` (n,) around `centres` (n, 2) in -1..1."""
    maps = _identity(len(factors))
    maps[:, 0, 0] = maps[:, 1, 1] = 1 / factors
    maps[:, :2, 2] = (1 - 1 / factors)[:, None] * centres
    return maps


def flips(flip: np.ndarray) -> np.ndarray:
    maps = _identity(len(flip))
    maps[:, 0, 0] = np.where(flip, -1, 1)
    return maps


def warps(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Perspective maps that shear opposite sides by `x` and `y`, as if the picture were seen from the side or below."""
    corners = np.array([[-1, -1], [-1, 1], [1, -1], [1, 1]], np.float32)
    product = corners.prod(axis=1, keepdims=True)
    maps = _identity(len(x))
    for i in np.flatnonzero((x != 0) | (y != 0)):
        moved = corners - product * np.array([y[i], x[i]], np.float32)
        maps[i] = cv2.getPerspectiveTransform(moved, corners)
    return maps


def lighting_tables(brightness: np.ndarray, contrast: np.ndarray) -> np.ndarray:
    """Lighting changes as one table of 256 uint8 values per image.

    `brightness` (n,) in -1..1 moves mid-grey to 0.5 * (1 + brightness), then `contrast` (n,) > 0 scales around it.
    Both act on the logits of the pixel values, as in fastai, so no value leaves 0..1 and nothing clips.
    """
    values = np.clip(np.arange(256) / 255, 1e-7, 1 - 1e-7)
    middle = 0.5 * (1 + brightness)
    logits = np.log(values / (1 - values)) + np.log(middle / (1 - middle))[:, None]
    return np.round(255 / (1 + np.exp(-logits * contrast[:, None]))).astype(np.uint8)


def _identity(n: int) -> np.ndarray:
    return np.tile(np.eye(3), (n, 1, 1))


def _maybe(rng: np.random.Generator, p: float, drawn: np.ndarray, otherwise: float) -> np.ndarray:
    """`drawn` (n,) for a share `p` of the images, `otherwise` for the rest."""
    return np.where(rng.random(len(drawn)) < p, drawn, otherwise)


def _to_pixels(side: int) -> np.ndarray:
    """From -1..1 to pixel centres 0..side - 1."""
    half = (side - 1) / 2
    return np.array([[half, 0, half], [0, half, half], [0, 0, 1]])
