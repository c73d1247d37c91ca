"""What lies in a data set's folder and is not read, by reason: nothing is left out without a word. Imports no torch."""

import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from trainables.data import DataError, Unused
from trainables.folder_tree import Folder, identity
from trainables.wording import many

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
NAMED = 3
"""So many files are named for each reason."""


def unused(top: Folder, used: Sequence[str], *, base: str, test: str) -> tuple[Unused, ...]:
    """What lies in `top` but not among the paths `used`: images by where they lie, other files by their suffix.

    `base` is the folder that holds the classes, `test` one with test images.
    """
    found: dict[tuple[str, str, str], list[str]] = {}
    for path in _unused_images(top, used):
        found.setdefault(_of_image(path, top, base, test), []).append(path)
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
        yield from inner.all_images


def _of_image(path: str, top: Folder, base: str, test: str) -> tuple[str, str, str]:
    """What an image is that is not read, where it lies, and what to do."""
    if test and path.startswith(test):
        return "image", f" in {test}", f"--test-split {shlex.quote(str(top.path / test))} tests the winner on them"
    parent = base if path.startswith(base) else ""
    folder, slash, _ = path.removeprefix(parent).partition("/")
    return "image", (f" in {parent}{folder}/" if slash else " without a label in the name or folder"), ""


def refuse_lost_classes(parents: Iterable[Folder]) -> None:
    """Raises `DataError` where a folder beside class folders has images, but none of a format that is read."""
    for folder in (each for parent in parents for each in parent.folders if not each.holds_images):
        suffixes = Counter(suffix for inner in folder.walk() for suffix in _suffixes(inner) if suffix in NEEDS)
        for suffix, count in suffixes.most_common(1):
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
