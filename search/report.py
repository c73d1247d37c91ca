"""Writes a run as one self-contained HTML file: `python -m search.report RUN`. Every search also does as it runs."""

import argparse
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd
from pandas.api.types import is_numeric_dtype

from search.cli.messages import command_name, say
from search.reporting import calibration_charts, charts, html_page, suspects, test_set, winner_charts
from search.reporting.chart_parts import Chart
from search.reporting.error_analysis import ErrorAnalysis, analyse, read_analysis
from search.reporting.summary import model
from search.runs.atomic_files import write_atomically
from search.runs.command import CommandRecord
from search.runs.csv_file import Row
from search.runs.kinds import PROBE, how_many, name_of, short_name
from search.runs.result_rows import (
    COMPLETED,
    FAILED,
    OF_OBJECTIVE,
    PROBED,
    RETRAINED,
    RUNNING,
    SCORES,
    STOPPED,
    UNFINISHED,
    better_epoch,
    objective,
)
from search.runs.run_record import RunRecord, load, records
from search.spaces.space import dimension_text
from trainables.system.command_line import run_cli
from trainables.system.full_disk import require_writable_file
from trainables.system.gpu_share import reserved
from trainables.system.text import duration, many, percent, shell_command

BEST_EPOCH = ("best_epoch", "best_error_rate")
"""Shown of the trials whose best epoch is not their last."""
MOST_ROWS, NUM_SHOWN = 300, 200
"""A longer table shows so many rows at first, and more of them on demand."""
MOST_FAILURES = 100
STATUSES = (COMPLETED, UNFINISHED, RETRAINED, STOPPED, FAILED, RUNNING)

EXAMPLES = """
examples:
  python -m search.report results/pets-20250101-120000
      writes results/pets-20250101-120000/report.html; open it in a browser, or print it
  python -m search.report results/pets-20250101-120000 --no-analysis --out now.html
      of a running search, at once: without labelling the validation images for the confusion matrix

Exit code 0, or 2 if the run or an option is invalid.
"""


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=command_name("search.report"),
        description="Write a run as one HTML file: winner, charts, errors, table, failures, and how to run it again.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a run, such as results/<name>")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the file to write (default: RUN/report.html)")
    parser.add_argument("--no-analysis", action="store_true", help=(
        "do not label the validation images with the winner; errors that are already known are still shown"
    ))  # fmt: skip
    parser.add_argument("--suspects", action="store_true", help=(
        "write suspects.csv anew: the training and validation images that may be labelled wrongly, or are like no "
        "other; without this, a report looks for them once, if that is quick"
    ))  # fmt: skip
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    run = load(args.run)
    out = args.out.expanduser() if args.out else run.folder.report
    require_writable_file(out)
    write_report(run, out, analysis=not args.no_analysis, look=args.suspects)
    say(f"report: {out}")
    return 0


def write_report(run: RunRecord, out: Path, *, analysis: bool, look: bool = False) -> None:
    """Write the report of `run` to `out`: at once from its tables, then again with the winner's errors, and with the
    images that may be labelled wrongly if they are found quickly, or whatever that takes with `look`.

    Raises `ValueError` if `out` cannot be written.
    """
    _write(out, render(run))
    if run.best is not None and (look or (analysis and read_analysis(run) is None)):
        effort = suspects.effort_of(run, asked=look)
        and_looking = " and looking for wrong labels" if effort else ""
        winner = name_of(run.best["number"])
        say(f"labelling the validation images with {winner}{and_looking} for the report (Ctrl-C skips this)")
        if missing := analyse(run, effort=effort):
            say(missing)
        _write(out, render(run, no_analysis=missing))


def _write(out: Path, text: str) -> None:
    try:
        write_atomically(out, text, wait=False)
    except OSError as error:
        raise ValueError(f"{out} cannot be written: {error}. Make room, or give another --out.") from error


def render(run: RunRecord, *, no_analysis: str = "") -> str:
    """The report as HTML. `no_analysis` says why it lacks the winner's errors."""
    found = read_analysis(run)
    failed = run.trials[run.trials["status"] == FAILED]
    found_charts, about_winner = charts.search_charts(run), winner_figures(run, found)
    judged = found.calibration if found else None
    rows = table(run)
    return html_page.render(
        "report.html",
        [*found_charts, *about_winner, *([calibration_charts.reliability(judged)] if judged else [])],
        name=run.path.name,
        doc=run.space["doc"],
        headline=headline(run),
        written_at=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
        running=bool((run.trials["status"] == RUNNING).any()),
        cards=cards(run),
        verdict=verdict(run),
        test=test_set.lines(run.folder),
        facts=facts(run),
        search_charts=[chart.name for chart in found_charts],
        winner_charts=[chart.name for chart in about_winner],
        winner=_winner(run),
        no_analysis=no_analysis,
        errors=found,
        calibration=calibration_charts.section(judged, run.best),
        suspects=suspects.pictures(run),
        about_suspects=suspects.lines(run.folder),
        columns=columns(run),
        rows=rows[:NUM_SHOWN] if len(rows) > MOST_ROWS else rows,
        later_rows=later_rows(rows),
        statuses=sorted(run.trials["status"].unique()),
        failures=failures(failed),
        command=shell_command("search.run", *run.command.argv),
        later_commands=run.later_commands,
        environment=environment(run),
    )


def winner_figures(run: RunRecord, found: ErrorAnalysis | None) -> list[Chart]:
    recipe = run.best_recipe
    shown = [winner_charts.confusion(found.counts, found.classes)] if found and found.counts is not None else []
    return [*shown, winner_charts.schedule(recipe)] if recipe and recipe.total_epochs else shown


# --- What ran, and what came of it ------------------------------------------------------------------------------------


def headline(run: RunRecord) -> str:
    """Such as "10 trials in 3 min 8 s: 7 completed, 3 stopped early"."""
    if run.trials.empty:
        return "no trial has started yet"
    counts = run.trials["status"].value_counts()
    by_status = ", ".join(f"{counts[name]} {name}" for name in STATUSES if name in counts)
    minutes = charts.end_times(run)
    took = f" in {duration(60 * minutes.max())}" if len(minutes) else ""
    return f"{how_many(run.trials['kind'])}{took}: {by_status}"


def verdict(run: RunRecord) -> str:
    """How certain the winner's lead over trial 0 is, and whether fine-tuning was worth it, in words; empty where there
    is nothing to compare."""
    if run.best is None:
        return "No trial has completed, so there is no winner yet." if len(run.trials) else ""
    found = [f"Fine-tuning is {run.fine_tuning}."] if run.fine_tuning else []
    found += [f"The winner is {run.lead}."] if run.lead else []
    if not found:
        return ""
    chosen = f"The winner is the best of {how_many(run.completed['kind'])} on the same {run.num_valid} images"
    if run.command.arguments.keep_epoch == "best":
        chosen += ", which also chose the best epoch of each trial, and"
    return " ".join([*found, f"{chosen} that are reported here, so expect a slightly larger error on new ones."])


def cards(run: RunRecord) -> list[dict[str, Any]]:
    """The winner beside the best probe and trial 0, as far as there are these."""
    best, probe, first = run.best, run.probe, run.first
    if best is None:
        return []
    shown = [_card("best-card", "Best", best, run)]
    if probe is not None and probe.name != best.name:
        shown.append(_card("probe-card", "Best probe, without fine-tuning", probe, run))
    if first is not None and first.name != best.name:
        what = "Trial 0" if run.command.arguments.recipes else "Trial 0, the space's own recipe"
        shown.append(_card("first-card", what, first, run))
    return shown


def _card(name: str, title: str, row: "pd.Series[Any]", run: RunRecord) -> dict[str, Any]:
    error, interval = row["error_rate"], run.interval(row)
    lines = [f"validation error, {name_of(row['number'])}: {model(run, row)}"]
    if not run.objective.is_error_rate:
        lines.append(f"{run.objective.name} {run.objective.text(objective(row))}, which the search minimises")
    if interval:
        low, high = map(percent, interval)
        num_valid = run.num_valid or 0
        wrong = round(error * num_valid)
        lines.append(f"{wrong} of {num_valid} images wrong; 95 % interval {low} to {high}")
    if not math.isnan(expected := row.get(run.objective.expected_column, math.nan)):
        text = run.objective.text(expected)
        lines.append(f"{text} expected on new images, from all images that its probe was tried on")
    if not math.isnan(row["tta_error_rate"]):
        lines.append(f"{percent(row['tta_error_rate'])} with test-time augmentation")
    if better := better_epoch(row):
        lines.append(f"{percent(better[1])} after its best epoch, {better[0]}")
    return {"id": name, "title": title, "figure": percent(error), "lines": lines}


def facts(run: RunRecord) -> list[tuple[str, str]]:
    """What ran and when, as terms and texts, as far as it is known."""
    last = run.epochs["finished_at"].max() if len(run.epochs) else ""
    dimensions = "; ".join(f"{name} {dimension_text(saved)}" for name, saved in run.space["dimensions"].items())
    found = [
        ("started", _minute(run.command.started_at)),
        ("last epoch ended", _minute(last)),
        ("images", run.command.data),
        ("split", _split(run)),
        ("searched", dimensions),
        ("strategy", _strategy(run)),
        ("a trial", _trial_size(run.command)),
    ]
    return [(term, text) for term, text in found if text]


def _strategy(run: RunRecord) -> str:
    """Such as "searcher tpe, scheduler rungs, objective error, seed 6"."""
    strategy = asdict(run.command.strategy) if run.command.strategy else {}
    chosen = {name: value for name, value in strategy.items() if value} | {"seed": run.space["seed"]}
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in chosen.items())


def _split(run: RunRecord) -> str:
    if not run.num_train or not run.num_valid:
        return ""
    classes = f" of {len(run.labels)} classes" if run.labels else ""
    groups = f", groups by {run.command.arguments.group}" if run.command.arguments.group else ""
    return f"{run.num_train} to train on, {run.num_valid} to validate{classes}; seed {run.command.split_seed}{groups}"


def _trial_size(command: CommandRecord) -> str:
    size, at_once = command.group_size, command.max_concurrent or "as many as fit"
    if not size:
        return ""
    each = reserved(size["cpus_per_worker"], size["gpus_per_worker"])
    return f"{many(size['num_workers'], 'worker')} of {each}; {at_once} at once"


def environment(run: RunRecord) -> list[tuple[str, str]]:
    """Versions and hardware, as terms and texts."""
    versions = ", ".join(f"{name} {version}" for name, version in run.command.versions.items())
    return [("versions", versions), ("hardware", _hardware(run.command.hardware))]


def _hardware(known: Mapping[str, Any]) -> str:
    """Such as "AMD EPYC, 2 CPUs, 24 GiB; 2 nodes of 16 CPUs and 8 GPUs (H100)"."""
    parts = [str(known[name]) for name in ("processor", "system") if name in known]
    parts += [f"{known[name]} {unit}" for name, unit in (("cpus", "CPUs"), ("memory_gib", "GiB")) if name in known]
    nodes = Counter(_node(**node) for node in known.get("nodes", []))
    cluster = " and ".join(f"{many(count, 'node')} of {size}" for size, count in nodes.items())
    kinds = f" ({', '.join(known['gpu_types'])})" if known.get("gpu_types") else ""
    return ", ".join(parts) + (f"; Ray: {cluster}{kinds}" if cluster else "")


def _node(cpus: float, gpus: float) -> str:
    return f"{cpus:g} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")


def _winner(run: RunRecord) -> dict[str, Any] | None:
    if run.best is None:
        return None
    names = [name for name in run.dimensions if run.best["kind"] != PROBE or name in PROBED]
    return {"name": name_of(run.best["number"]), "settings": [(name, _short(run.best[name])) for name in names]}


# --- The table --------------------------------------------------------------------------------------------------------


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


def later_rows(rows: list[dict[str, Any]]) -> str:
    """The rows that the page makes itself when they are to be seen, as JSON: whether it is the best, its status, and
    the value and text of each cell. Ten thousand rows of HTML would keep a browser busy for half a minute."""
    later = [
        [row["is_best"], row["status"], [[cell["value"], cell["text"]] for cell in row["cells"]]]
        for row in (rows[NUM_SHOWN:] if len(rows) > MOST_ROWS else [])
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
    text = "" if missing else percent(value) if column.is_share else _short(value)
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


def _short(value: Any) -> str:
    """A float in three digits; anything else as it is."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _minute(text: str) -> str:
    """An ISO time to the minute, with its offset."""
    return datetime.fromisoformat(text).strftime("%Y-%m-%d %H:%M %z") if text else ""


if __name__ == "__main__":
    run_cli(main)
