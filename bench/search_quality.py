"""Which searcher and which early termination find more with less?

    python bench/search_quality.py

Replays searches on the learning curves in results/bench/learning_curves.csv.gz, which bench/learning_curves.py made:
the search's own searchers and schedulers, real trainings, virtual time. Writes search_quality.json, .md and .png.
"""

import argparse
import itertools
import multiprocessing
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import curve_prior
import numpy as np
import optuna
import pandas as pd
from common import CPUS, RESULTS, command_line, footer, hardware, versions, write
from learning_curves import FILE, space
from quality_replay import CurveTable, Replay, Training, most_important, replay, replay_top_k
from scipy.stats import kendalltau

from search.options.strategy import Strategy
from search.reporting.importance import BEST_SHARE
from search.tuning.curve_forecast import Prior
from trainables.system.text import many

BASELINE, TOP_K = "random", "random, top K after one epoch"
MULTIVARIATE = "tpe as Optuna has it (multivariate), rungs"
BY_ERROR_NOW = "tpe, rungs that forecast nothing"
METHODS: dict[str, Strategy | None] = {
    BASELINE: Strategy(searcher="random", scheduler="none"),
    TOP_K: None,
    "tpe": Strategy(scheduler="none"),
    "tpe, rungs": Strategy(scheduler="rungs"),
    "tpe, forecast": Strategy(scheduler="forecast"),
    BY_ERROR_NOW: Strategy(scheduler="rungs"),
    "tpe, halving": Strategy(scheduler="halving"),
    "tpe, median": Strategy(scheduler="median"),
    MULTIVARIATE: Strategy(scheduler="rungs"),
    "gp": Strategy(searcher="gp", scheduler="none"),
    "cmaes": Strategy(searcher="cmaes", scheduler="none"),
}
DEFAULT = next(name for name, method in METHODS.items() if method == Strategy())
SLOTS = (1, 4)
BEST_SHARES = {"better half": BEST_SHARE, "best tenth": 0.1}
"""What importance tells from all trials: as a search has it, and as Optuna has it by itself."""
TRIALS_FOR_IMPORTANCE = (10, 20)
NEAR = 0.01
"""Errors this close to random search's count as equal."""
PACKAGES = ("ray", "optuna", "cmaes", "torch", "numpy", "pandas")
COLUMNS = {  # key: its heading and form
    "final_error_median": ("error of the winner", ".1%"),
    "final_error_quartiles": ("quartiles", ".1%"),
    "expected_error_median": ("of its recipe", ".1%"),
    "epochs_share_at_equal_quality": ("epochs to equal quality", ".2f"),
    "num_trials_median": ("trials", ".0f"),
    "best_stopped_share": ("best one stopped", ".0%"),
    "kendall_tau": ("τ of the rung", ".2f"),
}

_table: CurveTable | None = None  # of a worker process
_prior: Prior | None = None


def load(file: Path) -> None:
    """The table, and what the others tell of learning curves."""
    global _table, _prior
    _table = CurveTable(pd.read_csv(file), space())
    others = prior_tables(file)
    _prior = curve_prior.fit(curve_prior.read([RESULTS / name for name in others])) if others else None


def prior_tables(file: Path) -> list[str]:
    """Those of other images."""
    return [other.name for other in sorted(RESULTS.glob("learning_curves_*.csv.gz")) if other.name != file.name]


def run(job: tuple[str, int, int, int]) -> tuple[str, int, Replay]:
    name, slots, seed, budget = job
    method = METHODS[name]
    if method is None:
        return name, slots, replay_top_k(_table, seed=seed, budget=budget)
    sampler = optuna.samplers.TPESampler(seed=seed) if name == MULTIVARIATE else None
    changes = {"sampler": sampler, "forecasts": name != BY_ERROR_NOW, "prior": _prior}
    return name, slots, replay(method, _table, seed=seed, slots=slots, budget=budget, **changes)


def run_all(args: argparse.Namespace) -> dict[tuple[str, int], list[Replay]]:
    """Replays of every method and number of trials at once, one a seed."""
    jobs = [
        (name, slots, seed, args.budget)
        for name, slots, seed in itertools.product(args.methods, SLOTS, range(args.seeds))
        if METHODS[name] or slots == 1  # what goes on is chosen after all the first epochs, however many at once
    ]
    found: dict[tuple[str, int], list[Replay]] = {}
    with multiprocessing.get_context("spawn").Pool(args.jobs, load, (args.table,)) as pool:
        for count, (name, slots, done) in enumerate(pool.imap(run, jobs), start=1):
            found.setdefault((name, slots), []).append(done)
            print(f"\r{count}/{len(jobs)} searches", end="", flush=True)
    print()
    return found


def errors_at(replays: Sequence[Replay], epochs: int) -> list[float]:
    """Of the incumbents after so many epochs; before there is one, 1."""
    return [1.0 if (best := done.incumbent_at(epochs)) is None else best.final_error for done in replays]


def epochs_to(target: float, done: Replay) -> float:
    """Epochs spent when the incumbent's error is `target` at most; infinity if it never is."""
    return next((epochs for epochs, best in done.incumbents if best.final_error <= target + 1e-9), np.inf)


def measure(name: str, replays: Sequence[Replay], table: CurveTable, target: float, budget: int) -> dict[str, Any]:
    final = errors_at(replays, budget)
    taus = [tau(*zip(*done.rung_and_final, strict=True)) for done in replays if done.rung_and_final]
    if METHODS[name] is None:
        taus = [tau(*zip(*((one.error_rate[0], one.error_rate[-1]) for one in table.all()), strict=True))]
    share = np.median([epochs_to(target, done) / budget for done in replays])
    return {
        "final_error_median": float(np.median(final)),
        "final_error_quartiles": np.quantile(final, (0.25, 0.75)).tolist(),
        "expected_error_median": float(np.median([table.error(done.incumbents[-1][1].config) for done in replays])),
        "epochs_share_at_equal_quality": float(share) if np.isfinite(share) else None,
        "num_trials_median": float(np.median([len(done.trials) for done in replays])),
        "best_stopped_share": float(np.mean([done.best_was_stopped() for done in replays])),
        "kendall_tau": float(np.median(taus)) if taus else None,
    }


def importance(replays: Sequence[Replay], table: CurveTable) -> dict[str, Any]:
    """How many of the searches name the dimension first that matters most over all trainings of the table, after so
    many completed trials, by what the trials are told from."""
    decisive = table.decisive()
    named_first = {
        str(num_trials): {
            name: float(np.mean([most_important(done.completed[:num_trials], share) == decisive for done in replays]))
            for name, share in BEST_SHARES.items()
        }
        for num_trials in TRIALS_FOR_IMPORTANCE
    }
    return {"decisive": decisive, "named_first": named_first}


def chance(table: CurveTable) -> dict[str, float]:
    """How far two trainings of one configuration are apart, and how far a proposal's answer is from the truth."""
    first, second = finals(table.repeats(*table.trainings))
    own, nearest = table.leave_one_out()
    return {
        "configurations": len(first),
        "repeat_mean_difference": float(np.abs(np.subtract(first, second)).mean()),
        "repeat_kendall_tau": tau(first, second),
        "repeat_kendall_tau_longest": tau(*finals(table.repeats(max(table.trainings)))),
        "nearest_mean_difference": float(np.abs(own - nearest).mean()),
        "nearest_kendall_tau": tau(own, nearest),
    }


def finals(pairs: Sequence[tuple[Training, Training]]) -> tuple[list[float], list[float]]:
    return [one.error_rate[-1] for one, _ in pairs], [other.error_rate[-1] for _, other in pairs]


def tau(one: Sequence[float], other: Sequence[float]) -> float:
    return float(kendalltau(one, other).statistic)


def draw(found: Mapping[tuple[str, int], Sequence[Replay]], budget: int, target: float, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panes = plt.subplots(1, len(SLOTS), figsize=(11, 4.2), sharey=True, layout="constrained")
    epochs = np.arange(1, budget + 1)
    colours = {name: f"C{row}" for row, name in enumerate(METHODS)}
    for pane, slots in zip(panes, SLOTS, strict=True):
        for (name, at_once), replays in found.items():
            if at_once != slots:
                continue
            errors = np.array([errors_at(replays, spent) for spent in epochs])
            low, middle, high = 100 * np.quantile(errors, (0.25, 0.5, 0.75), axis=1)
            width = 2.5 if name == DEFAULT else 1.3
            pane.step(epochs, middle, where="post", color=colours[name], label=name, linewidth=width)
            pane.fill_between(epochs, low, high, step="post", color=colours[name], alpha=0.08)
        pane.axhline(100 * target, color="grey", linestyle=":", linewidth=1)
        pane.set(title=f"{many(slots, 'trial')} at once", xlabel="epochs spent", ylim=(0, 25))
    panes[0].set_ylabel("error of the incumbent, %: median and quartiles")
    panes[0].legend(fontsize=8)
    figure.savefig(file, dpi=110, metadata={"Software": None})


def text(value: Any, form: str) -> str:
    if isinstance(value, list):
        return " to ".join(format(one, form) for one in value)
    return "-" if value is None else format(value, form)


def markdown(result: dict[str, Any]) -> str:
    rows = [["method", *(head for head, _ in COLUMNS.values())]]
    rows.append(["---"] * len(rows[0]))
    for name, row in result["methods"].items():
        shown = f"**{name}** (default)" if name.removesuffix(", 4 at once") == DEFAULT else name
        rows.append([shown, *(text(row[key], form) for key, (_, form) in COLUMNS.items())])
    table, about, budget = "\n".join(f"| {' | '.join(row)} |" for row in rows), result["table"], result["budget"]
    return f"""# What a search finds for its epochs

`{result["command"]}`

Searches of the quickstart space, replayed: the search's own searchers and schedulers, answered by
{about["configurations"]} configurations that were trained to their ends, twice each, {result["seeds"]} seeds a method. Every search spends
{budget} epochs, frozen ones included, which is what random search needs for its {result["methods"][BASELINE]["num_trials_median"]:.0f} trials.

{table}

Medians over the seeds. The error of the winner is the lowest that the search has seen; of its recipe, what the same
configuration reaches on average: the difference is luck that a search takes for merit. Epochs to equal quality: the
share of the {budget} after which the incumbent is within {NEAR:.0%} (absolute) of the error at which random search ends. Best one
stopped: in so many searches the trial that would have ended best was not trained to its end. τ: Kendall's, between
what is compared at the rungs and the error at the end, over all trainings of the table that reach a rung; a forecast is
that which the search makes when its epochs are spent. The constants of search/tuning/forecast.py were chosen on this
table; the prior of the scheduler `forecast` comes from the tables of other images.

How much is chance: two trainings of the same configuration differ by {about["repeat_mean_difference"]:.1%} on average and rank
configurations alike with τ = {about["repeat_kendall_tau"]:.2f} ({about["repeat_kendall_tau_longest"]:.2f} among the longest).

A proposal between the table's configurations is answered by a whole training of the nearest one of as many epochs, with
a seed by lot; a forecast is made for and learns from the configuration that was trained. Dimensions weigh in the distance as the table itself says. Left out of the table, a configuration's error is
missed by {about["nearest_mean_difference"]:.1%} on average (τ = {about["nearest_kendall_tau"]:.2f}), its own chance included.

{importance_text(result["importance"])}

![the incumbent's error against epochs spent](search_quality.png)

{footer(result)}"""  # noqa: E501


def importance_text(found: Mapping[str, Any]) -> str:
    head = "| completed trials | " + " | ".join(f"{name} told from all" for name in BEST_SHARES) + " |"
    rows = [
        f"| {num_trials} | {' | '.join(f'{share:.0%}' for share in shares.values())} |"
        for num_trials, shares in found["named_first"].items()
    ]
    table = "\n".join([head, "| --- " * (1 + len(BEST_SHARES)) + "|", *rows])
    return f"""What mattered: of all settings, {found["decisive"]} tells most of the final errors' variance in the table. So many of the
default's searches name it first (PED-ANOVA); the best tenth is what Optuna takes by itself:

{table}"""  # noqa: E501


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20, help="searches of each method (20 without it)")
    parser.add_argument("--budget", type=int, default=120, help="epochs of each search (120 without it)")
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=list(METHODS),
        help="beside random search and the default; all without it",
    )
    parser.add_argument("--table", type=Path, default=RESULTS / FILE)
    parser.add_argument("--jobs", type=int, default=CPUS, help="searches at once (one a core without it)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.methods = [name for name in METHODS if name in {BASELINE, DEFAULT, *args.methods}]  # what others stand beside
    return args


def main() -> None:
    args = parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes, of which there is one a core
    load(args.table)
    found = run_all(args)
    target = float(np.median(errors_at(found[BASELINE, 1], args.budget))) + NEAR
    methods = {
        name if slots == 1 else f"{name}, {slots} at once": measure(name, replays, _table, target, args.budget)
        for (name, slots), replays in found.items()
    }
    result = {
        "methods": methods,
        "default": DEFAULT,
        "prior": prior_tables(args.table),
        "target_error": target,
        "seeds": args.seeds,
        "budget": args.budget,
        "table": chance(_table),
        "importance": importance([one for slots in SLOTS for one in found[DEFAULT, slots]], _table),
        "hardware": hardware(),
        "versions": versions(*PACKAGES),
        "command": command_line(),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    draw(found, args.budget, target, args.out / "search_quality.png")
    write(args.out, "search_quality", result, markdown(result))


if __name__ == "__main__":
    main()
