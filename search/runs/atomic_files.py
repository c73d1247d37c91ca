"""Writing files so that a kill at any time leaves either the old content or the new."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from trainables.system.full_disk import when_there_is_room


def write_atomically(path: Path, text: str, *, wait: bool = True) -> None:
    """Replace the content of a file at once; with `wait`, wait while the disk is full."""
    partial = path.with_name(f".{path.name}.partial")

    def write() -> None:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)

    if wait:
        when_there_is_room(write, path)
    else:
        write()


def append_line(path: Path, line: str) -> None:
    """Append a whole line to an existing file; waits while the disk is full."""
    when_there_is_room(lambda: append_whole(path, line.encode()), path)


def append_whole(path: Path, content: bytes, *, sync: bool = False) -> None:
    """Add all of `content` or nothing; with `sync`, it is on the disk afterwards. Raises `OSError` on a full disk."""
    # One write: a kill leaves the file with or without it.
    file = os.open(path, os.O_WRONLY | os.O_APPEND)
    before = os.fstat(file).st_size
    try:
        if os.write(file, content) < len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        if sync:
            os.fsync(file)
    except OSError:
        os.truncate(file, before)
        raise
    finally:
        os.close(file)


def replace_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Make `folder` hold what `fill` writes into an empty one. For an instant neither old nor new is there."""
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
    """Make `place` a hard link to `file`, or a copy where links do not work. Neither may be written to again."""
    try:
        os.link(file, place)
    except OSError:
        shutil.copyfile(file, place)
