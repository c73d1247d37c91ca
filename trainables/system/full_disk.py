"""Writing where the disk may be full, or not for us: found out before there is work to lose, waited for afterwards."""

import errno
import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

logger = logging.getLogger(__name__)

LOOK_SECONDS = 2.0
"""So often somebody who waits looks for room."""
FULL = (errno.ENOSPC, errno.EDQUOT)


def require_writable(folder: Path, option: str) -> None:
    """Makes `folder` and writes to it. Raises `ValueError` where it cannot, with the option for another."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(4096))
            probe.flush()
    except OSError as error:
        why = "it is a file" if isinstance(error, FileExistsError) else error.strerror
        raise ValueError(
            f"{folder} cannot be written ({why}). Give another place with {option}, or change what is in the way: the "
            "folder's owner or permissions, a file in its place, or a disk that is full or read-only."
        ) from error


def require_writable_file(path: Path) -> None:
    """The same for the file `path`, which is what `--out` names."""
    if path.is_dir():
        raise ValueError(f"--out {path} is a folder. Give the name of a file.")
    require_writable(path.parent, "--out")


def when_there_is_room(write: Callable[[], None], place: Path) -> None:
    """`write` something to `place`; again and again while its disk is full. It must be safe to repeat."""
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
            time.sleep(LOOK_SECONDS)
    if waits:
        logger.warning("there is room on the disk of %s again", place)
