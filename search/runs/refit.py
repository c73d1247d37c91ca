"""The winner once more, trained on all images: the model that a search delivers.

Validation images choose the winner and tell its error. When both are known, they are as good as any to train on, and a
fifth of the images is worth several tenths of a point on small sets. The new weights are averaged with those of the
best trials of the same network, see `trainables.training.weight_averaging`. Nothing tells the error of the new model;
that of the winner is what to expect at most.
"""

import math
from functools import lru_cache
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.experiment import Trial

from search.runs.csv_file import Row
from search.runs.kinds import TRIAL
from search.runs.result_rows import COMPLETED
from search.runs.results_table import ResultsTable
from trainables.inference.model_folder import read_model
from trainables.ray.node_states import bring_model, drop_state
from trainables.ray.trial import AVERAGES, REFITS, table_id
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
            known: dict[str, Any] = {
                name: result[name] for name in ("train_images", "error_rate", "averaged") if name in result
            }
            if result["epochs_total"] < winner["epochs_total"]:
                known["epochs"] = result["epochs_total"]
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
    """The row of the best trial or probe, if it has made all its epochs, with the temperature of its model, of which
    the table has fewer digits, and with the numbers of the kept trials that it is averaged with, itself the first."""
    best = table.ranking.best()
    if best is None or best["status"] != COMPLETED:
        return None
    best = best | {AVERAGES: [row["number"] for row in table.ranking.all.best(table.keep) if _is_like(row, best)]}
    try:
        return best | {"temperature": _temperature(table.folder.models / str(best["number"]))}
    except ValueError:  # an earlier version kept no models there
        return best


def _is_like(row: Row, best: Row) -> bool:
    """Whether a trial's weights can be averaged with those of the best one. (Probes differ in their heads alone.)"""
    same = all(row.get(name) == best.get(name) for name in ("arch", "head", "concat_pool", "hidden"))
    return same and row["kind"] == best["kind"] == TRIAL and row["status"] == COMPLETED


@lru_cache(maxsize=1)  # a search with a time budget asks for its winner again and again
def _temperature(model: Path) -> float:
    return read_model(model).temperature
