"""Test images: a share of each class that a search sets aside and opens only at its end. Imports no torch."""

from collections import defaultdict
from dataclasses import dataclass
from hashlib import sha256

import numpy as np

from trainables.data.labelled_images import DataError, ImageFolder
from trainables.system.text import some


@dataclass(frozen=True)
class WithoutTestImages:
    """A source without its test images, which every node gets instead of the source, see `source.images_of`."""

    source: str
    share: float
    seed: int

    def __str__(self) -> str:
        return self.source


def without_test_images(images: ImageFolder, share: float | None, seed: int) -> ImageFolder:
    """The images to train and validate on: all of them if `share` is None."""
    return images if share is None else set_aside(images, share, seed)[0]


def set_aside(images: ImageFolder, share: float, seed: int) -> tuple[ImageFolder, ImageFolder]:
    """The images to train and validate on, and the test images: round(share * n) of the n images of a class.

    A class of three images or more gives at least one; if the data has its own split, both parts give in proportion.
    The choice depends only on the seed and the images' paths, so it is the same on all machines and in any order.
    Raises `DataError` if a class would keep less than one image to train and one to validate on.
    """
    keys, parts = _keys(images, seed), _parts(images)
    chosen: list[int] = []
    too_small = []
    for label, name in enumerate(images.classes):
        mine = {part: sorted(parts[label, part], key=keys.__getitem__) for part in (False, True)}
        kept = [*mine[False][-1:], *mine[True][-1:]] if images.valid is not None else mine[False][-2:]
        members = sorted((*mine[False], *mine[True]), key=keys.__getitem__)
        free = [i for i in members if i not in kept]
        wanted = round(share * len(members)) or min(len(members) // 3, 1)
        if wanted > len(free):
            too_small.append(name)
        chosen += free[:wanted]
    if too_small:
        raise DataError(
            f"--test-split {share:g} leaves too few images in {some(too_small, 'class', 'classes')} of {images.root}: "
            "each class needs one to train on and one to validate on. Hold out a smaller share, or add images."
        )
    is_test = np.zeros(len(images.paths), dtype=bool)
    is_test[chosen] = True
    return images.only(np.flatnonzero(~is_test)), images.only(np.flatnonzero(is_test))


def held_share(test_split: object) -> float | None:
    """The share that `--test-split` holds out; None without the option, or if it names a folder."""
    return test_split if isinstance(test_split, float) else None


def _parts(images: ImageFolder) -> dict[tuple[int, bool], list[int]]:
    """Indices of the images by label and by whether the data set itself uses them for validation."""
    parts: dict[tuple[int, bool], list[int]] = defaultdict(list)
    for index, label in enumerate(images.labels):
        parts[label, bool(images.valid and images.valid[index])].append(index)
    return parts


def _keys(images: ImageFolder, seed: int) -> dict[int, float]:
    """Index -> position of the image in its class, 0..1: the images of each part in random order and evenly spaced, so
    that the lowest keys of a class come from its parts in proportion (systematic sampling)."""
    keys: dict[int, float] = {}
    for (label, part), members in _parts(images).items():
        offset = _uniform(f"{seed} {images.classes[label]!a} {part}")
        drawn = sorted(members, key=lambda i: _uniform(f"{seed} {images.paths[i]!a}"))
        keys |= {index: (place + offset) / len(members) for place, index in enumerate(drawn)}
    return keys


def _uniform(text: str) -> float:
    """A hash of the text as a number in 0..1."""
    return int.from_bytes(sha256(text.encode()).digest()[:6], "big") / 2**48
