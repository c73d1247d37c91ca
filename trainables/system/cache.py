"""The user's cache folder, and locks on what several processes may build there."""

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

logger = logging.getLogger(__name__)


def cache_dir() -> Path:
    """The folder of downloads and presized images: FINETUNE_SEARCH_CACHE, or finetune-search in the user's cache."""
    if given := os.environ.get("FINETUNE_SEARCH_CACHE"):
        return Path(given).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().absolute() / "finetune-search"


@contextlib.contextmanager
def locked(path: Path, waiting_for: str) -> Iterator[None]:
    """Holds the file lock `path`, which ends with its process; logs a line if it must wait."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.info("waiting %s (lock %s)", waiting_for, path)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
