"""Writing to disks that may be full or read-only: checks before there is work to lose, and waiting for room later."""

import errno
import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

logger = logging.getLogger(__name__)

RETRY_SECONDS = 2.0
"""How often a full disk is tried again."""
FULL = (errno.ENOSPC, errno.EDQUOT)


def require_writable(folder: Path, option: str) -> None:
    """Makes `folder` and writes to it. If that fails, raises `ValueError` with the `option` for another folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(4096))
            probe.flush()
    except OSError as error:
        why = "it is a file" if isinstance(error, FileExistsError) else error.strerror
        raise ValueError(
            f"{folder} cannot be written ({why}). Give another place with {option}, or fix the cause: the folder's "
            "owner or permissions, a file in its place, or a full or read-only disk."
        ) from error


def require_writable_file(path: Path) -> None:
    """The same for the file that `--out` names."""
    if path.is_dir():
        raise ValueError(f"--out {path} is a folder. Give the name of a file.")
    require_writable(path.parent, "--out")


def when_there_is_room(write: Callable[[], None], place: Path) -> None:
    """Calls `write`, which writes to `place` and must be safe to repeat, until the disk has room."""
    waits = False
    while True:
        try:
            write()
            break
        except OSError as error:
            if error.errno not in FULL:
                raise
            if not waits:
                logger.warning("the disk of %s is full: waiting for room, nothing is lost", place)
            waits = True
            time.sleep(RETRY_SECONDS)
    if waits:
        logger.warning("there is room on the disk of %s again", place)
