"""The journal file of the Optuna study, and its protection against kills and full disks."""

import json
import os
from pathlib import Path
from typing import Any

from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.storages.journal._file import get_lock_file
from optuna.storages.journal._storage import JournalOperation

from search.runs.atomic_files import append_whole
from trainables.system.full_disk import when_there_is_room

FOLLOWED = (JournalOperation.CREATE_TRIAL, JournalOperation.SET_TRIAL_PARAM)
"""Lines about a trial after which another one comes before it starts."""


def open_journal(path: Path) -> JournalStorage:
    """The storage in `path`, for the search that writes to it. Raises `ValueError` where it is damaged."""
    if path.is_file():
        mend(path)
    # Optuna's own choice is a symbolic link, which not every file system has.
    return JournalStorage(_WholeLines(str(path), lock_obj=JournalFileOpenLock(str(path))))


class _WholeLines(JournalFileBackend):
    """Optuna's backend, which alone would leave half a line on a full disk and flush each line to the disk.

    Only lines that something can start from are flushed here. A trial does not start before the line that follows its
    parameters, so flushing that one is enough.
    """

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        path = Path(self._file_path)
        lines = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
        sync = any(log["op_code"] not in FOLLOWED for log in logs)

        def append() -> None:
            with get_lock_file(self._lock):
                append_whole(path, lines.encode(), sync=sync)

        when_there_is_room(append, path)


def mend(path: Path) -> None:
    """Cut off an incomplete last line, which a machine that stopped has left: Optuna would append to it. Raises
    `ValueError` where the journal is damaged elsewhere."""
    lines = path.read_bytes().splitlines(keepends=True)
    whole = 0
    for number, line in enumerate(lines, start=1):
        if not _is_whole(line):
            if number < len(lines):
                raise ValueError(
                    f"{path} is damaged: line {number} is no JSON. Restore it from a copy, or begin a new run."
                )
            os.truncate(path, whole)
        whole += len(line)


def _is_whole(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return line.endswith(b"\n")
