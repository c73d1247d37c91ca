"""Writing files so that a kill at any moment leaves either the old content or the new."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from trainables.system.full_disk import when_there_is_room


def write_atomically(path: Path, text: str, *, wait: bool = True) -> None:
    """Waits while the disk is full, unless told not to."""
    partial = path.with_name(f".{path.name}.partial")

    def write() -> None:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)

    if wait:
        when_there_is_room(write, path)
    else:
        write()


def append_line(path: Path, line: str) -> None:
    """Add a whole line to a file that is there; waits while the disk is full."""
    content, before = line.encode(), path.stat().st_size

    def write() -> None:
        # One write of one line: a kill leaves the file with or without it.
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        try:
            if os.write(file, content) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            os.truncate(file, before)
            raise
        finally:
            os.close(file)

    when_there_is_room(write, path)


def replace_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Make `folder` hold what `fill` writes into an empty one. Between old and new there is a moment with neither."""
    partial, old = (folder.with_name(f".{folder.name}.{word}") for word in ("partial", "old"))
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        fill(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def link_or_copy(file: Path, place: Path) -> None:
    """`place` becomes another name of `file` where the file system has such. Neither is ever written to again."""
    try:
        os.link(file, place)
    except OSError:
        shutil.copyfile(file, place)
