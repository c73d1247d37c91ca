"""The results table: `trials.csv` with one row a trial, `epochs.csv` with one row an epoch."""

import math
import shutil
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from ray import tune

from search.options.strategy import CONFIRM_SEEDS
from search.runs.atomic_files import append_line, write_atomically
from search.runs.csv_file import Row, as_csv, as_text, decimal, moment, one_of, read_table, whole, whole_or_none
from search.runs.kept_models import KeptModels
from search.runs.paths import RunFolder
from trainables.ray.trial import RETRAINS, table_id
from trainables.recipe import Recipe
from trainables.system.text import last_line
from trainables.training import checkpoint
from trainables.training.checkpoint import WEIGHTS_FILE

COMPLETED, STOPPED, FAILED, RUNNING = "completed", "stopped early", "failed", "running"
RETRAINED = "retrained"
"""A trial that was one of the best once more, with another seed. It does not compete."""
METRICS = ("error_rate", "tta_error_rate", "valid_loss", "accuracy", "epochs_done", "epochs_total")
SCORES = METRICS[:4]
"""Metrics that a trial without a finished epoch, or a failed one, does not have."""
COSTS = ("seconds", "overhead_seconds", "images_per_second")
CONFIRMED = "confirmed_error_rate"
"""Mean error rate of a trial's retrainings."""
EPOCH_COLUMNS = [
    "number",
    "trial_id",
    "epoch",
    "stage",
    "progress",
    "train_loss",
    "valid_loss",
    "error_rate",
    "accuracy",
]
EPOCH_COLUMNS += ["train_seconds", "valid_seconds", "images_per_second", "train_images", "valid_images", "batch_parts"]
EPOCH_COLUMNS += ["finished_at"]

TRIAL_KINDS = {
    "number": whole,
    "status": one_of(COMPLETED, STOPPED, FAILED, RUNNING, RETRAINED),
    **dict.fromkeys((*SCORES, *COSTS, CONFIRMED), decimal),
    **dict.fromkeys(("epochs_done", "epochs_total"), whole),
    RETRAINS: whole_or_none,
}
"""What the fields of `trials.csv` are; those of settings are text."""
TRIAL_NEEDED = ("number", "trial_id", "status", "error_rate", "epochs_done", "epochs_total")
EPOCH_KINDS = dict.fromkeys(EPOCH_COLUMNS, decimal) | {
    **dict.fromkeys(("number", "epoch"), whole),
    **dict.fromkeys(("trial_id", "stage"), str),
    **dict.fromkeys(("progress", "train_images", "valid_images", "batch_parts"), whole_or_none),
    "finished_at": moment,
}
EPOCH_NEEDED = ("number", "trial_id", "epoch", "error_rate")


def rank(row: Row) -> tuple[float, ...]:
    """Sorts completed trials best first: lowest mean error rate of the retrainings, those without them last; then
    lowest error rate, ties by validation loss, and then the earlier one."""
    confirmed = row.get(CONFIRMED, math.nan)
    return (math.inf if math.isnan(confirmed) else confirmed), row["error_rate"], row["valid_loss"], row["number"]


def leaders(rows: Iterable[Row]) -> list[Row]:
    """The completed trials, best first."""
    return sorted((row for row in rows if row["status"] == COMPLETED), key=rank)


def pareto_front(rows: Iterable[Row]) -> list[Row]:
    """The completed trials that no other one beats in both error rate and seconds, cheapest first."""
    front: list[Row] = []
    for row in sorted(leaders(rows), key=lambda row: (row["seconds"], row["error_rate"])):
        if not front or row["error_rate"] < front[-1]["error_rate"]:
            front.append(row)
    return front


class ResultsTable(tune.Callback):
    """Keeps the tables as the search goes. After a kill at any moment the files on disk are whole, and `setup` reads
    them back when the search goes on.

    A trial's `error_rate` and the other metrics are those of its last epoch; `tta_error_rate`, with test-time
    augmentation, is known at the end only. `seconds` is its training and validation;
    `overhead_seconds` is how long its workers did neither before its first epoch, since the trial before it.
    """

    def __init__(
        self,
        folder: RunFolder,
        *,
        settings: dict[str, Any],
        dimensions: list[str],
        labels: list[str],
        pinned: Sequence[str] = (),
        confirm: int = 0,
        front: bool = False,
        keep: int = 1,
        keep_first: bool = False,
    ) -> None:
        self.folder = folder
        self.settings = settings
        self.dimensions = dimensions
        self.pinned = list(pinned)  # settings that the user gave one value: the same in all rows
        self.labels = labels
        self.confirm = confirm  # so many of the best are trained again
        self.front = front  # whether to mark the Pareto front of error rate and seconds
        self.keep = keep  # so many of the best keep their weights
        self.keep_first = keep_first  # trial 0's weights, too, in `first/`
        self.models = KeptModels(folder, first=keep_first)
        self.rows: dict[str, Row] = {}
        self.lines: dict[str, str] = {}  # of trials.csv, by trial: a thousand rows are not formatted for each event
        self.epoch_rows: dict[tuple[str, int], Row] = {}  # by trial and epoch
        self.running: dict[str, Any] = {}  # Tune's trials, by trial
        self.repeating: set[str] = set()  # trials that had ended before a kill, of which Tune has not taken note
        self.failures_in_a_row = 0
        """How many trials have failed without another end between them, since this start of the search."""
        _tables[folder.run_id] = self

    def __reduce__(self) -> tuple:
        """Tune saves its callbacks and its stopper apart from each other, the latter once a second. The rows are on
        disk anyway, and those who shared this table share the one that is read back."""
        names = ("settings", "dimensions", "labels", "pinned", "confirm", "front", "keep", "keep_first")
        given = {name: getattr(self, name) for name in names}
        return _table_of, (self.folder, given)

    @property
    def columns(self) -> list[str]:
        of_method = ["front"] * self.front + [CONFIRMED, RETRAINS, "seed"] * bool(self.confirm)
        settings = [name for name in (*self.dimensions, *self.pinned) if name not in of_method]
        return ["number", "trial_id", "status", *METRICS, *COSTS, *of_method, *settings, "reason"]

    def setup(self, **info: Any) -> None:
        self.rows = {row["trial_id"]: row for row in read_trials(self.folder.trials)}
        self.epoch_rows = {(row["trial_id"], row["epoch"]): row for row in read_epochs(self.folder.epochs)}
        self.restored = False
        self._write_all()
        self.models.retain(self._kept())  # fewer, where a search goes on with a smaller --keep

    def on_step_begin(self, iteration: int, trials: list, **info: Any) -> None:
        """Before the first step, drop the trials that began after Tune last saved its state: a kill made it forget
        them, and it runs others in their place."""
        if self.restored:
            return
        self.restored = True
        known = {table_id(trial): trial for trial in trials}
        running = [trial_id for trial_id, row in self.rows.items() if row["status"] == RUNNING]
        self.running = {trial_id: known[trial_id] for trial_id in running if trial_id in known}
        forgotten = set(running) - set(known)
        if not forgotten:
            return
        self.rows = {i: row for i, row in self.rows.items() if i not in forgotten}
        self.epoch_rows = {key: row for key, row in self.epoch_rows.items() if key[0] not in forgotten}
        self._write_all()
        for trial_id in forgotten:
            shutil.rmtree(self.folder.checkpoints / trial_id, ignore_errors=True)

    def on_trial_start(self, iteration: int, trials: list, trial, **info: Any) -> None:
        row = self._row(trial)
        if row["status"] != RUNNING:  # a kill came before Tune saved its end: it will say its last result once more
            self.repeating.add(row["trial_id"])
        self.running[row["trial_id"]] = trial
        self._write_trials(row)

    def on_trial_result(self, iteration: int, trials: list, trial, result: dict[str, Any], **info: Any) -> None:
        row = self._row(trial)
        if row["trial_id"] in self.repeating:
            if result["failure"] or result["epoch"] == row["epochs_done"]:
                return
            self.repeating.remove(row["trial_id"])  # its files were lost, and it begins anew
            row |= {"status": RUNNING, "reason": ""}
        if result["failure"]:
            fail(row, result["failure"])
            return
        row |= {name: result.get(name, math.nan) for name in (*SCORES, "epochs_total", "images_per_second")}
        row["epochs_done"] = result["epoch"]
        row |= {name: result[name] for name in ("seconds", "overhead_seconds")}
        self._add_epoch(row, result)
        if row["epochs_done"] == row["epochs_total"] and row[RETRAINS] == "":
            self._keep_weights(trial, row)  # a trial counts as complete when its weights are where they are looked for
        self._write_trials(row)

    def on_trial_complete(self, iteration: int, trials: list, trial, **info: Any) -> None:
        row = self._row(trial)
        if row["status"] != RUNNING:
            pass  # it has failed, or had ended before a kill
        elif row["epochs_done"] == row["epochs_total"]:
            row["status"] = COMPLETED if row[RETRAINS] == "" else RETRAINED
        else:
            row["status"] = STOPPED
            row["reason"] = self.folder.stop_reasons().get(trial.trial_id, "the search ended")
        self._end(row)
        if row["status"] == RETRAINED:
            self._confirm(row[RETRAINS])

    def on_step_end(self, iteration: int, trials: list, **info: Any) -> None:
        """A search that ends (time budget, too many failures) terminates its trials without telling callbacks."""
        for trial in [trial for trial in self.running.values() if trial.status == trial.TERMINATED]:
            self.on_trial_complete(iteration, trials, trial)

    def on_trial_error(self, iteration: int, trials: list, trial, **info: Any) -> None:
        row = self._row(trial)
        fail(row, last_line(trial.get_error() or "") or "its actor was lost")
        self._end(row)

    def _end(self, row: Row) -> None:
        if row["trial_id"] not in self.repeating:
            self.failures_in_a_row = self.failures_in_a_row + 1 if row["status"] == FAILED else 0
        self.repeating.discard(row["trial_id"])
        self.running.pop(row["trial_id"], None)
        self._write_trials(row, *self._mark_front())
        checkpoint.drop(self.folder.checkpoints / row["trial_id"])
        self.models.retain(self._kept())

    def _mark_front(self) -> list[Row]:
        """The rows of which this is news."""
        if not self.front:
            return []
        front = {row["trial_id"] for row in pareto_front(self.rows.values())}
        changed = [row for row in self.rows.values() if (row["front"] == "yes") != (row["trial_id"] in front)]
        for row in changed:
            row["front"] = "yes" if row["trial_id"] in front else ""
        return changed

    def _confirm(self, number: int) -> None:
        """Rank a trial by its retrainings when the last of them has ended."""
        again = [r for r in self.rows.values() if r[RETRAINS] == number and r["status"] == RETRAINED]
        if len(again) < CONFIRM_SEEDS:
            return
        row = next((row for row in self.rows.values() if row["number"] == number), None)
        if row is None:  # somebody removed it
            return
        row[CONFIRMED] = sum(r["error_rate"] for r in again) / len(again)
        self._write_trials(row)
        self.models.retain(self._kept())

    def _kept(self, *more: Row) -> list[int]:
        """The trials that keep their models, with those of `more`, best first. Where a search is extended, the next to
        be confirmed are others than those that were, which go first."""
        ranked = leaders([*self.rows.values(), *more])
        by_error = sorted(ranked, key=lambda row: rank(row)[1:]) if self.confirm else []
        return list(dict.fromkeys(row["number"] for row in (*ranked[: self.keep], *by_error[: self.confirm])))

    def _row(self, trial) -> Row:
        trial_id = table_id(trial)
        if trial_id not in self.rows:
            nothing_yet = dict.fromkeys((*SCORES, "images_per_second"), math.nan)
            recipe = self.settings | trial.config
            retrains = next((row["number"] for i, row in self.rows.items() if i == recipe.get(RETRAINS)), "")
            self.rows[trial_id] = dict(
                number=self._next_number(),
                trial_id=trial_id,
                status=RUNNING,
                **nothing_yet,
                epochs_done=0,
                epochs_total=recipe["epochs"] + recipe["freeze_epochs"],
                seconds=0.0,
                overhead_seconds=math.nan,
                reason="",
                **{"front": "", CONFIRMED: math.nan, RETRAINS: retrains},
                **{name: recipe[name] for name in (*self.dimensions, *self.pinned, "seed")},
            )
        return self.rows[trial_id]

    def _next_number(self) -> int:
        """Epochs count, too: they are still there where a damaged row of `trials.csv` was removed by hand."""
        return 1 + max((row["number"] for row in (*self.rows.values(), *self.epoch_rows.values())), default=-1)

    def _keep_weights(self, trial, row: Row) -> None:
        found = checkpoint.newest(self.folder.checkpoints / row["trial_id"])
        # Without weights it has ended and was looked at before: a kill made Tune forget that.
        if not found or not (found / WEIGHTS_FILE).is_file():
            return
        known = {name: row[name] for name in row if name not in ("front", CONFIRMED, RETRAINS)}
        metrics = known | trial.config | {"status": COMPLETED}  # a row read back has its dimensions as text
        recipe = Recipe.from_dict(self.settings | trial.config).to_dict()
        kept = self._kept(row | {"status": COMPLETED})
        self.models.add(found, kept=kept, recipe=recipe, labels=self.labels, metrics=metrics)

    def _add_epoch(self, row: Row, result: dict[str, Any]) -> None:
        finished_at = datetime.now().astimezone().isoformat(timespec="seconds")
        epoch = {name: result[name] for name in EPOCH_COLUMNS if name in result}
        epoch |= {"number": row["number"], "trial_id": row["trial_id"], "finished_at": finished_at}
        key = row["trial_id"], result["epoch"]
        repeated = key in self.epoch_rows  # its trial went on from before it
        self.epoch_rows[key] = epoch
        if repeated:
            self._write_epochs()
            return
        append_line(self.folder.epochs, as_csv(EPOCH_COLUMNS, [epoch], header=False))

    def _write_epochs(self) -> None:
        write_atomically(self.folder.epochs, as_csv(EPOCH_COLUMNS, self.epoch_rows.values()))

    def _write_trials(self, *changed: Row) -> None:
        self.lines |= {row["trial_id"]: as_csv(self.columns, [row], header=False) for row in changed}
        write_atomically(self.folder.trials, as_csv(self.columns, []) + "".join(self.lines.values()))

    def _write_all(self) -> None:
        self._write_epochs()
        self.lines = {}
        self._write_trials(*self.rows.values())


_tables: dict[str, ResultsTable] = {}
"""The table of each run in this process, by its id: the folder may have moved."""


def _table_of(folder: RunFolder, given: dict[str, Any]) -> ResultsTable:
    return _tables.get(folder.run_id) or ResultsTable(folder, **given)


def fail(row: Row, reason: str) -> None:
    """A trial that failed scores nothing, however well its last epoch went."""
    writable = reason.encode(errors="backslashreplace").decode()  # a file that it names may have no UTF-8 name
    row |= dict.fromkeys(SCORES, math.nan) | {"status": FAILED, "reason": writable}


def failures_in_a_row(folder: RunFolder) -> int:
    """How many trials have failed, one after another, since the last one that did not, in this start of a search."""
    table = _tables.get(folder.run_id)
    return table.failures_in_a_row if table else 0


class TooManyFailures(tune.Stopper):
    """Ends a search in which one trial after another fails: it is the search that is wrong, not the trials."""

    def __init__(self, table: ResultsTable, limit: int) -> None:
        self.table = table
        self.limit = limit

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self.table.failures_in_a_row >= self.limit


def read_trials(path: Path, needed: Iterable[str] = TRIAL_NEEDED) -> list[Row]:
    """The rows of `trials.csv` with numbers as numbers; dimensions as in the file. None where there is no file yet.

    Raises `ValueError` where it is damaged or lacks one of the columns `needed`.
    """
    if not path.is_file():
        return []
    rows = read_table(path, TRIAL_KINDS, needed, key="number")[1]
    absent = dict.fromkeys((*SCORES, *COSTS, CONFIRMED), math.nan) | {RETRAINS: "", "front": "", "reason": ""}
    for row in rows:
        row |= {name: value for name, value in absent.items() if name not in row}
    return rows


def read_epochs(path: Path) -> list[Row]:
    """The rows of `epochs.csv`, likewise."""
    return read_table(path, EPOCH_KINDS, EPOCH_NEEDED)[1] if path.is_file() else []


def check_tables(folder: RunFolder, dimensions: Iterable[str]) -> None:
    """Raises `ValueError` where a table is damaged: before a search goes on, not in the middle of it."""
    read_trials(folder.trials, (*TRIAL_NEEDED, *dimensions))
    read_epochs(folder.epochs)


def row_of(rows: Iterable[Row], config: dict[str, Any]) -> Row | None:
    """The row of the trial with these values of the dimensions, among rows as they are read back."""
    texts = {name: str(as_text(value)) for name, value in config.items()}
    return next((row for row in rows if all(row[name] == text for name, text in texts.items())), None)
