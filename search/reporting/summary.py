"""The lines that a search prints at its end about what it found."""

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from search.options.strategy import CONFIRM_SEEDS
from search.reporting.error_analysis import read_analysis
from search.reporting.importance import importances
from search.runs.kinds import name_of
from search.runs.result_rows import FAILED, better_epoch, confirmed, objective
from search.runs.run_record import RunRecord
from trainables.ray.trial import RETRAINS
from trainables.system.text import duration, many, percent

MAX_SETTINGS = 4  # named


def summary(run: RunRecord) -> list[str]:
    """The winner beside the best probe and trial 0, whether fine-tuning was worth it and the winner's lead is more than
    noise, the classes that the winner never predicts, the Pareto front, and which settings mattered."""
    recipes = run.command.arguments.recipes
    lines = [f"best: {_winner(run)}"]
    if len(rows := side_by_side(run)) > 1:
        cells = ((what, scores(run, row), interval(run, row), model(run, row)) for what, row in rows)
        lines += _aligned(list(cells))
    if refit := run.refit:
        others = refit.get("averaged", 1) - 1
        averaged = f" and averaged with {many(others, 'trial')}" if others else ""
        fewer = f" for {many(refit['epochs'], 'epoch')}" if "epochs" in refit else ""
        lines.append(
            f"refit: best/ is {name_of(refit['number'])}, trained again on all {refit['train_images']} images{fewer}"
            f"{averaged}; its own error cannot be known, and is expected to be a little lower"
        )
    if run.fine_tuning:
        lines.append(f"fine-tuning: {run.fine_tuning}")
    if run.lead and not recipes:
        lines.append(f"noise: {run.lead}")
    if (found := read_analysis(run)) and found.never_predicted:
        lines.append(f"the winner never predicts {found.never_predicted}")
    if missing := _unconfirmed(run):
        lines.append(missing)
    if "front" in run.trials:
        lines.append(f"best for their cost: {describe_front(run)}")
    if shares := importances(run):
        named = [f"{name} {percent(share, 0)}" for name, share in list(shares.items())[:MAX_SETTINGS]]
        lines.append(f"what mattered (PED-ANOVA of {len(run.whole)} trials): {', '.join(named)}")
    return lines


def _winner(run: RunRecord) -> str:
    best = run.best
    assert best is not None  # a summary is made of completed trials
    text = f"{name_of(best['number'])} with {percent(best['error_rate'])} validation error"
    if not run.objective.is_error_rate:
        text += f", {run.objective.name} {run.objective.text(objective(best))}"
    more = []
    if not math.isnan(expected := best.get(run.objective.expected_column, math.nan)):
        more.append(f"{run.objective.text(expected)} expected on new images")
    if not math.isnan(tta := best["tta_error_rate"]):
        more.append(f"{percent(tta)} with test-time augmentation")
    if not math.isnan(mean := confirmed(best)):
        folds = run.command.arguments.folds
        over = f"{folds} folds, in which each image validates once" if folds else f"{CONFIRM_SEEDS} more seeds"
        more.append(f"{run.objective.text(mean)} on average over {over}")
    if better := better_epoch(best):
        more.append(f"{percent(better[1])} at epoch {better[0]}")
    return text + (f" ({', '.join(more)})" if more else "")


def side_by_side(run: RunRecord) -> list[tuple[str, "pd.Series[Any]"]]:
    """What a person compares, each with what it is: the best probe, trial 0, the winner; those of them that there are.
    Among named recipes, trial 0 is nothing special."""
    found: dict[int, tuple[str, pd.Series[Any]]] = {}
    first = None if run.command.arguments.recipes else run.first
    for what, row in (("the best probe", run.probe), ("the space's recipe", first), ("the winner", run.best)):
        if row is not None:
            before, _ = found.get(row["number"], (name_of(row["number"]), row))
            found[row["number"]] = f"{before}, {what}", row
    return list(found.values())


def scores(run: RunRecord, row: "pd.Series[Any]") -> str:
    """The error rate, and what the search minimises if that is something else."""
    error = percent(row["error_rate"])
    other = f", {run.objective.name} {run.objective.text(objective(row))}"
    return error if run.objective.is_error_rate else error + other


def interval(run: RunRecord, row: "pd.Series[Any]") -> str:
    """Such as "95 % interval 2.3 to 10.5 %"; empty where it is not known."""
    ends = run.interval(row)
    return f"95 % interval {100 * ends[0]:.1f} to {percent(ends[1])}" if ends else ""


def model(run: RunRecord, row: "pd.Series[Any]") -> str:
    """Such as "resnet34 at 224 px, trained in 9 s", as far as it is known."""
    arch, size = (run.setting(row, name) for name in ("arch", "image_size"))
    backbone = f"{arch} at {size} px, " if arch and size else f"{arch}, " if arch else ""
    return f"{backbone}trained in {duration(row['seconds'])}"


def _aligned(rows: Sequence[tuple[str, str, str, str]]) -> list[str]:
    """What, error, interval and model of each row in columns, the errors to the right."""
    what, error, interval, _ = (max(map(len, column)) for column in zip(*rows, strict=True))
    return [f"  {a:<{what}}  {b:>{error}}  {c:<{interval}}  {d}" for a, b, c, d in rows]


def _unconfirmed(run: RunRecord) -> str:
    """A line if `--confirm` or `--folds` is incomplete."""
    wanted = min(run.command.arguments.num_confirmed, len(run.whole))
    best = run.whole.sort_values([run.objective.column, "valid_loss", "number"])[:wanted]
    done = int(best[run.objective.confirmed_column].notna().sum()) if wanted else 0
    if done == wanted:
        return ""
    missing = "the search ended before the others"
    if failed := sorted(run.trials[run.trials["status"] == FAILED].get(RETRAINS, pd.Series()).dropna().unique()):
        missing = f"retraining failed for trial {', '.join(f'{number:g}' for number in failed)}"
    return f"confirmed: {done} of the best {wanted}; {missing}"


def describe_front(run: RunRecord) -> str:
    """Such as "5.0 % in 30 s (trial 4), 3.0 % in 60 s (trial 7)"."""
    rows = (row for _, row in run.pareto_front.iterrows())
    named = ((run.objective.text(objective(row)), f"{row['seconds']:.0f} s", name_of(row["number"])) for row in rows)
    return ", ".join(f"{error} in {seconds} ({name})" for error, seconds, name in named)
