"""Reads every image of a data set before a training: what is there, and what would spoil the training.

Imports no torch. Reading (`inspect_files`) is separate from judging (`findings`), which needs no disk.
"""

import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import file_digest
from pathlib import Path

import numpy as np
import numpy.typing as npt

from trainables.data.image_file import UnreadableImage, decode
from trainables.data.labelled_images import MAX_UNREADABLE, DataError, ImageFolder
from trainables.data.layouts import find_images, find_unchecked
from trainables.data.near_duplicates import MAX_IMAGES, SIDE, Pair, pairs_among, picture
from trainables.data.splits import train_and_valid
from trainables.system.text import some

MIN_TRAINING_IMAGES = 10  # of a class without a warning
MAX_IMBALANCE = 10.0  # largest / smallest class without a warning
FILES_AT_ONCE = 1024  # submitted to the threads together, so that a huge data set needs no huge queue


@dataclass(frozen=True)
class ImageFile:
    """The result of reading one image."""

    path: str
    """As in `ImageFolder.paths`."""
    digest: bytes = b""
    """SHA-256 of the file's bytes; empty if it is unreadable."""
    format: str = ""
    """Pillow's name of the format, found by content and not by suffix."""
    width: int = 0
    height: int = 0
    """Pixels, upright."""
    problem: str = ""
    """Why it is unreadable, or empty."""
    picture: bytes = field(default=b"", repr=False)
    """The small grey one that `near_duplicates` compares; empty if it is unreadable, or one of very many."""


@dataclass(frozen=True)
class Finding:
    """A problem or a warning, and what to do about it."""

    text: str
    remedy: str
    spoils: bool
    """Whether training on the data would fail or mislead; otherwise it is a warning."""


@dataclass(frozen=True)
class Copies:
    """Readable images with the same bytes, as indices into `Inspection.files`."""

    indices: tuple[int, ...]
    across_splits: bool
    labels: tuple[int | tuple[int, ...], ...]
    """Sorted and unique, the label or the labels of an image; more than one is a contradiction."""


@dataclass(frozen=True)
class Inspection:
    """A data set, its files (in the order of `folder.paths`), and the split that trials will use.

    Unreadable images are in neither `train` nor `valid` (sorted indices), as in a presized cache.
    """

    folder: ImageFolder
    files: tuple[ImageFile, ...]
    train: npt.NDArray[np.int64]
    valid: npt.NDArray[np.int64]

    @cached_property
    def readable(self) -> list[int]:
        return [i for i, file in enumerate(self.files) if not file.problem]

    @cached_property
    def unreadable(self) -> list[ImageFile]:
        return [file for file in self.files if file.problem]

    @cached_property
    def counts(self) -> npt.NDArray[np.int64]:
        """(classes, 2) readable images for training and for validation."""
        return np.stack([self.folder.only(part).class_counts for part in (self.train, self.valid)], axis=1)

    @cached_property
    def sides(self) -> npt.NDArray[np.int64]:
        """(readable images, 2) width and height in pixels."""
        return np.array([(self.files[i].width, self.files[i].height) for i in self.readable]).reshape(-1, 2)

    @cached_property
    def near_duplicates(self) -> list[Pair]:
        """Images that look the same, without exact copies. Looks for them when it is first asked."""
        seen = [i for i in self.readable if self.files[i].picture]
        pictures = np.frombuffer(b"".join(self.files[i].picture for i in seen), np.uint8).reshape(-1, SIDE, SIDE)
        pairs = [Pair(seen[pair.first], seen[pair.second], pair.likeness) for pair in pairs_among(pictures)]
        return [pair for pair in pairs if self.files[pair.first].digest != self.files[pair.second].digest]

    @cached_property
    def copies(self) -> list[Copies]:
        """One entry for each content that several files share."""
        by_content = defaultdict(list)
        for i in self.readable:
            by_content[self.files[i].digest].append(i)
        valid, labels = set(self.valid.tolist()), self.folder.label_sets or self.folder.labels
        return [
            Copies(
                indices=tuple(same),
                across_splits=len({i in valid for i in same}) == 2,
                labels=tuple(sorted({labels[i] for i in same})),
            )
            for same in by_content.values()
            if len(same) > 1
        ]


# --- Reading ----------------------------------------------------------------------------------------------------------


def find_folder(root: Path | str) -> ImageFolder:
    """`find_images` without an error for classes that are too small, which `findings` lists.

    Raises `DataError` if there are no labelled images.
    """
    try:
        return find_images(root)
    except DataError:
        return find_unchecked(root)


def inspect(
    folder: ImageFolder,
    *,
    size: int,
    split_seed: int = 0,
    num_threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Inspection:
    """Reads every image as presizing to `size` pixels would, and splits the readable ones as a search does."""
    files = inspect_files(folder, size=size, num_threads=num_threads, progress=progress)
    train, valid = split_readable(folder, files, split_seed)
    return Inspection(folder, files, train, valid)


def inspect_files(
    folder: ImageFolder,
    *,
    size: int,
    num_threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[ImageFile, ...]:
    """Entry i describes `folder.paths[i]`. Uses threads, since Pillow and hashlib release the GIL."""
    files: list[ImageFile] = []
    with ThreadPoolExecutor(num_threads or os.cpu_count(), thread_name_prefix="inspect") as pool:
        for start in range(0, len(folder.paths), FILES_AT_ONCE):
            paths = folder.paths[start : start + FILES_AT_ONCE]
            for file in pool.map(lambda path: inspect_file(folder, path, size), paths):
                files.append(file)
                if progress:
                    progress(len(files), len(folder.paths))
    return tuple(files)


def inspect_file(folder: ImageFolder, path: str, size: int) -> ImageFile:
    """An image is unreadable if a presized cache would skip it."""
    file = folder.root / path
    try:
        image = decode(file, size, folder.white_level)
        with file.open("rb") as content:
            digest = file_digest(content, "sha256").digest()
        small = picture(image.pixels).tobytes() if len(folder.paths) <= MAX_IMAGES else b""
        return ImageFile(path, digest, image.format, image.width, image.height, picture=small)
    except (UnreadableImage, OSError) as error:
        return ImageFile(path, problem=_reason(error, file))


def _reason(error: Exception, file: Path) -> str:
    """On one line, without the path, which precedes it in the output."""
    return " ".join(str(error).replace(f" {str(file)!r}", "").split()).rstrip(":")


def split_readable(
    folder: ImageFolder, files: Sequence[ImageFile], seed: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Sorted indices of the readable training and validation images; the split is that of `PresizedImages.split`."""
    readable = np.array([i for i, file in enumerate(files) if not file.problem], dtype=np.int64)
    images = folder.only(readable)
    train, valid = train_and_valid(images.labels, images.valid, images.groups, seed=seed)
    return readable[train], readable[valid]


# --- Judging ----------------------------------------------------------------------------------------------------------


def findings(inspection: Inspection, max_unreadable: float = MAX_UNREADABLE) -> list[Finding]:
    """Problems first, then warnings; `max_unreadable` is the share of the images that a search allows."""
    found = [
        *_of_files(inspection, max_unreadable),
        *_of_copies(inspection),
        *_of_classes(inspection),
        *_of_balance(inspection),
    ]
    return sorted(found, key=lambda finding: not finding.spoils)


def _of_files(inspection: Inspection, max_unreadable: float) -> list[Finding]:
    bad, total = len(inspection.unreadable), len(inspection.files)
    if bad == 0:
        return []
    files = f"{bad} of {total} images cannot be read"
    if bad > max_unreadable * total:
        text = f"{files}, more than the {100 * max_unreadable:g} % that --max-unreadable allows"
        return [Finding(text, "repair or remove them, or allow a larger share", True)]
    return [Finding(f"{files} and will be skipped", "repair or remove them if they matter", False)]


def _of_copies(inspection: Inspection) -> list[Finding]:
    contradictions = [copies for copies in inspection.copies if len(copies.labels) > 1]
    across = [copies for copies in inspection.copies if copies.across_splits]
    within = [copies for copies in inspection.copies if not copies.across_splits and len(copies.labels) == 1]
    found = []
    if contradictions:
        text = f"{_number(contradictions, 'image lies', 'images lie')} under more than one class"
        remedy = "keep each in its true class and remove the other copies"
        if inspection.folder.label_sets is not None:
            text = f"{_number(contradictions, 'image has', 'images have')} other labels in an exact copy"
            remedy = "give all copies the true labels, or keep one copy"
        found.append(Finding(text, remedy, True))
    if across:
        text = f"{_number(across, 'image is', 'images are')} both in training and in validation, as exact copies"
        remedy = "remove all copies but one; until then the validation error looks better than it is"
        found.append(Finding(text, remedy, True))
    if within:
        text = f"{_number(within, 'image occurs', 'images occur')} more than once within one class and split"
        found.append(Finding(text, "remove the copies, unless they should weigh more", False))
    return found


def _of_classes(inspection: Inspection) -> list[Finding]:
    """The rules of `labelled_images.check_classes`, all at once."""
    classes, (train, valid) = inspection.folder.classes, inspection.counts.T
    found = []
    if len(classes) < 2:
        remedy = "a classifier needs two or more: give the folder that holds the class folders"
        found.append(Finding(f"there is only one class, {classes[0]!r}", remedy, True))
    tiny = train + valid < 2
    if tiny.any():
        text = f"{_named(classes, tiny)} fewer than two readable images"
        remedy = "add images or remove the class; each class needs one to train on and one to validate on"
        found.append(Finding(text, remedy, True))
    untrained = (train == 0) & ~tiny
    if untrained.any():
        remedy = "add images in training folders of the same names; names are compared letter by letter"
        found.append(Finding(f"{_named(classes, untrained)} validation images but no training image", remedy, True))
    if valid.sum() == 0:
        remedy = "add readable images to the validation folder"
        if inspection.folder.valid is None:
            remedy = "add images: a fifth of them validates, and there are too few"
        found.append(Finding("there is no validation image", remedy, True))
    elif (unseen := (valid == 0) & ~tiny).any():
        remedy = "add images: until then the validation error says nothing about these classes"
        found.append(Finding(f"{_named(classes, unseen)} no validation image", remedy, False))
    return found


def _of_balance(inspection: Inspection) -> list[Finding]:
    classes, train = inspection.folder.classes, inspection.counts[:, 0]
    found = []
    few = (train > 0) & (train < MIN_TRAINING_IMAGES)
    if few.any():
        remedy = "add images, and do not expect good predictions until then"
        found.append(Finding(f"{_named(classes, few)} fewer than {MIN_TRAINING_IMAGES} training images", remedy, False))
    trained = np.flatnonzero(train)
    if len(trained) == 0:
        return found
    small, large = trained[np.argmin(train[trained])], trained[np.argmax(train[trained])]
    if train[large] > MAX_IMBALANCE * train[small]:
        text = (
            f"the classes are imbalanced: {classes[large]!r} has {train[large]} training images and "
            f"{classes[small]!r} has {train[small]}, {train[large] / train[small]:.0f} times fewer"
        )
        remedy = "add images to the small classes; the error rate mostly measures the large ones"
        found.append(Finding(text, remedy, False))
    return found


def _number(things: Sequence[object], one: str, many: str) -> str:
    return f"{len(things)} {one if len(things) == 1 else many}"


def _named(classes: Sequence[str], chosen: npt.NDArray[np.bool_]) -> str:
    """ "2 classes ('a', 'b') have": the classes where the mask `chosen` holds."""
    names = [name for name, is_chosen in zip(classes, chosen, strict=True) if is_chosen]
    return f"{some(names, 'class', 'classes')} {'has' if len(names) == 1 else 'have'}"
