"""Labelled images as all modules pass them on, and their fingerprint.

Imports no torch: the search driver uses this module. `layouts` finds the images.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path

import numpy as np
import numpy.typing as npt

from trainables.data.label_sets import LabelSets
from trainables.data.splits import split as split
from trainables.system.text import some

MAX_UNREADABLE = 0.01
"""The share of the images that may be unreadable by default."""


class DataError(ValueError):
    """The images cannot be used; the message is one paragraph for the user."""


@dataclass(frozen=True)
class Unused:
    """Files of a data set that are not used, all for one reason."""

    what: str
    """Such as "2 images in extra/"."""
    advice: str
    """How to use them, or empty."""
    count: int
    names: tuple[str, ...]
    """The first of them, relative to the data set's folder."""

    def __str__(self) -> str:
        names = ", ".join(map(repr, self.names)) + (", ..." if self.count > len(self.names) else "")
        advice = f"; {self.advice}" if self.advice else ""
        return f"{self.what} ({names}{advice})"


@dataclass(frozen=True)
class ImageFolder:
    """The labelled images of one folder; entry i of `paths`, `labels`, `valid` and `groups` is of the same image."""

    root: Path
    layout: str
    """"Oxford Pets", "class folders", "split folders", "label table", "imagefolder" or "WebDataset"."""
    paths: tuple[str, ...]
    """POSIX paths relative to `root`, sorted."""
    labels: tuple[int, ...]
    classes: tuple[str, ...]
    """Class names, sorted; a label is an index into them."""
    valid: tuple[bool, ...] | None = None
    """Which images the folder itself uses for validation (split folders), or None."""
    base: str = ""
    """The folder in `root` that holds the classes or the split folders: empty, or with / at its end."""
    stars: str = ""
    """The `/*` with which the user said where the classes lie, see `layouts`."""
    split_folders: tuple[str, str] | None = None
    """The training and the validation folder, as `base`; None if the folder has no split of its own."""
    unused: tuple[Unused, ...] = ()
    groups: tuple[str, ...] | None = None
    """The group of each image, such as a patient, which no split separates; None if each image stands alone."""
    address: str = ""
    """What finds the same images again where `root` and `stars` do not: a table or archives, see `address`."""
    label_sets: LabelSets | None = None
    """All labels of each image, where it may have several or none; `labels` then has the rarest, see `rarest`."""

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def class_counts(self) -> npt.NDArray[np.int64]:
        """(classes,) images of each class; one with several labels counts for each of them."""
        labels = self.labels if self.label_sets is None else [label for own in self.label_sets for label in own]
        return np.bincount(np.asarray(labels, dtype=np.int64), minlength=self.num_classes)

    @cached_property
    def white_level(self) -> int:
        """What becomes white in images of more than 8 bits, see `image_file.white_level`; opens some of them."""
        from trainables.data.image_file import white_level

        return white_level(self.root, self.paths)

    @property
    def given(self) -> str:
        """The path that finds the same images again, see `address`."""
        return self.address or f"{self.root}{self.stars}"

    def only(self, indices: Iterable[int]) -> "ImageFolder":
        """The same folder with only the images `indices`; its classes stay."""
        indices = list(indices)
        return replace(
            self,
            paths=tuple(self.paths[i] for i in indices),
            labels=tuple(self.labels[i] for i in indices),
            valid=None if self.valid is None else tuple(self.valid[i] for i in indices),
            label_sets=None if self.label_sets is None else tuple(self.label_sets[i] for i in indices),
            groups=None if self.groups is None else tuple(self.groups[i] for i in indices),
        )

    def describe_depth(self) -> str:
        """How images of more than 8 bits are reduced to 8; empty if there are none, or if they use all 16."""
        from trainables.data.image_file import WHITE_16_BIT

        if self.white_level == WHITE_16_BIT:
            return ""
        used = "fractions" if self.white_level == 1 else f"{self.white_level.bit_length()} bits"
        return f"images of more than 8 bits use {used}: {self.white_level} becomes white"

    def describe(self) -> str:
        """The `data:` line: layout, counts, place, and what is not used."""
        split = ""
        if self.valid is not None:
            train, valid = (f" in {name}" for name in self.split_folders) if self.split_folders else ("", "")
            counts = len(self.valid) - sum(self.valid), sum(self.valid)
            split = f" ({counts[0]} for training{train}, {counts[1]} for validation{valid})"
        unused = f"; not used: {', '.join(map(str, self.unused))}" if self.unused else ""
        several = f", {self.class_counts.sum() / len(self.paths):.2g} labels an image," if self.label_sets else ""
        return (
            f"{self.layout} layout, {len(self.paths)} images{split}, {self.num_classes} classes{several} in "
            f"{self.address or self.root / self.base}{unused}"
        )


# --- Checking and naming ----------------------------------------------------------------------------------------------


def check_classes(folder: ImageFolder, gone: str = "") -> None:
    """Raises `DataError` unless there are at least two classes, each with at least two images and one for training.

    `gone` says which images are, such as "2 unreadable images skipped".
    """
    after = f" ({gone})" if gone else ""
    place = folder.address or folder.root
    if folder.num_classes < 2:
        advice = "Name the column of the labels with --columns label=NAME, if it is another one"
        raise DataError(
            f"{place} ({folder.layout} layout) has only one class, {folder.classes[0]!r}, and a classifier needs two "
            f"or more. {advice if folder.address else 'Give the folder that holds the class folders'}."
        )
    if small := [name for name, count in zip(folder.classes, folder.class_counts, strict=True) if count < 2]:
        raise DataError(
            f"{place} has fewer than two images{after} in {some(small, 'class', 'classes')}, and each class "
            "needs one to train on and one to validate on. Add images to these classes or remove them."
        )
    if folder.valid is None:
        return
    valid = np.asarray(folder.valid)
    trained = folder.only(np.flatnonzero(~valid)).class_counts
    if missing := [name for name, count in zip(folder.classes, trained, strict=True) if count == 0]:
        raise DataError(
            f"{place} has validation images but no training images{after} of {some(missing, 'class', 'classes')}. Each "
            "class needs training images under the same name; class names are compared letter by letter."
        )
    if not valid.any():
        raise DataError(f"{place} has no validation images{after}. Add images to its validation part.")


def fingerprint(folder: ImageFolder) -> str:
    """SHA-256 over classes, labels, label sets, relative paths, sizes and modification times of the images.

    The modification time stands for the content, so that an edited image is noticed without reading all of it. `root`
    does not count, so a data set that is moved with its times (mv, rsync -a, cp -p) keeps its fingerprint.
    """
    digest = sha256(ascii((folder.classes, folder.valid, *filter(None, [folder.label_sets]))).encode())
    for path, label in zip(folder.paths, folder.labels, strict=True):
        try:
            status = (folder.root / path).stat()
            size, changed = status.st_size, status.st_mtime_ns
        except OSError:  # a broken link, which is an unreadable image
            size, changed = -1, -1
        digest.update(f"{path!a} {label} {size} {changed}\n".encode())
    return digest.hexdigest()
