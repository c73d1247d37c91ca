"""What early termination saves, and what it costs: whole trainings of several sets of images, ended by each scheduler.

    python bench/early_termination.py

Replays searches that try the configurations of a table in random order. So schedulers are compared on the very same
trials, whatever a searcher would make of them. `forecast` has a prior from the other sets' tables only. Writes
early_termination.json and .md.
"""

import argparse
import heapq
import itertools
import multiprocessing
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import image_curves
import numpy as np
import pandas as pd
from common import CPUS, RESULTS, command_line, footer, hardware, versions, write
from curve_prior import fit, read
from learning_curves import FILE
from learning_curves import space as quickstart_space
from ray.tune.schedulers import TrialScheduler

from search.runs.objective import Objective
from search.tuning.early_stopping import new_scheduler
from search.tuning.forecast_stopping import CHANCE_PER_EPOCH, MOST_CHANCE, ForecastScheduler, Goal
from trainables.ray.trial import OBJECTIVE

METHODS = ("none", "rungs", "median", "forecast")
SLOTS = (1, 4)
BINS = (0.0, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)
QUICKSTART_IMAGES, QUICKSTART_CLASSES = 120, 8
"""For validation, and of classes; its table does not tell."""


@dataclass(frozen=True)
class Curve:
    """A whole training: its config, and an entry an epoch."""

    config: dict[str, Any]
    results: list[dict[str, Any]]
    true_error: float

    @property
    def final(self) -> tuple[float, float]:
        return self.results[-1][OBJECTIVE], self.results[-1]["valid_loss"]

    @property
    def num_epochs(self) -> int:
        return int(self.results[-1]["epochs_total"])


@dataclass
class Outcome:
    """Of a replay."""

    epochs: int = 0
    completed: list[Curve] = field(default_factory=list)
    stopped: list[Curve] = field(default_factory=list)
    chances: list[tuple[float, bool]] = field(default_factory=list)
    """At each decision: that the trial will be better than the incumbent, and whether it would have been."""


def curves_of(file: Path) -> tuple[Any, list[Curve]]:
    """The space of a table, and its trainings that did not diverge; one of each configuration."""
    rows = pd.read_csv(file)
    quickstart = file.name == FILE
    if quickstart:
        rows = rows.assign(valid_images=QUICKSTART_IMAGES)
        truth = rows[rows["progress"] == 100].groupby("number")["error_rate"].last()
        half = rows["number"].max() // 2 + 1
        rows = rows[rows["number"] < half]
    space = quickstart_space() if quickstart else image_curves.space()
    found = []
    for number, epochs in rows.groupby("number"):
        epochs = epochs.sort_values("epoch")
        last = epochs.iloc[-1]
        if isinstance(last.get("failure"), str):
            continue
        config = {name: last[name] for name in space.dimensions if not pd.isna(last[name])}
        total = int(last["epoch"])
        results = [
            {OBJECTIVE: row.error_rate, "epochs_total": total, "seconds": seconds}
            | {name: getattr(row, name) for name in ("epoch", "stage", "progress", "valid_loss", "valid_images")}
            for row, seconds in zip(epochs.itertuples(), epochs["seconds"].cumsum(), strict=True)
        ]
        # The same configuration with the other seed, which chose nothing here.
        true_error = truth[number + half] if quickstart else last["test_error_rate"]
        found.append(Curve(config, results, float(true_error)))
    return space, found


def replay(curves: Sequence[Curve], scheduler: TrialScheduler, slots: int) -> Outcome:
    """All of them in this order, `slots` at once. An epoch 0 costs nothing: features are computed once for all."""
    scheduler.set_search_properties(None, None)
    done, todo = Outcome(), list(enumerate(curves))[::-1]
    running: list[tuple[float, int, int]] = []  # when an epoch ends, the trial, and which of its results it is
    while todo or running:
        while todo and len(running) < slots:
            number, curve = todo.pop()
            now = running[0][0] if running else 0.0
            heapq.heappush(running, (now + curve.results[0]["seconds"], number, 0))
        now, number, place = heapq.heappop(running)
        curve, result = curves[number], curves[number].results[place]
        trial = SimpleNamespace(trial_id=str(number), config=curve.config)
        done.epochs += result["epoch"] > 0
        if result["progress"] == 100:
            scheduler.on_trial_complete(None, trial, result)
            done.completed.append(curve)
            continue
        decision = scheduler.on_trial_result(None, trial, result)
        if isinstance(scheduler, ForecastScheduler) and scheduler.chances and done.completed:
            asked, _, chance = scheduler.chances.pop()
            assert asked == trial.trial_id
            done.chances.append((chance, curve.final[0] < min(one.final[0] for one in done.completed)))
        if decision == TrialScheduler.STOP:
            scheduler.on_trial_complete(None, trial, result)
            done.stopped.append(curve)
        else:
            heapq.heappush(running, (now + curve.results[place + 1]["seconds"] - result["seconds"], number, place + 1))
    return done


def run(job: tuple[str, Path, Any, str, int, int, int, float]) -> tuple[str, str, int, list[Outcome]]:
    """All searches of a set by a method."""
    name, file, prior, method, slots, seeds, trials, chance_per_epoch = job
    space, curves = curves_of(file)
    outcomes = []
    for seed in range(seeds):
        order = np.random.default_rng(seed).permutation(len(curves))[:trials]
        with tempfile.TemporaryDirectory() as folder:
            state = Path(folder) / "rungs.json"
            if method == "forecast":
                classes = QUICKSTART_CLASSES if file.name == FILE else None
                goal = Goal(OBJECTIVE, Objective("error_rate"), classes)
                scheduler = ForecastScheduler(goal, space, state, prior=prior, chance_per_epoch=chance_per_epoch)
            else:
                scheduler = new_scheduler(method, OBJECTIVE, space, state)
            outcomes.append(replay([curves[i] for i in order], scheduler, slots))
    return name, method, slots, outcomes


def measure(outcomes: Sequence[Outcome], whole: Sequence[Outcome]) -> dict[str, Any]:
    """Of a method's searches, beside those in which nothing was stopped."""
    saved, lost, truth, stopped = [], [], [], []
    for one, all_trained in zip(outcomes, whole, strict=True):
        best, found = (min(search.completed, key=lambda curve: curve.final) for search in (all_trained, one))
        saved.append(1 - one.epochs / all_trained.epochs)
        lost.append(best.final != found.final)
        truth.append(found.true_error - best.true_error)
        stopped.append(len(one.stopped) / len(all_trained.completed))
    return {
        "epochs_saved": float(np.mean(saved)),
        "trials_stopped": float(np.mean(stopped)),
        "best_stopped": float(np.mean(lost)),
        "true_error_change": float(np.mean(truth)),
        "true_error_change_sem": float(np.std(truth, ddof=1) / np.sqrt(len(truth))) if len(truth) > 1 else None,
    }


def reliability(outcomes: Sequence[Outcome]) -> list[dict[str, float]]:
    """What was said, and how often it came true, by what was said."""
    said, came = np.array([pair for one in outcomes for pair in one.chances], dtype=float).reshape(-1, 2).T
    found = []
    for low, high in itertools.pairwise(BINS):
        inside = (said >= low) & ((said < high) | (high == 1))
        if inside.any():
            entry = {"said": float(said[inside].mean()), "came_true": float(came[inside].mean())}
            found.append({"from": low, "to": high, **entry, "decisions": int(inside.sum())})
    return found


def markdown(result: dict[str, Any]) -> str:
    head = "| set | at once | scheduler | epochs saved | trials stopped | best one stopped | true error of the winner |"
    rows = [head, "| --- " * 7 + "|"]
    for name, by_slots in result["sets"].items():
        for slots, methods in by_slots.items():
            for method, one in methods.items():
                sem = f" ± {100 * one['true_error_change_sem']:.2f}" if one["true_error_change_sem"] is not None else ""
                change = "" if method == "none" else f"{100 * one['true_error_change']:+.2f}{sem} points"
                shares = (f"{one[key]:.0%}" for key in ("epochs_saved", "trials_stopped", "best_stopped"))
                rows.append(f"| {name} | {slots} | {method} | {' | '.join(shares)} | {change} |")
    tables = [
        f"**{name}**\n\n| said | came true | decisions |\n| --- | --- | --- |\n"
        + "\n".join(f"| {row['said']:.0%} | {row['came_true']:.0%} | {row['decisions']} |" for row in found)
        for name, found in result["reliability"].items()
    ]
    return f"""# What early termination saves

`{result["command"]}`: {result["seeds"]} searches of {result["trials"]} trials for each line, made by bench/early_termination.py.

{chr(10).join(rows)}

All schedulers see the same trials: the configurations of a set's [learning
curves](../README.md), in random order. Epochs saved: of those that
training all of them to their ends takes. Best one stopped: in so many searches, the trial that would have ended best
was stopped. True error: on test images that no training or validation saw (of the quickstart: on the same validation
images with another seed), compared with the winner of `none`; ± standard error. `forecast` stops trials whose chance to
beat the incumbent is below {result["chance_per_epoch"]:.1%} for each epoch that they have left, and below {MOST_CHANCE:.0%}. Its prior
comes from the tables of the other sets only. Its constants (these shares, how many trials it trains first, how the chance in an error rate fades) were
chosen on quickstart, eurosat1200 and flowers17. A table of fewer trainings than {result["trials"]} gives all of them to each search:
{", ".join(f"{name} has {count}" for name, count in result["trainings"].items())}.

Is a chance what it says? At every decision of `forecast`, one at a time, whether the trial would have ended better than
the incumbent had it been trained to its end. Several decisions are about the same trial.

{(chr(10) * 2).join(tables)}

{footer(result)}"""  # noqa: E501


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=Path, nargs="+", default=sorted(RESULTS.glob("learning_curves*.csv.gz")))
    parser.add_argument("--seeds", type=int, default=40, help="searches of each method (40 without it)")
    parser.add_argument("--trials", type=int, default=30, help="of each search (30 without it)")
    parser.add_argument("--chance-per-epoch", type=float, default=CHANCE_PER_EPOCH, help="(%(default)s without it)")
    parser.add_argument("--jobs", type=int, default=CPUS, help="at once (one a core without it)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    tables = read(args.tables)
    jobs = []
    for name, file in zip(tables, args.tables, strict=True):
        prior = fit({other: curves for other, curves in tables.items() if other != name})
        jobs += [
            (name, file, prior, method, slots, args.seeds, args.trials, args.chance_per_epoch)
            for slots in SLOTS
            for method in METHODS
        ]
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        found = {(name, slots, method): outcomes for name, method, slots, outcomes in pool.imap(run, jobs)}
    sets = {
        name: {
            str(slots): {method: measure(found[name, slots, method], found[name, slots, "none"]) for method in METHODS}
            for slots in SLOTS
        }
        for name in tables
    }
    result = {
        "sets": sets,
        "reliability": {name: reliability(found[name, 1, "forecast"]) for name in tables},
        "chance_per_epoch": args.chance_per_epoch,
        "trainings": {name: len(curves_of(file)[1]) for name, file in zip(tables, args.tables, strict=True)},
        "seeds": args.seeds,
        "trials": args.trials,
        "hardware": hardware(),
        "versions": versions("ray", "numpy", "pandas"),
        "command": command_line(),
    }
    write(args.out, "early_termination", result, markdown(result))


if __name__ == "__main__":
    main()
