"""What a search found, in the lines that it prints at its end."""

import math

import pandas as pd

from search.options.strategy import CONFIRM_SEEDS
from search.reporting.charts import importances
from search.runs.results_table import CONFIRMED, FAILED, pareto_front
from search.runs.run_record import RunRecord
from trainables.ray.trial import RETRAINS
from trainables.system.text import percent

SHOWN = 4
"""So many settings at most are named."""


def summary(run: RunRecord) -> list[str]:
    """The winner, whether its lead is more than noise, the Pareto front, and which settings mattered."""
    recipes = run.command.arguments.recipes
    lines = [f"best: {_winner(run.best)}{'' if recipes else _beside(run)}"]
    if run.lead and not recipes:
        lines.append(f"noise: {run.lead}")
    if missing := _unconfirmed(run):
        lines.append(missing)
    if "front" in run.trials:
        lines.append(f"best for their cost: {_front(run)}")
    if shares := importances(run):
        named = [f"{name} {percent(share, 0)}" for name, share in list(shares.items())[:SHOWN]]
        lines.append(f"what mattered (PED-ANOVA of {len(run.completed)} trials): {', '.join(named)}")
    return lines


def _winner(best: pd.Series) -> str:
    tta, confirmed = best["tta_error_rate"], best.get(CONFIRMED, math.nan)
    said = f"trial {best.name} with {percent(best['error_rate'])} validation error"
    more = [] if math.isnan(tta) else [f"{percent(tta)} with test-time augmentation"]
    if not math.isnan(confirmed):
        more.append(f"{percent(confirmed)} in the mean of {CONFIRM_SEEDS} more seeds")
    return said + (f" ({', '.join(more)})" if more else "")


def _beside(run: RunRecord) -> str:
    first = run.first
    return "" if first is None else f"; trial 0, the space's own recipe: {percent(first['error_rate'])}"


def _unconfirmed(run: RunRecord) -> str:
    """Where `--confirm` was not done to its end, that it was not."""
    wanted = min(run.command.arguments.confirm, len(run.completed))
    best = run.completed.sort_values(["error_rate", "valid_loss", "number"])[:wanted]
    done = int(best[CONFIRMED].notna().sum()) if wanted else 0
    if done == wanted:
        return ""
    missing = "the search ended before the others were"
    if failed := sorted(run.trials[run.trials["status"] == FAILED].get(RETRAINS, pd.Series()).dropna().unique()):
        missing = f"a retraining failed of trial {', '.join(f'{number:g}' for number in failed)}"
    return f"confirmed: {done} of the best {wanted}; {missing}"


def _front(run: RunRecord) -> str:
    rows = pareto_front(run.trials.to_dict("records"))
    return ", ".join(f"{percent(row['error_rate'])} in {row['seconds']:.0f} s (trial {row['number']})" for row in rows)
