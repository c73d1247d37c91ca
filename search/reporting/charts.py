"""The charts of a report about its search, each with a caption that says the same in words. Pure functions of tables.

Optuna's own plots say less: they know neither minutes, epochs of the frozen stage, failed and stopped trials nor costs,
show a setting that can be off as two, and draw each trial as a trace of its own.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate, takewhile
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from search.reporting.importance import importances
from search.reporting.summary import describe_front
from search.runs.result_rows import COMPLETED, FAILED, RETRAINED, RUNNING, STOPPED
from search.runs.run_record import RunRecord
from trainables.system.text import many, percent

# Okabe and Ito (2008): distinct for colour-blind people, on white and on black. Symbols differ in shape, too.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
GREY = "#8a8f98"
STATUS_MARKERS = {
    COMPLETED: {"color": BLUE, "symbol": "circle"},
    RETRAINED: {"color": SKY, "symbol": "diamond-open"},
    STOPPED: {"color": ORANGE, "symbol": "x"},
    FAILED: {"color": RED, "symbol": "cross"},
    RUNNING: {"color": GREY, "symbol": "circle-open"},
}
FAMILIES = [(BLUE, "circle"), (ORANGE, "square"), (GREEN, "diamond"), (PURPLE, "cross"), (SKY, "triangle-up")]
QUARTERS = [("worst", 3, GREY), ("third", 2, SKY), ("second", 1, BLUE), ("best", 0, ORANGE)]


@dataclass(frozen=True)
class Chart:
    """A figure, its title, and a caption that says what it shows: for those who cannot see it, and for print."""

    name: str
    title: str
    caption: str
    figure: go.Figure


def search_charts(run: RunRecord) -> list[Chart]:
    """The charts of the search as a whole for which there is data."""
    charts = (incumbent(run), learning_curves(run), parallel_coordinates(run), importance(run), cost(run))
    return [chart for chart in charts if chart is not None]


def end_times(run: RunRecord) -> "pd.Series[float]":
    """Minutes from the start of the first epoch to the end of each trial's last epoch, by trial number.

    The time between the last epoch before a search was interrupted and its resumption does not count.
    """
    if run.epochs.empty:
        return pd.Series(dtype=float)
    ends = pd.to_datetime(run.epochs["finished_at"], utc=True)
    lengths = pd.to_timedelta(run.epochs["train_seconds"] + run.epochs["valid_seconds"], unit="s")
    elapsed = ends - (ends - lengths).min()
    previous = None  # resumption
    for resumed in (pd.Timestamp(resume.started_at) for resume in run.command.resumes):
        if (ends < resumed).any():
            idle_since = ends[ends < resumed].max()
            idle_since = idle_since if previous is None else max(idle_since, previous)
            elapsed -= (ends >= resumed).astype(int) * (resumed - idle_since)
        previous = resumed
    minutes = elapsed.dt.total_seconds() / 60
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
    for status, marker in STATUS_MARKERS.items():
        if len(rows := scored[scored["status"] == status]):
            _add_points(figure, rows, "minutes", "after %{x:.1f} min", name=status, marker=marker | {"size": 9})
    best = list(accumulate(done["error_rate"], min))
    figure.add_scatter(
        x=[*done["minutes"], float(scored["minutes"].max())],
        y=[*best, best[-1]],
        mode="lines",
        name="best so far",
        line={"color": GREEN, "width": 3, "shape": "hv"},
        hoverinfo="skip",
    )
    figure.update_xaxes(title_text="minutes since the first epoch began", rangemode="tozero")
    _error_axis(figure)
    first, last = (
        f"trial {number} with {percent(done.loc[number, 'error_rate'])} after {done.loc[number, 'minutes']:.1f} min"
        for number in (done.index[0], done.sort_values(["error_rate", "valid_loss"]).index[0])
    )
    caption = f"The first trial to complete was {first}"
    caption += f"; the best so far is {last}." if last != first else ", and no later one has beaten it."
    return Chart("incumbent", "Error of the best trial over time", caption, figure)


def learning_curves(run: RunRecord) -> Chart | None:
    """Validation error after every epoch of every trial; a cross ends those that were stopped early."""
    if run.epochs.empty:
        return None
    figure = go.Figure()
    best = None if run.best is None else run.best.name
    for status, marker in STATUS_MARKERS.items():
        numbers = [n for n in run.trials.index[run.trials["status"] == status] if n != best]
        _add_curves(figure, run.epochs, numbers, status, marker["color"])
    stopped = run.trials[(run.trials["status"] == STOPPED) & (run.trials["epochs_done"] > 0)]
    if len(stopped):
        figure.add_scatter(
            x=stopped["epochs_done"],
            y=stopped["error_rate"],
            mode="markers",
            name="where it was stopped",
            marker=STATUS_MARKERS[STOPPED] | {"size": 10},
            text=[f"trial {number}: {plain(row['reason'])}" for number, row in stopped.iterrows()],
            hovertemplate="%{text}<extra></extra>",
        )
    if best is not None:
        _add_curves(figure, run.epochs, [best], f"best: trial {best}", GREEN, width=4)
    step = max(1, math.ceil(run.epochs["epoch"].max() / 10))
    figure.update_xaxes(title_text="epoch", rangemode="tozero", tick0=0, dtick=step)
    _error_axis(figure)
    caption = f"Validation error after each epoch of {many(run.epochs['number'].nunique(), 'trial')}."
    if len(stopped):
        rungs = stopped["trial_id"].map(run.stop_rungs).dropna().value_counts().sort_index()
        at = ", ".join(f"{number} at rung {rung:g} %" for rung, number in rungs.items())
        caption += f" {many(len(stopped), 'trial')} ended early{f': {at} of the unfrozen stage' if at else ''}."
    return Chart("learning-curves", "Learning curves", caption, figure)


def parallel_coordinates(run: RunRecord) -> Chart | None:
    """A line per trial through its settings to its error, in groups from the best to the worst quarter."""
    scored = run.trials[run.trials["error_rate"].notna() & (run.trials["status"] != RUNNING)]
    if len(scored) < 2 or not run.dimensions:
        return None
    axes = [_Axis(name, scored[name], run.is_log(name)) for name in run.dimensions]
    axes.append(_Axis("error_rate", scored["error_rate"], log=False))
    positions = np.column_stack([axis.positions for axis in axes])
    quarters = (4 * (scored["error_rate"].rank(method="first") - 1) // len(scored)).to_numpy()
    figure = go.Figure()
    for name, quarter, colour in QUARTERS:
        lines = ((range(len(axes)), positions[i], [f"trial {scored.index[i]}"] * len(axes))
                 for i in np.flatnonzero(quarters == quarter).tolist())  # fmt: skip
        x, y, text = _joined(lines)
        figure.add_scatter(
            x=x,
            y=y,
            text=text,
            name=f"{name} quarter",
            mode="lines+markers",
            line={"color": colour, "width": 3 if quarter == 0 else 1.5},
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
    listed = ", ".join(f"{name} {percent(share, 0)}" for name, share in shares.items())
    caption = (
        f"How much each setting tells the better half of {len(run.completed)} completed trials from all of them "
        f"(Optuna's PED-ANOVA): {listed}. With few trials it is a hint, not a finding."
    )
    return Chart("importance", "Importance of the settings", caption, figure)


def cost(run: RunRecord) -> Chart | None:
    """Error against seconds; a line joins the trials that no other beats in both."""
    done = run.completed
    if done.empty:
        return None
    figure = go.Figure()
    families = done["arch"].astype(str) if "arch" in run.dimensions else pd.Series("trials", index=done.index)
    for i, family in enumerate(families.value_counts().index):
        colour, symbol = FAMILIES[i % len(FAMILIES)]
        marker = {"color": colour, "symbol": symbol, "size": 10}
        _add_points(figure, done[families == family], "seconds", "in %{x:.0f} s", name=plain(family), marker=marker)
    front = run.pareto_front
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
    caption = f"No completed trial is better and cheaper than these: {describe_front(front)}."
    return Chart("cost", "Error against cost", caption, figure)


# --- Parts ------------------------------------------------------------------------------------------------------------


class _Axis:
    """One axis of parallel coordinates: positions of its values in 0..1, and a few labelled ticks."""

    def __init__(self, name: str, values: "pd.Series[Any]", log: bool) -> None:
        self.name = name
        numbers = pd.to_numeric(values, errors="coerce")
        if numbers.isna().any():
            names = sorted(values.astype(str).unique())
            places = np.linspace(0, 1, len(names)).tolist() if len(names) > 1 else [0.5]
            self.positions = values.astype(str).map(dict(zip(names, places, strict=True))).to_numpy(dtype=float)
            self.ticks = list(zip(places, shortened(names), strict=True))
            return
        low, high = float(numbers.min()), float(numbers.max())
        if low == high:
            self.positions = np.full(len(numbers), 0.5)
            self.ticks = [(0.5, f"{low:.3g}")]
            return
        scaled = np.log(numbers) if log and low > 0 else numbers
        self.positions = ((scaled - scaled.min()) / (scaled.max() - scaled.min())).to_numpy(dtype=float)
        self.ticks = [(0.0, f"{low:.3g}"), (1.0, f"{high:.3g}")]


def _add_points(
    figure: go.Figure, rows: pd.DataFrame, x: str, where: str, *, name: str, marker: dict[str, Any]
) -> None:
    """A marker per trial at the column `x` and its error; `where` says the former when hovering."""
    figure.add_scatter(
        x=rows[x],
        y=rows["error_rate"],
        mode="markers",
        name=name,
        marker=marker,
        text=[f"trial {number}" for number in rows.index],
        hovertemplate=f"%{{text}}: %{{y:.1%}} {where}<extra></extra>",
    )


def _add_curves(
    figure: go.Figure, epochs: pd.DataFrame, numbers: Sequence[Any], name: str, colour: str, width: float = 1.5
) -> None:
    """The curves of some trials as one trace, with gaps between: a thousand traces would be slow."""
    groups = epochs[epochs["number"].isin(numbers)].sort_values("epoch").groupby("number")
    if not len(groups):
        return
    lines = ((rows["epoch"], rows["error_rate"], [f"trial {number}"] * len(rows)) for number, rows in groups)
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


def _joined(lines: Iterable[tuple[Iterable[Any], ...]]) -> tuple[list[Any], list[Any], list[Any]]:
    """Many (x, y, text) as one line with gaps."""
    joined: tuple[list[Any], list[Any], list[Any]] = ([], [], [])
    for line in lines:
        for values, more in zip(joined, line, strict=True):
            values.extend([*more, None])
    return joined


def _error_axis(figure: go.Figure) -> None:
    figure.update_yaxes(title_text="validation error", tickformat=".0%", rangemode="tozero")


def shortened(names: Sequence[str], max_length: int = 13) -> list[str]:
    """Names of at most `max_length` characters: without their common start, then without their end."""
    letters = zip(*names, strict=False)
    common = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, letters))
    if len(names) > 1 and common > 1 and max(map(len, names)) > max_length:
        names = [f"…{name[common:]}" for name in names]
    return [name if len(name) <= max_length else f"{name[: max_length - 1]}…" for name in names]


def plain(text: Any) -> str:
    """`text` escaped for plotly, which interprets some HTML tags."""
    return escape(str(text), quote=False)
