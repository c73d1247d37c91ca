"""What a running search shows: a live table on a terminal, or a line per event in a log file.

Where more trials run than a person can follow, both show what they do together, see `many_trials`.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ray import tune
from ray.tune.experiment import Trial
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from search.reporting.many_trials import MANY, ManyTrials, running_rows
from search.runs.csv_file import Row
from search.runs.kinds import PROBE, name_of, short_name
from search.runs.objective import Objective
from search.runs.result_rows import (
    COMPLETED,
    FAILED,
    PROBED,
    RUNNING,
    better_epoch,
    leaders,
    objective,
    row_of,
)
from search.runs.results_table import ResultsTable
from search.runs.time_budget import seconds_spent
from search.spaces.space import NamedRecipe
from trainables.ray.trial import REFITS, table_id
from trainables.system.text import duration, percent

MAX_SHOWN = 8  # completed trials
MOST_LEADING = 100  # of the ranked ones, from which they are taken
MAX_PROBES = 3
"""Of them: where no trial is better than its probe yet, the trials are to be seen as well."""


class Leaderboard(tune.Callback):
    """Reads the results table, so it must follow it in the list of callbacks."""

    def __init__(
        self, table: ResultsTable, *, num_trials: int, time_budget: float | None, rungs: Sequence[int] = ()
    ) -> None:
        self.table = table
        self.num_trials = num_trials
        self.time_budget = time_budget
        self.started = time.monotonic()
        self.spent_before = 0.0
        self.live: Live | None = None
        self.many = ManyTrials(rungs)
        self.refit = ""  # how far the winner's training on all images is

    def setup(self, *args: Any, **info: Any) -> None:
        self.started = time.monotonic()
        self.spent_before = seconds_spent(self.table.folder)
        self.ended_before = self._num_ended_trials()
        self.console = Console()
        if self.console.is_terminal:
            self.live = Live(console=self.console, get_renderable=self._render, refresh_per_second=2, transient=True)
            self.live.start()

    def _row(self, trial: Trial) -> Row:
        return self.table.rows[table_id(trial)]

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        if REFITS in trial.config:
            return self._note_refit(trial, "starts")
        row = self._row(trial)
        if self._has_many():
            return self._say_many()
        self._say(row, f"starts: {_recipe(row, self.table.dimensions)}")

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        if REFITS in trial.config:
            return self._note_refit(trial, result["failure"] or f"epoch {result['epoch']}/{result['epochs_total']}")
        row = self._row(trial)
        if result["failure"]:
            return
        self.many.note_epoch()
        if self._has_many():
            return self._say_many()
        epoch = "probe" if result["stage"] == PROBE else f"epoch {_epochs(row)} ({result['stage']})"
        losses = f"train loss {result['train_loss']:.3f}, valid loss {row['valid_loss']:.3f}"
        parts = result.get("batch_parts", 1)
        split = f", each batch in {parts} parts to save memory" if parts > 1 else ""
        speed = f"{result['images_per_second']:.0f} images/s"
        if skipped := result.get("skipped_images", 0):
            speed += f", from {result['train_images']} of {result['train_images'] + skipped} images for lack of time"
        self._say(row, f"{epoch}: {self._score(row)}, {losses}, {speed}{split}")

    def _note_refit(self, trial: Trial, what: str) -> None:
        self.refit = f"the winner again, on all images: {what}"
        self._say(self.table.rows[trial.config[REFITS]], self.refit)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        if REFITS in trial.config:
            return
        row = self._row(trial)
        self.many.note_end(row["status"])
        best = self.table.ranking.best()
        is_best = best is not None and best["number"] == row["number"]
        if self._has_many() and not is_best and row["status"] != FAILED:
            return self._say_many()
        outcome = row["reason"] or self._score(row)
        if better := better_epoch(row):
            outcome += f" ({percent(better[1])} at epoch {better[0]})"
        self._say(row, f"{row['status']}: {outcome}. {self._summary()}")

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self.on_trial_complete(iteration, trials, trial)

    def on_experiment_end(self, trials: list[Trial], **info: Any) -> None:
        self.close()

    def close(self) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"live": None, "console": None}  # Tune pickles its callbacks; a terminal cannot be

    def _say(self, row: Row, text: str) -> None:
        if self.live is None:
            line = f"{time.strftime('%H:%M:%S')}  {name_of(row['number']):<9} {text}"
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _has_many(self) -> bool:
        return len(self.table.running) > MANY

    def _say_many(self) -> None:
        """A line about all trials, from time to time."""
        if self.live is None and self.many.is_due:
            running = running_rows(self.table.rows.values())
            text = f"{self.many.log_line(running, self.table.settings)}. {self._summary()}"
            self.console.print(f"{time.strftime('%H:%M:%S')}  {text}", highlight=False, markup=False, soft_wrap=True)

    def _score(self, row: Row) -> str:
        """Such as "error 5.0 %", with the objective where it is another."""
        error, what = f"error {_percent(row['error_rate'])}", self.table.objective
        return error if what.is_error_rate else f"{error}, {what.name} {_text(what, objective(row))}"

    def _num_ended(self) -> int:
        return sum(row["status"] != RUNNING for row in self.table.rows.values())

    def _num_ended_trials(self) -> int:
        return sum(row["status"] != RUNNING and row["number"] >= 0 for row in self.table.rows.values())

    def _summary(self) -> str:
        best = self.table.ranking.best()
        incumbent = f"best {self._score(best)} ({name_of(best['number'])})" if best else "no trial completed yet"
        total = max(self.num_trials, len(self.table.rows))  # after an extension, more trials may be trained again
        what = "probes and trials" if _has_probes(self.table.rows.values()) else "trials"
        refit = f", {self.refit}" if self.refit else ""
        return f"{self._num_ended()}/{total} {what} ended, {incumbent}{refit}, {self._time_left()}"

    def _time_left(self) -> str:
        """Probes do not tell how long the trials after them will take."""
        elapsed = time.monotonic() - self.started
        ended = self._num_ended_trials() - self.ended_before
        guesses = [self.time_budget - self.spent_before - elapsed] if self.time_budget else []
        if ended:
            guesses.append(elapsed / ended * (self.num_trials - self._num_ended()))
        left = f", about {duration(max(0, min(guesses)))} left" if guesses else ""
        return f"{duration(self.spent_before + elapsed)} elapsed{left}"

    def _render(self) -> Group:
        """At most as high as the terminal: half for the running trials, the rest for the best ones."""
        running = running_rows(list(self.table.rows.values()))
        height = self.console.size.height
        has_many = len(running) > MANY
        shown = [] if has_many else running[: max(1, height // 2 - 3)]
        # Two or three lines follow, and some about many trials.
        best = _leading(self.table.ranking.all.best(MOST_LEADING))[: max(0, height - len(shown) - 7 - 2 * has_many)]
        parts: list[RenderableType] = [
            rows_table([*shown, *best], self.table.dimensions, self.table.objective, fold=False)
        ]
        if has_many:
            grid = Table.grid(padding=(0, 2))
            for name, text in self.many.lines(running, self.table.settings):
                grid.add_row(Text(name, style="bold"), Text(text, no_wrap=True, overflow="ellipsis"))
            parts.append(grid)
        elif len(shown) < len(running):
            parts.append(Text(f"and {len(running) - len(shown)} more running", style="dim"))
        bar = Table.grid(expand=True)
        bar.add_row(ProgressBar(total=self.num_trials, completed=self._num_ended()))
        return Group(*parts, bar, Text(self._summary()))


ERROR_RATE = Objective("error_rate")


def leaderboard(rows: list[Row], dimensions: list[str], of: Objective = ERROR_RATE) -> Table:
    """The best completed trials by an objective, as a table for `rich`."""
    return rows_table(_leading(rows), dimensions, of)


def _leading(rows: Iterable[Row]) -> list[Row]:
    """The best completed trials, with the best of the probes among them."""
    best = leaders(rows)
    later_probes = [row["number"] for row in best if row["number"] < 0][MAX_PROBES:]
    return [row for row in best if row["number"] not in later_probes][:MAX_SHOWN]


def rows_table(rows: list[Row], dimensions: list[str], of: Objective = ERROR_RATE, *, fold: bool = True) -> Table:
    """Trials as a table for `rich`, with a bar for the epochs of a running one; without `fold`, one line each."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    # With these widths, only the recipe shrinks in a narrow terminal.
    widths = {"trial": 8 if _has_probes(rows) else 5, "status": 10, "epochs": 6, "error": 7, "loss": 5, "seconds": 7}
    for name, width in widths.items():
        table.add_column(name, justify="left" if name == "status" else "right", no_wrap=True, min_width=width)
    optional = {name: cell for name, cell in _optional_columns(of).items() if any(map(cell, rows))}
    for name in optional:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("recipe", overflow="fold")
    for row in rows:
        known = not math.isnan(row["error_rate"])
        scores = [_percent(row["error_rate"]), f"{row['valid_loss']:.3f}"] if known else ["", ""]
        cells = [short_name(row["number"]), _status(row), _epochs(row), *scores]
        cells.append(f"{row['seconds']:.0f}")
        cells += [cell(row) for cell in optional.values()]
        recipe = _recipe(row, dimensions)
        # A column that cannot wrap would not shrink, so only its text does not wrap.
        table.add_row(*cells, recipe if fold else Text(recipe, no_wrap=True, overflow="ellipsis"))
    return table


def _optional_columns(of: Objective) -> dict[str, Callable[[Row], str]]:
    """Those that are shown where a row has something for them."""
    own = {} if of.is_error_rate else {of.name: lambda row: _text(of, objective(row))}
    return own | {
        "expected": lambda row: _text(of, row.get(of.expected_column)),
        "confirmed": lambda row: _text(of, row.get(of.confirmed_column)),  # of the retrainings
        "front": lambda row: "*" if row.get("front") else "",
        "best epoch": lambda row: _best_epoch(row),  # where it is not the last one
    }


def _text(of: Objective, value: float | None) -> str:
    return "" if value is None or math.isnan(value) else of.text(value)


def _best_epoch(row: Row) -> str:
    """Such as "0: 18.3 %"."""
    better = better_epoch(row)
    return f"{better[0]}: {percent(better[1])}" if better else ""


def _has_probes(rows: Iterable[Row]) -> bool:
    return any(row["number"] < 0 for row in rows)


def _epochs(row: Row) -> str:
    return f"{row['epochs_done']}/{row['epochs_total']}" if row["epochs_total"] else "0"


def _status(row: Row) -> str | ProgressBar:
    if row["status"] != RUNNING:
        return str(row["status"])
    done, total = row["epochs_done"], row["epochs_total"]
    return ProgressBar(total=total or 1, completed=done, width=10, pulse=done == 0)


def recipes_table(dimensions: list[str], recipes: Sequence[NamedRecipe], rows: list[Row]) -> Table:
    """Named recipes with their errors here and, where known, the published ones, as a table for `rich`."""
    published = [[_percent(recipe.error_rate), _percent(recipe.tta_error_rate)] for recipe in recipes]
    shown = [any(errors) for errors in zip(*published, strict=True)]
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("recipe")
    names = ["trial", "epochs", "seconds", "error", *["published"] * shown[0], "with TTA", *["published"] * shown[1]]
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("source")
    for recipe, (theirs, their_tta) in zip(recipes, published, strict=True):
        row = row_of(rows, {name: recipe.settings[name] for name in dimensions})
        *costs, error, tta = _recipe_cells(row)
        errors = [error, *[theirs] * shown[0], tta, *[their_tta] * shown[1]]
        table.add_row(recipe.name, *costs, *errors, recipe.source)
    return table


def _recipe_cells(row: Row | None) -> list[str]:
    """Trial, epochs, seconds, error, error with test-time augmentation."""
    if row is None:
        return ["", "", "", "not run", ""]
    costs = [str(row["number"]), _epochs(row), f"{row['seconds']:.0f}"]
    if row["status"] != COMPLETED:
        return [*costs, row["status"], ""]
    return [*costs, _percent(row["error_rate"]), _percent(row["tta_error_rate"])]


def counts(rows: list[Row]) -> str:
    """Such as "7 completed, 3 stopped early"."""
    return ", ".join(f"{count} {status}" for status, count in Counter(row["status"] for row in rows).items())


def _percent(error_rate: float | None) -> str:
    return _text(ERROR_RATE, error_rate)


def _recipe(row: Row, dimensions: list[str]) -> str:
    """The searched settings; of a probe only what it depends on."""
    names = [name for name in dimensions if name in PROBED] if row.get("kind") == PROBE else dimensions
    return "  ".join(f"{name} {_short(row[name])}" for name in names)


def _short(value: Any) -> str:
    """A number in three digits; anything else as it is."""
    try:
        return f"{float(value):.3g}"
    except ValueError:
        return str(value)
