"""The results table: `trials.csv` with one row per trial, `epochs.csv` with one row per epoch. (The file is long so
that all that an event changes in a table stands in one place.)"""

import math
import shutil
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from ray import tune
from ray.tune.experiment import Trial

from search.options.strategy import CONFIRM_SEEDS
from search.runs.csv_file import Row
from search.runs.kept_models import KeptModels
from search.runs.kinds import PROBE, TRIAL
from search.runs.objective import Objective
from search.runs.paths import RunFolder
from search.runs.ranking import Ranking
from search.runs.result_rows import (
    COMPLETED,
    CONFIRMED,
    COSTS,
    EPOCH_COLUMNS,
    FAILED,
    METRICS,
    OF_OBJECTIVE,
    RETRAINED,
    RUNNING,
    SCORES,
    STOPPED,
    UNFINISHED,
    expected_alone,
    is_whole,
    objective,
    read_trials,
)
from search.runs.rungs_file import RungsFile
from search.runs.table_files import EpochsFile, TrialsFile
from trainables.ray.node_states import bring_model, drop_state
from trainables.ray.trial import EXPECTED_OBJECTIVE, FOLD, OBJECTIVE, REFITS, RETRAINS, SCREENS, recipe_of, table_id
from trainables.recipe import Recipe
from trainables.system.text import last_line
from trainables.training import checkpoint
from trainables.training.checkpoint import WEIGHTS_FILE


class ResultsTable(tune.Callback):
    """Writes the tables during a search. The files on disk are complete even after a kill, and `setup` reads them when
    the search is resumed.

    A long `trials.csv` is written every half second instead of after each event. Until an end is in it, the trial keeps
    its state on the disk, and Tune's saved state does not have the end either: a kill loses nothing that has ended.

    A trial's metrics are those of its last epoch, or, with `keep_epoch` best, of its best one once it has ended;
    `tta_error_rate`, with test-time augmentation, is known only at its end. `seconds` is the time of training and
    validation, `overhead_seconds` the time between the workers' previous trial and its first epoch.
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
        folds: int = 0,
        front: bool = False,
        keep: int = 1,
        keep_first: bool = False,
        keep_epoch: str = "last",
        metric: str = "error_rate",
    ) -> None:
        self.folder = folder
        self.settings = settings
        self.dimensions = dimensions
        self.pinned = list(pinned)  # settings that the user fixed: the same in all rows
        self.labels = labels
        self.confirm = confirm  # how many of the best are trained again
        self.folds = folds  # in which; 0: they get other seeds
        self.front = front  # whether to mark the Pareto front of error rate and seconds
        self.keep = keep  # how many of the best keep their weights
        self.keep_first = keep_first  # also trial 0's weights, in `first/`
        self.keep_epoch = keep_epoch  # whose model a trial leaves: last or best
        self.metric = metric
        self.objective = Objective(metric)
        # Where the error rate is the objective, its own columns say it all.
        self.of_objective = () if self.objective.is_error_rate else (OBJECTIVE, EXPECTED_OBJECTIVE)
        self.confirmed = self.objective.confirmed_column
        self.epoch_columns = [*EPOCH_COLUMNS, *self.of_objective]
        self.models = KeptModels(folder, first=keep_first)
        self.rows: dict[str, Row] = {}
        self.trials = TrialsFile(folder.trials, self.columns)
        self.epochs = EpochsFile(folder.epochs, self.epoch_columns)
        self.rungs = RungsFile(folder.rungs)
        self.ended: list[str] = []  # trials whose end may not be in `trials.csv` yet
        self.last_number = -1
        self.ranking = self._ranked()
        self.running: dict[str, Trial] = {}  # by trial id in the table
        self.repeating: set[str] = set()  # trials that had ended before a kill without Tune having saved that
        self.consecutive_failures = 0  # since this start of the search
        _tables[folder.run_id] = self

    def __reduce__(self) -> tuple[Any, ...]:
        """Tune pickles its callbacks and its stopper separately, the latter once a second. The rows are on disk anyway,
        and what shared this table shares it again after unpickling."""
        names = ("settings", "dimensions", "labels", "pinned", "confirm", "folds", "front", "keep", "keep_first")
        given = {name: getattr(self, name) for name in (*names, "keep_epoch", "metric")}
        return _table_of, (self.folder, given)

    @property
    def columns(self) -> list[str]:
        again = [self.confirmed, RETRAINS, FOLD if self.folds else "seed"]
        of_strategy = ["front"] * self.front + again * bool(self.confirm)
        settings = [name for name in (*self.dimensions, *self.pinned) if name not in of_strategy]
        scores = (*self.of_objective, *METRICS)
        return ["number", "trial_id", "kind", "status", *scores, *COSTS, *of_strategy, *settings, "reason"]

    def setup(self, *args: Any, **info: Any) -> None:
        self.rows = {row["trial_id"]: row for row in read_trials(self.folder.trials)}
        self._load_epochs()
        self.restored = False
        self.ranking = self._ranked()
        self.trials.write_all(self.rows.values())
        self.models.retain(self.ranking.kept())  # fewer if a search is resumed with a smaller --keep

    def _load_epochs(self) -> None:
        running = {trial_id for trial_id, row in self.rows.items() if row["status"] == RUNNING}
        # Epochs count, too: they remain if the user has removed a damaged row of `trials.csv`.
        self.last_number = max([self.epochs.load(running), *(int(row["number"]) for row in self.rows.values())])

    def _ranked(self) -> Ranking:
        return Ranking(self.rows.values(), keep=self.keep, confirm=self.confirm, front=self.front)

    def get_state(self) -> None:
        """Tune asks for it before it saves its own state, which must not know more than `trials.csv`."""
        self.flush()

    def on_step_begin(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """Before the first step, drop the trials that started after Tune last saved its state: it has lost them in a
        kill, and runs others instead."""
        if self.restored:
            return
        self.restored = True
        known = {table_id(trial): trial for trial in trials}
        running = [trial_id for trial_id, row in self.rows.items() if row["status"] == RUNNING]
        self.running = {trial_id: known[trial_id] for trial_id in running if trial_id in known}
        lost = set(running) - set(known)
        if not lost:
            return
        self.rows = {i: row for i, row in self.rows.items() if i not in lost}
        self.epochs.remove(lost)
        self._load_epochs()
        self.trials.write_all(self.rows.values())
        for trial_id in lost:
            shutil.rmtree(self.folder.checkpoints / trial_id, ignore_errors=True)

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        if REFITS in trial.config:  # see `search.runs.refit`
            return self.flush()
        row = self._row(trial)
        if row["status"] != RUNNING:  # killed before Tune saved its end: Tune will repeat its last result
            self.repeating.add(row["trial_id"])
            self.epochs.reopen(row["trial_id"])
        self.running[row["trial_id"]] = trial
        self._write_trials(row)

    def on_trial_result(self, iteration: int, trials: list[Trial], trial: Trial, result: Row, **info: Any) -> None:
        if REFITS in trial.config:
            return
        row = self._row(trial)
        if row["trial_id"] in self.repeating:
            if result["failure"] or result["epoch"] == row["epochs_done"]:
                return
            self.repeating.remove(row["trial_id"])  # its files were lost, so it starts again
            row |= {"status": RUNNING, "reason": ""}
            self._write_trials(*self.ranking.update(row))
        if result["failure"]:
            return fail(row, result["failure"])
        measured = (*self.of_objective, *SCORES, *COSTS, "best_error_rate", "epochs_total")
        row |= {name: result.get(name, math.nan) for name in measured}
        row |= {"epochs_done": result["epoch"], "best_epoch": result.get("best_epoch", "")}
        self._add_epoch(row, result)
        if is_whole(row) and row[RETRAINS] == "":
            self._keep_weights(trial, row)  # a complete trial has its weights in place
        self._write_trials(row)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        if REFITS in trial.config:
            return
        row = self._row(trial)
        if row["status"] == RUNNING:  # else it has failed, or had ended before a kill
            if is_whole(row):
                row["status"] = COMPLETED if row[RETRAINS] == "" else RETRAINED
            elif reason := self.rungs.read()["reasons"].get(trial.trial_id):
                row |= {"status": STOPPED, "reason": reason}
            else:
                self._end_unfinished(trial, row)
        self._end(row)
        if row["status"] == RETRAINED:
            self._confirm(row[RETRAINS])

    def _end_unfinished(self, trial: Trial, row: Row) -> None:
        """A time budget or failures ended the search: the model of the trial's last epoch may be its best."""
        row |= {"status": UNFINISHED, "reason": "the search ended"}
        if row[RETRAINS] == "" and not math.isnan(row["error_rate"]):
            self._keep_weights(trial, row)

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """A search that stops (time budget, too many failures) terminates its trials without calling callbacks."""
        for trial in [trial for trial in self.running.values() if trial.status == trial.TERMINATED]:
            self.on_trial_complete(iteration, trials, trial)
        if self.trials.is_due:
            self.flush()

    def on_experiment_end(self, trials: list[Trial], **info: Any) -> None:
        self.flush()
        if row := self._best_running():  # nodes may have its model, and the search leaves the cluster now
            bring_model(self.folder.checkpoints / row["trial_id"], self.folder.run_id)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        if REFITS in trial.config:
            return
        row = self._row(trial)
        fail(row, last_line(trial.get_error() or "") or "its actor was lost")
        self._end(row)

    def _end(self, row: Row) -> None:
        if row["trial_id"] not in self.repeating:
            self.consecutive_failures = self.consecutive_failures + 1 if row["status"] == FAILED else 0
        self.repeating.discard(row["trial_id"])
        self.running.pop(row["trial_id"], None)
        self.epochs.close(row["trial_id"])
        self.ended.append(row["trial_id"])
        self._write_trials(row, *self.ranking.update(row))

    def _confirm(self, number: int) -> None:
        """Rank a trial by its retrainings when the last of them has ended."""
        again = [r for r in self.rows.values() if r[RETRAINS] == number and r["status"] == RETRAINED]
        if len(again) < (self.folds - 1 if self.folds else CONFIRM_SEEDS):
            return
        for row in [row for row in self.rows.values() if row["number"] == number]:  # none if the user has removed it
            # In all folds together each image has been validated once, so there is nothing to correct.
            values = [objective(r) for r in (row, *again)] if self.folds else list(map(expected_alone, again))
            row[self.confirmed] = sum(values) / len(values)
            changed = row, *self._confirmed_probes()
            for ranked in changed:
                self.ranking.update(ranked)
            self._write_trials(*changed)
            self.flush()
            self.models.retain(self.ranking.kept())

    def _confirmed_probes(self) -> list[Row]:
        """Probes depend on no seed, so their errors need no confirmation. Returns their rows."""
        probes = [row for row in self.rows.values() if row["kind"] == PROBE and row["status"] == COMPLETED]
        for row in probes:
            row[self.confirmed] = expected_alone(row)
        return probes

    def _row(self, trial: Trial) -> Row:
        trial_id = table_id(trial)
        if trial_id not in self.rows:
            recipe = self.settings | trial.config
            total = recipe["epochs"] + recipe["freeze_epochs"]
            number = recipe[SCREENS] if SCREENS in recipe else self.last_number + 1
            self.last_number = max(self.last_number, number)
            retrains = self.rows[recipe[RETRAINS]]["number"] if recipe.get(RETRAINS) in self.rows else ""
            self.rows[trial_id] = {
                **{"number": number, "trial_id": trial_id, "kind": TRIAL if total else PROBE, "status": RUNNING},
                **dict.fromkeys((*SCORES, *COSTS, CONFIRMED, *OF_OBJECTIVE, "best_error_rate"), math.nan),
                **{"best_epoch": "", "epochs_done": 0, "epochs_total": total, "seconds": 0.0},
                **{"reason": "", "front": "", RETRAINS: retrains, FOLD: recipe.get(FOLD, "")},
                **{name: recipe[name] for name in (*self.dimensions, *self.pinned, "seed")},
            }
        return self.rows[trial_id]

    def _keep_weights(self, trial: Trial, row: Row) -> None:
        states = self.folder.checkpoints / row["trial_id"]
        found = checkpoint.newest(states)
        # Without weights, it had ended before a kill that made Tune forget it.
        if not found or not ((found / WEIGHTS_FILE).is_file() or checkpoint.elsewhere(states)):
            return
        if self.keep_epoch == "best" and row["best_epoch"] not in ("", row["epochs_done"]):
            best = self.epochs.rows[row["trial_id"]][row["best_epoch"]]
            row |= {name: best.get(name, math.nan) for name in (*self.of_objective, *SCORES)}
        status = COMPLETED if is_whole(row) else UNFINISHED
        known = {name: row[name] for name in row if name not in ("front", self.confirmed, RETRAINS, FOLD)}
        searched = {name: trial.config[name] for name in self.dimensions if name in trial.config}
        metrics = known | searched | {"status": status}  # a row that was read back has its dimensions as texts
        recipe = Recipe.from_dict(recipe_of(self.settings, trial.config)).to_dict()
        kept = self.ranking.kept(row | {"status": status})
        is_wanted = row["number"] in kept or (self.keep_first and row["number"] == 0)
        if is_wanted and not bring_model(states, self.folder.run_id):
            return fail(row, "its model was lost with its nodes")
        self.models.add(found, kept=kept, recipe=recipe, labels=self.labels, metrics=metrics)

    def deliver_running(self) -> None:
        """Make the last epoch of a trial that still runs the best model, if it is: the search has been interrupted. The
        trial stays in the table as running, since a resumed search continues it."""
        self.flush()
        if row := self._best_running():
            self._keep_weights(self.running[row["trial_id"]], row)

    def _best_running(self) -> Row | None:
        """The row of a trial that still runs, as if it ended now, if it is the best of all."""
        unfinished = {
            row["trial_id"]: row | {"status": UNFINISHED}
            for row in (self.rows[trial_id] for trial_id in self.running)
            if row[RETRAINS] == ""
        }
        best = self.ranking.all.best(1, *unfinished.values())
        return unfinished.get(best[0]["trial_id"]) if best else None

    def _add_epoch(self, row: Row, result: dict[str, Any]) -> None:
        finished_at = datetime.now().astimezone().isoformat(timespec="seconds")
        epoch = {name: result[name] for name in self.epoch_columns if name in result}
        epoch |= {"number": row["number"], "trial_id": row["trial_id"], "finished_at": finished_at}
        self.epochs.add(epoch)

    def _write_trials(self, *changed: Row) -> None:
        self.trials.note(changed)
        if self.trials.is_due:
            self.flush()

    def flush(self) -> None:
        """Write what has changed. Then the trials that have ended leave the disk, unless they are kept."""
        self.trials.write()
        ended, self.ended = self.ended, []
        for trial_id in ended:
            drop_state(self.folder.checkpoints / trial_id, self.folder.run_id)
        if ended:
            self.models.retain(self.ranking.kept())


_tables: dict[str, ResultsTable] = {}
"""The table of each run in this process, by its id: the folder may have moved."""


def _table_of(folder: RunFolder, given: dict[str, Any]) -> ResultsTable:
    return _tables.get(folder.run_id) or ResultsTable(folder, **given)


def fail(row: Row, reason: str) -> None:
    """A failed trial has no scores, however good its last epoch was."""
    writable = reason.encode(errors="backslashreplace").decode()  # it may contain a file name that is not UTF-8
    row |= dict.fromkeys((*SCORES, *OF_OBJECTIVE), math.nan) | {"status": FAILED, "reason": writable}


def consecutive_failures(folder: RunFolder) -> int:
    """Consecutive failed trials since this start of a search."""
    table = _tables.get(folder.run_id)
    return table.consecutive_failures if table else 0


def deliver_running(folder: RunFolder) -> None:
    """See `ResultsTable.deliver_running`, for the search of this process."""
    if table := _tables.get(folder.run_id):
        table.deliver_running()


class TooManyFailures(tune.Stopper):
    """Stops a search after `limit` consecutive failures: the search must be wrong, not the trials."""

    def __init__(self, table: ResultsTable, limit: int) -> None:
        self.table = table
        self.limit = limit

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self.table.consecutive_failures >= self.limit
