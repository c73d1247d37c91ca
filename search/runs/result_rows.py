"""The rows of the results table: columns, reading and ranking of `trials.csv` and `epochs.csv`."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from search.runs.csv_file import (
    Parser,
    Row,
    as_text,
    float_or_nan,
    integer,
    one_of,
    optional_integer,
    read_table,
    signed_integer,
    timestamp,
)
from search.runs.kinds import PROBE, TRIAL
from search.runs.paths import RunFolder
from trainables.ray.trial import EXPECTED_OBJECTIVE, FOLD, OBJECTIVE, RETRAINS
from trainables.training.metrics import MORE_METRICS

if TYPE_CHECKING:  # takes long to import
    import pandas as pd

COMPLETED, STOPPED, FAILED, RUNNING = "completed", "stopped early", "failed", "running"
RETRAINED = "retrained"  # one of the best trials again, with another seed; it is not ranked
UNFINISHED = "unfinished"  # it was running when a time budget or failures ended the search
RANKED = (COMPLETED, UNFINISHED)
"""What the best model may come from: the last finished epoch of an unfinished trial counts."""
PROBED = ("arch", "image_size")
"""The searched settings that a probe of the screen depends on."""
EXPECTED = "expected_error_rate"  # on new images, where a probe tells it: see `trainables.probe.expected_error`
CALIBRATION = ("temperature", "calibration_error_before", "calibration_error")  # see `trainables.network.calibration`
SCORES = ("error_rate", EXPECTED, "tta_error_rate", "wise_alpha", "valid_loss", "accuracy", *MORE_METRICS, *CALIBRATION)
"""None without a finished epoch."""
METRICS = (*SCORES, "best_epoch", "best_error_rate", "epochs_done", "epochs_total")
COSTS = ("seconds", "overhead_seconds", "images_per_second")
CONFIRMED = "confirmed_error_rate"  # mean of a trial's retrainings
CONFIRMED_OBJECTIVE = "confirmed_objective"
"""The same of `OBJECTIVE`, which tables have where a search minimises another metric than the error rate."""
OF_OBJECTIVE = (OBJECTIVE, EXPECTED_OBJECTIVE, CONFIRMED_OBJECTIVE)
EPOCH_COLUMNS = [
    *("number", "trial_id", "epoch", "stage", "progress", "train_loss", "valid_loss", "error_rate", EXPECTED),
    *("accuracy", *MORE_METRICS, *CALIBRATION, "train_seconds", "valid_seconds", "images_per_second"),
    *("train_images", "valid_images", "batch_parts", "finished_at"),
]

TRIAL_PARSERS: dict[str, Parser] = {
    "number": signed_integer,
    "kind": one_of(TRIAL, PROBE),
    "status": one_of(COMPLETED, STOPPED, FAILED, RUNNING, RETRAINED, UNFINISHED),
    **dict.fromkeys((*SCORES, *COSTS, CONFIRMED, *OF_OBJECTIVE, "best_error_rate"), float_or_nan),
    "best_epoch": optional_integer,
    **dict.fromkeys(("epochs_done", "epochs_total"), integer),
    **dict.fromkeys((RETRAINS, FOLD), optional_integer),
}
"""Types of the fields of `trials.csv`; settings are texts."""
TRIAL_NEEDED = ("number", "trial_id", "status", "error_rate", "epochs_done", "epochs_total")
EPOCH_PARSERS: dict[str, Parser] = {
    **dict.fromkeys((*EPOCH_COLUMNS, *OF_OBJECTIVE), float_or_nan),
    "number": signed_integer,
    "epoch": integer,
    **dict.fromkeys(("trial_id", "stage"), str),
    **dict.fromkeys(("progress", "train_images", "valid_images", "batch_parts"), optional_integer),
    "finished_at": timestamp,
}
EPOCH_NEEDED = ("number", "trial_id", "epoch", "error_rate")


def better_epoch(row: "Row | pd.Series[Any]") -> tuple[int, float] | None:
    """The best epoch of a trial and its error rate, where it is not the last one; epoch 0 is the trial's own probe."""
    epoch, error = row.get("best_epoch", ""), row.get("best_error_rate", math.nan)
    if epoch in ("", row["epochs_done"]) or math.isnan(epoch) or math.isnan(error) or row["status"] == FAILED:
        return None
    return int(epoch), float(error)


def is_whole(row: Row) -> bool:
    """Whether a trial has made its last epoch."""
    return bool(row["epochs_done"] == row["epochs_total"]) and not math.isnan(row["error_rate"])


def objective(row: "Mapping[str, Any] | pd.Series[Any]") -> float:
    """What the search minimises, of a trial on the validation images: the error rate, or what another metric lacks to
    its best value."""
    return float(row[OBJECTIVE] if _has_objective(row) else row["error_rate"])


def confirmed(row: "Mapping[str, Any] | pd.Series[Any]") -> float:
    """The mean objective of a trial's retrainings; NaN without them."""
    return float(row.get(CONFIRMED_OBJECTIVE if _has_objective(row) else CONFIRMED, math.nan))


def expected_alone(row: "Mapping[str, Any] | pd.Series[Any]") -> float:
    """The objective to expect of a trial on new images by itself, as far as it is known: its own one corrected by its
    probe's, or its own one on the validation images."""
    expected = row.get(EXPECTED_OBJECTIVE if _has_objective(row) else EXPECTED, math.nan)
    return objective(row) if math.isnan(expected) else float(expected)


def expected_objective(row: "Mapping[str, Any] | pd.Series[Any]") -> float:
    """The same, or the mean over its retrainings."""
    return expected_alone(row) if math.isnan(confirmed(row)) else confirmed(row)


def _has_objective(row: "Mapping[str, Any] | pd.Series[Any]") -> bool:
    """Whether the search minimises something else than the error rate."""
    return not math.isnan(row.get(OBJECTIVE, math.nan))


def rank(row: Row) -> tuple[float, ...]:
    """Key that sorts completed trials best first: those that were trained again before the others, then by expected
    objective, objective, validation loss, and number."""
    return math.isnan(confirmed(row)), expected_objective(row), objective(row), row["valid_loss"], row["number"]


def is_ranked(row: Row) -> bool:
    """Whether a trial has completed, or is unfinished and has made an epoch."""
    return row["status"] in RANKED and not math.isnan(row["error_rate"])


def leaders(rows: Iterable[Row]) -> list[Row]:
    """The ranked trials, best first."""
    return sorted(filter(is_ranked, rows), key=rank)


def pareto_front(rows: Iterable[Row]) -> list[Row]:
    """The completed trials that no other one beats in both objective and seconds, cheapest first."""
    front: list[Row] = []
    for row in sorted(leaders(rows), key=lambda row: (row["seconds"], objective(row))):
        if not front or objective(row) < objective(front[-1]):
            front.append(row)
    return front


def read_trials(path: Path, needed: Iterable[str] = TRIAL_NEEDED) -> list[Row]:
    """The rows of `trials.csv` with numbers as numbers and settings as texts; empty if there is no file yet.

    Raises `ValueError` if it is damaged or lacks one of the columns `needed`.
    """
    if not path.is_file():
        return []
    rows = read_table(path, TRIAL_PARSERS, needed, key="number")[1]
    absent: Row = dict.fromkeys((*SCORES, *COSTS, CONFIRMED, *OF_OBJECTIVE, "best_error_rate"), math.nan)
    absent |= {RETRAINS: "", FOLD: "", "front": "", "reason": "", "kind": TRIAL, "best_epoch": ""}
    for row in rows:
        row |= {name: value for name, value in absent.items() if name not in row}
    return rows


def read_epochs(path: Path) -> list[Row]:
    """The rows of `epochs.csv`; empty if there is no file yet."""
    return read_table(path, EPOCH_PARSERS, EPOCH_NEEDED)[1] if path.is_file() else []


def check_tables(folder: RunFolder, dimensions: Iterable[str]) -> None:
    """Raises `ValueError` if a table is damaged: before a search is resumed, not in the middle of it."""
    read_trials(folder.trials, (*TRIAL_NEEDED, *dimensions))
    read_epochs(folder.epochs)


def row_of(rows: Iterable[Row], config: dict[str, Any]) -> Row | None:
    """The row of the trial with these values of the dimensions, among rows that were read from the file."""
    texts = {name: str(as_text(value)) for name, value in config.items()}
    return next((row for row in rows if all(row[name] == text for name, text in texts.items())), None)
