"""A reading is one way to take the images of a folder; here are those by class folders and by file names. No torch."""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from trainables.data.folder_tree import Folder
from trainables.data.labelled_images import DataError
from trainables.system.text import some

PETS_NAME = re.compile(r"(.+)_\d+\.jpe?g", re.IGNORECASE | re.DOTALL)
CAMERA_NAME = re.compile(r"(img|dsc[nf]?|pxl|mvimg|vid|pict?|photo|image|screenshot|whatsapp image)?[ _-]?\d*", re.I)
"""What cameras and phones, or numbers, make of the part before the last one; it tells no class."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One way to take the images of a folder."""

    layout: str
    base: str
    """The folder that holds the classes, or the split folders, as a prefix of `Folder`."""
    labelled: list[tuple[str, str, bool | None]]
    """Path, class, and whether the data set itself sets the image aside for validation."""
    parents: Sequence[Folder] = ()
    """The folders whose folders are the classes."""
    split: tuple[str, str] | None = None
    """The folders that train and that validate, as `base`."""
    test: str = ""
    """A folder of test images, as `base`."""
    test_has_classes: bool = False
    """Whether they are sorted into folders of the same names as the classes."""


def class_folders(parents: Sequence[Folder]) -> Reading | None:
    """`<class>/*.jpg` in each of `parents`; folders of one name are one class."""
    folders = [each for parent in parents for each in parent.filled]
    if not folders or (len(parents) == 1 and [each.name for each in folders] == ["images"]):
        return None  # the latter is the folder of the Pets layout, with names that do not label
    base = parents[0].prefix
    while not all(parent.prefix.startswith(base) for parent in parents):
        base = base[: base.rstrip("/").rfind("/") + 1]
    return Reading(layout="class folders", base=base, labelled=labelled(folders, None), parents=parents)


def labelled(folders: Iterable[Folder], valid: bool | None) -> list[tuple[str, str, bool | None]]:
    return [(path, folder.class_name, valid) for folder in folders for path in folder.all_images]


def breeds_of(folder: Folder) -> dict[str, str]:
    """The breed that each image's name tells, `<breed>_<number>.jpg`; none where most tell none, or all the same."""
    matches = ((name, PETS_NAME.fullmatch(name)) for name in folder.images)
    breeds = {name: match[1] for name, match in matches if match and not CAMERA_NAME.fullmatch(match[1])}
    return breeds if len(set(breeds.values())) > 1 and 2 * len(breeds) > len(folder.images) else {}


def oxford_pets(folder: Folder, breeds: dict[str, str]) -> Reading:
    others = [name for name in folder.images if name not in breeds]
    if len(others) > 0.01 * len(folder.images):
        raise DataError(
            f"{some(others, 'image', 'images')} of {len(folder.images)} in {folder.path} carry no label: the others "
            "are named <breed>_<number>.jpg (Oxford Pets layout). Rename or remove them."
        )
    labelled = [(f"{folder.prefix}{name}", unicodedata.normalize("NFC", breed), None) for name, breed in breeds.items()]
    return Reading(layout="Oxford Pets", base=folder.prefix, labelled=labelled)


def two_readings(folder: Folder, one: str, other: str, choose: str) -> DataError:
    return DataError(f"{folder.path} can be read in two ways: {one}; or {other}. {choose}.")


def names_of(folders: Sequence[Folder]) -> str:
    names = list(dict.fromkeys(f"{folder.name}/" for folder in folders))
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
