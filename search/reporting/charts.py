"""The charts of a report about its search, each with a caption that says the same in words. Pure functions of tables.

Optuna's own plots say less: they know neither minutes, epochs of the frozen stage, failed and stopped trials nor costs,
show a setting that can be off as two, and draw each trial as a trace of its own.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from search.reporting.chart_parts import (
    BLUE,
    GREEN,
    GREY,
    MAX_DRAWN,
    ORANGE,
    SKY,
    STATUS_MARKERS,
    Axis,
    Chart,
    add_curves,
    add_families,
    add_points,
    drawn,
    drawn_note,
    joined,
    objective_axis,
    objective_ticks,
    objective_title,
    plain,
)
from search.reporting.importance import importances
from search.reporting.summary import describe_front
from search.runs.kinds import PROBE, TRIAL, how_many, name_of
from search.runs.result_rows import RANKED, RUNNING, STOPPED
from search.runs.run_record import RunRecord, records
from trainables.system.text import many, percent

QUARTERS = [("worst", 3, GREY), ("third", 2, SKY), ("second", 1, BLUE), ("best", 0, ORANGE)]


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
            add_points(figure, rows, run, "minutes", "after %{x:.1f} min", name=name, marker=marker | {"size": 9})
    best = done[run.objective.column].cummin()
    better = best.diff().fillna(-1) < 0 if len(done) > MAX_DRAWN else best.notna()  # else the line is the same
    figure.add_scatter(
        x=[*done["minutes"][better], float(scored["minutes"].max())],
        y=[*best[better], best.iloc[-1]],
        mode="lines",
        name="best so far",
        line={"color": GREEN, "width": 3, "shape": "hv"},
        hoverinfo="skip",
    )
    figure.update_xaxes(title_text="minutes since the first epoch began", rangemode="tozero")
    objective_axis(figure, run)
    first, last = (
        f"{name_of(number)} with {run.objective.text(done.loc[number, run.objective.column])} "
        f"after {done.loc[number, 'minutes']:.1f} min"
        for number in (done.index[0], done.sort_values([run.objective.column, "valid_loss"]).index[0])
    )
    caption = f"The first model was that of {first}"
    caption += f"; the best so far is {last}." if last != first else ", and no later one has beaten it."
    caption += drawn_note(run)
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
        add_curves(figure, run, epochs, numbers, status, marker["color"])
    stopped = run.trials[(run.trials["status"] == STOPPED) & (run.trials["epochs_done"] > 0)]
    if len(stopped):
        shown = stopped[stopped.index.isin(drawn(run))]
        figure.add_scatter(
            x=shown["epochs_done"],
            y=shown[run.objective.column],
            mode="markers",
            name="where it was stopped",
            marker=STATUS_MARKERS[STOPPED] | {"size": 10},
            text=[f"{name_of(row['number'])}: {plain(row['reason'])}" for _, row in shown.iterrows()],
            hovertemplate="%{text}<extra></extra>",
        )
    if best is not None:
        add_curves(figure, run, run.epochs, [best], f"best: {name_of(best)}", GREEN, width=4)
    step = max(1, math.ceil(epochs["epoch"].max() / 10))
    figure.update_xaxes(title_text="epoch", rangemode="tozero", tick0=0, dtick=step)
    objective_axis(figure, run)
    caption = f"Validation error after each epoch of {many(epochs['number'].nunique(), 'trial')}.{drawn_note(run)}"
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
    figure, column = go.Figure(), run.objective.column
    add_families(figure, tuned, run, "probe", "from a probe's %{x:.1%}")
    alone = _only_probed(run)
    if len(alone):
        marker = {"color": GREY, "symbol": "circle-open", "size": 8}
        name, alone = "not fine-tuned", alone.assign(probe=alone[column])
        add_points(figure, alone, run, "probe", "as a probe alone", name=name, marker=marker)
    line = {"color": GREY, "dash": "dot"}
    ends = [0.0, float(pd.concat([tuned["probe"], tuned[column], alone[column]]).max())]
    figure.add_scatter(x=ends, y=ends, mode="lines", name="as good as its probe", line=line, hoverinfo="skip")
    title = f"{objective_title(run)} of the probe"
    figure.update_xaxes(title_text=title, tickformat=objective_ticks(run), rangemode="tozero")
    objective_axis(figure, run)
    better, same = (tuned[column] < tuned["probe"]).sum(), (tuned[column] == tuned["probe"]).sum()
    caption = (
        f"Of {many(len(tuned), 'fine-tuned trial')}, {better} ended below the diagonal, better than the probe of the "
        f"same architecture and image size; {len(tuned) - better - same} ended above it."
    )
    if len(alone):
        caption += f" Circles on the diagonal: {many(len(alone), 'probe')} that no trial was fine-tuned from."
    caption += drawn_note(run)
    return Chart("probes", "What fine-tuning adds to a probe", caption, figure)


def own_probes(run: RunRecord) -> "pd.Series[float]":
    """The objective of each fine-tuned trial's probe, by its number: of its own epoch 0, or else of the screen's probe
    of the same architecture and image size. Without the trials that have neither."""
    starts = run.epochs[run.epochs["epoch"] == 0].drop_duplicates("number", keep="last")
    own = starts.set_index("number")[run.objective.column]
    best_last = _probes(run)[::-1]  # the screen probes its best pair twice
    of_screen = {_backbone(run, row): row[run.objective.column] for _, row in best_last.iterrows()}
    errors = {
        row["number"]: own.get(row["number"], of_screen.get(_backbone(run, row), math.nan))
        for row in records(run.tuned)
    }
    return pd.Series(errors, dtype=float).dropna()


def _only_probed(run: RunRecord) -> pd.DataFrame:
    """The probes of what no completed trial was fine-tuned from."""
    probes, tuned = _probes(run), {_backbone(run, row) for row in records(run.tuned)}
    alone = [_backbone(run, row) not in tuned for row in records(probes)]
    return probes[np.array(alone, dtype=bool)]  # an empty list would select no columns instead of no rows


def _probes(run: RunRecord) -> pd.DataFrame:
    return run.completed[run.completed["kind"] == PROBE]


def _backbone(run: RunRecord, row: "Mapping[str, Any] | pd.Series[Any]") -> tuple[str, str]:
    """Architecture and image size."""
    return str(run.setting(row, "arch")), str(run.setting(row, "image_size"))


def parallel_coordinates(run: RunRecord) -> Chart | None:
    """A line per trial through its settings to its error, in groups from the best to the worst quarter. A probe has few
    of the settings, and none of the trials' errors."""
    trials = run.trials[run.trials["kind"] == TRIAL]
    scored = trials[trials["error_rate"].notna() & (trials["status"] != RUNNING)]
    if len(scored) < 2 or not run.dimensions:
        return None
    axes = [Axis(name, scored[name], run.is_log(name)) for name in run.dimensions]
    axes.append(Axis(run.objective.column, scored[run.objective.column], log=False))
    positions = np.column_stack([axis.positions for axis in axes])
    quarters = (4 * (scored[run.objective.column].rank(method="first") - 1) // len(scored)).to_numpy()
    figure, shown = go.Figure(), scored.index.isin(drawn(run))
    for name, quarter, colour in QUARTERS:
        lines = ((range(len(axes)), positions[i], [name_of(scored.index[i])] * len(axes))
                 for i in np.flatnonzero((quarters == quarter) & shown).tolist())  # fmt: skip
        x, y, text = joined(lines)
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
    ) + drawn_note(run)
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
    add_families(figure, run.tuned, run, "seconds", "in %{x:.0f} s")
    if len(probes := _probes(run)):
        marker = STATUS_MARKERS[PROBE] | {"size": 8}
        add_points(figure, probes, run, "seconds", "in %{x:.0f} s", name="probes", marker=marker)
    front = run.pareto_front
    figure.add_scatter(
        x=front["seconds"],
        y=front[run.objective.column],
        mode="lines",
        name="best for its cost",
        line={"color": GREY, "dash": "dot", "shape": "hv"},
        hoverinfo="skip",
    )
    figure.update_xaxes(title_text="seconds of training and validation", rangemode="tozero")
    objective_axis(figure, run)
    caption = f"Of {how_many(done['kind'])}, none is better and cheaper than these: {describe_front(run)}."
    caption += drawn_note(run)
    return Chart("cost", "Error against cost", caption, figure)
