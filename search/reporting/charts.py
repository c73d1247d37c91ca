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
from search.runs.kinds import PROBE, TRIAL, how_many, name_of
from search.runs.result_rows import COMPLETED, FAILED, RANKED, RETRAINED, RUNNING, STOPPED, UNFINISHED
from search.runs.run_record import RunRecord
from trainables.system.text import many, percent

# Okabe and Ito (2008): distinct for colour-blind people, on white and on black. Symbols differ in shape, too.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
GREY = "#8a8f98"
STATUS_MARKERS = {
    COMPLETED: {"color": BLUE, "symbol": "circle"},
    PROBE: {"color": SKY, "symbol": "triangle-up"},  # whatever its status
    UNFINISHED: {"color": PURPLE, "symbol": "hexagon-open"},
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
    about_settings = (parallel_coordinates(run), importance(run), cost(run))
    charts = (incumbent(run), learning_curves(run), probes_and_fine_tuned(run), *about_settings)
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
    """Error of the best trial or probe over time, and where every one of them ended."""
    minutes = end_times(run)
    scored = run.trials[run.trials["error_rate"].notna() & run.trials.index.isin(minutes.index)]
    scored = scored.assign(minutes=minutes).sort_values("minutes")
    done = scored[scored["status"].isin(RANKED)]
    if done.empty:
        return None
    figure = go.Figure()
    groups = scored["status"].where(scored["kind"] == TRIAL, PROBE)
    for name, marker in STATUS_MARKERS.items():
        if len(rows := scored[groups == name]):
            _add_points(figure, rows, run, "minutes", "after %{x:.1f} min", name=name, marker=marker | {"size": 9})
    best = list(accumulate(done[run.objective_column], min))
    figure.add_scatter(
        x=[*done["minutes"], float(scored["minutes"].max())],
        y=[*best, best[-1]],
        mode="lines",
        name="best so far",
        line={"color": GREEN, "width": 3, "shape": "hv"},
        hoverinfo="skip",
    )
    figure.update_xaxes(title_text="minutes since the first epoch began", rangemode="tozero")
    _objective_axis(figure, run)
    first, last = (
        f"{name_of(number)} with {run.objective.text(done.loc[number, run.objective_column])} "
        f"after {done.loc[number, 'minutes']:.1f} min"
        for number in (done.index[0], done.sort_values([run.objective_column, "valid_loss"]).index[0])
    )
    caption = f"The first model was that of {first}"
    caption += f"; the best so far is {last}." if last != first else ", and no later one has beaten it."
    return Chart("incumbent", "Error of the best trial over time", caption, figure)


def learning_curves(run: RunRecord) -> Chart | None:
    """Validation error after every epoch of every trial; a cross ends those that were stopped early.

    A trial that starts from a probe begins with its epoch 0. Of the screen's probes, only a winner is shown.
    """
    trials = run.trials[run.trials["kind"] == TRIAL]
    epochs = run.epochs[run.epochs["number"].isin(trials.index)]
    if epochs.empty:
        return None
    figure = go.Figure()
    best = None if run.best is None else run.best["number"]
    for status, marker in STATUS_MARKERS.items():
        numbers = [n for n in trials.index[trials["status"] == status] if n != best]
        _add_curves(figure, run, epochs, numbers, status, marker["color"])
    stopped = run.trials[(run.trials["status"] == STOPPED) & (run.trials["epochs_done"] > 0)]
    if len(stopped):
        figure.add_scatter(
            x=stopped["epochs_done"],
            y=stopped[run.objective_column],
            mode="markers",
            name="where it was stopped",
            marker=STATUS_MARKERS[STOPPED] | {"size": 10},
            text=[f"{name_of(row['number'])}: {plain(row['reason'])}" for _, row in stopped.iterrows()],
            hovertemplate="%{text}<extra></extra>",
        )
    if best is not None:
        _add_curves(figure, run, run.epochs, [best], f"best: {name_of(best)}", GREEN, width=4)
    step = max(1, math.ceil(epochs["epoch"].max() / 10))
    figure.update_xaxes(title_text="epoch", rangemode="tozero", tick0=0, dtick=step)
    _objective_axis(figure, run)
    caption = f"Validation error after each epoch of {many(epochs['number'].nunique(), 'trial')}."
    if (epochs["epoch"] == 0).any():
        caption += " Epoch 0 is the probe that a trial starts from."
    if len(stopped):
        rungs = stopped["trial_id"].map(run.stop_rungs).dropna().value_counts().sort_index()
        at = ", ".join(f"{number} at rung {rung:g} %" for rung, number in rungs.items())
        caption += f" {many(len(stopped), 'trial')} ended early{f': {at} of the unfrozen stage' if at else ''}."
    return Chart("learning-curves", "Learning curves", caption, figure)


def probes_and_fine_tuned(run: RunRecord) -> Chart | None:
    """Error of each fine-tuned trial against that of its probe. What was only probed lies on the diagonal."""
    probed = own_probes(run)
    tuned = run.tuned[run.tuned.index.isin(probed.index)].assign(probe=probed)
    if tuned.empty:
        return None
    figure, column = go.Figure(), run.objective_column
    _add_families(figure, tuned, run, "probe", "from a probe's %{x:.1%}")
    alone = _only_probed(run)
    if len(alone):
        marker = {"color": GREY, "symbol": "circle-open", "size": 8}
        name, alone = "not fine-tuned", alone.assign(probe=alone[column])
        _add_points(figure, alone, run, "probe", "as a probe alone", name=name, marker=marker)
    line = {"color": GREY, "dash": "dot"}
    ends = [0.0, float(pd.concat([tuned["probe"], tuned[column], alone[column]]).max())]
    figure.add_scatter(x=ends, y=ends, mode="lines", name="as good as its probe", line=line, hoverinfo="skip")
    figure.update_xaxes(title_text=f"{_title(run)} of the probe", tickformat=_ticks(run), rangemode="tozero")
    _objective_axis(figure, run)
    better, same = (tuned[column] < tuned["probe"]).sum(), (tuned[column] == tuned["probe"]).sum()
    caption = (
        f"Of {many(len(tuned), 'fine-tuned trial')}, {better} ended below the diagonal, better than the probe of the "
        f"same architecture and image size; {len(tuned) - better - same} ended above it."
    )
    if len(alone):
        caption += f" Circles on the diagonal: {many(len(alone), 'probe')} that no trial was fine-tuned from."
    return Chart("probes", "What fine-tuning adds to a probe", caption, figure)


def own_probes(run: RunRecord) -> "pd.Series[float]":
    """The objective of each fine-tuned trial's probe, by its number: of its own epoch 0, or else of the screen's probe
    of the same architecture and image size. Without the trials that have neither."""
    starts = run.epochs[run.epochs["epoch"] == 0].drop_duplicates("number", keep="last")
    own = starts.set_index("number")[run.objective_column]
    best_last = _probes(run)[::-1]  # the screen probes its best pair twice
    of_screen = {_backbone(run, row): row[run.objective_column] for _, row in best_last.iterrows()}
    errors = {
        number: own.get(number, of_screen.get(_backbone(run, row), math.nan)) for number, row in run.tuned.iterrows()
    }
    return pd.Series(errors, dtype=float).dropna()


def _only_probed(run: RunRecord) -> pd.DataFrame:
    """The probes of what no completed trial was fine-tuned from."""
    tuned, probes = {_backbone(run, row) for _, row in run.tuned.iterrows()}, _probes(run)
    return probes[[_backbone(run, row) not in tuned for _, row in probes.iterrows()]]


def _probes(run: RunRecord) -> pd.DataFrame:
    return run.completed[run.completed["kind"] == PROBE]


def _backbone(run: RunRecord, row: "pd.Series[Any]") -> tuple[str, str]:
    """Architecture and image size."""
    return str(run.setting(row, "arch")), str(run.setting(row, "image_size"))


def parallel_coordinates(run: RunRecord) -> Chart | None:
    """A line per trial through its settings to its error, in groups from the best to the worst quarter. A probe has few
    of the settings, and none of the trials' errors."""
    trials = run.trials[run.trials["kind"] == TRIAL]
    scored = trials[trials["error_rate"].notna() & (trials["status"] != RUNNING)]
    if len(scored) < 2 or not run.dimensions:
        return None
    axes = [_Axis(name, scored[name], run.is_log(name)) for name in run.dimensions]
    axes.append(_Axis(run.objective_column, scored[run.objective_column], log=False))
    positions = np.column_stack([axis.positions for axis in axes])
    quarters = (4 * (scored[run.objective_column].rank(method="first") - 1) // len(scored)).to_numpy()
    figure = go.Figure()
    for name, quarter, colour in QUARTERS:
        lines = ((range(len(axes)), positions[i], [name_of(scored.index[i])] * len(axes))
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
        f"How much each setting tells the better half of {len(run.whole)} completed trials from all of them "
        f"(Optuna's PED-ANOVA): {listed}. With few trials it is a hint, not a finding."
    )
    return Chart("importance", "Importance of the settings", caption, figure)


def cost(run: RunRecord) -> Chart | None:
    """Error against seconds; a line joins the trials that no other beats in both."""
    done = run.completed
    if done.empty:
        return None
    figure = go.Figure()
    _add_families(figure, run.tuned, run, "seconds", "in %{x:.0f} s")
    if len(probes := _probes(run)):
        marker = STATUS_MARKERS[PROBE] | {"size": 8}
        _add_points(figure, probes, run, "seconds", "in %{x:.0f} s", name="probes", marker=marker)
    front = run.pareto_front
    figure.add_scatter(
        x=front["seconds"],
        y=front[run.objective_column],
        mode="lines",
        name="best for its cost",
        line={"color": GREY, "dash": "dot", "shape": "hv"},
        hoverinfo="skip",
    )
    figure.update_xaxes(title_text="seconds of training and validation", rangemode="tozero")
    _objective_axis(figure, run)
    caption = f"Of {how_many(done['kind'])}, none is better and cheaper than these: {describe_front(run)}."
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


def _add_families(figure: go.Figure, rows: pd.DataFrame, run: RunRecord, x: str, where: str) -> None:
    """Points in a colour and a shape per architecture, if these are searched."""
    families = rows["arch"].astype(str) if "arch" in run.dimensions else pd.Series("trials", index=rows.index)
    for i, family in enumerate(families.value_counts().index):
        colour, symbol = FAMILIES[i % len(FAMILIES)]
        marker = {"color": colour, "symbol": symbol, "size": 10}
        _add_points(figure, rows[families == family], run, x, where, name=plain(family), marker=marker)


def _add_points(
    figure: go.Figure, rows: pd.DataFrame, run: RunRecord, x: str, where: str, *, name: str, marker: dict[str, Any]
) -> None:
    """A marker per trial at the column `x` and its objective; `where` says the former when hovering."""
    figure.add_scatter(
        x=rows[x],
        y=rows[run.objective_column],
        mode="markers",
        name=name,
        marker=marker,
        text=[name_of(number) for number in rows.index],
        hovertemplate=f"%{{text}}: %{{y:{_digits(run)}}} {where}<extra></extra>",
    )


def _add_curves(
    figure: go.Figure,
    run: RunRecord,
    epochs: pd.DataFrame,
    numbers: Sequence[Any],
    name: str,
    colour: str,
    width: float = 1.5,
) -> None:
    """The curves of some trials as one trace, with gaps between: a thousand traces would be slow."""
    groups = epochs[epochs["number"].isin(numbers)].sort_values("epoch").groupby("number")
    if not len(groups):
        return
    column = run.objective_column
    lines = ((rows["epoch"], rows[column], [name_of(rows["number"].iloc[0])] * len(rows)) for _, rows in groups)
    x, y, text = _joined(lines)
    figure.add_scatter(
        x=x,
        y=y,
        text=text,
        name=name,
        mode="lines+markers",
        line={"color": colour, "width": width},
        marker={"size": 4 + width},
        hovertemplate=f"%{{text}}, epoch %{{x}}: %{{y:{_digits(run)}}}<extra></extra>",
    )


def _joined(lines: Iterable[tuple[Iterable[Any], ...]]) -> tuple[list[Any], list[Any], list[Any]]:
    """Many (x, y, text) as one line with gaps."""
    joined: tuple[list[Any], list[Any], list[Any]] = ([], [], [])
    for line in lines:
        for values, more in zip(joined, line, strict=True):
            values.extend([*more, None])
    return joined


def _objective_axis(figure: go.Figure, run: RunRecord) -> None:
    figure.update_yaxes(title_text=_title(run), tickformat=_ticks(run), rangemode="tozero")


def _title(run: RunRecord) -> str:
    return "validation error" if run.objective.is_error_rate else f"{run.objective.name} on validation"


def _ticks(run: RunRecord) -> str:
    return ".0%" if run.objective.is_share else ".2f"


def _digits(run: RunRecord) -> str:
    return ".1%" if run.objective.is_share else ".3f"


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
