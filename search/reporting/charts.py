"""The charts of a report, each with a caption that says the same in words. Pure functions of a run's tables."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate, takewhile
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from optuna import Study
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, TrialState
from plotly.subplots import make_subplots

from search.runs import results_table
from search.runs.results_table import COMPLETED, FAILED, RETRAINED, RUNNING, STOPPED
from search.runs.run_record import RunRecord
from search.spaces.space import SWITCH
from trainables.network.schedule import stage_cycle
from trainables.recipe import Recipe
from trainables.system.text import many, percent

# Okabe and Ito (2008): told apart by colour-blind people, on white and on black. Marks differ in shape, too.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
GREY = "#8a8f98"
STATUS_MARKS = {
    COMPLETED: {"color": BLUE, "symbol": "circle"},
    RETRAINED: {"color": SKY, "symbol": "diamond-open"},
    STOPPED: {"color": ORANGE, "symbol": "x"},
    FAILED: {"color": RED, "symbol": "cross"},
    RUNNING: {"color": GREY, "symbol": "circle-open"},
}
FAMILIES = [(BLUE, "circle"), (ORANGE, "square"), (GREEN, "diamond"), (PURPLE, "cross"), (SKY, "triangle-up")]
RIGHT_COLOURS = [[0, "#e3f2fc"], [1, SKY]]  # dark numbers are legible on all of them
WRONG_COLOURS = [[0, "#fdf0d5"], [0.5, ORANGE], [1, ORANGE]]
LEAST_FOR_IMPORTANCE = 5  # completed trials; of fewer nothing can be said
BEST_SHARE = 0.5
"""Of the completed trials, that importance tells from all of them. Optuna's own tenth is a single one of ten trials, to
which all settings seem to matter alike: bench/search_quality.py compares both."""
NUM_CONFUSED_CLASSES = 40  # more are no longer legible in one matrix


@dataclass(frozen=True)
class Chart:
    """A figure, what it is called, and what it shows in words: for those who do not see it, and for print."""

    name: str
    title: str
    caption: str
    figure: go.Figure


def search_charts(run: RunRecord) -> list[Chart]:
    """What can be drawn of the search as a whole; a chart without data is left out."""
    charts = (incumbent(run), learning_curves(run), parallel_coordinates(run), importance(run), cost(run))
    return [chart for chart in charts if chart is not None]


def end_times(run: RunRecord) -> pd.Series:
    """Minutes from the start of the first epoch to the last epoch's end of each trial, by its number. The time between
    the last epoch before a search was resumed and its resuming does not count."""
    if run.epochs.empty:
        return pd.Series(dtype=float)
    ends = pd.to_datetime(run.epochs["finished_at"], utc=True)
    lasted = pd.to_timedelta(run.epochs["train_seconds"] + run.epochs["valid_seconds"], unit="s")
    since = ends - (ends - lasted).min()
    before = None  # the resume before
    for resumed in (pd.Timestamp(resume.started_at) for resume in run.command.resumes):
        if (ends < resumed).any():
            idle_since = ends[ends < resumed].max()
            idle_since = idle_since if before is None else max(idle_since, before)
            since -= (ends >= resumed).astype(int) * (resumed - idle_since)
        before = resumed
    minutes = since.dt.total_seconds() / 60
    return minutes.groupby(run.epochs["number"]).max()


def incumbent(run: RunRecord) -> Chart | None:
    """Error of the best completed trial over time, and where every trial ended."""
    minutes = end_times(run)
    scored = run.trials[run.trials["error_rate"].notna() & run.trials.index.isin(minutes.index)]
    scored = scored.assign(minutes=minutes).sort_values("minutes")
    done = scored[scored["status"] == COMPLETED]
    if done.empty:
        return None
    figure = go.Figure()
    for status, marks in STATUS_MARKS.items():
        some = scored[scored["status"] == status]
        if len(some):
            figure.add_scatter(
                x=some["minutes"],
                y=some["error_rate"],
                mode="markers",
                name=status,
                marker=marks | {"size": 9},
                text=[f"trial {number}" for number in some.index],
                hovertemplate="%{text}: %{y:.1%} after %{x:.1f} min<extra></extra>",
            )
    best = list(accumulate(done["error_rate"], min))
    end = float(scored["minutes"].max())
    figure.add_scatter(
        x=[*done["minutes"], end],
        y=[*best, best[-1]],
        mode="lines",
        name="best so far",
        line={"color": GREEN, "width": 3, "shape": "hv"},
        hoverinfo="skip",
    )
    figure.update_xaxes(title_text="minutes since the first epoch began", rangemode="tozero")
    _error_axis(figure)
    first, last = done.index[0], done.sort_values(["error_rate", "valid_loss"]).index[0]
    caption = f"The first trial to complete was {_at(done, first)}"
    caption += f"; the best so far is {_at(done, last)}." if last != first else ", which no later one has beaten."
    return Chart("incumbent", "Error of the best trial over time", caption, figure)


def learning_curves(run: RunRecord) -> Chart | None:
    """Validation error after every epoch of every trial; stopped ones end in a cross that tells the rung."""
    if run.epochs.empty:
        return None
    figure = go.Figure()
    best = None if run.best is None else run.best.name
    for status, marks in STATUS_MARKS.items():
        numbers = [n for n in run.trials.index[run.trials["status"] == status] if n != best]
        _add_curves(figure, run.epochs, numbers, status, marks["color"])
    stopped = run.trials[(run.trials["status"] == STOPPED) & (run.trials["epochs_done"] > 0)]
    if len(stopped):
        figure.add_scatter(
            x=stopped["epochs_done"],
            y=stopped["error_rate"],
            mode="markers",
            name="where it was stopped",
            marker=STATUS_MARKS[STOPPED] | {"size": 10},
            text=[f"trial {number}: {plain(row['reason'])}" for number, row in stopped.iterrows()],
            hovertemplate="%{text}<extra></extra>",
        )
    if best is not None:
        _add_curves(figure, run.epochs, [best], f"best: trial {best}", GREEN, width=4)
    figure.update_xaxes(title_text="epoch", rangemode="tozero", tick0=0, dtick=_whole_steps(run.epochs["epoch"].max()))
    _error_axis(figure)
    count = run.epochs["number"].nunique()
    caption = f"Validation error after each epoch of {many(count, 'trial')}."
    if len(stopped):
        rungs = stopped["reason"].str.extract(r"rung (\d+)")[0].dropna().value_counts().sort_index()
        at = ", ".join(f"{number} at rung {rung} %" for rung, number in rungs.items())
        caption += f" {many(len(stopped), 'trial')} ended early{f': {at} of the unfrozen stage' if at else ''}."
    return Chart("learning-curves", "Learning curves", caption, figure)


def parallel_coordinates(run: RunRecord) -> Chart | None:
    """A line per trial through its settings to its error, in groups from the best to the worst quarter."""
    scored = run.trials[run.trials["error_rate"].notna() & (run.trials["status"] != RUNNING)]
    if len(scored) < 2 or not run.dimensions:
        return None
    axes = [_Axis(name, scored[name], "(log)" in run.space["dimensions"][name]) for name in run.dimensions]
    axes.append(_Axis("error_rate", scored["error_rate"], log=False))
    positions = np.column_stack([axis.positions for axis in axes])
    ranks = (scored["error_rate"].rank(method="first").to_numpy() - 1) / len(scored)
    figure = go.Figure()
    groups = [("worst quarter", 0.75, 1.0, GREY), ("third quarter", 0.5, 0.75, SKY)]
    groups += [("second quarter", 0.25, 0.5, BLUE), ("best quarter", 0.0, 0.25, ORANGE)]
    for name, low, high, colour in groups:
        inside = np.flatnonzero((ranks >= low) & (ranks < high))
        x, y, text = _joined(
            (range(len(axes)), positions[i], [plain(f"trial {scored.index[i]}")] * len(axes)) for i in inside
        )
        figure.add_scatter(
            x=x,
            y=y,
            text=text,
            name=name,
            mode="lines+markers",
            line={"color": colour, "width": 3 if low == 0 else 1.5},
            marker={"size": 5},
            hovertemplate="%{text}<extra></extra>",
        )
    for i, axis in enumerate(axes):
        for position, label in axis.ticks:
            figure.add_annotation(x=i, y=position, text=plain(label), showarrow=False, xshift=4, xanchor="left")
    names = [plain(axis.name) for axis in axes]
    figure.update_xaxes(tickvals=list(range(len(axes))), ticktext=names, range=[-0.1, len(axes) - 0.3])
    figure.update_yaxes(visible=False, range=[-0.05, 1.05])
    figure.update_layout(meta={"min_width": 80 * len(axes)})
    caption = (
        f"Each line is one of {len(scored)} trials with a score; it crosses the axis of every searched setting at its "
        "value. Choose a quarter in the legend to hide or show it."
    )
    return Chart("parallel", "Settings and their error", caption, figure)


def importance(run: RunRecord) -> Chart | None:
    """How much each dimension tells good trials from bad ones."""
    shares = importances(run)
    if not shares:
        return None
    names = list(reversed(shares))
    figure = go.Figure()
    figure.add_bar(
        x=[shares[name] for name in names],
        y=[plain(name) for name in names],
        orientation="h",
        marker={"color": BLUE},
        hovertemplate="%{y}: %{x:.0%}<extra></extra>",
    )
    figure.update_xaxes(title_text="share of the importance", tickformat=".0%", rangemode="tozero")
    figure.update_yaxes(automargin=True)
    said = ", ".join(f"{name} {percent(share, 0)}" for name, share in shares.items())
    caption = (
        f"How much each setting tells the better half of {len(run.completed)} completed trials from all of them "
        f"(Optuna's PED-ANOVA): {said}. With few trials it is a hint, not a finding."
    )
    return Chart("importance", "Importance of the settings", caption, figure)


def importances(run: RunRecord) -> dict[str, float]:
    """Share of each dimension, largest first, summing to 1; none where there are too few trials to tell."""
    if len(run.completed) < LEAST_FOR_IMPORTANCE or not run.folder.journal.is_file():
        return {}
    try:
        return study_importances(run.study)
    except (ValueError, RuntimeError):  # such as all trials alike
        return {}


def study_importances(study: Study, best_share: float = BEST_SHARE) -> dict[str, float]:
    """How much each dimension tells the best trials from all, as shares of 1, largest first: Optuna's PED-ANOVA
    (Watanabe et al. 2023). Raises `ValueError` or `RuntimeError` where the trials say nothing of it.

    Where the worst error is that of many, fewer trials are the best ones: were they all, every share would be the same.
    """
    errors = [_error(trial) for trial in study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])]
    num_better = sum(error < max(errors) for error in errors)
    if not num_better:
        raise ValueError("All trials have the same error.")
    share = min(best_share, (num_better - 0.5) / len(errors))  # Optuna rounds the number of trials up
    evaluator = PedAnovaImportanceEvaluator(target_quantile=share)
    with warnings.catch_warnings():  # that a lower target is taken for the better one: it is
        warnings.simplefilter("ignore", UserWarning)
        found = get_param_importances(study, evaluator=evaluator, target=_error)
    shares: dict[str, float] = {}
    for param, value in found.items():
        name = param.removesuffix(SWITCH)  # whether it is off or a number is part of what it matters
        shares[name] = shares.get(name, 0.0) + value
    return dict(sorted(shares.items(), key=lambda item: (-item[1], item[0])))


def _error(trial: FrozenTrial) -> float:
    return trial.values[0]


def cost(run: RunRecord) -> Chart | None:
    """Error against seconds, with the trials that no other beats in both joined by a line."""
    done = run.completed
    if done.empty:
        return None
    figure = go.Figure()
    kinds = done["arch"].astype(str) if "arch" in run.dimensions else pd.Series("trials", index=done.index)
    for i, kind in enumerate(kinds.value_counts().index):
        some = done[kinds == kind]
        colour, symbol = FAMILIES[i % len(FAMILIES)]
        figure.add_scatter(
            x=some["seconds"],
            y=some["error_rate"],
            mode="markers",
            name=plain(kind),
            marker={"color": colour, "symbol": symbol, "size": 10},
            text=[f"trial {number}" for number in some.index],
            hovertemplate="%{text}: %{y:.1%} in %{x:.0f} s<extra></extra>",
        )
    front = pareto_front(done)
    figure.add_scatter(
        x=front["seconds"],
        y=front["error_rate"],
        mode="lines",
        name="best for its cost",
        line={"color": GREY, "dash": "dot", "shape": "hv"},
        hoverinfo="skip",
    )
    figure.update_xaxes(title_text="seconds of training and validation", rangemode="tozero")
    _error_axis(figure)
    said = ", ".join(
        f"{percent(row['error_rate'])} in {row['seconds']:.0f} s (trial {n})" for n, row in front.iterrows()
    )
    return Chart("cost", "Error against cost", f"No completed trial is better and cheaper than these: {said}.", figure)


def pareto_front(done: pd.DataFrame) -> pd.DataFrame:
    """The completed trials that no other one beats in both error and seconds, cheapest first."""
    return done.loc[[row["number"] for row in results_table.pareto_front(done.to_dict("records"))]]


# --- The winner -------------------------------------------------------------------------------------------------------


def schedule(recipe: Recipe) -> Chart:
    """Learning rates of the first layers and of the head, and the momentum, over the winner's epochs."""
    epochs, earliest, head, momentum = schedule_curves(recipe)
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.08)
    for name, values, colour in (("rate of the head", head, BLUE), ("rate of the first layers", earliest, ORANGE)):
        figure.add_scatter(x=epochs, y=values, name=name, mode="lines", line={"color": colour}, row=1, col=1)
    figure.add_scatter(x=epochs, y=momentum, name="momentum", mode="lines", line={"color": GREEN}, row=2, col=1)
    figure.update_yaxes(title_text="learning rate", type="log", exponentformat="power", row=1, col=1)
    figure.update_yaxes(title_text="momentum", row=2, col=1)
    figure.update_xaxes(title_text="epoch", row=2, col=1)
    frozen = f"{many(recipe.freeze_epochs, 'epoch')} frozen up to {recipe.lr_max_frozen:.3g}, then "
    caption = (
        f"{frozen if recipe.freeze_epochs else ''}{many(recipe.epochs, 'epoch')} unfrozen up to "
        f"{recipe.lr_max:.3g} for the head and {recipe.lr_min:.3g} for the first layers; momentum falls from "
        f"{recipe.mom_high} to {recipe.mom_low} and rises again."
    )
    return Chart("schedule", "Learning rate and momentum", caption, figure)


def schedule_curves(recipe: Recipe, points: int = 100) -> tuple[list[float], ...]:
    """Epoch, rate of the first layers, rate of the head, and momentum; `points` of each per stage."""
    stages = [(True, 0, recipe.freeze_epochs, recipe.lr_max_frozen / recipe.lr_ratio_frozen, recipe.lr_max_frozen)]
    stages.append((False, recipe.freeze_epochs, recipe.epochs, recipe.lr_min, recipe.lr_max))
    rows = []
    for frozen, start, length, low, high in stages:
        cycle = stage_cycle(recipe, frozen=frozen)
        for position in np.linspace(0, 1, points, endpoint=False) if length else ():
            factor = cycle.lr_factor(position)
            rows.append((start + position * length, low * factor, high * factor, cycle.momentum(position)))
    return tuple(map(list, zip(*rows, strict=True)))


def confusion(counts: np.ndarray, classes: Sequence[str]) -> Chart:
    """(classes, classes) images as a matrix: rows are the actual classes, columns the predicted ones.

    Of many classes, those with the most errors are shown.
    """
    wrong = counts.sum(axis=0) + counts.sum(axis=1) - 2 * counts.diagonal()
    shown = np.sort(np.argsort(-wrong, kind="stable")[:NUM_CONFUSED_CLASSES])
    part = counts[np.ix_(shown, shown)]
    names = [plain(classes[i]) for i in shown]
    share = part / np.maximum(counts[shown].sum(axis=1, keepdims=True), 1)
    places = list(range(len(shown)))
    said = [[f"{n} of {actual} taken for {predicted}" for predicted, n in zip(names, row, strict=True)]
            for actual, row in zip(names, part, strict=True)]  # fmt: skip
    on_diagonal = np.eye(len(shown), dtype=bool)
    figure = go.Figure()
    for name, where, colours in (("right", on_diagonal, RIGHT_COLOURS), ("wrong", ~on_diagonal, WRONG_COLOURS)):
        figure.add_heatmap(
            name=name,
            x=places,
            y=places,
            z=np.where(where & (part > 0), share, np.nan),
            text=np.where(part > 0, part.astype(str), ""),
            texttemplate="%{text}",
            textfont={"color": "#1c2128"},
            customdata=said,
            hovertemplate="%{customdata}<extra></extra>",
            colorscale=colours,
            zmin=0,
            zmax=1,
            xgap=1,
            ygap=1,
            showscale=False,
        )
    figure.update_xaxes(title_text="predicted", tickvals=places, ticktext=names, tickangle=-60, automargin=True)
    figure.update_yaxes(title_text="actual", tickvals=places, ticktext=names, autorange="reversed", automargin=True)
    size = max(360, 150 + 24 * len(shown))
    figure.update_layout(height=size, meta={"min_width": size})
    total, right = int(counts.sum()), int(counts.diagonal().sum())
    caption = f"{total - right} of {total} validation images are wrong. "
    caption += "Rows are what an image is, columns what the model says."
    if len(shown) < len(classes):
        caption += f" Of {len(classes)} classes, the {len(shown)} with the most errors are shown."
    return Chart("confusion", "Confusion matrix", caption, figure)


# --- Parts ------------------------------------------------------------------------------------------------------------


class _Axis:
    """One axis of parallel coordinates: where values lie between 0 and 1, and a few labelled places."""

    def __init__(self, name: str, values: pd.Series, log: bool) -> None:
        self.name = name
        numbers = pd.to_numeric(values, errors="coerce")
        if numbers.isna().any():
            names = sorted(values.astype(str).unique())
            places = np.linspace(0, 1, len(names)) if len(names) > 1 else [0.5]
            self.positions = values.astype(str).map(dict(zip(names, places, strict=True))).to_numpy(dtype=float)
            self.ticks = list(zip(places, shortened(names), strict=True))
            return
        low, high = float(numbers.min()), float(numbers.max())
        scale = np.log if log and low > 0 else np.asarray
        ends = scale(np.array([low, high], dtype=float))
        spread = ends[1] - ends[0]
        if spread:
            self.positions = (scale(numbers.to_numpy(dtype=float)) - ends[0]) / spread
            self.ticks = [(0.0, f"{low:.3g}"), (1.0, f"{high:.3g}")]
        else:
            self.positions = np.full(len(numbers), 0.5)
            self.ticks = [(0.5, f"{low:.3g}")]


def _add_curves(
    figure: go.Figure, epochs: pd.DataFrame, numbers: Sequence[int], name: str, colour: str, width: float = 1.5
) -> None:
    """The curves of some trials as one trace, with gaps between: a thousand traces would be slow."""
    groups = epochs[epochs["number"].isin(numbers)].sort_values("epoch").groupby("number")
    if not len(groups):
        return
    lines = ((some["epoch"], some["error_rate"], [f"trial {number}"] * len(some)) for number, some in groups)
    x, y, text = _joined(lines)
    figure.add_scatter(
        x=x,
        y=y,
        text=text,
        name=name,
        mode="lines+markers",
        line={"color": colour, "width": width},
        marker={"size": 4 + width},
        hovertemplate="%{text}, epoch %{x}: %{y:.1%}<extra></extra>",
    )


def _joined(lines) -> tuple[list, list, list]:
    """Many (x, y, text) as one line with gaps."""
    joined: tuple[list, list, list] = ([], [], [])
    for line in lines:
        for values, more in zip(joined, line, strict=True):
            values.extend([*more, None])
    return joined


def _error_axis(figure: go.Figure) -> None:
    figure.update_yaxes(title_text="validation error", tickformat=".0%", rangemode="tozero")


def _at(done: pd.DataFrame, number: int) -> str:
    row = done.loc[number]
    return f"trial {number} with {percent(row['error_rate'])} after {row['minutes']:.1f} min"


def _whole_steps(most: float) -> int:
    return max(1, math.ceil(most / 10))


def shortened(names: Sequence[str], most: int = 13) -> list[str]:
    """Names of at most `most` characters: without what all have in common at their start, then without their end."""
    letters = zip(*names, strict=False)
    common = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, letters))
    if len(names) > 1 and common > 1 and max(map(len, names)) > most:
        names = [f"…{name[common:]}" for name in names]
    return [name if len(name) <= most else f"{name[: most - 1]}…" for name in names]


def plain(text: Any) -> str:
    """`text` for plotly, which takes some HTML tags in texts for markup."""
    return escape(str(text), quote=False)
