"""At which level of a folder its classes lie, and where that is not clear. Imports no torch."""

from trainables.data.folder_tree import Folder
from trainables.data.labelled_images import DataError
from trainables.data.readings import breeds_of, names_of, two_readings
from trainables.system.text import some

CONTAINERS = ("images", "image", "imgs", "img", "photos", "pictures", "data", "dataset", "jpegimages")
COMPANIONS = (
    "annotations", "annotation", "labels", "masks", "mask", "trimaps", "xmls", "segmentation", "segmentations",
    "segmentationclass", "segmentationobject", "ground_truth",
)  # fmt: skip
"""Folders that data sets have beside the one that holds their images."""
FEW = 0.1
"""Up to this share of the images, loose ones beside class folders (or the reverse) are no second reading."""


def class_level(folder: Folder) -> Folder | None:
    """The folder whose folders are the classes: `folder`, or what alone lies in it. None where nothing is sorted."""
    while not folder.images and (inner := container(folder)) and not inner.images:
        folder = inner
    loose = len(folder.images)
    return folder if folder.filled and loose <= FEW * len(folder.all_images) else None


def container(folder: Folder) -> Folder | None:
    """The folder in `folder` that holds the data set: it is the only one, or called so beside its companions."""
    filled = [each for each in folder.filled if each.name.lower() not in COMPANIONS] or folder.filled
    if len(filled) > 1 or not filled or not _holds_classes(filled[0]):
        return None
    return filled[0] if len(folder.filled) == 1 or filled[0].name.lower() in CONTAINERS else None


def refuse_unclear_container(folder: Folder) -> None:
    """Raises `DataError` where one of the folders in `folder` may hold the data set, or all may be parts of one."""
    others = [each for each in folder.filled if each.name.lower() not in COMPANIONS]
    containers = [each for each in others if each.name.lower() in CONTAINERS]
    for inner in others if len(others) == 1 < len(folder.filled) else containers:
        if _holds_classes(inner) and len(folder.filled) > 1:
            raise two_readings(
                folder,
                f"{names_of(folder.filled)} are the classes",
                f"{inner.name}/ holds the data set, and the others do not belong to it",
                f"Give '{folder.path}/*' for the first, or {inner.path} for the second",
            )
    if containers and len(folder.filled) > 1 and len(others) == len(containers):
        raise two_readings(
            folder,
            f"{names_of(folder.filled)} are the classes",
            "it is a data set for segmentation or detection, whose images carry no classes",
            f"Give '{folder.path}/*' for the first; for the second, sort the images into one folder per class",
        )


def _holds_classes(folder: Folder) -> bool:
    """Whether it may be a data set rather than one class."""
    return bool(breeds_of(folder) if folder.images else folder.filled)


def refuse_copy_inside(folder: Folder) -> None:
    """Raises `DataError` where one of the class folders in `folder` holds the other classes' folders."""
    names = {each.class_name.casefold() for each in folder.filled}
    for each in folder.filled if len(names) > 1 else ():
        again = names & {inner.class_name.casefold() for inner in each.filled} - {each.class_name.casefold()}
        if 2 * len(again) >= len(names) - 1:
            raise DataError(
                f"{each.path} contains folders with the names of the folders beside it "
                f"({some(sorted(again), 'name', 'names')}): it looks like a second copy of the data set inside itself. "
                f"Remove it or move it away; or give {each.path} to use that copy, or '{folder.path}/*' if {each.name} "
                "is a class like the others."
            )


def refuse_deeper_classes(folder: Folder) -> None:
    """Raises `DataError` where the folders in the folders of `folder` may be the classes."""
    filled = folder.filled
    deeper = [inner for each in filled for inner in each.filled]
    if len(filled) > 1 and len(deeper) > len(filled) and not any(each.images for each in filled):
        raise two_readings(
            folder,
            f"the classes are {names_of(filled)}, whose images lie in further folders",
            f"the classes are the folders one level deeper, {names_of(deeper)}",
            f"Give '{folder.path}/*' for the first, or '{folder.path}/*/*' for the second",
        )
