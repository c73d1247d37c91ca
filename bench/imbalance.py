"""Macro-F1 on a long-tailed set: a search that suits its metric and its loss to the classes, and one that does not.

    python bench/imbalance.py --data flowers=DIR --weights DIR --archs mobilenetv2_100,tf_efficientnet_lite0

Of each class, the same number of images is held out for validation and for the test. Of the others, class k keeps the
share 0.8^k in a random order of the classes, at least 3 images. Each search gets the same images, seed and number of
trials: one with `--metric auto`, one with `--metric error_rate`. The model in its `best/` labels the test images.
`--balanced` sets keep all images: there, the two are to be the same search. Writes imbalance.json and imbalance.md.
"""

import argparse
import csv
import io
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from budget_methods import ROOT, Failed, Record, environment_of
from common import RESULTS, command_line, footer, hardware, versions, write

from trainables.data.labelled_images import ImageFolder
from trainables.data.layouts import find_images
from trainables.training.metrics import more_metrics

METRICS = ("auto", "error_rate")
TAIL, LEAST = 0.8, 3


def parts(labels: Sequence[int], held_out: int, seed: int, *, balanced: bool) -> dict[str, list[int]]:
    """Indices of the images to train on, to validate on and to test on."""
    rng = np.random.default_rng(seed)
    found: dict[str, list[int]] = {"train": [], "valid": [], "test": []}
    for place, label in enumerate(rng.permutation(np.unique(labels))):
        images = rng.permutation(np.flatnonzero(np.asarray(labels) == label)).tolist()
        rest = images[2 * held_out :]
        kept = len(rest) if balanced else max(LEAST, round(len(rest) * TAIL**place))
        found["train"] += rest[:kept]
        found["valid"] += images[:held_out]
        found["test"] += images[held_out : 2 * held_out]
    return found


def link(images: ImageFolder, indices: Sequence[int], folder: Path) -> None:
    """Class folders of links to some of the images."""
    for i in indices:
        source = images.root / images.paths[i]
        target = folder / images.classes[images.labels[i]] / f"{i:06}_{source.name}"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(source)


def search(words: Sequence[str], folder: Path, metric: str) -> Record:
    """A search of `folder`/data, and what its model makes of the test images."""
    results = folder / metric
    command = [sys.executable, "-m", "search.run", "--data", str(folder / "data"), *words, "--metric", metric]
    command += ["--report", "off", "--results", str(results), "--name", "run"]
    environment = environment_of(ROOT) | {"FINETUNE_SEARCH_CACHE": str(folder / "cache")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise Failed(f"{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return tested(results / "run" / "best", folder / "test")


def tested(model: Path, test: Path) -> Record:
    """Macro-F1, balanced error and error rate of a model's labels of the images in class folders."""
    command = [sys.executable, "-m", "search.predict", str(model), str(test), "--csv"]
    done = subprocess.run(command, cwd=ROOT, env=environment_of(ROOT), capture_output=True, text=True, check=True)
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    classes = sorted(entry.name for entry in test.iterdir())
    labels = np.array([classes.index(Path(row["path"]).parent.name) for row in rows])
    answers = np.eye(len(classes))[[classes.index(row["label"]) for row in rows]]
    found = more_metrics(answers, labels)
    error_rate = float((answers.argmax(1) != labels).mean())
    return {"macro_f1": found["macro_f1"], "balanced_error": found["balanced_error"], "error_rate": error_rate}


def runs_of(args: argparse.Namespace) -> Iterator[Record]:
    words = ["--space", args.space, "--trials", str(args.trials), "--weights", str(args.weights)]
    settings = [f"arch={args.archs}", f"image_size={args.sizes}", f"presize={args.presize}", *args.set]
    words += [word for setting in settings for word in ("--set", setting)]
    for name, data in args.data.items():
        images = find_images(data)
        for seed in range(args.splits):
            with tempfile.TemporaryDirectory() as scratch:
                folder = Path(scratch)
                indices = parts(images.labels, args.held_out, seed, balanced=name in args.balanced)
                link(images, indices["train"], folder / "data" / "train")
                link(images, indices["valid"], folder / "data" / "valid")
                link(images, indices["test"], folder / "test")
                for metric in METRICS:
                    found = search([*words, "--seed", str(seed)], folder, metric)
                    counts = {f"{part}_images": len(rows) for part, rows in indices.items()}
                    print(f"{name} {seed}  --metric {metric:10}  macro-F1 {found['macro_f1']:.3f}", flush=True)
                    yield {"set": name, "split": seed, "metric": metric} | found | counts


def summary(runs: Sequence[Record]) -> Record:
    """Of each set and metric the mean and the deviation over the splits; of each set the mean gain in macro-F1."""
    found: Record = {}
    for name in dict.fromkeys(run["set"] for run in runs):
        values = {m: [run["macro_f1"] for run in runs if (run["set"], run["metric"]) == (name, m)] for m in METRICS}
        found[name] = {
            metric: {"macro_f1_mean": fmean(of), "macro_f1_sd": stdev(of) if len(of) > 1 else 0.0}
            for metric, of in values.items()
        }
        found[name]["gain"] = fmean(a - b for a, b in zip(*(values[metric] for metric in METRICS), strict=True))
    return found


def markdown(result: dict[str, Any]) -> str:
    rows = []
    for name, of in result["summary"].items():
        images = next(run for run in result["runs"] if run["set"] == name)
        cells = [f"{of[m]['macro_f1_mean']:.3f} ± {of[m]['macro_f1_sd']:.3f}" for m in METRICS]
        counts = f"{images['train_images']} / {images['valid_images']} / {images['test_images']}"
        rows.append(f"| {name} | {counts} | {' | '.join(cells)} | {100 * of['gain']:+.1f} |")
    joint = "\n"
    return f"""# Macro-F1 on long-tailed images

`{result["command"]}`

Test images, as many of each class, labelled by the model in `best/`; mean ± deviation over {result["splits"]} splits.

| set | images to train on / validate on / test on | `--metric auto` | `--metric error_rate` | gain, points |
|---|---|---|---|---|
{joint.join(rows)}

{footer(result)}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", action="append", required=True, metavar="NAME=DIR", help="labelled images; repeatable"
    )
    parser.add_argument("--balanced", action="append", default=[], metavar="NAME", help="sets that keep all images")
    parser.add_argument("--weights", type=Path, required=True, metavar="DIR", help="folder with <arch>.safetensors")
    parser.add_argument("--archs", required=True, metavar="A,B,C")
    parser.add_argument("--sizes", default="128", metavar="PX,PX", help="image sizes (128)")
    parser.add_argument("--presize", type=int, default=160, metavar="PX", help="160 without it")
    parser.add_argument("--space", default="images", help="images without it")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="for all searches")
    parser.add_argument("--trials", type=int, default=2, metavar="N", help="of each search, after its probes (2)")
    parser.add_argument("--held-out", type=int, default=12, metavar="N", help="of each class and part (12)")
    parser.add_argument("--splits", type=int, default=3, metavar="N", help="3 without it")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR")
    args = parser.parse_args()
    args.data = {name: Path(folder).resolve() for name, folder in (text.split("=", 1) for text in args.data)}
    args.weights = args.weights.resolve()
    runs = list(runs_of(args))
    packages = ("torch", "timm", "ray", "optuna", "finetune-search")
    result = {"command": command_line(), "splits": args.splits, "summary": summary(runs), "runs": runs}
    result |= {"hardware": hardware(), "versions": versions(*packages)}
    write(args.out, "imbalance", result, markdown(result))


if __name__ == "__main__":
    main()
