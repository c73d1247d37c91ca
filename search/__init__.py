"""Many trials: spaces, Optuna, early termination, tables. From a notebook: `search.load("results/<name>")`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import trainables  # noqa: F401, sees to it that there is a home folder before Ray looks for it

if TYPE_CHECKING:
    from search.runs.run_record import RunRecord


def load(path: Path | str) -> RunRecord:
    """The `search.runs.run_record.RunRecord` of a run: its tables, study and best recipe. Raises `ValueError`."""
    from search.runs.run_record import load  # not before it is wanted: commands import this package, too

    return load(path)
