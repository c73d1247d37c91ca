"""Writing files so that a kill at any moment leaves either the old content or the new."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


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
