"""Finds the labelled images in a folder: which layout it has, at which level its classes lie, and what is left unused.

All commands ask `find_images`, so they agree. A folder that can be read in two ways is refused with both readings; `/*`
at the end of its path settles it: `DIR/*` takes the folders in DIR as classes, `DIR/*/*` those one level deeper.
Imports no torch.
"""

import logging
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from trainables.data import DataError, ImageFolder, check_classes, some
from trainables.folder_tree import Folder
from trainables.leftovers import LAYOUTS, nothing_found, refuse_lost_classes, unused

logger = logging.getLogger(__name__)

PETS_NAME = re.compile(r"(.+)_\d+\.jpe?g", re.IGNORECASE | re.DOTALL)
CAMERA_NAME = re.compile(r"(img|dsc[nf]?|pxl|mvimg|vid|pict?|photo|image|screenshot|whatsapp image)?[ _-]?\d*", re.I)
"""What cameras and phones, or numbers, make of the part before the last one; it tells no class."""
ROLES = {
    "train": ("train", "training", "trn", "trainval"),
    "valid": ("val", "valid", "validation", "eval", "evaluation", "dev"),
    "test": ("test", "testing", "tst", "holdout"),
}
"""Words in the names of split folders; of several validation folders the first word's is used."""
FILLERS = ("set", "data", "dataset", "image", "images", "img", "imgs", "photos", "split", "folder", "seg", "full")
"""Words that may stand beside them: seg_train, Train Images, test_set."""
CONTAINERS = ("images", "image", "imgs", "img", "photos", "pictures", "data", "dataset", "jpegimages")
COMPANIONS = (
    "annotations", "annotation", "labels", "masks", "mask", "trimaps", "xmls", "segmentation", "segmentations",
    "segmentationclass", "segmentationobject", "ground_truth",
)  # fmt: skip
"""Folders that data sets have beside the one that holds their images."""
FEW = 0.1
"""Up to this share of the images, loose ones beside class folders (or the reverse) are no second reading."""


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
        reading = _class_folders(_parents(top, stars)) if stars else _read(top)
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


# --- Readings ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Reading:
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


def _read(folder: Folder) -> _Reading | None:
    """The one reading of `folder`; None where there is none. Raises `DataError` where there are several."""
    breeds = _breeds(folder)
    loose, sorted_ones = len(folder.images), sum(len(each.all_images) for each in folder.filled) if breeds else 0
    if breeds and sorted_ones <= FEW * (loose + sorted_ones):
        return _oxford_pets(folder, breeds)
    if breeds and loose > FEW * (loose + sorted_ones):
        raise _two_readings(
            folder,
            f"{loose} images are labelled by their names, such as {folder.images[0]!r}",
            f"{sorted_ones} images are labelled by the folders that they lie in ({_names(folder.filled)})",
            f"Move one of the two elsewhere, or give '{folder.path}/*' to use the folders",
        )
    if reading := _split_folders(folder):
        return reading
    if inner := _container(folder):
        refuse_lost_classes([folder])
        return _read(inner)
    _refuse_unclear_container(folder)
    _refuse_copy_inside(folder)
    _refuse_deeper_classes(folder)
    return _class_folders([folder])


def _breeds(folder: Folder) -> dict[str, str]:
    """The breed that each image's name tells, `<breed>_<number>.jpg`; none where most tell none, or all the same."""
    matches = ((name, PETS_NAME.fullmatch(name)) for name in folder.images)
    breeds = {name: match[1] for name, match in matches if match and not CAMERA_NAME.fullmatch(match[1])}
    return breeds if len(set(breeds.values())) > 1 and 2 * len(breeds) > len(folder.images) else {}


def _oxford_pets(folder: Folder, breeds: dict[str, str]) -> _Reading:
    others = [name for name in folder.images if name not in breeds]
    if len(others) > 0.01 * len(folder.images):
        raise DataError(
            f"{some(others, 'image', 'images')} of {len(folder.images)} in {folder.path} carry no label: the others "
            "are named <breed>_<number>.jpg (Oxford Pets layout). Rename or remove them."
        )
    labelled = [(f"{folder.prefix}{name}", unicodedata.normalize("NFC", breed), None) for name, breed in breeds.items()]
    return _Reading(layout="Oxford Pets", base=folder.prefix, labelled=labelled)


def _class_folders(parents: Sequence[Folder]) -> _Reading | None:
    """`<class>/*.jpg` in each of `parents`; folders of one name are one class."""
    folders = [each for parent in parents for each in parent.filled]
    if not folders or (len(parents) == 1 and [each.name for each in folders] == ["images"]):
        return None  # the latter is the folder of the Pets layout, with names that do not label
    base = parents[0].prefix
    while not all(parent.prefix.startswith(base) for parent in parents):
        base = base[: base.rstrip("/").rfind("/") + 1]
    return _Reading(layout="class folders", base=base, labelled=_labelled(folders, None), parents=parents)


def _labelled(folders: Iterable[Folder], valid: bool | None) -> list[tuple[str, str, bool | None]]:
    return [(path, folder.class_name, valid) for folder in folders for path in folder.all_images]


def _parents(top: Folder, stars: str) -> list[Folder]:
    """The folders whose folders are the classes, for a path with `stars` at its end."""
    parents = [top]
    for _ in range(stars.count("*") - 1):
        parents = [inner for parent in parents for inner in parent.filled]
    return parents


# --- At which level the classes lie -----------------------------------------------------------------------------------


def _container(folder: Folder) -> Folder | None:
    """The folder in `folder` that holds the data set: it is the only one, or called so beside its companions."""
    filled = [each for each in folder.filled if each.name.lower() not in COMPANIONS] or folder.filled
    if len(filled) > 1 or not filled or not _holds_classes(filled[0]):
        return None
    return filled[0] if len(folder.filled) == 1 or filled[0].name.lower() in CONTAINERS else None


def _refuse_unclear_container(folder: Folder) -> None:
    """Raises `DataError` where one of the folders in `folder` may hold the data set, or all may be parts of one."""
    others = [each for each in folder.filled if each.name.lower() not in COMPANIONS]
    containers = [each for each in others if each.name.lower() in CONTAINERS]
    for inner in others if len(others) == 1 < len(folder.filled) else containers:
        if _holds_classes(inner) and len(folder.filled) > 1:
            raise _two_readings(
                folder,
                f"{_names(folder.filled)} are the classes",
                f"{inner.name}/ holds the data set, and the others do not belong to it",
                f"Give '{folder.path}/*' for the first, or {inner.path} for the second",
            )
    if containers and len(folder.filled) > 1 and len(others) == len(containers):
        raise _two_readings(
            folder,
            f"{_names(folder.filled)} are the classes",
            "it is a data set for segmentation or detection, whose images carry no classes",
            f"Give '{folder.path}/*' for the first; for the second, sort the images into one folder per class",
        )


def _holds_classes(folder: Folder) -> bool:
    """Whether it may be a data set rather than one class."""
    return bool(_breeds(folder) if folder.images else folder.filled)


def _refuse_copy_inside(folder: Folder) -> None:
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


def _refuse_deeper_classes(folder: Folder) -> None:
    """Raises `DataError` where the folders in the folders of `folder` may be the classes."""
    filled = folder.filled
    deeper = [inner for each in filled for inner in each.filled]
    if len(filled) > 1 and len(deeper) > len(filled) and not any(each.images for each in filled):
        raise _two_readings(
            folder,
            f"the classes are {_names(filled)}, whose images lie in further folders",
            f"the classes are the folders one level deeper, {_names(deeper)}",
            f"Give '{folder.path}/*' for the first, or '{folder.path}/*/*' for the second",
        )


# --- Split folders ----------------------------------------------------------------------------------------------------


def _split_folders(folder: Folder) -> _Reading | None:
    """`train/<class>` with `val/<class>`, under any of the usual names; without the latter the classes of `train`."""
    roles = _roles(folder)
    train, valid, test = (roles.get(role) for role in ROLES)
    others = [each for each in folder.filled if each not in roles.values() and each.name.lower() not in COMPANIONS]
    classes = _class_level(train) if train else None
    if classes is None:
        _refuse_unlabelled_parts(folder, roles, others)
        return None
    _refuse_copy_inside(classes)
    test_prefix = test.prefix if test and test.holds_images else ""
    test_level = _class_level(test) if test else None
    names = {each.class_name for each in classes.filled}
    test_has_classes = test_level is not None and {each.class_name for each in test_level.filled} == names
    if valid:
        validation = _validation(train, classes, valid)
        return _Reading(
            layout="split folders",
            base=folder.prefix,
            labelled=[*_labelled(classes.filled, False), *_labelled(validation.filled, True)],
            parents=(classes, validation),
            split=(train.prefix, valid.prefix),
            test=test_prefix,
            test_has_classes=test_has_classes,
        )
    if others and not test:
        raise _two_readings(
            folder,
            f"{_names([train, *others])} are the classes",
            f"{train.name}/ is the training part of a split, with {_names(classes.filled)} as its classes",
            f"Give '{folder.path}/*' for the first, or {train.path} for the second",
        )
    _refuse_deeper_classes(classes)
    return replace(_class_folders([classes]), test=test_prefix, test_has_classes=test_has_classes)


def _roles(folder: Folder) -> dict[str, Folder]:
    """The split folders in `folder` by their part. Raises `DataError` where it is not clear which those are."""
    named = [(each, *_role(each.name)) for each in folder.folders]
    rests: dict[str, set[str]] = {}
    for _, role, _, rest in named:
        if role:
            rests.setdefault(rest, set()).add(role)
    shared = [rest for rest, roles in rests.items() if rest and len(roles) > 1]  # "birds_train" with "birds_test"
    if len(shared) > 1:
        raise _two_readings(
            folder,
            f"{_names(folder.filled)} are the classes",
            f"they are parts of a split, of {', '.join(shared)}",
            f"Give '{folder.path}/*' for the first; for the second, sort them into train/<class> and test/<class>",
        )
    found: dict[str, list[tuple[int, Folder]]] = {}
    for each, role, place, rest in named:
        if role and (not rest or list(rests) == shared):  # not "steam train"
            found.setdefault(role, []).append((place, each))
    trains = [each for _, each in found.get("train", []) if each.holds_images]
    if len(trains) > 1 and all(map(_class_level, trains)):
        raise DataError(
            f"{folder.path} has several training folders, {_names(trains)}. Leave one there, or give "
            f"'{folder.path}/*' if these are the classes."
        )
    return {role: min(parts, key=lambda part: (not part[1].holds_images, part[0]))[1] for role, parts in found.items()}


def _role(name: str) -> tuple[str, int, str]:
    """The part of a split that a folder's name tells ("" for none), which of its words does, and the other words."""
    words = re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower())
    words = [re.sub(r"(?<=[a-z])(set|data|dataset|images)$", "", word) for word in words]
    for role, known in ROLES.items():
        if len(places := [known.index(word) for word in words if word in known]) == 1:
            return role, places[0], " ".join(word for word in words if word not in (*known, *FILLERS, ""))
    return "", 0, ""


def _class_level(folder: Folder) -> Folder | None:
    """The folder whose folders are the classes: `folder`, or what alone lies in it. None where nothing is sorted."""
    while not folder.images and (inner := _container(folder)) and not inner.images:
        folder = inner
    loose = len(folder.images)
    return folder if folder.filled and loose <= FEW * len(folder.all_images) else None


def _validation(train: Folder, classes: Folder, valid: Folder) -> Folder:
    """The folder in `valid`, or itself, that has the classes of the training part."""
    known, level = {each.class_name for each in classes.filled}, valid
    while len(level.filled) == 1 and level.filled[0].class_name not in known:
        level = level.filled[0]
    if not known & {each.class_name for each in level.filled}:
        raise DataError(
            f"{valid.path} has no class folders with images that have the names of those in {train.path} "
            f"({_names(classes.filled)}). Expected {valid.name}/<class>/*.jpg. Sort its images into such folders, or "
            f"give {train.path} to have a part of the training images set aside for validation. Class names are "
            "compared letter by letter."
        )
    return level


def _refuse_unlabelled_parts(folder: Folder, roles: dict[str, Folder], others: list[Folder]) -> None:
    """Raises `DataError` where folders have the names of a split's parts, but no training part has classes."""
    train = roles.get("train")
    parts = [each for role, each in roles.items() if role != "train" and each.holds_images]
    if not parts:
        return  # a class may be called "train"
    if train and train.holds_images:
        second = "they are parts of a split whose images carry no labels"
        choose = "for the second, sort the images of each part into one folder per class"
    elif len(folder.filled) == 1:
        return  # it is looked into
    elif not others:
        raise DataError(
            f"{folder.path} has {_names(folder.filled)}, which look like parts of a split, but no training folder with "
            f"images. Add one called train, or give '{folder.path}/*' if these are the classes."
        )
    else:
        second = f"{_names(parts)} is a part of a split and no class"
        choose = f"for the second, move {_names(parts)} elsewhere"
    raise _two_readings(
        folder, f"{_names(folder.filled)} are the classes", second, f"Give '{folder.path}/*' for the first; {choose}"
    )


# --- The outcome ------------------------------------------------------------------------------------------------------


def _image_folder(top: Folder, reading: _Reading, stars: str) -> ImageFolder:
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


def _two_readings(folder: Folder, one: str, other: str, choose: str) -> DataError:
    return DataError(f"{folder.path} can be read in two ways: {one}; or {other}. {choose}.")


def _names(folders: Sequence[Folder]) -> str:
    names = list(dict.fromkeys(f"{folder.name}/" for folder in folders))
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def _warn_of_case(classes: Sequence[str]) -> None:
    folded: dict[str, list[str]] = {}
    for name in classes:
        folded.setdefault(name.casefold(), []).append(name)
    for names in folded.values():
        if len(names) > 1:
            logger.warning("classes %s differ only in case; each is a class of its own", ", ".join(map(repr, names)))
