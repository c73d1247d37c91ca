"""Does a search of a thousand trials slow down, or fill the memory, as it goes on?

    python bench/search_scale.py --trials 1000
    python bench/search_scale.py --at-once 1000

Trials that train nothing (`empty_trials`) go through this project's own search: Optuna's TPE with its journal, early
termination, tables, checkpoints, TensorBoard files. They have the quickstart's dimensions, 1 to 3 epochs, and errors
that follow from their settings, with noise. Seconds a trial are told per hundred trials, and the memory of this process
and of the trials' actor at each hundred's end, after a garbage collection. The first trial, which starts the workers,
counts nowhere. Memory grows from the end of trial 10 on. Writes search_scale.json and search_scale.md. Seconds need a
machine with nothing else to do; CPU seconds hardly do.

With `--at-once`, many trials run at a time, whose epochs take time and nothing else: can the driver handle their
results, and what does it take? See `scale_at_once`. Writes search_at_once.json and search_at_once.md.
"""

import argparse
import gc
import itertools
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import scale_at_once
from common import RESULTS, command_line, footer, hardware, versions, write
from empty_trials import CPUS_TOLD, run_search, search_options, start_ray

SETTINGS = ("freeze_epochs=0", "epochs=1..3")
WARM = 10
"""Trials before the memory counts."""


def resident_mb(pid: int | str = "self") -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


class Watch:
    """Follows a search from inside: when trials end, and the memory then."""

    def __init__(self, trials: int, part: int) -> None:
        self.marks = sorted({1, *range(part, trials, part), trials})  # trials ended; the first one starts the clock
        self.num_warm = min(WARM, trials - 1)
        self.ended, self.epochs, self.actor = 0, 0, None
        self.warm_mb = 0.0
        self.rows: list[dict[str, Any]] = []

    def on_result(self, result: dict[str, Any]) -> None:
        self.epochs += 1
        self.actor = result["pid"]

    def on_end(self, now: float) -> None:
        self.ended += 1
        if self.ended == self.num_warm:
            self.warm_mb = collected_mb()
        if self.ended in self.marks:
            times = {"now": now, "cpu": time.process_time()}
            memory = {"rss_before_gc_mb": resident_mb(), "rss_mb": collected_mb()}
            row = {"trials": self.ended, **times, **memory, "actor_rss_mb": resident_mb(self.actor)}
            self.rows.append(row)
            print(f"{self.ended:5} trials  {row['rss_mb']:.0f} MB", file=sys.__stdout__, flush=True)

    def parts(self) -> list[dict[str, Any]]:
        """The rows but for the first trial's, with their seconds a trial."""
        parts = []
        for before, row in itertools.pairwise(self.rows):
            trials = row["trials"] - before["trials"]
            seconds = {"seconds_per_trial": (row["now"] - before["now"]) / trials}
            seconds["cpu_seconds_per_trial"] = (row["cpu"] - before["cpu"]) / trials
            parts.append(seconds | {name: row[name] for name in row if name not in ("now", "cpu")})
        return parts


def collected_mb() -> float:
    gc.collect()
    return resident_mb()


def measure(args: argparse.Namespace) -> dict[str, Any]:
    import ray

    watch = Watch(args.trials, args.part)
    with tempfile.TemporaryDirectory() as root:
        started = time.perf_counter()
        start_ray(Path(root) / "cache")
        options = search_options(Path(root), SETTINGS, trials=args.trials, concurrent=args.concurrent, seed=args.seed)
        try:
            rows = run_search(options, watch.on_end, watch.on_result)
        finally:
            ray.shutdown()
    parts = watch.parts()
    lists = {name: [part[name] for part in parts] for name in parts[0]}
    per_trial, memory, cpu = lists["seconds_per_trial"], lists["rss_mb"], lists["cpu_seconds_per_trial"]
    return {
        "cpu_last_over_first": cpu[-1] / cpu[0],
        "last_over_first": per_trial[-1] / per_trial[0],
        "rss_growth_mb": memory[-1] - watch.warm_mb,
        "rss_growth_from_trial": watch.num_warm,
        "rss_warm_mb": watch.warm_mb,
        "first_trial_seconds": watch.rows[0]["now"] - started,
        "seconds": watch.rows[-1]["now"] - started,
        "epochs": watch.epochs,
        "ended": dict(Counter(row["status"] for row in rows)),
        "trials_at": lists.pop("trials"),
        **lists,
    }


def markdown(result: dict[str, Any]) -> str:
    names = ("trials_at", "seconds_per_trial", "cpu_seconds_per_trial", "rss_mb", "actor_rss_mb")
    rows = zip(*(result[name] for name in names), strict=True)
    lines = [f"| {n} | {wall:.3f} | {cpu:.3f} | {own:.0f} | {actor:.0f} |" for n, wall, cpu, own, actor in rows]
    ended = ", ".join(f"{count} {status}" for status, count in result["ended"].items())
    return f"""# A long search, as it goes on

`{result["command"]}`

n = {result["trials"]} trials that train nothing ({ended}), {result["concurrent"]} at a time, {result["epochs"]} epochs,
seed {result["seed"]}; {result["seconds"]:.0f} s in all, {result["first_trial_seconds"]:.1f} s of them until the first
trial had ended, which counts in no row.

| trials so far | seconds a trial | CPU seconds of the search | memory of the search, MB | of a trial's actor, MB |
|---|---|---|---|---|
{chr(10).join(lines)}

The last row takes {result["last_over_first"]:.2f} times the seconds of the first one, and
{result["cpu_last_over_first"]:.2f} times its CPU seconds; from trial
{result["rss_growth_from_trial"]} on the search's memory grew by {result["rss_growth_mb"]:.0f} MB.
One worker of 1 CPU a trial, a Ray that is told of {CPUS_TOLD} CPUs.
{footer(result)}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    helps = {"trials": "in all", "concurrent": "at a time", "part": "trials a row of the table", "seed": "of proposals"}
    defaults = {"trials": 1000, "concurrent": 1, "part": 100, "seed": 0}
    for name, default in defaults.items():
        parser.add_argument(
            f"--{name}", type=int, default=default, help=f"{helps[name]} ({default} without it)".strip()
        )
    parser.add_argument("--out", type=Path, default=RESULTS)
    scale_at_once.add_options(parser)
    args = parser.parse_args()
    if args.at_once is not None:
        return many_at_once(args, parser)
    if not 1 <= args.concurrent <= CPUS_TOLD:
        parser.error(f"--concurrent {args.concurrent}: Ray has {CPUS_TOLD} CPUs here")
    if args.part < 2 or args.trials <= args.part:
        parser.error("--part and --trials: at least 2 trials a row and more than one row are needed")
    found = measure(args)
    settings = {name: getattr(args, name) for name in defaults}
    result = {**found, **settings, "command": command_line(), "hardware": hardware(),
              "versions": versions("ray", "optuna", "torch", "tensorboardX", "finetune-search")}  # fmt: skip
    write(args.out, "search_scale", result, markdown(result))


def many_at_once(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if args.at_once < 2 or args.seconds < 2 * scale_at_once.SLICE_SECONDS or args.epoch_seconds <= 0:
        parser.error(
            f"--at-once: at least 2 trials, --seconds {2 * scale_at_once.SLICE_SECONDS:g} and epochs that last"
        )
    names = ("at_once", "seconds", "epoch_seconds", "seed")
    found = scale_at_once.measure(args) | {name: getattr(args, name) for name in names}
    packages = versions("ray", "optuna", "finetune-search")
    result = found | {"command": command_line(), "hardware": hardware(), "versions": packages}
    write(args.out, "search_at_once", result, scale_at_once.markdown(result) + footer(result))


if __name__ == "__main__":
    main()
