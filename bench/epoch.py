"""Seconds of an epoch, training and validation, by this project and by fastai, frozen and unfrozen.

    python bench/epoch.py --data DIR --weights DIR

All sides train the same network (fastai's head on the same backbone) from the same weights on the same images and
split, by the schedule of `fine_tune`. Ours is the recipe as a user gets it, and once more in fp32; fastai's is its
default, which is fp32. They take turns in one process, in rotating order; each repeat has a seed of its own. Our images
are presized before, fastai decodes them every epoch. An architecture that has no weights in --weights, or without that
in an installed package, starts from random ones. Writes epoch.json and epoch.md. Needs the extra `oracle` and a machine
with nothing else to do.
"""

import argparse
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

# Before torch is imported: its threads would spin while they wait, and keep the cores from fastai's data processes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import timm
import torch
from common import CPUS, RESULTS, command_line, footer, hardware, versions, write
from fastai.vision import all as fastai
from fastai_side import DEVICE, train_fastai
from parity import train_ours

from trainables.data.layouts import find_images
from trainables.data.presize import PresizedImages, presize
from trainables.network.model import check_architecture
from trainables.network.precision import autocast_dtype
from trainables.network.pretrained_weights import WeightsError, find_weights
from trainables.recipe import Recipe
from trainables.training.fine_tune import FineTune

SIDES = {"ours": "this project", "ours_fp32": "this project, fp32", "fastai": "fastai, fp32"}
STAGES = ("frozen", "unfrozen")


def recipe_of(args: argparse.Namespace, arch: str, seed: int, num_train: int) -> Recipe:
    """The defaults, whose rates and schedule are fastai's, with the head that fastai gives its networks."""
    return Recipe(
        arch=arch, seed=seed, head="mlp", concat_pool=True, tta_views=0, presize=args.presize,
        pretrained=not args.from_scratch and has_weights(arch, args.weights),
        image_size=args.image_size, batch_size=min(args.batch_size, num_train),
        freeze_epochs=args.freeze_epochs, epochs=args.epochs,
    )  # fmt: skip


def has_weights(arch: str, folder: Path | None) -> bool:
    try:
        return find_weights(arch, folder) is not None
    except WeightsError:
        return False


def train_all(args: argparse.Namespace, images: PresizedImages, root: Path, arch: str, seed: int) -> dict[str, Any]:
    """Every side once; the seed is also the split's."""
    train, valid = images.split(seed=seed)
    recipe = recipe_of(args, arch, seed, len(train))
    shift = seed % len(SIDES)
    run: dict[str, Any] = {"seed": seed, "order": [*SIDES][shift:] + [*SIDES][:shift], "batch_size": recipe.batch_size}
    run |= {"pretrained": recipe.pretrained, "train_images": len(train), "valid_images": len(valid)}
    for side in run["order"]:
        print(f"{arch}, repeat {seed + 1}, {side}", flush=True)
        fastai.set_seed(seed)
        used = recipe if side == "ours" else replace(recipe, precision="fp32")
        training = FineTune(used, images, weights=args.weights, device=DEVICE, num_threads=CPUS, split_seed=seed)
        run[side] = train_fastai(training, images, root) if side == "fastai" else train_ours(training, side)
        training.close()
    return run


def summarise(runs: list[dict]) -> dict[str, Any]:
    """Of one architecture: seconds by stage and side over all epochs and repeats, and the error rates at the end."""
    shared = ("pretrained", "train_images", "valid_images", "batch_size")
    summary: dict[str, Any] = {name: runs[0][name] for name in shared} | {"seconds": {}, "error_rate": {}}
    for stage in STAGES:
        values = {side: [r["seconds"] for run in runs for r in run[side] if r["stage"] == stage] for side in SIDES}
        summary["seconds"][stage] = {side: {"median": median(v), "min": min(v)} for side, v in values.items()}
    for side in SIDES:
        errors = [run[side][-1]["error_rate"] for run in runs]
        sem = stdev(errors) / len(errors) ** 0.5 if len(errors) > 1 else None  # of one there is none
        summary["error_rate"][side] = {"mean": fmean(errors), "sem": sem}
    return summary | {"runs": runs}


def ratios(archs: dict[str, dict]) -> dict[str, dict[str, float]]:
    """Our seconds over fastai's by architecture, of medians; below 1 this project is faster."""

    def ratio(stage: str, side: str) -> dict[str, float]:
        seconds = {arch: summary["seconds"][stage] for arch, summary in archs.items()}
        return {arch: of_stage[side]["median"] / of_stage["fastai"]["median"] for arch, of_stage in seconds.items()}

    kinds = {"": "ours", "_fp32": "ours_fp32"}
    return {f"{stage}_ratio{kind}": ratio(stage, side) for kind, side in kinds.items() for stage in reversed(STAGES)}


def markdown(result: dict[str, Any]) -> str:
    used, archs = result["settings"], result["archs"]
    first = next(iter(archs.values()))

    def seconds_line(arch: str, stage: str) -> str:
        seconds = archs[arch]["seconds"][stage].values()
        cells = [f"{side['median']:.2f} ({side['min']:.2f})" for side in seconds]
        cells += [f"{result[f'{stage}_ratio{kind}'][arch]:.2f}" for kind in ("", "_fp32")]
        return f"| {arch} | {stage} | {' | '.join(cells)} |"

    def error_line(arch: str) -> str:
        cells = [f"{100 * e['mean']:.1f}" + (f" ± {100 * e['sem']:.1f}" if e["sem"] is not None else "")
                 for e in archs[arch]["error_rate"].values()]  # fmt: skip
        return f"| {arch} | {'pretrained' if archs[arch]['pretrained'] else 'random'} | {' | '.join(cells)} |"

    names = " | ".join(SIDES.values())
    return f"""# Seconds of an epoch, this project and fastai

`{result["command"]}`

{result["data"]}, {first["train_images"]} images to train on and {first["valid_images"]} to validate;
{used["freeze_epochs"]} frozen + {used["epochs"]} unfrozen epochs at {used["image_size"]} px, batch size
{first["batch_size"]}. n = {used["repeats"]} repeats with seeds from 0 on, each with its own split and head.

Seconds of training and validation, median (lowest) over the epochs of all repeats, first ones included; ratio = this
project / fastai, of the medians, so below 1 this project is faster:

| architecture | stage | {names} | ratio | ratio, fp32 |
|---|---|---|---|---|---|---|
{chr(10).join(seconds_line(arch, stage) for arch in archs for stage in STAGES)}

Error rate after the last epoch, %, mean ± standard error of the mean:

| architecture | weights at the start | {names} |
|---|---|---|---|---|
{chr(10).join(map(error_line, archs))}

This project is the default recipe with the head of fastai: the frozen backbone's batch norms do not train, fastai's do,
and its precision is {result["precision"]} here. fastai's default is fp32. This project reads images presized before, in
{result["presize_seconds"]:.2f} s; fastai decodes and resizes them every epoch. As many torch threads as cores, and as
many data processes (fastai) or threads (this project).
{footer(result)}"""


def parse_args() -> tuple[argparse.Namespace, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of labelled images")
    parser.add_argument("--weights", type=Path, help="folder with <arch>.safetensors")
    parser.add_argument("--from-scratch", action="store_true", help="no pretrained weights; all start from the same")
    parser.add_argument("--arch", nargs="+", default=["tf_efficientnet_lite0", "resnet18"], help="timm architectures")
    numbers = {"repeats": 3, "freeze-epochs": 2, "epochs": 2, "presize": 460, "image-size": 224, "batch-size": 32}
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{default} without it")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    try:
        if min(args.repeats, args.freeze_epochs, args.epochs) < 1:
            raise ValueError("expected at least one repeat, one frozen epoch and one unfrozen epoch")
        for arch in args.arch:
            check_architecture(arch)
            recipe_of(args, arch, seed=0, num_train=args.batch_size)
        return args, find_images(args.data)
    except ValueError as error:
        parser.error(str(error))


def precision_of(arch: str, image_size: int) -> str:
    """What automatic precision chooses here."""
    found = autocast_dtype(Recipe(image_size=image_size), DEVICE, timm.create_model(arch))
    return f"{found or torch.float32} ({arch})".removeprefix("torch.")


def main() -> None:
    args, folder = parse_args()
    with tempfile.TemporaryDirectory() as cache:  # of its own, so that presizing is timed and all files are warm
        started = time.perf_counter()
        images = presize(folder, args.presize, cache=Path(cache))
        seconds = time.perf_counter() - started
        print(f"{len(images)} images, {len(images.classes)} classes; presized in {seconds:.1f} s", flush=True)
        archs = {
            arch: summarise([train_all(args, images, folder.root, arch, seed) for seed in range(args.repeats)])
            for arch in args.arch
        }
    settings = {name: value for name, value in vars(args).items() if name not in ("data", "weights", "out")}
    precision = " and ".join(precision_of(arch, args.image_size) for arch in args.arch)
    gpu = torch.cuda.get_device_name() if DEVICE.type == "cuda" else None
    result = {**ratios(archs), "archs": archs, "precision": precision, "presize_seconds": seconds,
              "data": folder.root.name, "command": command_line(), "settings": settings, "hardware": hardware(gpu),
              "versions": versions("torch", "timm", "fastai", "finetune-search")}  # fmt: skip
    write(args.out, "epoch", result, markdown(result))


if __name__ == "__main__":
    main()
