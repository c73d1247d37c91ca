"""The table of a report: its columns, a row a trial, and the failures."""

import json
import math
from dataclasses import dataclass
from typing import Any

import pandas as pd
from pandas.api.types import is_numeric_dtype

from search.reporting import html_page
from search.runs.csv_file import Row
from search.runs.kinds import PROBE, name_of, short_name
from search.runs.result_rows import OF_OBJECTIVE, PROBED, SCORES, better_epoch
from search.runs.run_record import RunRecord, records
from trainables.system.text import many, percent

BEST_EPOCH = ("best_epoch", "best_error_rate")
"""Shown of the trials whose best epoch is not their last."""
MOST_ROWS, NUM_SHOWN = 300, 200
"""A longer table shows so many rows at first, and more of them on demand."""
MOST_FAILURES = 100


@dataclass(frozen=True)
class Column:
    name: str
    source: str
    is_text: bool = False
    is_share: bool = False


def columns(run: RunRecord) -> list[Column]:
    """The columns of the table: outcome, cost, searched and pinned settings, and why a trial ended."""
    shown = [Column("trial", "number"), Column("status", "status", is_text=True), Column("epochs", "epochs_done")]
    shown.append(Column("error", "error_rate", is_share=True))
    is_share = run.objective.is_share
    if not run.objective.is_error_rate:
        shown.append(Column(run.objective.name, run.objective.column, is_share=is_share))
    if _has(run, run.objective.expected_column):
        shown.append(Column("expected", run.objective.expected_column, is_share=is_share))
    if any(map(better_epoch, records(run.trials))):
        shown.append(Column("best epoch", "best_epoch"))
        shown.append(Column("error then", "best_error_rate", is_share=True))
    if run.trials["tta_error_rate"].notna().any():
        shown.append(Column("with TTA", "tta_error_rate", is_share=True))
    if _has(run, run.objective.confirmed_column):
        shown.append(Column("confirmed", run.objective.confirmed_column, is_share=is_share))
    shown += [Column("loss", "valid_loss"), Column("seconds", "seconds")]
    known = {"number", "trial_id", *SCORES, *(column.source for column in shown)}
    known |= {
        run.objective.confirmed_column,
        *OF_OBJECTIVE,
        "epochs_total",
        "overhead_seconds",
        "images_per_second",
        "reason",
    }
    known |= {"kind", *BEST_EPOCH}
    settings = [name for name in run.trials.columns if name not in known]
    shown += [Column(name, name, is_text=not is_numeric_dtype(run.trials[name])) for name in settings]
    return [*shown, Column("reason", "reason", is_text=True)]


def _has(run: RunRecord, column: str) -> bool:
    return column in run.trials and bool(run.trials[column].notna().any())


def table(run: RunRecord) -> list[dict[str, Any]]:
    """A row per trial, best first."""
    shown, best = columns(run), None if run.best is None else run.best.name
    keys = ["expected", run.objective.column, "valid_loss", "number"]
    order = run.trials.assign(expected=run.expected).sort_values(keys)
    return [
        {
            "status": row["status"],
            "is_best": bool(row["number"] == best),
            "cells": [_cell(row, column) for column in shown],
        }
        for row in records(order.assign(**_without_idle_settings(run, order)))
    ]


def first_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that the page has at first."""
    return rows[:NUM_SHOWN] if len(rows) > MOST_ROWS else rows


def later_rows(rows: list[dict[str, Any]]) -> str:
    """The rows that the page makes itself when they are to be seen, as JSON: whether it is the best, its status, and
    the value and text of each cell. Ten thousand rows of HTML would keep a browser busy for half a minute."""
    later = [
        [row["is_best"], row["status"], [[cell["value"], cell["text"]] for cell in row["cells"]]]
        for row in rows[len(first_rows(rows)) :]
    ]
    return html_page.script_json(json.dumps(later))


def failures(failed: pd.DataFrame) -> list[tuple[str, str]]:
    """Failed trials and why; of many a line for each reason."""
    if len(failed) <= MOST_FAILURES:
        return [(name_of(row["number"]), row["reason"]) for _, row in failed.iterrows()]
    groups = failed.groupby("reason")["number"]
    found = [(reason, numbers.tolist()) for reason, numbers in groups]
    largest = sorted(found, key=lambda group: -len(group[1]))[:MOST_FAILURES]
    return [(f"{many(len(numbers), 'trial')}, such as {numbers[-1]}", str(reason)) for reason, numbers in largest]


def _without_idle_settings(run: RunRecord, rows: pd.DataFrame) -> "dict[str, pd.Series[Any]]":
    """The columns of settings without those that a probe does not depend on."""
    names = [name for name in run.dimensions if name in rows and name not in PROBED]
    probes = rows["kind"] == PROBE
    return {name: rows[name].astype(object).mask(probes, math.nan) for name in names} if probes.any() else {}


def _cell(row: Row, column: Column) -> dict[str, str]:
    value = row[column.source]
    if column.source in BEST_EPOCH and better_epoch(row) is None:
        value = math.nan
    missing = isinstance(value, float) and math.isnan(value)
    text = "" if missing else percent(value) if column.is_share else short(value)
    if column.source == "epochs_done":
        text = f"{row['epochs_done']}/{row['epochs_total']}" if row["epochs_total"] else "0"
    elif column.source == "seconds":
        text = f"{value:.0f}"
    elif column.source == "number":
        text = short_name(value)
    elif column.source == "best_epoch" and not missing:
        text = f"{value:.0f}"
    kind = "text long" if column.source == "reason" else "text" if column.is_text else ""
    return {"text": text, "value": "" if missing else str(value), "kind": kind}


def short(value: Any) -> str:
    """A float in three digits; anything else as it is."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
