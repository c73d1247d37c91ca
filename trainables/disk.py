"""Writing where the disk may be full: nothing is lost, the writer waits for room."""

import errno
import logging
import time
from collections.abc import Callable
from pathlib import Path

logger = logging.getLogger(__name__)

LOOK_SECONDS = 2.0
"""So often somebody who waits looks for room."""
FULL = (errno.ENOSPC, errno.EDQUOT)


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
