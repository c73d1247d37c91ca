"""The lines that a search prints at its end about what it found."""

import math

import pandas as pd

from search.options.strategy import CONFIRM_SEEDS
from search.reporting.importance import importances
from search.runs.result_rows import CONFIRMED, FAILED
from search.runs.run_record import RunRecord
from trainables.ray.trial import RETRAINS
from trainables.system.text import percent

MAX_SETTINGS = 4  # named


def summary(run: RunRecord) -> list[str]:
    """The winner, whether its lead is more than noise, the Pareto front, and which settings mattered."""
    recipes = run.command.arguments.recipes
    lines = [f"best: {_winner(run)}{'' if recipes else _trial_0(run)}"]
    if run.lead and not recipes:
        lines.append(f"noise: {run.lead}")
    if missing := _unconfirmed(run):
        lines.append(missing)
    if "front" in run.trials:
        lines.append(f"best for their cost: {describe_front(run.pareto_front)}")
    if shares := importances(run):
        named = [f"{name} {percent(share, 0)}" for name, share in list(shares.items())[:MAX_SETTINGS]]
        lines.append(f"what mattered (PED-ANOVA of {len(run.completed)} trials): {', '.join(named)}")
    return lines


def _winner(run: RunRecord) -> str:
    best = run.best
    assert best is not None  # a summary is made of completed trials
    tta, confirmed = best["tta_error_rate"], best.get(CONFIRMED, math.nan)
    text = f"trial {best.name} with {percent(best['error_rate'])} validation error"
    more = [] if math.isnan(tta) else [f"{percent(tta)} with test-time augmentation"]
    if not math.isnan(confirmed):
        more.append(f"{percent(confirmed)} on average over {CONFIRM_SEEDS} more seeds")
    return text + (f" ({', '.join(more)})" if more else "")


def _trial_0(run: RunRecord) -> str:
    first = run.first
    return "" if first is None else f"; trial 0, the space's own recipe: {percent(first['error_rate'])}"


def _unconfirmed(run: RunRecord) -> str:
    """A line if `--confirm` is incomplete."""
    wanted = min(run.command.arguments.confirm, len(run.completed))
    best = run.completed.sort_values(["error_rate", "valid_loss", "number"])[:wanted]
    done = int(best[CONFIRMED].notna().sum()) if wanted else 0
    if done == wanted:
        return ""
    missing = "the search ended before the others"
    if failed := sorted(run.trials[run.trials["status"] == FAILED].get(RETRAINS, pd.Series()).dropna().unique()):
        missing = f"retraining failed for trial {', '.join(f'{number:g}' for number in failed)}"
    return f"confirmed: {done} of the best {wanted}; {missing}"


def describe_front(front: pd.DataFrame) -> str:
    """Such as "5.0 % in 30 s (trial 4), 3.0 % in 60 s (trial 7)"."""
    rows = front.iterrows()
    return ", ".join(f"{percent(row['error_rate'])} in {row['seconds']:.0f} s (trial {number})" for number, row in rows)
