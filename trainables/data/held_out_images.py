"""Test images: a share of each class that a search sets aside and opens only at its end. Imports no torch."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

import numpy as np

from trainables.data.groups import with_text
from trainables.data.labelled_images import DataError, ImageFolder
from trainables.data.left_out_images import remaining
from trainables.data.splits import group_numbers, in_order, take_groups
from trainables.system.text import some


@dataclass(frozen=True)
class WithoutTestImages:
    """A source without its test images and those left out, which every node gets instead, see `source.images_of`."""

    source: str
    share: float | None
    """That is held out of every class as test images; None for none."""
    seed: int
    left_out: tuple[str, ...] = ()
    """The paths of the images that are neither used nor test images, see `left_out_images`."""
    groups: str = ""
    """Of the others, as `groups.to_text` writes them."""

    def __str__(self) -> str:
        return self.source


ImageSource = str | WithoutTestImages
"""Where every node gets the images of a search from, see `source.images_of`."""


def without_test_images(
    images: ImageFolder, share: float | None, seed: int, left_out: tuple[str, ...] = (), groups: str = ""
) -> ImageFolder:
    """The images to train and validate on, with their groups: all of them but those `left_out`, if `share` is None."""
    images = remaining(images, left_out)
    images = with_text(images, groups) if groups else images
    return images if share is None else set_aside(images, share, seed)[0]


def set_aside(images: ImageFolder, share: float, seed: int) -> tuple[ImageFolder, ImageFolder]:
    """The images to train and validate on, and the test images: round(share * n) of the n images of a class.

    A class of three images or more gives at least one; if the data has its own split, both parts give in proportion.
    Groups stay whole, so with them the numbers are as near to that as they allow, see `splits.take_groups`. The choice
    depends only on the seed and the images' paths, so it is the same on all machines and in any order. Raises
    `DataError` if a class would keep less than one image, or group, to train and one to validate on.
    """
    keys, parts, groups = _keys(images, seed), _parts(images), images.groups or images.paths
    members: list[list[int]] = []
    kept: set[str] = set()
    for label in range(images.num_classes):
        mine = {part: sorted(parts[label, part], key=keys.__getitem__) for part in (False, True)}
        if images.valid is not None:
            kept |= {groups[i] for part in mine.values() for i in part[-1:]}
        else:  # the last two groups
            kept |= set(list(dict.fromkeys(groups[i] for i in reversed(mine[False])))[:2])
        members.append(sorted((*mine[False], *mine[True]), key=keys.__getitem__))
    wanted = [round(share * len(own)) or min(len(own) // 3, 1) for own in members]
    free = [[i for i in own if groups[i] not in kept] for own in members]
    if too_small := [images.classes[i] for i, own in enumerate(free) if wanted[i] > len(own)]:
        without_groups = "" if images.groups is None else ", in another group,"
        raise DataError(
            f"--test-split {share:g} leaves too few images in {some(too_small, 'class', 'classes')} of {images.root}: "
            f"each class needs one to train on and one{without_groups} to validate on. Hold out a smaller share, or "
            "add images."
        )
    is_test = np.zeros(len(images.paths), dtype=bool)
    is_test[_taken(images, sorted((i for own in free for i in own), key=keys.__getitem__), groups, wanted)] = True
    return images.only(np.flatnonzero(~is_test)), images.only(np.flatnonzero(is_test))


def _taken(images: ImageFolder, free: list[int], groups: Sequence[str], wanted: list[int]) -> list[int]:
    """About as many of the images `free` as are `wanted` of each class, the first ones if they are alone."""
    numbers = group_numbers([groups[i] for i in free])
    labels = np.array([images.labels[i] for i in free], dtype=np.int64)
    most = np.bincount(labels, minlength=images.num_classes)
    taken = take_groups(labels, numbers, in_order(numbers), np.array(wanted, dtype=np.int64), most)
    return [i for i, is_taken in zip(free, taken, strict=True) if is_taken]


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
