"""The journal file of the Optuna study, which survives kills and full disks."""

import json
import os
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.storages.journal._file import get_lock_file
from optuna.storages.journal._storage import JournalOperation
from optuna.trial import FrozenTrial, TrialState

from search.runs.atomic_files import append_whole
from trainables.system.full_disk import when_there_is_room

UNSYNCED = (JournalOperation.CREATE_TRIAL, JournalOperation.SET_TRIAL_PARAM)
"""Operations that another one of the same trial follows before it starts: that one is flushed to the disk."""
WARM_START = "warm_start"
"""The attribute that marks a trial of an earlier run, see `search.tuning.warm_start`: that run and its number there."""


def own_trials(study: optuna.Study, *states: TrialState) -> list[FrozenTrial]:
    """The trials in these states that the search itself has made."""
    found = study.get_trials(deepcopy=False, states=states)
    return [trial for trial in found if WARM_START not in trial.user_attrs]


def open_journal(path: Path) -> JournalStorage:
    """Open the journal for writing. Raises `ValueError` if it is damaged."""
    if path.is_file():
        repair(path)
    # By default Optuna locks with a symbolic link, which not every file system supports.
    return JournalStorage(_AtomicBackend(str(path), lock_obj=JournalFileOpenLock(str(path))))


class _AtomicBackend(JournalFileBackend):
    """Optuna's backend, except that a full disk leaves no half lines and that not every line is flushed to the disk.

    A trial does not start before the line that follows its parameters, so flushing that one is enough.
    """

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        path = Path(self._file_path)
        lines = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
        sync = any(log["op_code"] not in UNSYNCED for log in logs)

        def append() -> None:
            with get_lock_file(self._lock):
                append_whole(path, lines.encode(), sync=sync)

        when_there_is_room(append, path)


def repair(path: Path) -> None:
    """Remove an incomplete last line, which a machine that crashed can leave: Optuna would append to it. Raises
    `ValueError` if the journal is damaged elsewhere."""
    lines = path.read_bytes().splitlines(keepends=True)
    size = 0  # of the complete lines
    for number, line in enumerate(lines, start=1):
        if not _is_complete(line):
            if number < len(lines):
                raise ValueError(
                    f"{path} is damaged: line {number} is not JSON. Restore it from a copy, or start a new run."
                )
            os.truncate(path, size)
        size += len(line)


def _is_complete(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return line.endswith(b"\n")
