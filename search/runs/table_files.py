"""`trials.csv` and `epochs.csv` as a search writes them: whole at every moment, and at a cost that does not grow with
the events that they have seen."""

import math
import time
from collections.abc import Collection, Container, Iterable
from pathlib import Path

from search.runs.atomic_files import append_line, write_atomically
from search.runs.csv_file import Row, as_csv
from search.runs.result_rows import read_epochs

AT_ONCE = 100
"""Trials up to which `trials.csv` is written after each event."""
WRITE_SECONDS = 0.5
"""Between two writes of a longer one."""


class TrialsFile:
    """The table of trials. A short one is written whenever a row changes, a long one every half second."""

    def __init__(self, path: Path, columns: list[str]) -> None:
        self.path = path
        self.columns = columns
        self.lines: dict[str, str] = {}  # by trial: formatting all rows for each write would be slow
        self.changed: dict[str, Row] = {}  # since the last write
        self.written_at = -math.inf

    @property
    def is_due(self) -> bool:
        return len(self.lines) < AT_ONCE or time.monotonic() - self.written_at >= WRITE_SECONDS

    def note(self, rows: Iterable[Row]) -> None:
        """These rows have changed."""
        self.changed |= {row["trial_id"]: row for row in rows}

    def write(self) -> None:
        if not self.changed and self.written_at > -math.inf:
            return
        self.lines |= {trial_id: as_csv(self.columns, [row], header=False) for trial_id, row in self.changed.items()}
        write_atomically(self.path, as_csv(self.columns, []) + "".join(self.lines.values()))
        self.changed, self.written_at = {}, time.monotonic()

    def write_all(self, rows: Iterable[Row]) -> None:
        """Nothing but these rows."""
        self.lines, self.written_at = {}, -math.inf
        self.note(rows)
        self.write()


class EpochsFile:
    """The table of epochs. In memory are those of the trials that have not ended; a line that is on the disk stays as
    it is unless its epoch is trained again."""

    def __init__(self, path: Path, columns: list[str]) -> None:
        self.path = path
        self.columns = columns  # the first three are a trial's number, its id, and the epoch
        self.rows: dict[str, dict[int, Row]] = {}

    def load(self, running: Container[str]) -> int:
        """Read the file and write it as a whole: it may lack its last line, or have one twice. Returns the highest
        number of a trial in it, or -1."""
        rows = {(row["trial_id"], row["epoch"]): row for row in read_epochs(self.path)}
        write_atomically(self.path, as_csv(self.columns, rows.values()))
        self.rows = {}
        for (trial_id, epoch), row in rows.items():
            if trial_id in running:
                self.rows.setdefault(trial_id, {})[epoch] = row
        return max([-1, *(int(row["number"]) for row in rows.values())])

    def reopen(self, trial_id: str) -> None:
        """Hold the epochs of a trial that had ended."""
        self.rows[trial_id] = {row["epoch"]: row for row in read_epochs(self.path) if row["trial_id"] == trial_id}

    def close(self, trial_id: str) -> None:
        """Let go of the epochs of a trial that has ended."""
        self.rows.pop(trial_id, None)

    def add(self, row: Row) -> None:
        """Add an epoch, or put it in the place of the one that was trained before."""
        known = self.rows.setdefault(row["trial_id"], {})
        before = known.get(row["epoch"])
        if before is not None and self._values(before) == self._values(row):
            return  # a resumed trial repeats its last result
        known[row["epoch"]] = row
        line = as_csv(self.columns, [row], header=False)
        if before is None:
            append_line(self.path, line)
            return
        start = "".join(f"{row[name]}," for name in self.columns[:3])
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        write_atomically(self.path, "".join(line if old.startswith(start) else old for old in lines))

    def remove(self, trials: Collection[str]) -> None:
        """Remove all epochs of these trials."""
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        write_atomically(self.path, "".join(line for line in lines if line.split(",", 2)[1] not in trials))

    def _values(self, row: Row) -> str:
        """All but the time at which it ended."""
        return as_csv([name for name in self.columns if name != "finished_at"], [row], header=False)
