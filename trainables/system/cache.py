"""The user's cache folder, and how several processes build folders there: under a lock, whole or not at all."""

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

logger = logging.getLogger(__name__)

INDEX_FILE, CHECKSUM_FILE = "index.json", "index.sha256"
"""What a folder of the cache holds, and the SHA-256 of that file."""
LOOK_SECONDS = 1.0
"""How often a process that waits for a lock says that it is alive."""


class DamagedCache(ValueError):
    """A cache folder that does not match its index or checksum."""


def cache_dir() -> Path:
    """The folder of downloads, presized images and features: FINETUNE_SEARCH_CACHE, or finetune-search in the user's
    cache."""
    if given := os.environ.get("FINETUNE_SEARCH_CACHE"):
        return Path(given).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().absolute() / "finetune-search"


@contextlib.contextmanager
def locked(path: Path, waiting_for: str, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Holds the file lock `path`, which ends with its process; logs a line if it must wait, and calls `on_wait` now and
    then."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.info("waiting %s (lock %s)", waiting_for, path)
        while not lock.is_locked:
            on_wait()
            with contextlib.suppress(Timeout):
                lock.acquire(timeout=LOOK_SECONDS)
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill that becomes `path` at the end, in place of a damaged one; the caller holds its lock."""
    temporary = path.with_name(f".{path.name}.partial")  # a fixed name, to remove what a killed process left
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        yield temporary
        shutil.rmtree(path, ignore_errors=True)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_index(folder: Path, index: dict[str, Any]) -> None:
    text = json.dumps(index).encode()
    for name, content in ((INDEX_FILE, text), (CHECKSUM_FILE, sha256(text).hexdigest().encode())):
        with (folder / name).open("wb") as file:
            file.write(content)
            flush(file)


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a cache folder; raises `DamagedCache` if it is not as it was written."""
    try:
        text = (folder / INDEX_FILE).read_bytes()
        if sha256(text).hexdigest() != (folder / CHECKSUM_FILE).read_text():
            raise ValueError(f"{INDEX_FILE} does not match its checksum")
        index: dict[str, Any] = json.loads(text)
        return index
    except (OSError, ValueError) as error:
        raise DamagedCache(f"{folder}: {error}") from error


def flush(file: BinaryIO) -> None:
    """Syncs to the disk: after a power cut a renamed folder must not hold empty pages."""
    file.flush()
    os.fsync(file.fileno())
