"""What a report says of a run as a whole, in words: what ran, what came of it, and on what."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from typing import Any

import pandas as pd

from search.reporting.charts import end_times
from search.reporting.summary import model
from search.reporting.trials_table import short
from search.runs.command import CommandRecord
from search.runs.kinds import PROBE, how_many, name_of
from search.runs.result_rows import (
    COMPLETED,
    FAILED,
    PROBED,
    RETRAINED,
    RUNNING,
    STOPPED,
    UNFINISHED,
    better_epoch,
    objective,
)
from search.runs.run_record import RunRecord
from search.spaces.space import dimension_text
from trainables.system.gpu_share import reserved
from trainables.system.text import duration, many, percent

STATUSES = (COMPLETED, UNFINISHED, RETRAINED, STOPPED, FAILED, RUNNING)


def headline(run: RunRecord) -> str:
    """Such as "10 trials in 3 min 8 s: 7 completed, 3 stopped early"."""
    if run.trials.empty:
        return "no trial has started yet"
    counts = run.trials["status"].value_counts()
    by_status = ", ".join(f"{counts[name]} {name}" for name in STATUSES if name in counts)
    minutes = end_times(run)
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


def winner(run: RunRecord) -> dict[str, Any] | None:
    if run.best is None:
        return None
    names = [name for name in run.dimensions if run.best["kind"] != PROBE or name in PROBED]
    return {"name": name_of(run.best["number"]), "settings": [(name, short(run.best[name])) for name in names]}


def _minute(text: str) -> str:
    """An ISO time to the minute, with its offset."""
    return datetime.fromisoformat(text).strftime("%Y-%m-%d %H:%M %z") if text else ""
