"""What charts are made of: colours and symbols, points and curves of trials, axes."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import takewhile
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from search.runs.kinds import PROBE, name_of
from search.runs.result_rows import COMPLETED, FAILED, RETRAINED, RUNNING, STOPPED, UNFINISHED
from search.runs.run_record import RunRecord

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


MAX_DRAWN = 500
"""Trials that a chart draws. With ten thousand, a browser would take half a minute."""


@dataclass(frozen=True)
class Chart:
    """A figure, its title, and a caption that says what it shows: for those who cannot see it, and for print."""

    name: str
    title: str
    caption: str
    figure: go.Figure


class Axis:
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


def drawn(run: RunRecord) -> "pd.Index[Any]":
    """The numbers of the trials that charts draw: of very many the best half of `MAX_DRAWN`, the winner among them, and
    as many of the others, evenly over the search. A probe is always drawn."""
    numbers = run.trials.index
    if len(numbers) <= MAX_DRAWN:
        return numbers
    best = run.completed.index[: MAX_DRAWN // 2]
    others = numbers.difference(best)
    step = math.ceil(len(others) / (MAX_DRAWN // 2))
    probes = numbers[run.trials["kind"] == PROBE]
    return best.union(others[::step]).union(probes)


def drawn_note(run: RunRecord) -> str:
    """What a caption says of it; empty where all are drawn."""
    number = len(drawn(run))
    if number == len(run.trials):
        return ""
    return f" {number:,} of the {len(run.trials):,} are drawn: the {MAX_DRAWN // 2} best, and some of all others."


def add_families(figure: go.Figure, rows: pd.DataFrame, run: RunRecord, x: str, where: str) -> None:
    """Points in a colour and a shape per architecture, if these are searched."""
    families = rows["arch"].astype(str) if "arch" in run.dimensions else pd.Series("trials", index=rows.index)
    for i, family in enumerate(families.value_counts().index):
        colour, symbol = FAMILIES[i % len(FAMILIES)]
        marker = {"color": colour, "symbol": symbol, "size": 10}
        add_points(figure, rows[families == family], run, x, where, name=plain(family), marker=marker)


def add_points(
    figure: go.Figure, rows: pd.DataFrame, run: RunRecord, x: str, where: str, *, name: str, marker: dict[str, Any]
) -> None:
    """A marker per trial at the column `x` and its objective; `where` says the former when hovering."""
    rows = rows[rows.index.isin(drawn(run))]
    figure.add_scatter(
        x=rows[x],
        y=rows[run.objective.column],
        mode="markers",
        name=name,
        marker=marker,
        text=[name_of(number) for number in rows.index],
        hovertemplate=f"%{{text}}: %{{y:{objective_digits(run)}}} {where}<extra></extra>",
    )


def add_curves(
    figure: go.Figure,
    run: RunRecord,
    epochs: pd.DataFrame,
    numbers: Sequence[Any],
    name: str,
    colour: str,
    width: float = 1.5,
) -> None:
    """The curves of some trials as one trace, with gaps between: a thousand traces would be slow."""
    shown = drawn(run).intersection(list(numbers))
    groups = epochs[epochs["number"].isin(shown)].sort_values("epoch").groupby("number")
    if not len(groups):
        return
    column = run.objective.column
    lines = ((rows["epoch"], rows[column], [name_of(rows["number"].iloc[0])] * len(rows)) for _, rows in groups)
    x, y, text = joined(lines)
    figure.add_scatter(
        x=x,
        y=y,
        text=text,
        name=name,
        mode="lines+markers",
        line={"color": colour, "width": width},
        marker={"size": 4 + width},
        hovertemplate=f"%{{text}}, epoch %{{x}}: %{{y:{objective_digits(run)}}}<extra></extra>",
    )


def joined(lines: Iterable[tuple[Iterable[Any], ...]]) -> tuple[list[Any], list[Any], list[Any]]:
    """Many (x, y, text) as one line with gaps."""
    joined: tuple[list[Any], list[Any], list[Any]] = ([], [], [])
    for line in lines:
        for values, more in zip(joined, line, strict=True):
            values.extend([*more, None])
    return joined


def objective_axis(figure: go.Figure, run: RunRecord) -> None:
    figure.update_yaxes(title_text=objective_title(run), tickformat=objective_ticks(run), rangemode="tozero")


def objective_title(run: RunRecord) -> str:
    return "validation error" if run.objective.is_error_rate else f"{run.objective.name} on validation"


def objective_ticks(run: RunRecord) -> str:
    return ".0%" if run.objective.is_share else ".2f"


def objective_digits(run: RunRecord) -> str:
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
