"""What a trial costs beside its training: trials that train nothing, in this project and in the pattern of Ray's guide.

    python bench/trial_overhead.py --trials 200 --nested-trials 5

Ours is this project's own search (`empty_trials`), whose workers stay warm. The other one is Ray's user guide
"Hyperparameter Tuning with Ray Tune": Tune runs a function that fits a `TorchTrainer`, whose metrics come back by
`TuneReportCallback`. It gets what speaks for it: trial actors that are used again, a train controller that looks every
0.1 s (Ray: every 2 s), random proposals, no tables. Its workers import torch and timm, as fine-tuning must. A trial is
one epoch with one sum over the workers and one report of metrics and a checkpoint of a few bytes.

Its overhead is the time from the end before to its own end, one trial at a time. The first trial, which starts
everything, is reported apart. Every arm is a process with a Ray of its own; the sides take turns, and who goes first
alternates. Writes trial_overhead.json and trial_overhead.md. Needs a machine with nothing else to do.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from common import RESULTS, command_line, footer, hardware, versions, write

SIDES = ("ours", "nested")
POLL_SECONDS = "0.1"


def ours(args: argparse.Namespace, root: Path, ends: list[float]) -> int:
    from empty_trials import run_search, search_options, start_ray

    start_ray(root / "cache")
    settings = ("epochs=1", "freeze_epochs=0")
    options = search_options(root, settings, trials=args.trials + 1, workers=args.workers[0], seed=args.seed)
    rows = run_search(options, on_end=lambda seconds: ends.append(seconds))
    return sum(row["status"] != "completed" for row in rows)


def nested(args: argparse.Namespace, root: Path, ends: list[float]) -> int:
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = POLL_SECONDS
    from empty_trials import start_ray
    from ray import tune

    class Clock(tune.Callback):
        def on_trial_complete(self, *unused: Any, **info: Any) -> None:
            ends.append(time.perf_counter())

    start_ray(root / "cache", hook=None)
    space = {"lr": tune.loguniform(1e-4, 1e-2), "num_workers": args.workers[0], "storage": str(root)}
    tuner = tune.Tuner(
        fit_trainer,
        param_space=space,
        tune_config=tune.TuneConfig(num_samples=args.nested_trials + 1, max_concurrent_trials=1, reuse_actors=True),
        run_config=tune.RunConfig(name="tune", storage_path=str(root), callbacks=[Clock()], verbose=0),
    )
    results = tuner.fit()
    if results.errors:
        raise results.errors[0]
    return sum("error_rate" not in (result.metrics or {}) for result in results)


def fit_trainer(config: dict[str, Any]) -> None:
    """The trial of Ray's guide."""
    from ray import train, tune
    from ray.train.torch import TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    TorchTrainer(
        train_nothing,
        train_loop_config={"lr": config["lr"]},
        scaling_config=train.ScalingConfig(num_workers=config["num_workers"], resources_per_worker={"CPU": 1}),
        run_config=train.RunConfig(
            name=f"train-trial_id={tune.get_context().get_trial_id()}",
            storage_path=config["storage"],
            callbacks=[TuneReportCallback()],
        ),
    ).fit()


def train_nothing(config: dict[str, Any]) -> None:
    """Ray's train function, once per worker: an epoch without steps."""
    import timm  # noqa: F401
    import torch
    from ray import train

    part = torch.tensor(1 / train.get_context().get_world_size())
    if train.get_context().get_world_size() > 1:
        torch.distributed.all_reduce(part)
    metrics = {"error_rate": float(part) * config["lr"]}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "model.safetensors").write_bytes(b"weights")
        first = train.get_context().get_world_rank() == 0
        train.report(metrics, checkpoint=train.Checkpoint.from_directory(folder) if first else None)


def run_arm(args: argparse.Namespace) -> None:
    """One side with one number of workers, in a process of its own; `--out` gets the seconds between the ends, and how
    many trials had no result: of nested ones some of the reports get lost on their way to Tune.
    """
    import ray

    ends = [time.perf_counter()]
    with tempfile.TemporaryDirectory() as root:
        try:
            without_result = {"ours": ours, "nested": nested}[args.arm](args, Path(root), ends)
        finally:
            ray.shutdown()
    seconds = [end - before for before, end in itertools.pairwise(ends)]
    args.out.write_text(json.dumps({"seconds": seconds, "without_result": without_result}))


def measure(args: argparse.Namespace, side: str, workers: int) -> dict[str, Any]:
    """What `run_arm` says; the seconds of the first trial include the start of Ray."""
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "arm.json", Path(folder) / "log"
        numbers = {"workers": workers, "trials": args.trials, "nested-trials": args.nested_trials, "seed": args.seed}
        options = [word for name, value in numbers.items() for word in (f"--{name}", str(value))]
        with log.open("w") as file:
            command = [sys.executable, __file__, "--arm", side, "--out", str(out), *options]
            done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT)
        if done.returncode:
            raise RuntimeError(
                f"{side} with {workers} workers ended with {done.returncode}:\n{log.read_text()[-4000:]}"
            )
        return json.loads(out.read_text())


def name_of(workers: int) -> str:
    return f"{workers}_worker{'s' * (workers > 1)}"


def summarise(runs: list[dict[str, Any]], workers: list[int]) -> dict[str, Any]:
    """Medians over the trials of all rounds but each round's first, and nested over ours."""
    result = {}
    for count in workers:
        name = name_of(count)
        for side in SIDES:
            seconds = [run["seconds"] for run in runs if (run["side"], run["workers"]) == (side, count)]
            later = [value for values in seconds for value in values[1:]]
            result[f"{side}_{name}_seconds"] = median(later)
            result[f"{side}_{name}_range"] = [min(later), max(later)]
            result[f"{side}_{name}_first_seconds"] = median(values[0] for values in seconds)
            result[f"{side}_{name}_n"] = len(later)
    for side in SIDES:
        result[f"{side}_without_result"] = sum(run["without_result"] for run in runs if run["side"] == side)
    for name in map(name_of, workers):
        result[f"ratio_{name}"] = result[f"nested_{name}_seconds"] / result[f"ours_{name}_seconds"]
    return result


def markdown(result: dict[str, Any]) -> str:
    def line(count: int) -> str:
        name = name_of(count)

        def cell(side: str) -> str:
            low, high = result[f"{side}_{name}_range"]
            return f"{result[f'{side}_{name}_seconds']:.3f} ({low:.3f} to {high:.3f}, n = {result[f'{side}_{name}_n']})"

        firsts = " | ".join(f"{result[f'{side}_{name}_first_seconds']:.1f}" for side in SIDES)
        return f"| {count} | {cell('ours')} | {cell('nested')} | {result[f'ratio_{name}']:.0f} | {firsts} |"

    settings = result["settings"]
    return f"""# Seconds a trial costs beside its training

`{result["command"]}`

Trials of one epoch that train nothing, one at a time: seconds from the end of the trial before, median (range) over
n trials in {settings["rounds"]} rounds, seed {settings["seed"]}. Nested is a `TorchTrainer` inside each Tune trial, as
in Ray's user guide, with trial actors used again and a train controller that looks every {POLL_SECONDS} s.

| workers | this project | nested | nested / this project | first trial, this project | first trial, nested |
|---|---|---|---|---|---|
{chr(10).join(map(line, settings["workers"]))}

The first trial includes the start of Ray and of everything in it; it is not in the medians. Both sides: gloo, 1 CPU a
worker, a Ray that is told of {result["cpus_told"]} CPUs. Trials whose result did not arrive:
{result["ours_without_result"]} here, {result["nested_without_result"]} nested.
{footer(result)}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    numbers = {"trials": 200, "nested-trials": 5, "rounds": 2, "seed": 0}
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{default} without it")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="1 2 without it")
    parser.add_argument("--arm", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.arm:
        return run_arm(args)
    from empty_trials import CPUS_TOLD

    runs = []
    for turn in range(args.rounds):
        for workers in args.workers:
            for side in SIDES if turn % 2 == 0 else SIDES[::-1]:
                run = {"round": turn, "side": side, "workers": workers, **measure(args, side, workers)}
                runs.append(run)
                first, *later = run["seconds"]
                times = f"first trial {first:.1f} s, then {median(later):.3f} s"
                print(f"round {turn}  workers {workers}  {side:6}  {times}", flush=True)
    settings = {name.replace("-", "_"): getattr(args, name.replace("-", "_")) for name in (*numbers, "workers")}
    result = {**summarise(runs, args.workers), "cpus_told": CPUS_TOLD, "seed": args.seed, "settings": settings,
              "command": command_line(), "hardware": hardware(), "runs": runs,
              "versions": versions("ray", "torch", "timm", "optuna", "finetune-search")}  # fmt: skip
    write(args.out, "trial_overhead", result, markdown(result))


if __name__ == "__main__":
    main()
