"""Many trials: spaces, Optuna, early termination, tables. From a notebook: `search.load("results/<name>")`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import trainables  # noqa: F401, sees to it that there is a home folder before Ray looks for it

if TYPE_CHECKING:
    from search.run_record import RunRecord


def load(path: Path | str) -> RunRecord:
    """The tables, the study and the best recipe of a run; see `search.run_record.RunRecord`. Raises `ValueError`."""
    from search.run_record import load  # not before it is wanted: commands import this package, too

    return load(path)
