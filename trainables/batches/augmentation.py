"""Batch augmentation: all geometric changes of an image as one map of coordinates, read with one interpolation.

The changes and their ranges are those of fastai's `aug_transforms` (fastai book, chapter 5). A map is a 3 x 3
homography from a point of the output square, with both axes from -1 to 1, to the point of the input square that it
shows. This module draws the maps; `warp_cpu` and `warp_gpu` make the pixels.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from trainables.recipe import Recipe

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Augmentations:
    """The changes of n images, drawn for a whole batch so that they depend only on the seed."""

    window: Floats  # (n,) position of the square window along the longer side, 0 to 1
    maps: Floats  # (n, 3, 3) output point -> point of the window
    lighting: npt.NDArray[np.uint8]  # (n, 256) the new value of each pixel value
    crop: Floats  # (n,) height of the random crop that is part of the map; 1 = none
    pad: bool = False  # the window covers the full longer side instead, and images reflect beyond their edges

    def __getitem__(self, rows: Any) -> "Augmentations":
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


def compose(*, flip: Floats, rotation: Floats, zoom: Floats, warp: Floats, crop: Floats) -> Floats:
    """All maps as one (n, 3, 3) in fastai's order: the image is warped, flipped, rotated, zoomed, then cropped."""
    composed: Floats = warp @ flip @ rotation @ zoom @ crop
    return composed


def centre(n: int, resize_method: str = "crop") -> Augmentations:
    """For validation: the unchanged centre square."""
    maps = np.broadcast_to(np.eye(3), (n, 3, 3))
    unchanged = np.broadcast_to(np.arange(256, dtype=np.uint8), (n, 256))
    return Augmentations(np.full(n, 0.5), maps, unchanged, np.ones(n), resize_method == "pad")


def random_crops(rng: np.random.Generator, n: int, min_scale: float, max_aspect: float = 1.0) -> Floats:
    """Maps to crops of `min_scale` to all of the area, anywhere inside, whose sides differ by at most `max_aspect`.

    As in fastai, a crop that does not fit is drawn again, and after ten tries nothing is cropped.
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


def rotations(degrees: Floats) -> Floats:
    """Maps that turn the image clockwise."""
    maps = _identity(len(degrees))
    angle = np.deg2rad(degrees)
    maps[:, 0, 0] = maps[:, 1, 1] = np.cos(angle)
    maps[:, 0, 1] = np.sin(angle)
    maps[:, 1, 0] = -maps[:, 0, 1]
    return maps


def zooms(factors: Floats, centres: Floats) -> Floats:
    """Maps that enlarge by `factors` (n,) around `centres` (n, 2) in -1..1."""
    maps = _identity(len(factors))
    maps[:, 0, 0] = maps[:, 1, 1] = 1 / factors
    maps[:, :2, 2] = (1 - 1 / factors)[:, None] * centres
    return maps


def flips(flip: npt.NDArray[np.bool_]) -> Floats:
    maps = _identity(len(flip))
    maps[:, 0, 0] = np.where(flip, -1, 1)
    return maps


def warps(x: Floats, y: Floats) -> Floats:
    """Perspective maps that shear opposite sides by `x` and `y`, as if the image were seen from the side or below."""
    corners = np.array([[-1, -1], [-1, 1], [1, -1], [1, 1]], np.float64)
    moved = corners - corners.prod(axis=1, keepdims=True) * np.stack([y, x], axis=1)[:, None]
    return _homographies(moved, np.broadcast_to(corners, moved.shape))


def _homographies(points: Floats, images: Floats) -> Floats:
    """Maps (n, 3, 3) that take four `points` (n, 4, 2) each to their `images` (n, 4, 2), last entry 1."""
    n = len(points)
    homogeneous, zeros = np.concatenate([points, np.ones((n, 4, 1))], axis=2), np.zeros((n, 4, 3))
    x, y = images[..., :1], images[..., 1:]
    equations_of_x = np.concatenate([homogeneous, zeros, -x * points], axis=2)
    equations_of_y = np.concatenate([zeros, homogeneous, -y * points], axis=2)
    equations = np.concatenate([equations_of_x, equations_of_y], axis=1)
    entries = np.linalg.solve(equations, np.concatenate([x, y], axis=1))
    return np.concatenate([entries[..., 0], np.ones((n, 1))], axis=1).reshape(n, 3, 3)


def lighting_tables(brightness: Floats, contrast: Floats) -> npt.NDArray[np.uint8]:
    """Changes of lighting as one table of 256 values per image.

    `brightness` (n,) in -1..1 moves mid-grey to 0.5 * (1 + brightness), then `contrast` (n,) > 0 scales around it.
    Both act on the logits of the pixel values, as in fastai, so that no value leaves 0..1 or is clipped.
    """
    values = np.clip(np.arange(256) / 255, 1e-7, 1 - 1e-7)
    middle = 0.5 * (1 + brightness)
    logits = np.log(values / (1 - values)) + np.log(middle / (1 - middle))[:, None]
    scaled: Floats = 255 / (1 + np.exp(-logits * contrast[:, None]))
    return np.round(scaled).astype(np.uint8)


def _identity(n: int) -> Floats:
    return np.tile(np.eye(3), (n, 1, 1))


def _maybe(rng: np.random.Generator, p: float, drawn: Floats, otherwise: float) -> Floats:
    """`drawn` (n,) for a share `p` of the images, `otherwise` for the rest."""
    return np.where(rng.random(len(drawn)) < p, drawn, otherwise)
