"""Training and validation images in folders of their own: `train/<class>` with `val/<class>`. Imports no torch."""

import re
from dataclasses import replace

from trainables.data.class_level import COMPANIONS, class_level, refuse_copy_inside, refuse_deeper_classes
from trainables.data.folder_tree import Folder
from trainables.data.labelled_images import DataError
from trainables.data.readings import Reading, class_folders, labelled, names_of, two_readings

ROLES = {
    "train": ("train", "training", "trn", "trainval"),
    "valid": ("val", "valid", "validation", "eval", "evaluation", "dev"),
    "test": ("test", "testing", "tst", "holdout"),
}
"""Words in the names of split folders; of several validation folders the first word's is used."""
FILLERS = ("set", "data", "dataset", "image", "images", "img", "imgs", "photos", "split", "folder", "seg", "full")
"""Words that may stand beside them: seg_train, Train Images, test_set."""


def split_folders(folder: Folder) -> Reading | None:
    """`train/<class>` with `val/<class>`, under any of the usual names; without the latter the classes of `train`."""
    roles = _roles(folder)
    train, valid, test = (roles.get(role) for role in ROLES)
    others = [each for each in folder.filled if each not in roles.values() and each.name.lower() not in COMPANIONS]
    classes = class_level(train) if train else None
    if classes is None:
        _refuse_unlabelled_parts(folder, roles, others)
        return None
    refuse_copy_inside(classes)
    test_prefix = test.prefix if test and test.holds_images else ""
    test_level = class_level(test) if test else None
    names = {each.class_name for each in classes.filled}
    test_has_classes = test_level is not None and {each.class_name for each in test_level.filled} == names
    if valid:
        validation = _validation(train, classes, valid)
        return Reading(
            layout="split folders",
            base=folder.prefix,
            labelled=[*labelled(classes.filled, False), *labelled(validation.filled, True)],
            parents=(classes, validation),
            split=(train.prefix, valid.prefix),
            test=test_prefix,
            test_has_classes=test_has_classes,
        )
    if others and not test:
        raise two_readings(
            folder,
            f"{names_of([train, *others])} are the classes",
            f"{train.name}/ is the training part of a split, with {names_of(classes.filled)} as its classes",
            f"Give '{folder.path}/*' for the first, or {train.path} for the second",
        )
    refuse_deeper_classes(classes)
    return replace(class_folders([classes]), test=test_prefix, test_has_classes=test_has_classes)


def _roles(folder: Folder) -> dict[str, Folder]:
    """The split folders in `folder` by their part. Raises `DataError` where it is not clear which those are."""
    named = [(each, *_role(each.name)) for each in folder.folders]
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
            f"{folder.path} has several training folders, {names_of(trains)}. Leave one there, or give "
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


def _validation(train: Folder, classes: Folder, valid: Folder) -> Folder:
    """The folder in `valid`, or itself, that has the classes of the training part."""
    known, level = {each.class_name for each in classes.filled}, valid
    while len(level.filled) == 1 and level.filled[0].class_name not in known:
        level = level.filled[0]
    if not known & {each.class_name for each in level.filled}:
        raise DataError(
            f"{valid.path} has no class folders with images that have the names of those in {train.path} "
            f"({names_of(classes.filled)}). Expected {valid.name}/<class>/*.jpg. Sort its images into such folders, or "
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
            f"{folder.path} has {names_of(folder.filled)}, which look like parts of a split, but no training folder "
            f"with images. Add one called train, or give '{folder.path}/*' if these are the classes."
        )
    else:
        second = f"{names_of(parts)} is a part of a split and no class"
        choose = f"for the second, move {names_of(parts)} elsewhere"
    raise two_readings(
        folder, f"{names_of(folder.filled)} are the classes", second, f"Give '{folder.path}/*' for the first; {choose}"
    )
