"""Finds the labelled images in a folder: which layout it has, at which level its classes lie, and what is left unused.

All commands ask `find_images`, so they agree. A folder that can be read in two ways is refused with both readings; `/*`
at the end of its path settles it: `DIR/*` takes the folders in DIR as classes, `DIR/*/*` those one level deeper.
Imports no torch.
"""

import logging
import re
from collections.abc import Sequence
from pathlib import Path

from trainables.data.class_level import (
    FEW,
    container,
    refuse_copy_inside,
    refuse_deeper_classes,
    refuse_unclear_container,
)
from trainables.data.folder_tree import Folder
from trainables.data.labelled_images import DataError, ImageFolder, check_classes
from trainables.data.leftovers import LAYOUTS, nothing_found, refuse_lost_classes, unused
from trainables.data.readings import Reading, breeds_of, class_folders, names_of, oxford_pets, two_readings
from trainables.data.split_folders import split_folders

logger = logging.getLogger(__name__)


def find_images(root: Path | str) -> ImageFolder:
    """The labelled images of `root`, whose path may end in `/*`; raises `DataError` where they cannot be used."""
    found = find_unchecked(root)
    check_classes(found)
    _warn_of_case(found.classes)
    logger.debug("%s", found.describe())
    return found


def find_unchecked(root: Path | str) -> ImageFolder:
    """The same, whatever the number of images in a class."""
    try:
        bare, stars = (str(root), "") if Path(root).expanduser().exists() else split_level(str(root))
        top = Folder(_existing_folder(bare))
        reading = class_folders(_parents(top, stars)) if stars else _read(top)
        if reading is None:
            raise nothing_found(top)
        return _image_folder(top, reading, stars)
    except OSError as error:
        raise DataError(
            f"The folder {error.filename or root} cannot be read ({error.strerror or error}). Every folder of a data "
            "set must be readable: change its permissions, or move it out of the data set."
        ) from error


def count_images(root: Path) -> int:
    """How many labelled images lie in `root`, 0 where it is missing or damaged."""
    try:
        return len(find_unchecked(root).paths)
    except DataError:
        return 0


def split_level(text: str) -> tuple[str, str]:
    """A path or URI, and the `/*` at its end, if any."""
    bare = re.sub(r"(/\*)+$", "", text)
    return bare, text.removeprefix(bare)


def _existing_folder(path: str) -> Path:
    root = Path(path).expanduser()
    if not root.exists():
        raise DataError(f"There is no folder {root.absolute()}. Expected a folder of labelled images. {LAYOUTS}")
    if not root.is_dir():
        raise DataError(
            f"{root.absolute()} is a file. Expected a folder of labelled images: unpack it if it is an archive. "
            f"{LAYOUTS}"
        )
    return root.resolve()


def _read(folder: Folder) -> Reading | None:
    """The one reading of `folder`; None where there is none. Raises `DataError` where there are several."""
    breeds = breeds_of(folder)
    loose, sorted_ones = len(folder.images), sum(len(each.all_images) for each in folder.filled) if breeds else 0
    if breeds and sorted_ones <= FEW * (loose + sorted_ones):
        return oxford_pets(folder, breeds)
    if breeds and loose > FEW * (loose + sorted_ones):
        raise two_readings(
            folder,
            f"{loose} images are labelled by their names, such as {folder.images[0]!r}",
            f"{sorted_ones} images are labelled by the folders that they lie in ({names_of(folder.filled)})",
            f"Move one of the two elsewhere, or give '{folder.path}/*' to use the folders",
        )
    if reading := split_folders(folder):
        return reading
    if inner := container(folder):
        refuse_lost_classes([folder])
        return _read(inner)
    refuse_unclear_container(folder)
    refuse_copy_inside(folder)
    refuse_deeper_classes(folder)
    return class_folders([folder])


def _parents(top: Folder, stars: str) -> list[Folder]:
    """The folders whose folders are the classes, for a path with `stars` at its end."""
    parents = [top]
    for _ in range(stars.count("*") - 1):
        parents = [inner for parent in parents for inner in parent.filled]
    return parents


def _image_folder(top: Folder, reading: Reading, stars: str) -> ImageFolder:
    paths, names, valid = zip(*sorted(reading.labelled), strict=True)
    refuse_lost_classes(reading.parents)
    classes = tuple(sorted(set(names)))
    index = {name: label for label, name in enumerate(classes)}
    return ImageFolder(
        root=top.path,
        layout=reading.layout,
        paths=paths,
        labels=tuple(index[name] for name in names),
        classes=classes,
        valid=valid if reading.split else None,
        base=reading.base,
        stars=stars,
        split_folders=reading.split,
        unused=unused(top, paths, base=reading.base, test=reading.test, test_has_classes=reading.test_has_classes),
    )


def _warn_of_case(classes: Sequence[str]) -> None:
    folded: dict[str, list[str]] = {}
    for name in classes:
        folded.setdefault(name.casefold(), []).append(name)
    for names in folded.values():
        if len(names) > 1:
            logger.warning("classes %s differ only in case; each is a class of its own", ", ".join(map(repr, names)))
