"""The ways to read a folder as labelled images: class folders, split folders, Oxford Pets. Imports no torch.

A layout is a function that returns a `Reading`; `layouts.read` chooses among them.
"""

import re
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from trainables.data.folder_tree import Folder
from trainables.data.labelled_images import DataError
from trainables.system.text import some

PETS_NAME = re.compile(r"(.+)_\d+\.jpe?g", re.IGNORECASE | re.DOTALL)
CAMERA_NAME = re.compile(r"(img|dsc[nf]?|pxl|mvimg|vid|pict?|photo|image|screenshot|whatsapp image)?[ _-]?\d*", re.I)
"""What cameras and phones put before the last number. It names no class."""
CONTAINERS = ("images", "image", "imgs", "img", "photos", "pictures", "data", "dataset", "jpegimages")
COMPANIONS = (
    "annotations", "annotation", "labels", "masks", "mask", "trimaps", "xmls", "segmentation", "segmentations",
    "segmentationclass", "segmentationobject", "ground_truth",
)  # fmt: skip
"""Folders that data sets have next to the one with their images."""
MAX_STRAY = 0.1
"""Up to this share of the images, loose ones next to class folders (or the reverse) are not a second reading."""
MAX_UNNAMED = 0.01
"""Up to this share of the images of the Oxford Pets layout may have names without a breed."""
ROLES = {
    "train": ("train", "training", "trn", "trainval"),
    "valid": ("val", "valid", "validation", "eval", "evaluation", "dev"),
    "test": ("test", "testing", "tst", "holdout"),
}
"""Words in the names of split folders. Of several validation folders, the one whose word comes first is used."""
FILLERS = ("set", "data", "dataset", "image", "images", "img", "imgs", "photos", "split", "folder", "seg", "full")
"""Words that may come with them: seg_train, Train Images, test_set."""

Labelled = tuple[str, str, bool | None]
"""Path, class, and whether the data set itself uses the image for validation."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One way to read the images of a folder."""

    layout: str
    base: str
    """The folder that holds the classes, or the split folders, as a prefix of `Folder`."""
    labelled: list[Labelled]
    parents: Sequence[Folder] = ()
    """The folders whose folders are the classes."""
    split: tuple[str, str] | None = None
    """The training and the validation folder, as `base`."""
    test: str = ""
    """A folder of test images, as `base`."""
    test_has_classes: bool = False
    """Whether they are sorted into folders with the names of the classes."""


def two_readings(folder: Folder, one: str, other: str, choose: str) -> DataError:
    return DataError(f"{folder.path} can be read in two ways: {one}; or {other}. {choose}.")


def names_of(folders: Sequence[Folder]) -> str:
    names = list(dict.fromkeys(f"{folder.name}/" for folder in folders))
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


# --- Class folders ----------------------------------------------------------------------------------------------------


def class_folders(parents: Sequence[Folder]) -> Reading | None:
    """`<class>/*.jpg` in each of `parents`; folders of one name are one class."""
    folders = [each for parent in parents for each in parent.filled]
    if not folders or (len(parents) == 1 and [each.name for each in folders] == ["images"]):
        return None  # the latter is the folder of the Pets layout, with names that are no labels
    base = parents[0].prefix
    while not all(parent.prefix.startswith(base) for parent in parents):
        base = base[: base.rstrip("/").rfind("/") + 1]
    return Reading(layout="class folders", base=base, labelled=labelled(folders, None), parents=parents)


def labelled(folders: Iterable[Folder], valid: bool | None) -> list[Labelled]:
    return [(path, folder.class_name, valid) for folder in folders for path in folder.all_images]


def class_level(folder: Folder) -> Folder | None:
    """The folder whose folders are the classes: `folder`, or the only one in it. None if nothing is sorted."""
    while not folder.images and (inner := container(folder)) and not inner.images:
        folder = inner
    return folder if folder.filled and len(folder.images) <= MAX_STRAY * len(folder.all_images) else None


def container(folder: Folder) -> Folder | None:
    """The folder in `folder` that holds the data set: the only one, or one with a typical name and companions."""
    filled = _without_companions(folder) or folder.filled
    if len(filled) != 1 or not _may_hold_classes(filled[0]):
        return None
    return filled[0] if len(folder.filled) == 1 or filled[0].name.lower() in CONTAINERS else None


def refuse_unclear_container(folder: Folder) -> None:
    """Raises `DataError` if one of the folders in `folder` may hold the data set, or all may be parts of one."""
    if len(folder.filled) < 2:
        return
    first = f"{names_of(folder.filled)} are the classes"
    others = _without_companions(folder)
    containers = [each for each in others if each.name.lower() in CONTAINERS]
    for inner in others if len(others) == 1 else containers:
        if _may_hold_classes(inner):
            raise two_readings(
                folder,
                first,
                f"{inner.name}/ holds the data set, and the others do not belong to it",
                f"Give '{folder.path}/*' for the first, or {inner.path} for the second",
            )
    if containers and len(others) == len(containers):
        raise two_readings(
            folder,
            first,
            "it is a data set for segmentation or detection, whose images have no classes",
            f"Give '{folder.path}/*' for the first; for the second, sort the images into one folder per class",
        )


def _without_companions(folder: Folder) -> list[Folder]:
    return [each for each in folder.filled if each.name.lower() not in COMPANIONS]


def _may_hold_classes(folder: Folder) -> bool:
    """Whether it may be a data set rather than one class."""
    return bool(breeds_of(folder) if folder.images else folder.filled)


def refuse_copy_inside(folder: Folder) -> None:
    """Raises `DataError` if one of the class folders in `folder` holds the other classes' folders."""
    names = {each.class_name.casefold() for each in folder.filled}
    for each in folder.filled if len(names) > 1 else ():
        again = names & {inner.class_name.casefold() for inner in each.filled} - {each.class_name.casefold()}
        if 2 * len(again) >= len(names) - 1:
            raise DataError(
                f"{each.path} contains folders with the names of its neighbours "
                f"({some(sorted(again), 'name', 'names')}): it looks like a second copy of the data set inside itself. "
                f"Remove it or move it away; or give {each.path} to use that copy, or '{folder.path}/*' if {each.name} "
                "is a class like the others."
            )


def refuse_deeper_classes(folder: Folder) -> None:
    """Raises `DataError` if the folders in the folders of `folder` may be the classes."""
    filled = folder.filled
    deeper = [inner for each in filled for inner in each.filled]
    if len(filled) > 1 and len(deeper) > len(filled) and not any(each.images for each in filled):
        raise two_readings(
            folder,
            f"the classes are {names_of(filled)}, whose images lie in further folders",
            f"the classes are the folders one level deeper, {names_of(deeper)}",
            f"Give '{folder.path}/*' for the first, or '{folder.path}/*/*' for the second",
        )


# --- Oxford Pets: labels in the names of the files --------------------------------------------------------------------


def breeds_of(folder: Folder) -> dict[str, str]:
    """Image -> breed, for names like `<breed>_<number>.jpg`; empty if most names have none, or all the same."""
    matches = ((name, PETS_NAME.fullmatch(name)) for name in folder.images)
    breeds = {name: match[1] for name, match in matches if match and not CAMERA_NAME.fullmatch(match[1])}
    return breeds if len(set(breeds.values())) > 1 and 2 * len(breeds) > len(folder.images) else {}


def oxford_pets(folder: Folder, breeds: dict[str, str]) -> Reading:
    others = [name for name in folder.images if name not in breeds]
    if len(others) > MAX_UNNAMED * len(folder.images):
        raise DataError(
            f"{some(others, 'image', 'images')} of {len(folder.images)} in {folder.path} have no label: the others "
            "are named <breed>_<number>.jpg (Oxford Pets layout). Rename or remove them."
        )
    labelled: list[Labelled] = [
        (f"{folder.prefix}{name}", unicodedata.normalize("NFC", breed), None) for name, breed in breeds.items()
    ]
    return Reading(layout="Oxford Pets", base=folder.prefix, labelled=labelled)


# --- Split folders: training and validation images apart --------------------------------------------------------------


def split_folders(folder: Folder) -> Reading | None:
    """`train/<class>` with `val/<class>`, under any of the usual names; without the latter the classes of `train`."""
    roles = _roles(folder)
    train, valid, test = (roles.get(role) for role in ROLES)
    others = [each for each in _without_companions(folder) if each not in roles.values()]
    classes = class_level(train) if train else None
    if train is None or classes is None:
        _refuse_unlabelled_parts(folder, roles, others)
        return None
    refuse_copy_inside(classes)
    if valid:
        validation = _validation(train, classes, valid)
        reading: Reading | None = Reading(
            layout="split folders",
            base=folder.prefix,
            labelled=[*labelled(classes.filled, False), *labelled(validation.filled, True)],
            parents=(classes, validation),
            split=(train.prefix, valid.prefix),
        )
    elif others and not test:
        raise two_readings(
            folder,
            f"{names_of([train, *others])} are the classes",
            f"{train.name}/ is the training part of a split, with {names_of(classes.filled)} as its classes",
            f"Give '{folder.path}/*' for the first, or {train.path} for the second",
        )
    else:
        refuse_deeper_classes(classes)
        reading = class_folders([classes])
    if reading is None or test is None or not test.holds_images:
        return reading
    level = class_level(test)
    return replace(
        reading, test=test.prefix, test_has_classes=level is not None and _class_names(level) == _class_names(classes)
    )


def _class_names(folder: Folder) -> set[str]:
    return {each.class_name for each in folder.filled}


def _roles(folder: Folder) -> dict[str, Folder]:
    """The split folders in `folder` by their role. Raises `DataError` if it is not clear which those are."""
    named = [(each, *role_of(each.name)) for each in folder.folders]
    rests: dict[str, set[str]] = {}
    for _, role, _, rest in named:
        if role:
            rests.setdefault(rest, set()).add(role)
    shared = [rest for rest, roles in rests.items() if rest and len(roles) > 1]  # "birds_train" with "birds_test"
    if len(shared) > 1:
        raise two_readings(
            folder,
            f"{names_of(folder.filled)} are the classes",
            f"they are parts of a split, of {', '.join(shared)}",
            f"Give '{folder.path}/*' for the first; for the second, sort them into train/<class> and test/<class>",
        )
    found: dict[str, list[tuple[int, Folder]]] = {}
    for each, role, place, rest in named:
        if role and (not rest or list(rests) == shared):  # not "steam train"
            found.setdefault(role, []).append((place, each))
    trains = [each for _, each in found.get("train", []) if each.holds_images]
    if len(trains) > 1 and all(map(class_level, trains)):
        raise DataError(
            f"{folder.path} has several training folders, {names_of(trains)}. Keep one of them there, or give "
            f"'{folder.path}/*' if these are the classes."
        )
    return {role: min(parts, key=lambda part: (not part[1].holds_images, part[0]))[1] for role, parts in found.items()}


def role_of(name: str) -> tuple[str, int, str]:
    """The role that a folder's name tells ("" for none), the place of its word in `ROLES`, and the other words."""
    words = re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower())
    words = [re.sub(r"(?<=[a-z])(set|data|dataset|images)$", "", word) for word in words]
    for role, known in ROLES.items():
        if len(places := [known.index(word) for word in words if word in known]) == 1:
            return role, places[0], " ".join(word for word in words if word not in (*known, *FILLERS, ""))
    return "", 0, ""


def _validation(train: Folder, classes: Folder, valid: Folder) -> Folder:
    """The folder in `valid`, or itself, that has the classes of the training part."""
    known, level = _class_names(classes), valid
    while len(level.filled) == 1 and level.filled[0].class_name not in known:
        level = level.filled[0]
    if not known & _class_names(level):
        raise DataError(
            f"{valid.path} has no class folders with images that have the names of those in {train.path} "
            f"({names_of(classes.filled)}). Expected {valid.name}/<class>/*.jpg. Sort its images into such folders, or "
            f"give {train.path} to have a part of the training images set aside for validation. Class names are "
            "compared letter by letter."
        )
    return level


def _refuse_unlabelled_parts(folder: Folder, roles: dict[str, Folder], others: Collection[Folder]) -> None:
    """Raises `DataError` if folders have the names of a split's parts, but no training part has classes."""
    train = roles.get("train")
    parts = [each for role, each in roles.items() if role != "train" and each.holds_images]
    if not parts:
        return  # a class may be called "train"
    if train and train.holds_images:
        second = "they are parts of a split whose images have no labels"
        choose = "for the second, sort the images of each part into one folder per class"
    elif len(folder.filled) == 1:
        return  # it is the container of the data set
    elif not others:
        raise DataError(
            f"{folder.path} has {names_of(folder.filled)}, which look like parts of a split, but no training folder "
            f"with images. Add one called train, or give '{folder.path}/*' if these are the classes."
        )
    else:
        second = f"{names_of(parts)} is a part of a split and not a class"
        choose = f"for the second, move {names_of(parts)} elsewhere"
    raise two_readings(
        folder, f"{names_of(folder.filled)} are the classes", second, f"Give '{folder.path}/*' for the first; {choose}"
    )
