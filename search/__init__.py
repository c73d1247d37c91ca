"""Many trials: spaces, Optuna, early termination, tables. From a notebook: `search.load("results/<name>")`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import trainables  # noqa: F401, makes a home folder, if there is none, before Ray looks for it

if TYPE_CHECKING:
    from search.runs.run_record import RunRecord


def load(path: Path | str) -> RunRecord:
    """Open a run, during the search or after its end. Nothing in its folder is executed.

    Args:
        path: The folder of the run, such as `results/<name>`.

    Returns:
        Its tables as pandas frames, its Optuna study and its best recipe.

    Raises:
        ValueError: There is no run, a file of it is damaged, or a later version wrote it.

    Example:
        >>> run = load("results/pets")
        >>> print(run.best["number"], run.best["error_rate"], run.best_recipe.epochs)
        9 0.25 1
    """
    from search.runs.run_record import load  # imported late, because commands import this package, too

    return load(path)
