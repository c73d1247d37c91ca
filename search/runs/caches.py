"""The presized images and features that this machine keeps: listing and clearing them (`search.check --cache`)."""

import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from rich.table import Table
from rich.text import Text

from trainables.data.presize import caches_folder
from trainables.data.presized_images import PresizedImages
from trainables.probe.feature_files import FEATURES_FILE, features_folder
from trainables.system.cache import DamagedCache, read_index
from trainables.system.text import megabytes, printable

NAME = re.compile(r"\.?([0-9a-f]{32})(-memory-map|-jpeg|-off-[0-9a-f]{8})?(\.partial)?")
"""Folders that `presize` and `feature_files` make, those of earlier versions included; the first group names their
lock."""


@dataclass(frozen=True, kw_only=True)
class Content:
    """What a cache holds, as the table shows it."""

    root: Path
    size: int
    """px; of the presized images."""
    resize_method: str
    kind: str
    """How images are stored, or whose features they are."""
    num_images: int


@dataclass(frozen=True)
class Cache:
    """One folder of presized images or of features, or what is left of one."""

    path: Path
    num_bytes: int
    used: float  # seconds since 1970
    content: Content | None
    """None where it cannot be read: damaged, of an earlier version, or not finished."""


def find_caches() -> list[Cache]:
    """All presized images and features, those last used first."""
    folders = {caches_folder(): _images, features_folder(): _features}
    found = [
        _cache(path, read)
        for folder, read in folders.items()
        for path in folder.glob("*")
        if NAME.fullmatch(path.name) and path.is_dir()
    ]
    return sorted(found, key=lambda cache: -cache.used)


def _cache(path: Path, read: Callable[[Path], Content]) -> Cache:
    files = [file.stat() for file in path.iterdir() if file.is_file()]
    try:
        content = None if path.name.startswith(".") else read(path)
    except DamagedCache:
        content = None
    return Cache(path, sum(file.st_size for file in files), path.stat().st_mtime, content)


def _images(path: Path) -> Content:
    images = PresizedImages(path)
    return Content(
        root=images.root,
        size=images.size,
        resize_method=images.method,
        kind=images.storage,
        num_images=len(images),
    )


def _features(path: Path) -> Content:
    """By the index and the size of the file: to compare checksums would read all of it."""
    index = read_index(path)
    try:
        if (path / FEATURES_FILE).stat().st_size != 2 * index["num_images"] * index["num_features"]:
            raise ValueError(f"{FEATURES_FILE} has another size than the index says")
        augmented = ", augmented" if index["augmented"] else ""
        return Content(
            root=Path(index["root"]),
            size=index["size"],
            resize_method=index["resize_method"],
            kind=f"features of {index['arch']} at {index['image_size']} px" + augmented,
            num_images=index["num_images"],
        )
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise DamagedCache(f"{path}: {error}") from error


def clear(caches: list[Cache]) -> tuple[int, list[Cache]]:
    """Removes `caches`. Returns the bytes that were freed, and the caches left alone because they are being built.

    A training that has its images or features open continues to use them; later ones build them again.
    """
    freed, busy = 0, []
    for folder in {cache.path.parent for cache in caches}:
        for file in folder.glob("*.unreadable.txt"):
            file.unlink(missing_ok=True)
    for cache in caches:
        key = cache.path.name.lstrip(".")[:32]
        try:
            with FileLock(cache.path.with_name(f".{key}.lock"), timeout=0):  # the builder's
                shutil.rmtree(cache.path, ignore_errors=True)
        except Timeout:
            busy.append(cache)
            continue
        freed += 0 if cache.path.exists() else cache.num_bytes
    return freed, busy


def caches_table(caches: list[Cache]) -> Table:
    """One line a cache, for `rich`."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("data set", overflow="fold")
    for name in ("px", "resize", "stored as", "images", "on disk", "last used"):
        table.add_column(name, justify="left" if name in ("resize", "stored as") else "right", no_wrap=True)
    for cache in caches:
        table.add_row(*(Text(cell) for cell in (*_described(cache), megabytes(cache.num_bytes), _ago(cache.used))))
    return table


def _described(cache: Cache) -> tuple[str, ...]:
    content = cache.content
    if content is None:
        unfinished = cache.path.name.startswith(".")
        return f"{'not finished' if unfinished else 'not readable'}: {cache.path.name}", "", "", "", ""
    kind = printable(content.kind)
    return printable(content.root), str(content.size), content.resize_method, kind, str(content.num_images)


def _ago(moment: float) -> str:
    seconds = max(0.0, time.time() - moment)
    for length, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= length:
            return f"{seconds / length:.0f} {name} ago"
    return "just now"
