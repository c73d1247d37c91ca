"""The files of a running search as they are at one moment, for copying them."""

import os
from collections.abc import Mapping
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, NamedTuple

from search.runs.paths import RunFolder
from trainables.training import checkpoint

CHECKPOINTS, TUNE = "checkpoints/", "tune/"
LARGE = (CHECKPOINTS, "models/", "best/", "first/")
"""Folders whose files are written once; large ones are held open instead of in memory."""
LARGE_BYTES = 1 << 20
MAX_TRIES = 5
"""How often the files may change while a snapshot is taken."""

Signature = tuple[int, int, int]
"""Inode, size and time of change of a file; another one means another content."""


class HeldFile(NamedTuple):
    """A file in a snapshot, whose content stays although the file may change; None if it is as known before."""

    signature: Signature
    content: BinaryIO | None


def snapshot(folder: RunFolder, tunes: Path | None, known: Mapping[str, Signature]) -> dict[str, HeldFile]:
    """The files of a run by name. To be called when Tune's driver does nothing else.

    Tune writes its state to `tunes`, and a thread of its own copies it to the run's folder later. The state that
    belongs to this moment is in the former.
    """
    for _ in range(MAX_TRIES):
        with suppress(FileNotFoundError):  # a trial has ended an epoch meanwhile
            return _look(folder, tunes, known)
    return _look(folder, tunes, known)


def _look(folder: RunFolder, tunes: Path | None, known: Mapping[str, Signature]) -> dict[str, HeldFile]:
    trials = list(folder.checkpoints.iterdir()) if folder.checkpoints.is_dir() else []
    newest = [checkpoint.newest(trial) for trial in trials]
    paths = {str(path.relative_to(folder.path)): path for path in _below(folder.path, without=folder.checkpoints)}
    paths |= {TUNE + str(path.relative_to(tunes)): path for path in _below(tunes)} if tunes else {}
    epochs = [path for epoch in newest if epoch for path in _below(epoch)]
    paths |= {str(path.relative_to(folder.path)): path for path in epochs}
    found = {name: _hold(name, path, known.get(name)) for name, path in paths.items()}
    if newest != [checkpoint.newest(trial) for trial in trials]:
        raise FileNotFoundError("some of an epoch's files may already have been removed")
    return found


def _below(root: Path, without: Path | None = None) -> list[Path]:
    """Files, except partial ones and locks."""
    found = []
    for folder, folders, names in os.walk(root):
        here = Path(folder)
        folders[:] = [name for name in folders if not name.startswith(".") and here / name != without]
        found += [here / name for name in names if not name.startswith(".") and not name.endswith(".lock")]
    return found


def _hold(name: str, path: Path, known: Signature | None) -> HeldFile:
    if _signature(path.stat()) == known:
        return HeldFile(known, None)
    file = path.open("rb")
    signature = _signature(os.fstat(file.fileno()))
    if name.startswith(LARGE) and signature[1] > LARGE_BYTES:
        return HeldFile(signature, file)  # written once, and too large for the memory
    with file:
        return HeldFile(signature, BytesIO(file.read()))


def _signature(stat: os.stat_result) -> Signature:
    return stat.st_ino, stat.st_size, stat.st_mtime_ns
