"""Train one recipe with this project and with fastai: is the error rate the same, and which is faster?

    python bench/parity.py --data DIR --weights DIR --seeds 3

Per seed both get the same images, split, backbone weights, input statistics, batch size and hyperparameters: fastai's
`vision_learner` and `fine_tune`, and our `FineTune` set to do the same. They take turns in one process; who goes first
alternates. Each draws its own random numbers, so single runs differ and only means compare. Seconds are an epoch's
training and validation: ours reads images presized once before (reported beside), fastai decodes them every epoch.
Writes parity.json and parity.md. Needs the extra `oracle`, and a machine with nothing else to do.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

# Before torch is imported: its threads would spin while they wait, and keep the cores from fastai's data processes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from common import CPUS, EPOCH_COLUMNS, RESULTS, command_line, epoch_row, footer, hardware, versions, write
from fastai.vision import all as fastai
from fastai_side import DEVICE, train_fastai

from trainables.data.layouts import find_images
from trainables.data.presize import PresizedImages, presize
from trainables.recipe import Recipe
from trainables.training.fine_tune import FineTune

SIDES = ("ours", "fastai")


def recipe_of(args: argparse.Namespace, seed: int, num_train: int) -> Recipe:
    """What fastai's `fine_tune` does, as our recipe; what is not named here has fastai's value by default."""
    return Recipe(
        arch=args.arch, pretrained=not args.from_scratch, seed=seed, precision="fp32", tta_views=0,
        head="mlp", concat_pool=True, layer_groups="fastai", train_bn="always", div_final=1e5,
        presize=args.presize, image_size=args.image_size, batch_size=min(args.batch_size, num_train),
        freeze_epochs=args.freeze_epochs, lr_max_frozen=args.base_lr, lr_ratio_frozen=10, div_frozen=25,
        epochs=args.epochs, lr_max=args.base_lr / 2, lr_ratio=100, div=5, pct_start=0.3, pct_start_frozen=0.99,
    )  # fmt: skip


def train_ours(training: FineTune, side: str = "ours") -> list[dict]:
    """One row an epoch."""
    rows = []
    for _ in range(training.recipe.total_epochs):
        row = training.run_epoch()
        row["seconds"] = row["train_seconds"] + row["valid_seconds"]
        rows.append(epoch_row(side, row))
    return rows


def train_both(args: argparse.Namespace, images: PresizedImages, root: Path, seed: int) -> dict[str, Any]:
    """Both sides with one seed, which is also the split's."""
    train, valid = images.split(seed=seed)
    recipe = recipe_of(args, seed, len(train))
    run = {"seed": seed, "train_images": len(train), "valid_images": len(valid), "batch_size": recipe.batch_size}
    run["order"] = SIDES if seed % 2 == 0 else SIDES[::-1]
    for side in run["order"]:
        fastai.set_seed(seed, reproducible=True)
        training = FineTune(recipe, images, weights=args.weights, device=DEVICE, num_threads=CPUS, split_seed=seed)
        print(f"seed {seed}, {side}", flush=True)
        rows = train_ours(training) if side == "ours" else train_fastai(training, images, root)
        training.close()
        run[side] = {name: rows[-1][name] for name in ("error_rate", "valid_loss")} | {"epochs": rows}
        run[side]["seconds_per_epoch"] = fmean(row["seconds"] for row in rows)
    return run


def summarise(runs: list[dict]) -> dict[str, float | None]:
    """Means over the seeds and their standard errors; a standard error of one seed is None."""
    numbers = {}
    for name, key in (("error", "error_rate"), ("loss", "valid_loss"), ("seconds", "seconds_per_epoch")):
        values = {side: [run[side][key] for run in runs] for side in SIDES}
        values["difference"] = [ours - theirs for ours, theirs in zip(*values.values(), strict=True)]
        for kind, of_seeds in values.items():
            numbers[f"{kind}_{name}_mean"] = fmean(of_seeds)
            numbers[f"{kind}_{name}_sem"] = stdev(of_seeds) / len(runs) ** 0.5 if len(runs) > 1 else None
    return numbers | {"seconds_ratio": numbers["ours_seconds_mean"] / numbers["fastai_seconds_mean"]}


def markdown(result: dict[str, Any]) -> str:
    runs, used = result["runs"], result["settings"]
    n, first = len(runs), runs[0]
    columns = [f"{name}, {side}" for name in EPOCH_COLUMNS for side in SIDES]

    def cells(name: str, form: str, scale: float = 1) -> str:
        names = [f"{kind}_{name}" for kind in (*SIDES, "difference")]
        pairs = [(scale * result[f"{name}_mean"], result[f"{name}_sem"]) for name in names]
        return " | ".join(f"{mean:{form}}" + (f" ± {scale * sem:{form}}" if n > 1 else "") for mean, sem in pairs)

    def epoch_line(rows: tuple[dict, ...]) -> str:
        means = [fmean(row[name] for row in rows[i :: len(SIDES)]) for name in EPOCH_COLUMNS for i in range(len(SIDES))]
        return f"| {rows[0]['epoch']} | {rows[0]['stage']} | {' | '.join(f'{mean:.3f}' for mean in means)} |"

    epochs = zip(*(run[side]["epochs"] for run in runs for side in SIDES), strict=True)
    return f"""# This project and fastai, same recipe

`{result["command"]}`

{used["arch"]}; {result["data"]}, {first["train_images"]} images to train on and {first["valid_images"]} to validate;
{used["freeze_epochs"]} frozen + {used["epochs"]} epochs at {used["image_size"]} px, batch size {first["batch_size"]}.
Mean ± standard error of the mean, n = {n} seeds, each with its own split and head; differences are paired by seed.

| | this project | fastai | difference |
|---|---|---|---|
| error rate at the end, % | {cells("error", ".1f", 100)} |
| validation loss at the end | {cells("loss", ".3f")} |
| seconds per epoch | {cells("seconds", ".2f")} |
| seconds to presize, once per data set | {result["presize_seconds"]:.2f} | - | |

This project takes {result["seconds_ratio"]:.2f} times the seconds of fastai. Every epoch, means over the seeds:

| epoch | stage | {" | ".join(columns)} |
|---|---{"|---" * len(columns)}|
{chr(10).join(map(epoch_line, epochs))}

As many torch threads as cores, and as many data processes (fastai) or threads (this project).
{footer(result)}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of labelled images")
    parser.add_argument("--weights", type=Path, help="folder with <arch>.safetensors")
    parser.add_argument("--from-scratch", action="store_true", help="no pretrained weights; both start from the same")
    parser.add_argument("--arch", default="tf_efficientnet_lite0")
    numbers = {"seeds": 3, "epochs": 3, "freeze-epochs": 2, "presize": 460, "image-size": 224, "batch-size": 64}
    for name, default in (numbers | {"base-lr": 2e-3}).items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"{default} without it")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    try:
        folder = find_images(args.data)
        recipe_of(args, seed=0, num_train=args.batch_size)
    except ValueError as error:
        parser.error(str(error))
    with tempfile.TemporaryDirectory() as cache:  # of its own, so that presizing is timed and all files are warm
        started = time.perf_counter()
        images = presize(folder, args.presize, cache=Path(cache))
        seconds = time.perf_counter() - started
        print(f"{len(images)} images, {len(images.classes)} classes; presized in {seconds:.1f} s", flush=True)
        runs = [train_both(args, images, folder.root, seed) for seed in range(args.seeds)]
    settings = {name: value for name, value in vars(args).items() if name not in ("data", "weights", "out")}
    gpu = torch.cuda.get_device_name() if DEVICE.type == "cuda" else None
    result = {**summarise(runs), "presize_seconds": seconds, "data": folder.root.name, "command": command_line(),
              "settings": settings, "hardware": hardware(gpu), "runs": runs,
              "versions": versions("torch", "timm", "fastai", "finetune-search")}  # fmt: skip
    write(args.out, "parity", result, markdown(result))


if __name__ == "__main__":
    main()
