"""What a person sees while a search runs: a live table on a terminal, a line per event in a log file."""

import math
import time
from collections.abc import Sequence
from typing import Any

from ray import tune
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from search.runs.results_table import COMPLETED, CONFIRMED, RUNNING, ResultsTable, Row, leaders, row_of
from search.runs.time_budget import seconds_spent
from search.spaces.space import NamedRecipe
from trainables.ray.trial import table_id
from trainables.system.text import duration, percent

SHOWN = 8


class Leaderboard(tune.Callback):
    """Reads the results table, so it must come after it among the callbacks."""

    def __init__(self, table: ResultsTable, *, num_trials: int, time_budget: float | None) -> None:
        self.table = table
        self.num_trials = num_trials
        self.time_budget = time_budget
        self.started = time.monotonic()
        self.spent_before = 0.0
        self.live: Live | None = None

    def setup(self, **info: Any) -> None:
        self.started = time.monotonic()
        self.spent_before = seconds_spent(self.table.folder)
        self.ended_before = self._num_ended()
        self.console = Console()
        if self.console.is_terminal:
            self.live = Live(console=self.console, get_renderable=self._render, refresh_per_second=2, transient=True)
            self.live.start()

    def on_trial_start(self, iteration: int, trials: list, trial, **info: Any) -> None:
        row = self.table.rows[table_id(trial)]
        self._say(row, f"starts: {_recipe(row, self.table.dimensions)}")

    def on_trial_result(self, iteration: int, trials: list, trial, result: dict[str, Any], **info: Any) -> None:
        row = self.table.rows[table_id(trial)]
        if not result["failure"]:
            epoch = f"epoch {row['epochs_done']}/{row['epochs_total']} ({result['stage']})"
            losses = f"train loss {result['train_loss']:.3f}, valid loss {row['valid_loss']:.3f}"
            parts = result.get("batch_parts", 1)  # more than one where the memory did not suffice
            split = f", each batch in {parts} parts for want of memory" if parts > 1 else ""
            self._say(
                row, f"{epoch}: error {_percent(row)}, {losses}, {result['images_per_second']:.0f} images/s{split}"
            )

    def on_trial_complete(self, iteration: int, trials: list, trial, **info: Any) -> None:
        row = self.table.rows[table_id(trial)]
        reason = f": {row['reason']}" if row["reason"] else f": error {_percent(row)}"
        self._say(row, f"{row['status']}{reason}. {self._summary()}")

    def on_trial_error(self, iteration: int, trials: list, trial, **info: Any) -> None:
        self.on_trial_complete(iteration, trials, trial)

    def on_experiment_end(self, trials: list, **info: Any) -> None:
        self.close()

    def close(self) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"live": None, "console": None}  # Tune pickles its callbacks; a terminal does not travel

    def _say(self, row: Row, text: str) -> None:
        if self.live is None:
            clock = time.strftime("%H:%M:%S")
            line = f"{clock}  trial {row['number']:<3} {text}"
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _num_ended(self) -> int:
        return sum(row["status"] != RUNNING for row in self.table.rows.values())

    def _summary(self) -> str:
        best = leaders(self.table.rows.values())
        incumbent = f"best error {_percent(best[0])} (trial {best[0]['number']})" if best else "no trial completed yet"
        most = max(self.num_trials, len(self.table.rows))  # other trials than before may be trained again
        return f"{self._num_ended()}/{most} trials ended, {incumbent}, {self._time_left()}"

    def _time_left(self) -> str:
        elapsed = time.monotonic() - self.started
        ended = self._num_ended() - self.ended_before
        guesses = [self.time_budget - self.spent_before - elapsed] if self.time_budget else []
        if ended:
            guesses.append(elapsed / ended * (self.num_trials - self._num_ended()))
        left = f", about {duration(max(0, min(guesses)))} left" if guesses else ""
        return f"{duration(self.spent_before + elapsed)} gone{left}"

    def _render(self) -> Group:
        """No higher than the terminal: half of it for the running trials, the rest for the best ones."""
        rows = list(self.table.rows.values())
        running = [row for row in rows if row["status"] == RUNNING]
        height = self.console.size.height
        shown = running[: max(1, height // 2 - 3)]
        best = leaders(rows)[: max(0, min(SHOWN, height - len(shown) - 7))]  # below: two lines or three
        parts = [rows_table([*shown, *best], self.table.dimensions, fold=False)]
        if len(shown) < len(running):
            parts.append(Text(f"and {len(running) - len(shown)} more running", style="dim"))
        bar = Table.grid(expand=True)
        bar.add_row(ProgressBar(total=self.num_trials, completed=self._num_ended()))
        return Group(*parts, bar, Text(self._summary()))


def leaderboard(rows: list[Row], dimensions: list[str]) -> Table:
    """The best completed trials, as a table for `rich`."""
    return rows_table(leaders(rows)[:SHOWN], dimensions)


def rows_table(rows: list[Row], dimensions: list[str], *, fold: bool = True) -> Table:
    """Trials as a table for `rich`, a running one with a bar of its epochs; without `fold`, a line each."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    widths = {"trial": 5, "status": 10, "epochs": 6, "error": 7, "loss": 5, "seconds": 7}  # recipes give way first
    for name, width in widths.items():
        table.add_column(name, justify="left" if name == "status" else "right", no_wrap=True, min_width=width)
    more = {name: of_row for name, of_row in MORE.items() if any(map(of_row, rows))}
    for name in more:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("recipe", overflow="fold")
    for row in rows:
        known = row["epochs_done"] > 0
        cells = [str(row["number"]), _status(row), f"{row['epochs_done']}/{row['epochs_total']}"]
        cells += [_percent(row) if known else "", f"{row['valid_loss']:.3f}" if known else "", f"{row['seconds']:.0f}"]
        cells += [of_row(row) for of_row in more.values()]
        recipe = _recipe(row, dimensions)
        # The column may wrap, or it would not give way: it is the text that does not.
        table.add_row(*cells, recipe if fold else Text(recipe, no_wrap=True, overflow="ellipsis"))
    return table


MORE = {
    "confirmed": lambda row: _share(row.get(CONFIRMED)),  # the mean of the retrainings
    "front": lambda row: "*" if row.get("front") else "",
}
"""Columns that only some searches have."""


def _status(row: Row) -> str | ProgressBar:
    if row["status"] != RUNNING:
        return row["status"]
    done, total = row["epochs_done"], row["epochs_total"]
    return ProgressBar(total=total, completed=done, width=10, pulse=done == 0)


def recipes_table(dimensions: list[str], recipes: Sequence[NamedRecipe], rows: list[Row]) -> Table:
    """Named recipes with the errors that they reached here and those that were published, as a table for `rich`.

    The columns of published errors are there only where there are any.
    """
    published = [[_share(recipe.error_rate), _share(recipe.tta_error_rate)] for recipe in recipes]
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
    costs = [str(row["number"]), f"{row['epochs_done']}/{row['epochs_total']}", f"{row['seconds']:.0f}"]
    if row["status"] != COMPLETED:
        return [*costs, row["status"], ""]
    return [*costs, _share(row["error_rate"]), _share(row["tta_error_rate"])]


def counts(rows: list[Row]) -> str:
    by_status = {
        status: sum(row["status"] == status for row in rows) for status in dict.fromkeys(r["status"] for r in rows)
    }
    return ", ".join(f"{count} {status}" for status, count in by_status.items())


def _recipe(row: Row, dimensions: list[str]) -> str:
    return "  ".join(f"{name} {_short(row[name])}" for name in dimensions)


def _percent(row: Row) -> str:
    return _share(row["error_rate"])


def _share(error_rate: float | None) -> str:
    return "" if error_rate is None or math.isnan(error_rate) else percent(error_rate)


def _short(value: Any) -> str:
    """A number in three digits; anything else as it is."""
    try:
        return f"{float(value):.3g}"
    except ValueError:
        return str(value)
