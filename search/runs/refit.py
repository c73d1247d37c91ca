"""The winner once more, trained on all images: the model that a search delivers.

Validation images choose the winner and tell its error. When both are known, they are as good as any to train on, and a
fifth of the images is worth several tenths of a point on small sets. Nothing tells the error of the new model; that of
the winner is what to expect at most.
"""

import math
from functools import lru_cache
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.experiment import Trial

from search.runs.csv_file import Row
from search.runs.result_rows import COMPLETED
from search.runs.results_table import ResultsTable
from trainables.inference.model_folder import read_model
from trainables.ray.node_states import bring_model, drop_state
from trainables.ray.trial import REFITS, table_id
from trainables.training import checkpoint


class Refit(tune.Callback):
    """Puts the winner that is trained again into `best/`, once it has made all its epochs."""

    def __init__(self, table: ResultsTable) -> None:
        self.table = table

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        if REFITS not in trial.config or result["failure"] or result["epoch"] < result["epochs_total"]:
            return
        winner = self.table.rows.get(trial.config[REFITS])
        states = self.table.folder.checkpoints / table_id(trial)
        found = checkpoint.newest(states)
        if winner and found and is_plausible(winner, result) and bring_model(states, self.table.folder.run_id):
            known = {"train_images": result["train_images"], "error_rate": result["error_rate"]}
            self.table.models.deliver_refit(found, winner["number"], known)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        if REFITS in trial.config:
            drop_state(self.table.folder.checkpoints / table_id(trial), self.table.folder.run_id)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self.on_trial_complete(iteration, trials, trial)


def is_plausible(winner: Row, result: dict[str, Any]) -> bool:
    """Whether a training on all images went as well as the winner's: it has seen the validation images, so its errors
    on them must not be more."""
    return not math.isnan(result["error_rate"]) and result["error_rate"] <= winner["error_rate"]


def winner_to_refit(table: ResultsTable) -> Row | None:
    """The row of the best trial or probe, if it has made all its epochs, with the temperature of its model: the table
    has fewer digits."""
    best = table.ranking.best()
    if best is None or best["status"] != COMPLETED:
        return None
    try:
        return best | {"temperature": _temperature(table.folder.models / str(best["number"]))}
    except ValueError:  # an earlier version kept no models there
        return best


@lru_cache(maxsize=1)  # a search with a time budget asks for its winner again and again
def _temperature(model: Path) -> float:
    return read_model(model).temperature
