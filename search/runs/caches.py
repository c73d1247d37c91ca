"""The presized images that this machine keeps: listing and clearing them (`python -m search.check --cache`)."""

import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from rich.table import Table
from rich.text import Text

from trainables.data.presized_images import PresizedImages
from trainables.system.cache import DamagedCache
from trainables.system.text import megabytes, printable

NAME = re.compile(r"\.?([0-9a-f]{32})(-memory-map|-jpeg|-off-[0-9a-f]{8})?(\.partial)?")
"""Folders that `presize` makes, those of earlier versions included; the first group names their lock."""


@dataclass(frozen=True)
class Cache:
    """One folder of presized images, or what is left of one."""

    path: Path
    num_bytes: int
    used: float  # seconds since 1970
    images: PresizedImages | None
    """None where they cannot be read: damaged, of an earlier version, or not finished."""


def find_caches(folder: Path) -> list[Cache]:
    """All caches in `folder`, the one last used first."""
    found = [path for path in folder.glob("*") if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(map(_cache, found), key=lambda cache: -cache.used)


def _cache(path: Path) -> Cache:
    files = [file.stat() for file in path.iterdir() if file.is_file()]
    try:
        images = None if path.name.startswith(".") else PresizedImages(path)
    except DamagedCache:
        images = None
    return Cache(path, sum(file.st_size for file in files), path.stat().st_mtime, images)


def clear(caches: list[Cache]) -> tuple[int, list[Cache]]:
    """Removes `caches`. Returns the bytes that were freed, and the caches left alone because they are being built.

    A training that has its images open continues to use them; later ones build them again.
    """
    freed, busy = 0, []
    for folder in {cache.path.parent for cache in caches}:
        for file in folder.glob("*.unreadable.txt"):
            file.unlink(missing_ok=True)
    for cache in caches:
        key = cache.path.name.lstrip(".")[:32]
        try:
            with FileLock(cache.path.with_name(f".{key}.lock"), timeout=0):  # the builder's, see `presize`
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
    images = cache.images
    if images is None:
        unfinished = cache.path.name.startswith(".")
        return f"{'not finished' if unfinished else 'not readable'}: {cache.path.name}", "", "", "", ""
    return printable(images.root), str(images.size), images.method, images.storage, str(len(images))


def _ago(moment: float) -> str:
    seconds = max(0.0, time.time() - moment)
    for length, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= length:
            return f"{seconds / length:.0f} {name} ago"
    return "just now"
