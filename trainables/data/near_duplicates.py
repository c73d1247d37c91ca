"""Near-duplicates: photos of one scene a moment apart, crops, and copies that were saved again. Imports no torch.

Images are compared as small grey pictures, in three steps. The first finds candidates among all pairs, by the
correlation of very coarse pictures, which is a product of matrices. The second tries some crops, and looks at details:
what remains without the broad lights and shades that many pictures share. The third lays one picture over the other,
by the affine map that maximises their correlation (ECC: Evangelidis and Psarakis 2008, "Parametric Image Alignment
Using Enhanced Correlation Coefficient Maximization"), and the correlation of details decides. Brightness and contrast
do not count in any of them.
"""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from trainables.data.image_file import Pixels, UnreadableImage, read_image
from trainables.data.labelled_images import ImageFolder
from trainables.data.splits import Indices

Grey = npt.NDArray[np.uint8]
"""(SIDE, SIDE) of one picture, (n, SIDE, SIDE) of several."""
Floats = npt.NDArray[np.float32]

SIDE, COARSE, FINE = 64, 8, 32
"""px; of a picture, and of what the first two steps compare."""
MIN_COARSE, MIN_FINE, MIN_LIKENESS = 0.8, 0.45, 0.8
"""The least correlations that the steps let pass.

Of pairs of one photo with up to 6 % cut off at each side, and of other brightness and quality, the three keep 99 %
(Flowers-17, Caltech-101), with up to 10 %, 87 to 90 %. What else they find there are near-duplicates, too, all but one.
Among EuroSAT's tiles, many of which look alike at a glance, they find no pair.
"""
PER_IMAGE = 12
"""Candidates per image, on average: all images of a series may be candidates of each other."""
MIN_CONTRAST = 1.5
"""Of 255: a picture whose details vary less has none to compare, such as one of open water."""
ROWS = 256
"""Pictures that are compared with all others at a time."""
MAX_IMAGES = 20_000
"""Of more images, nobody looks for near-duplicates unasked."""


@dataclass(frozen=True)
class Pair:
    """Two near-duplicates by their indices, the lower one first, and the correlation of their details, up to 1."""

    first: int
    second: int
    likeness: float


class Box(NamedTuple):
    """A square piece of a picture, in px."""

    left: int
    top: int
    side: int


CROPS = (Box(0, 0, SIDE), *(Box(left, top, SIDE - cut)
    for cut in (4, 8, 12) for top in (0, cut // 2, cut) for left in (0, cut // 2, cut)))  # fmt: skip
"""The whole picture, and pieces of three sizes at nine places."""


# --- Pictures ---------------------------------------------------------------------------------------------------------


def find_duplicates(images: ImageFolder, progress: Callable[[int, int], None] = lambda done, total: None) -> list[Pair]:
    """All pairs of near-duplicates, the most alike first. Opens every image; unreadable ones are like none."""
    white = images.white_level

    def look(path: str) -> Grey:
        try:
            return picture(read_image(images.root / path, 2 * SIDE, white))
        except UnreadableImage:
            return np.zeros((SIDE, SIDE), dtype=np.uint8)

    pictures = np.empty((len(images.paths), SIDE, SIDE), dtype=np.uint8)
    with ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="look") as pool:
        for start in range(0, len(pictures), ROWS):
            found = list(pool.map(look, images.paths[start : start + ROWS]))
            pictures[start : start + len(found)] = found
            progress(start + len(found), len(pictures))
    return pairs_among(pictures)


def picture(image: Pixels) -> Grey:
    """An image as a small grey picture."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    return cv2.resize(grey, (SIDE, SIDE), interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)


def pairs_among(pictures: Grey) -> list[Pair]:
    """The pairs of near-duplicates among some pictures, the most alike first."""
    if len(pictures) == 0 or len(candidates := _candidates(_coarse(pictures))) == 0:
        return []
    pairs, maps = _cropped_alike(pictures, candidates)
    with ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="align") as pool:
        one, other = (pictures[pairs[:, place]] for place in range(2))
        likeness = list(pool.map(_aligned_likeness, one, other, maps))
    found = zip(pairs.tolist(), likeness, strict=True)
    kept = [Pair(first, second, value) for (first, second), value in found if value >= MIN_LIKENESS]
    return sorted(kept, key=lambda pair: -pair.likeness)


# --- The first step ---------------------------------------------------------------------------------------------------


def _coarse(pictures: Grey) -> Floats:
    """(n, COARSE * COARSE) as unit vectors of mean 0; zeros for a picture without contrast."""
    step = SIDE // COARSE
    means = pictures.reshape(-1, COARSE, step, COARSE, step).mean((2, 4), dtype=np.float32)
    return _unit(means - means.mean((1, 2), keepdims=True))


def _candidates(vectors: Floats) -> Indices:
    """(pairs, 2) indices of vectors whose correlation is at least MIN_COARSE; of very many those with the highest."""
    found = [np.empty((0, 2), dtype=np.int64)]
    for start in range(0, len(vectors), ROWS):
        likeness = np.triu(vectors[start : start + ROWS] @ vectors[start:].T, 1)
        near = np.argwhere(likeness >= MIN_COARSE)
        if len(near) > PER_IMAGE * len(likeness):
            highest = np.argsort(-likeness[near[:, 0], near[:, 1]], kind="stable")
            near = near[highest[: PER_IMAGE * len(likeness)]]
        found.append(near + start)
    return np.concatenate(found)


# --- The second step --------------------------------------------------------------------------------------------------


def _cropped_alike(pictures: Grey, pairs: Indices) -> tuple[Indices, list[Floats]]:
    """The pairs of which one picture's details are like those of a crop of the other, each with the affine map (2, 3)
    from the first picture's pixels to the second's."""
    whole = np.concatenate([_details(each, CROPS[:1]) for each in pictures])
    best, crop = np.full((2, len(pairs)), -1, dtype=np.float32), np.zeros((2, len(pairs)), dtype=np.int64)
    for side in range(2):  # whose crops are tried
        order = np.argsort(pairs[:, side], kind="stable")
        own, starts = np.unique(pairs[order, side], return_index=True)
        for index, rows in zip(own.tolist(), np.split(order, starts[1:]), strict=True):
            # As a plain loop: on a busy machine, BLAS waits for its threads longer than it computes.
            likeness = np.einsum("cd,pd->cp", _details(pictures[index], CROPS), whole[pairs[rows, 1 - side]])
            best[side, rows], crop[side, rows] = likeness.max(axis=0), likeness.argmax(axis=0)
    kept = np.flatnonzero(best.max(axis=0) >= MIN_FINE)
    sides = best.argmax(axis=0)
    return pairs[kept], [_map_of(CROPS[crop[sides[row], row]], of_first=sides[row] == 0) for row in kept]


def _map_of(box: Box, *, of_first: bool) -> Floats:
    """Where a pixel of the first picture lies in the second one, if a crop of one of them is all of the other."""
    scale = box.side / SIDE
    if of_first:
        return np.array([[1 / scale, 0, -box.left / scale], [0, 1 / scale, -box.top / scale]], dtype=np.float32)
    return np.array([[scale, 0, box.left], [0, scale, box.top]], dtype=np.float32)


def _details(image: Grey, boxes: Iterable[Box]) -> Floats:
    """(boxes, FINE * FINE) unit vectors: pieces of a picture without their local mean; zeros where nothing is left."""
    pieces = [image[box.top : box.top + box.side, box.left : box.left + box.side] for box in boxes]
    return _unit(np.stack([_without_mean(cv2.resize(piece, (FINE, FINE), interpolation=cv2.INTER_AREA))
                           for piece in pieces]))  # fmt: skip


def _without_mean(image: npt.NDArray[np.generic]) -> Floats:
    values = image.astype(np.float32)
    return values - cv2.blur(values, (9, 9), borderType=cv2.BORDER_REPLICATE)


def _unit(values: Floats) -> Floats:
    vectors = values.reshape(len(values), -1)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.where(norms < MIN_CONTRAST * vectors.shape[1] ** 0.5, 0, vectors / np.maximum(norms, 1e-6))


# --- The third step ---------------------------------------------------------------------------------------------------


def _aligned_likeness(one: Grey, other: Grey, start: Floats) -> float:
    """The correlation of the details of two pictures where they lie over each other; 0 if that is not on one half."""
    criteria = cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, 12, 1e-3
    nowhere = np.empty(0, dtype=np.uint8)
    try:
        _, found = cv2.findTransformECC(one, other, start, cv2.MOTION_AFFINE, criteria, nowhere, 3)
    except cv2.error:  # it does not converge
        return 0.0
    how = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    laid = cv2.warpAffine(other, found, (SIDE, SIDE), flags=how, borderMode=cv2.BORDER_REPLICATE)
    covered = cv2.warpAffine(np.ones_like(other), found, (SIDE, SIDE), flags=how) > 0
    if covered.mean() < 0.5:
        return 0.0
    first, second = (_unit(_without_mean(image)[covered][None])[0] for image in (one, laid))
    return min(1.0, float(first @ second))
