"""What lies in a data set's folder and is not read, by reason: nothing is left out without a word. Imports no torch."""

import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from trainables.data.folder_tree import Folder, identity
from trainables.data.labelled_images import DataError, Unused
from trainables.system.text import many

LAYOUTS = (
    "The layouts that are read: class folders (<class>/*.jpg), split folders (train/<class>/*.jpg with "
    "val/<class>/*.jpg) and Oxford Pets (images/<breed>_<number>.jpg), in any format that Pillow reads."
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
"""Images that Pillow does not read by itself, by suffix, and what to do."""
PHOTOS = (".heic", ".heif", ".avif", ".jxl", ".dcm")
"""Those of them that people train on; raw files and drawings may lie beside the images."""
NAMED = 3
"""So many files are named for each reason."""


def unused(top: Folder, used: Sequence[str], *, base: str, test: str, test_has_classes: bool) -> tuple[Unused, ...]:
    """What lies in `top` but not among the paths `used`: images by where they lie, other files by their suffix.

    `base` is the folder that holds the classes; `test` is one with test images, sorted into the same classes or not.
    """
    advice = "they carry no labels of these classes; search.predict labels them"
    if test_has_classes:
        advice = f"--test-split {shlex.quote(str(top.path / test))} tests the winner on them"
    found: dict[tuple[str, str, str], list[str]] = {}
    for path in _unused_images(top, used):
        if test and path.startswith(test):
            found.setdefault(("image", f" in {test}", advice), []).append(path)
        else:
            found.setdefault(("image", _place(path, base), ""), []).append(path)
    for folder in top.walk():
        for path in _system_images(folder):
            found.setdefault(("hidden or system image", "", ""), []).append(path)
        for name in folder.others:
            suffix = Path(name).suffix.lower()
            kind = (f"{suffix} file", "", NEEDS[suffix]) if suffix in NEEDS else ("other file", "", "")
            found.setdefault(kind, []).append(f"{folder.prefix}{name}")
    return tuple(
        Unused(f"{many(len(paths), what)}{where}", advice, len(paths), tuple(sorted(paths)[:NAMED]))
        for (what, where, advice), paths in found.items()
    )


def _unused_images(top: Folder, used: Iterable[str]) -> Iterator[str]:
    """The other images; those that `used` reaches by a link are used, too."""
    used = set(used)
    used_folders = {path.rpartition("/")[0] for path in used}
    linked = {identity(top.path / folder) for folder in used_folders}
    for folder in top.walk():
        if folder.prefix.rstrip("/") in used_folders or folder.identity not in linked:
            yield from (path for image in folder.images if (path := f"{folder.prefix}{image}") not in used)


def _system_images(folder: Folder) -> Iterator[str]:
    yield from (f"{folder.prefix}{name}" for name in folder.system_images)
    for inner in folder.system_folders:
        with suppress(OSError):  # lost+found is root's alone
            yield from inner.all_images


def _place(path: str, base: str) -> str:
    """Where an image lies that is not read."""
    parent = base if path.startswith(base) else ""
    folder, slash, _ = path.removeprefix(parent).partition("/")
    return f" in {parent}{folder}/" if slash else " without a label in the name or folder"


def refuse_lost_classes(parents: Iterable[Folder]) -> None:
    """Raises `DataError` where a folder beside class folders has mostly photos, but of a format that is not read."""
    for folder in (each for parent in parents for each in parent.folders if not each.holds_images):
        suffixes = Counter(suffix for inner in folder.walk() for suffix in _suffixes(inner))
        suffix, count = max(((each, suffixes[each]) for each in PHOTOS), key=lambda pair: pair[1])
        if 2 * count > suffixes.total():
            raise DataError(
                f"{folder.path} looks like a class, but none of its images can be read: it has {count} {suffix} "
                f"{'file' if count == 1 else 'files'} ({NEEDS[suffix]}). Otherwise move the folder out of the data set."
            )


def nothing_found(top: Folder) -> DataError:
    """Why there are no labelled images in `top`."""
    for folder in (*(each for each in top.folders if each.name == "images"), top):
        if folder.images:
            return DataError(
                f"The {len(folder.images)} images in {folder.path} do not tell two classes apart by their names (the "
                f"first is {folder.images[0]!r}). Sort them into one folder per class, or name them "
                f"<class>_<number>.jpg. {LAYOUTS}"
            )
    suffixes = Counter(suffix for folder in top.walk() for suffix in _suffixes(folder))
    others = ", ".join(f"{count} {suffix or 'without a suffix'}" for suffix, count in suffixes.most_common(5))
    advice = "".join(f" {suffix}: {NEEDS[suffix]}." for suffix in suffixes if suffix in NEEDS)
    there = f" (other files: {others})" if others else ""
    return DataError(f"There are no images that can be read in {top.path}{there}.{advice} {LAYOUTS}")


def _suffixes(folder: Folder) -> Iterator[str]:
    return (Path(name).suffix.lower() for name in folder.others)
