"""The folders of a data set as they lie on the disk, each read once, on first use. Imports no torch."""

import os
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from trainables.data.image_file import SUFFIXES

SYSTEM_NAMES = frozenset({
    "__macosx", "@eadir", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "$recycle.bin", "recycler",
    "lost+found", "system volume information", "network trash folder", "temporary items", "_vti_cnf", "__pycache__",
    "thumbs.db", "ehthumbs.db", "desktop.ini",
})  # fmt: skip
"""What systems leave among the user's files, in lower case; names with a leading dot count as well."""


@dataclass(frozen=True)
class _Content:
    """The sorted names in a folder, not in those below."""

    images: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    system_images: list[str] = field(default_factory=list)
    system_folders: list[str] = field(default_factory=list)


class Folder:
    """A folder of a data set. Links are followed, unless they lead to a folder above."""

    def __init__(self, path: Path, prefix: str = "", above: frozenset[tuple[int, int]] | None = None) -> None:
        self.path = path
        self.prefix = prefix  # the path relative to the data set's root: empty, or with / at its end
        self.identity = identity(path)
        self._above = (frozenset(map(identity, path.parents)) if above is None else above) | {self.identity}

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def class_name(self) -> str:
        """The name in Unicode's composed form, which file systems may not use."""
        return unicodedata.normalize("NFC", self.name)

    @property
    def images(self) -> list[str]:
        """Names of the images directly in it, readable or not."""
        return self._content.images

    @property
    def others(self) -> list[str]:
        """Names of the files directly in it that are neither images nor the system's."""
        return self._content.others

    @property
    def system_images(self) -> list[str]:
        """Names of the hidden images directly in it, and of those that the system made."""
        return self._content.system_images

    @cached_property
    def folders(self) -> list["Folder"]:
        """The folders directly in it, without hidden ones and the system's."""
        return self._subfolders(self._content.folders)

    @cached_property
    def system_folders(self) -> list["Folder"]:
        """The hidden folders directly in it, and the system's."""
        return self._subfolders(self._content.system_folders)

    @cached_property
    def holds_images(self) -> bool:
        return any(folder.images for folder in self.walk())

    @cached_property
    def filled(self) -> list["Folder"]:
        """The folders directly in it that hold images at any depth."""
        return [folder for folder in self.folders if folder.holds_images]

    @cached_property
    def all_images(self) -> list[str]:
        """The paths of all images below, relative to the data set's root."""
        return [f"{folder.prefix}{name}" for folder in self.walk() for name in folder.images]

    def walk(self) -> Iterator["Folder"]:
        """This folder and all below, each real one once, so that cycles of links end."""
        seen: set[tuple[int, int]] = set()
        waiting = [self]
        while waiting:
            folder = waiting.pop()
            if folder.identity not in seen:
                seen.add(folder.identity)
                yield folder
                waiting += reversed(folder.folders)

    def _subfolders(self, names: Iterable[str]) -> list["Folder"]:
        found = (Folder(self.path / name, f"{self.prefix}{name}/", self._above) for name in names)
        return [folder for folder in found if folder.identity not in self._above]

    @cached_property
    def _content(self) -> _Content:
        content = _Content()
        with os.scandir(self.path) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                of_system = entry.name.startswith(".") or entry.name.lower() in SYSTEM_NAMES
                if is_folder(entry):
                    (content.system_folders if of_system else content.folders).append(entry.name)
                elif _is_image(entry):
                    (content.system_images if of_system else content.images).append(entry.name)
                elif not of_system:
                    content.others.append(entry.name)
        return content


def identity(folder: Path) -> tuple[int, int]:
    """Device and inode: the same for all links to one folder."""
    status = folder.stat()
    return status.st_dev, status.st_ino


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Of a folder, or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_image(entry: os.DirEntry[str]) -> bool:
    """By its name. A broken link counts, so that it is reported as unreadable; a pipe does not."""
    if not entry.name.lower().endswith(SUFFIXES):
        return False
    try:
        return entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path))  # noqa: PTH110
    except OSError:
        return entry.is_symlink()
