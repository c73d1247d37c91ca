"""Seconds of frozen work in a search: probes, beside the frozen epochs of every trial of an earlier version.

    python bench/frozen.py --data DIR --weights DIR --archs A,B,C --before ../as-it-was --set epochs=1

One search of each checkout, with the same images, split, seed and architectures, at one image size. Frozen work is what
epochs.csv gives for epochs of the stages `probe` (features and fits, of the screen and of trials) and `frozen`: seconds
of training and of validation. Writes frozen.json and frozen.md. Wants a machine with nothing else to do.
"""

import argparse
import csv
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from budget_methods import ROOT, environment_of, warm_up
from common import RESULTS, command_line, footer, hardware, versions, write

TABLES = ("trials.csv", "epochs.csv")
FROZEN_STAGES = ("probe", "frozen")
Row = dict[str, str]


def search(repo: Path, words: Sequence[str], folder: Path) -> dict[str, Any]:
    """A search in a checkout, with caches of its own, and what its tables tell."""
    command = [sys.executable, "-m", "search.run", *words, "--report", "off", "--results", str(folder), "--name", "run"]
    environment = environment_of(repo) | {"FINETUNE_SEARCH_CACHE": str(folder / "cache")}
    started = time.monotonic()
    done = subprocess.run(command, cwd=repo, env=environment, capture_output=True, text=True)
    seconds = time.monotonic() - started
    if done.returncode:
        raise RuntimeError(f"the search in {repo} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return {"command_seconds": seconds, **summarise(*(rows_of(folder / "run" / name) for name in TABLES))}


def rows_of(table: Path) -> list[Row]:
    with table.open(newline="") as file:
        return list(csv.DictReader(file))


def summarise(trials: Sequence[Row], epochs: Sequence[Row]) -> dict[str, Any]:
    """Seconds by stage, and the validation errors: of the best model, probes included, and the mean of the trials."""
    stages = sorted({row["stage"] for row in epochs})
    seconds = {stage: sum(map(seconds_of, (row for row in epochs if row["stage"] == stage))) for stage in stages}
    ended = [row for row in trials if row["error_rate"] and row["status"] != "failed"]
    fine_tuned = [row for row in ended if row.get("kind", "trial") == "trial"]
    return {
        "frozen_seconds": sum(seconds.get(stage, 0.0) for stage in FROZEN_STAGES),
        "seconds_by_stage": seconds,
        "trials": len(fine_tuned),
        "probes": len(ended) - len(fine_tuned),
        "stopped": sum(row["status"] == "stopped early" for row in fine_tuned),
        "failed": sum(row["status"] == "failed" for row in trials),
        "error_best": min(float(row["error_rate"]) for row in ended if row["status"] == "completed"),
        "error_mean": fmean(float(row["error_rate"]) for row in fine_tuned),
    }


def seconds_of(epoch: Row) -> float:
    return sum(float(epoch[name] or 0) for name in ("train_seconds", "valid_seconds"))


def markdown(result: dict[str, Any]) -> str:
    sides = {"before": result["before"], "now": result["now"]}

    def line(words: str, form: str, *path: str, scale: float = 1) -> str:
        values = []
        for side in sides.values():
            for name in path:
                side = side.get(name, 0)
            values.append(f"{scale * side:{form}}")
        return f"| {words} | {' | '.join(values)} |"

    lines = [
        line("**seconds of frozen work**", ".1f", "frozen_seconds"),
        line("of them, probes", ".1f", "seconds_by_stage", "probe"),
        line("of them, frozen epochs", ".1f", "seconds_by_stage", "frozen"),
        line("seconds of unfrozen epochs", ".1f", "seconds_by_stage", "unfrozen"),
        line("seconds of the command", ".0f", "command_seconds"),
        line("trials with an error rate", "d", "trials"),
        line("of them, stopped early", "d", "stopped"),
        line("probes of the screen", "d", "probes"),
        line("best validation error, %", ".1f", "error_best", scale=100),
        line("mean validation error of the trials, %", ".1f", "error_mean", scale=100),
    ]
    used, joint = result["settings"], "\n"
    return f"""# Seconds of frozen work in a search

`{result["command"]}`

{used["trials"]} trials over {used["archs"].replace(",", ", ")} at {used["image_size"]} px on {result["data"]};
one search of each version, seed {used["seed"]}. Frozen work takes {result["frozen_seconds_ratio"]:.2f} times the
seconds that it took before.

| | before | now |
|---|---|---|
{joint.join(lines)}

{footer(result)}"""


def words_of(args: argparse.Namespace, space: str) -> list[str]:
    """The arguments of a search."""
    settings = [f"arch={args.archs}", f"image_size={args.image_size}", f"presize={args.presize}", *args.set]
    words = ["--space", space, "--data", str(args.data.resolve()), "--trials", str(args.trials)]
    words += ["--seed", str(args.seed), *(word for setting in settings for word in ("--set", setting))]
    return words + (["--weights", str(args.weights.resolve())] if args.weights else [])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder of labelled images")
    parser.add_argument("--weights", type=Path, metavar="DIR", help="folder with <arch>.safetensors")
    parser.add_argument("--archs", required=True, metavar="A,B,C")
    parser.add_argument("--before", type=Path, required=True, metavar="DIR", help="another checkout")
    parser.add_argument("--space", default="pets", help="pets without it")
    parser.add_argument("--before-space", help="of the other checkout (the same)")
    parser.add_argument("--trials", type=int, default=20, metavar="N", help="20 without it")
    parser.add_argument("--image-size", type=int, default=224, metavar="PX", help="224 without it")
    parser.add_argument("--presize", type=int, default=256, metavar="PX", help="256 without it")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="for both searches")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of both searches (0)")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR")
    args = parser.parse_args()
    args.before_space = args.before_space or args.space
    repos = {"before": (args.before.resolve(), args.before_space), "now": (ROOT, args.space)}
    warm_up(["torch", "timm", "ray", "optuna"], [repo for repo, _ in repos.values()])
    found = {}
    for side, (repo, space) in repos.items():
        with tempfile.TemporaryDirectory() as folder:
            found[side] = search(repo, words_of(args, space), Path(folder))
        print(f"{side:7} {found[side]['frozen_seconds']:.1f} s of frozen work", flush=True)
    names = ("space", "before_space", "archs", "trials", "image_size", "presize", "set", "seed")
    result = {
        "frozen_seconds_ratio": found["now"]["frozen_seconds"] / found["before"]["frozen_seconds"],
        **found,
        "data": args.data.name,
        "command": command_line(),
        "settings": {name: getattr(args, name) for name in names},
        "hardware": hardware(),
        "versions": versions("ray", "torch", "timm", "optuna", "finetune-search"),
    }
    write(args.out, "frozen", result, markdown(result))


if __name__ == "__main__":
    main()
