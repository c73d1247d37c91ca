"""The files that the rows of a table name, as they are written there, below one folder. Imports no torch."""

import os
import posixpath
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple
from unicodedata import normalize

from trainables.data.folder_tree import is_folder
from trainables.data.image_file import SUFFIXES


class RowFile(NamedTuple):
    """The path of a file, or why a row names none."""

    path: str = ""
    """POSIX, relative to the folder of the images, or absolute if the file lies elsewhere."""
    problem: str = ""


class RowFiles:
    """Finds files in `root`. Each folder is listed once, which is faster than a look at each file."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.missing: set[str] = set()
        """The paths that were asked for but are not there."""
        self._files = cache(lambda folder: _files_in(root / folder))
        self._stems = cache(lambda folder: _stems_of(self._files(folder)))

    def find(self, prefix: str, name: str) -> RowFile:
        """The file that a row calls `name`, from the folder `prefix` in `root`: a path with slashes or backslashes, in
        any of Unicode's forms, with or without the suffix of an image."""
        if not name:
            return RowFile(problem="names no file")
        if "\0" in name:
            return RowFile(problem=f"names {name!r}, which no file can be called")
        for spelling in _spellings(name):
            path = self._relative(prefix + spelling if not spelling.startswith("/") else spelling)
            folder, base = posixpath.split(path)
            if base in self._files(folder):
                return self._checked(path, name)
            if found := self._stems(folder).get(base, []):
                if len(found) == 1:
                    return RowFile(posixpath.join(folder, found[0]))
                return RowFile(problem=f"names {name!r}, which may be {' or '.join(map(repr, found[:3]))}")
        path = self._relative(prefix + name if not name.startswith("/") else name)
        with suppress(OSError):  # the name is too long
            if (self.root / path).is_dir():
                return RowFile(problem=f"names {name!r}, which is a folder")
            if (self.root / path).is_file():  # on a file system without regard to case
                return self._checked(path, name)
        self.missing.add(path)
        return self._checked(path, name)

    def _relative(self, path: str) -> str:
        path = posixpath.normpath(path)
        return path.removeprefix(f"{self.root}/")

    def _checked(self, path: str, name: str) -> RowFile:
        suffix = posixpath.splitext(path)[1].lower()
        if suffix and suffix not in SUFFIXES and not suffix[1:].isdigit():
            return RowFile(problem=f"names {name!r}, which is not an image that can be read ({suffix})")
        return RowFile(path)


def _spellings(name: str) -> Iterator[str]:
    yield name
    for each in (name, name.replace("\\", "/")):  # the latter in tables from Windows
        yield from (spelling for form in ("NFC", "NFD") if (spelling := normalize(form, each)) != name)


def _files_in(folder: Path) -> frozenset[str]:
    """The names in a folder that are no folders' names."""
    try:
        with os.scandir(folder) as entries:
            return frozenset(entry.name for entry in entries if not is_folder(entry))
    except OSError:
        return frozenset()


def _stems_of(names: Iterable[str]) -> dict[str, list[str]]:
    """The names of images without their suffix -> the whole names."""
    found = defaultdict(list)
    for name in sorted(names):
        stem, suffix = posixpath.splitext(name)
        if suffix.lower() in SUFFIXES:
            found[stem].append(name)
    return dict(found)
