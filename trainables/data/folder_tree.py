"""A data set's folders as they lie on the disk, each read once and only when it is asked for. Imports no torch."""

import os
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from trainables.data.image_file import SUFFIXES

SYSTEM = frozenset({
    "__macosx", "@eadir", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "$recycle.bin", "recycler",
    "lost+found", "system volume information", "network trash folder", "temporary items", "_vti_cnf", "__pycache__",
    "thumbs.db", "ehthumbs.db", "desktop.ini",
})  # fmt: skip
"""What systems leave beside the user's files, in lower case; they also hide files behind a leading dot."""


@dataclass(frozen=True)
class _Content:
    """Names of what lies right in a folder, sorted."""

    images: list[str]
    folders: list[str]
    others: list[str]
    system_images: list[str]
    system_folders: list[str]


class Folder:
    """A folder of a data set. Links are followed, but never to a folder that this one lies in."""

    def __init__(self, path: Path, prefix: str = "", above: frozenset[tuple[int, int]] | None = None) -> None:
        self.path = path
        self.prefix = prefix
        """The path relative to the data set's root: "", or with / at its end."""
        self.identity = identity(path)
        self._above = (frozenset(map(identity, path.parents)) if above is None else above) | {self.identity}

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def class_name(self) -> str:
        """The name with one spelling of é, however a system wrote it."""
        return unicodedata.normalize("NFC", self.name)

    @property
    def images(self) -> list[str]:
        """Names of the images right in it; whether they can be read is not looked at."""
        return self._content.images

    @property
    def others(self) -> list[str]:
        """Names of the files right in it that are not images and not a system's."""
        return self._content.others

    @property
    def system_images(self) -> list[str]:
        """Names of the images right in it that are hidden or a system's."""
        return self._content.system_images

    @cached_property
    def folders(self) -> list["Folder"]:
        """The folders right in it, without those of systems."""
        return self._inner(self._content.folders)

    @cached_property
    def system_folders(self) -> list["Folder"]:
        """The folders right in it that are hidden or a system's."""
        return self._inner(self._content.system_folders)

    @cached_property
    def holds_images(self) -> bool:
        return any(folder.images for folder in self.walk())

    @cached_property
    def filled(self) -> list["Folder"]:
        """The folders right in it that hold images, however deep."""
        return [folder for folder in self.folders if folder.holds_images]

    @cached_property
    def all_images(self) -> list[str]:
        """All images below, relative to the data set's root."""
        return [f"{folder.prefix}{name}" for folder in self.walk() for name in folder.images]

    def walk(self) -> Iterator["Folder"]:
        """This folder and all below, each real one once, so that mazes of links end."""
        seen, waiting = set(), [self]
        while waiting:
            folder = waiting.pop()
            if folder.identity not in seen:
                seen.add(folder.identity)
                yield folder
                waiting += reversed(folder.folders)

    def _inner(self, names: Iterable[str]) -> list["Folder"]:
        found = (Folder(self.path / name, f"{self.prefix}{name}/", self._above) for name in names)
        return [folder for folder in found if folder.identity not in self._above]

    @cached_property
    def _content(self) -> _Content:
        content = _Content([], [], [], [], [])
        with os.scandir(self.path) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                of_system = entry.name.startswith(".") or entry.name.lower() in SYSTEM
                if _is_folder(entry):
                    (content.system_folders if of_system else content.folders).append(entry.name)
                elif _is_image(entry):
                    (content.system_images if of_system else content.images).append(entry.name)
                elif not of_system:
                    content.others.append(entry.name)
        return content


def identity(folder: Path) -> tuple[int, int]:
    """The same for all links to one folder."""
    status = folder.stat()
    return status.st_dev, status.st_ino


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_image(entry: os.DirEntry) -> bool:
    """By its name. A broken link counts, to be reported as unreadable; a pipe does not."""
    if not entry.name.lower().endswith(SUFFIXES):
        return False
    try:
        return entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path))  # noqa: PTH110
    except OSError:
        return entry.is_symlink()
