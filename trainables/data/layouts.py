"""Finds the labelled images in a folder: which layout it has, at which level its classes lie, and what stays unused.

All commands call `find_images`, so they agree. A folder that can be read in two ways is refused with both readings;
`/*` at the end of its path decides: `DIR/*` takes the folders in DIR as classes, `DIR/*/*` those one level deeper.
Tables of labels and archives have modules of their own, `label_tables` and `shards`.
Imports no torch.
"""

import logging
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from trainables.data import label_tables, readings, shards
from trainables.data.address import DataAddress
from trainables.data.folder_tree import Folder, identity
from trainables.data.labelled_images import DataError, ImageFolder, Unused, check_classes
from trainables.data.readings import MAX_STRAY, Reading
from trainables.data.table_files import is_table
from trainables.system.text import many

logger = logging.getLogger(__name__)

LAYOUTS = (
    "Supported layouts: class folders (<class>/*.jpg), split folders (train/<class>/*.jpg with val/<class>/*.jpg), "
    "Oxford Pets (images/<breed>_<number>.jpg), tables of paths and labels (labels.csv, or metadata.csv in the folder) "
    "and WebDataset (*.tar), with images in any format that Pillow reads."
)
NEEDS = {
    ".heic": "install pillow-heif to read them",
    ".heif": "install pillow-heif to read them",
    ".avif": "install pillow-avif-plugin to read them",
    ".jxl": "install pillow-jxl-plugin to read them",
    ".svg": "convert them to PNG",
    ".dcm": "convert them to PNG, with pydicom for example",
    **dict.fromkeys((".cr2", ".cr3", ".nef", ".arw", ".dng", ".orf", ".rw2", ".raf"), "develop them to JPEG or TIFF"),
}
"""What to do with images that Pillow does not read by itself, by suffix."""
PHOTOS = (".heic", ".heif", ".avif", ".jxl", ".dcm")
"""Those that people train on; raw files and drawings may accompany the images."""
MAX_NAMED = 3
"""Files that are named for each reason."""


def find_images(root: Path | str) -> ImageFolder:
    """The labelled images of `root`, a folder, a table of labels or an archive, see `address`.

    Raises `DataError` if they cannot be used.
    """
    found = find_unchecked(root)
    check_classes(found)
    _warn_of_case(found.classes)
    logger.debug("%s", found.describe())
    return found


def find_unchecked(root: Path | str) -> ImageFolder:
    """The same for any number of images in a class."""
    try:
        address = DataAddress.of(str(root))
        if address.path.is_file() and is_table(address.path.name):
            return label_tables.in_table(address)
        if address.path.is_file() and shards.is_archive(address.path.name):
            return shards.in_archive(address)
        top = Folder(_existing_folder(address.path))
        for find in () if address.stars else (shards.in_folder, shards.in_samples, label_tables.in_metadata):
            if found := find(top, address):
                return found
        reading = readings.class_folders(_parents(top, address.stars)) if address.stars else read(top)
        if reading is None:
            raise _nothing_found(top)
        return _image_folder(top, reading, address.stars)
    except OSError as error:
        raise DataError(
            f"{error.filename or root} cannot be read ({error.strerror or error}). Every folder of a data set must be "
            "readable: change its permissions, or move it out of the data set."
        ) from error


def root_of(given: str) -> Path:
    """The folder that the paths of the images in `given` are relative to, whether or not it is there."""
    address = DataAddress.of(given)
    is_file = is_table(address.path.name) and not address.path.is_dir()
    folder = address.path.parent if is_file else address.path
    return shards.unpacked_folder(address) or address.images_in(folder)


def count_images(root: Path) -> int:
    """The number of labelled images in `root`, 0 if it is missing or damaged."""
    try:
        return len(find_unchecked(root).paths)
    except DataError:
        return 0


def read(folder: Folder) -> Reading | None:
    """The one reading of `folder`, or None. Raises `DataError` if there are several."""
    breeds = readings.breeds_of(folder)
    num_loose, num_sorted = len(folder.images), sum(len(each.all_images) for each in folder.filled) if breeds else 0
    if breeds and num_sorted <= MAX_STRAY * (num_loose + num_sorted):
        return readings.oxford_pets(folder, breeds)
    if breeds and num_loose > MAX_STRAY * (num_loose + num_sorted):
        raise readings.two_readings(
            folder,
            f"{num_loose} images are labelled by their names, such as {folder.images[0]!r}",
            f"{num_sorted} images are labelled by their folders ({readings.names_of(folder.filled)})",
            f"Move one of the two elsewhere, or give '{folder.path}/*' to use the folders",
        )
    if reading := readings.split_folders(folder):
        return reading
    if inner := readings.container(folder):
        _refuse_unreadable_classes([folder])
        return read(inner)
    readings.refuse_unclear_container(folder)
    readings.refuse_copy_inside(folder)
    readings.refuse_deeper_classes(folder)
    return readings.class_folders([folder])


def _existing_folder(root: Path) -> Path:
    if root.is_dir():
        return root.resolve()
    kind = "file" if is_table(root.name) or shards.is_archive(root.name) else "folder"
    problem = f"There is no {kind} {root.absolute()}. Expected a folder of labelled images."
    if root.exists():
        problem = f"{root.absolute()} is a file. Expected a folder of labelled images: unpack it if it is an archive."
    raise DataError(f"{problem} {LAYOUTS}")


def _parents(top: Folder, stars: str) -> list[Folder]:
    """The folders whose folders are the classes, for a path with `stars` at its end."""
    parents = [top]
    for _ in range(stars.count("*") - 1):
        parents = [inner for parent in parents for inner in parent.filled]
    return parents


def _image_folder(top: Folder, reading: Reading, stars: str) -> ImageFolder:
    paths, names, valid = zip(*sorted(reading.labelled), strict=True)
    _refuse_unreadable_classes(reading.parents)
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
        unused=_unused(top, paths, reading),
    )


def _warn_of_case(classes: Sequence[str]) -> None:
    folded: dict[str, list[str]] = {}
    for name in classes:
        folded.setdefault(name.casefold(), []).append(name)
    for names in folded.values():
        if len(names) > 1:
            logger.warning("classes %s differ only in case; each is a class of its own", ", ".join(map(repr, names)))


# --- Files that are not used ------------------------------------------------------------------------------------------


def _unused(top: Folder, used: Sequence[str], reading: Reading) -> tuple[Unused, ...]:
    """What lies in `top` but not among the paths `used`: images by where they lie, other files by their suffix."""
    test_advice = "they have no labels of these classes; search.predict labels them"
    if reading.test_has_classes:
        test_advice = f"--test-split {shlex.quote(str(top.path / reading.test))} tests the winner on them"
    found: dict[tuple[str, str, str], list[str]] = {}
    for path in _unused_images(top, used):
        if reading.test and path.startswith(reading.test):
            found.setdefault(("image", f" in {reading.test}", test_advice), []).append(path)
        else:
            found.setdefault(("image", _place(path, reading.base), ""), []).append(path)
    for folder in top.walk():
        for path in _system_images(folder):
            found.setdefault(("hidden or system image", "", ""), []).append(path)
        for name in folder.others:
            suffix = Path(name).suffix.lower()
            kind = (f"{suffix} file", "", NEEDS[suffix]) if suffix in NEEDS else ("other file", "", "")
            found.setdefault(kind, []).append(f"{folder.prefix}{name}")
    return tuple(
        Unused(f"{many(len(paths), what)}{where}", advice, len(paths), tuple(sorted(paths)[:MAX_NAMED]))
        for (what, where, advice), paths in found.items()
    )


def _unused_images(top: Folder, used: Iterable[str]) -> Iterator[str]:
    """The other images, without those that `used` reaches by a link."""
    used = set(used)
    used_folders = {path.rpartition("/")[0] for path in used}
    linked = {identity(top.path / folder) for folder in used_folders}
    for folder in top.walk():
        if folder.prefix.rstrip("/") in used_folders or folder.identity not in linked:
            yield from (path for image in folder.images if (path := f"{folder.prefix}{image}") not in used)


def _system_images(folder: Folder) -> Iterator[str]:
    yield from (f"{folder.prefix}{name}" for name in folder.system_images)
    for inner in folder.system_folders:
        with suppress(OSError):  # only root reads lost+found
            yield from inner.all_images


def _place(path: str, base: str) -> str:
    """Where an unused image lies."""
    parent = base if path.startswith(base) else ""
    folder, slash, _ = path.removeprefix(parent).partition("/")
    return f" in {parent}{folder}/" if slash else " without a label in the name or folder"


def _refuse_unreadable_classes(parents: Iterable[Folder]) -> None:
    """Raises `DataError` if a folder next to class folders has mostly photos of a format that is not read."""
    for folder in (each for parent in parents for each in parent.folders if not each.holds_images):
        suffixes = _suffixes(folder)
        suffix = max(PHOTOS, key=suffixes.__getitem__)
        if 2 * suffixes[suffix] > suffixes.total():
            raise DataError(
                f"{folder.path} looks like a class, but none of its images can be read: it has "
                f"{many(suffixes[suffix], f'{suffix} file')} ({NEEDS[suffix]}). Otherwise move the folder out of the "
                "data set."
            )


def _nothing_found(top: Folder) -> DataError:
    """Why there are no labelled images in `top`."""
    tables = [name for name in top.others if is_table(name)]
    table = f" If {tables[0]} has their labels, give {top.path / tables[0]}." if tables else ""
    for folder in (*(each for each in top.folders if each.name == "images"), top):
        if folder.images:
            return DataError(
                f"The names of the {len(folder.images)} images in {folder.path} do not tell two classes apart (the "
                f"first is {folder.images[0]!r}). Sort them into one folder per class, or name them "
                f"<class>_<number>.jpg.{table} {LAYOUTS}"
            )
    suffixes = _suffixes(top)
    others = ", ".join(f"{count} {suffix or 'without a suffix'}" for suffix, count in suffixes.most_common(5))
    advice = "".join(f" {suffix}: {NEEDS[suffix]}." for suffix in suffixes if suffix in NEEDS)
    there = f" (other files: {others})" if others else ""
    return DataError(f"There are no images that can be read in {top.path}{there}.{advice}{table} {LAYOUTS}")


def _suffixes(folder: Folder) -> Counter[str]:
    """Of all other files below."""
    return Counter(Path(name).suffix.lower() for inner in folder.walk() for name in inner.others)
