"""How many images a second the input pipeline makes, no network: this project, fastai and plain torchvision.

    python bench/input_pipeline.py [--data DIR]

All three deliver the same photos as normalised float batches on the device. Each repeat all take turns in one process,
in an order that rotates and turns around. Ours is timed twice: with the presized cache there, and with none, as in a
first epoch. Without --data the photos are drawn, of the size of those of Oxford-IIIT Pets. Writes
input_pipeline.json and input_pipeline.md. Needs the extra `oracle`, and a machine with nothing else to do.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import fmean, median
from typing import Any

# Before torch is imported: its threads would spin while they wait, and keep the cores from the data processes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from common import CPUS, RESULTS, command_line, draw_photos, footer, hardware, versions, write
from fastai.vision import all as fastai
from fastai_side import DEVICE, data_loaders
from torch.utils.data import DataLoader, Dataset
from torchvision.io import decode_image
from torchvision.transforms import InterpolationMode, v2

from trainables.batches.epoch_plan import plan_epoch
from trainables.batches.loader import BatchLoader, normalized
from trainables.data.labelled_images import ImageFolder
from trainables.data.layouts import find_images
from trainables.data.presize import PresizedImages, presize
from trainables.recipe import Recipe

NAMES = {
    "ours": "this project",
    "ours_first": "this project, first epoch: presizing included",
    "fastai": "fastai",
    "torchvision": "torchvision v2",
}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Epoch = Callable[[int], Iterable[torch.Tensor]]
"""Epoch number -> its batches."""


def our_batches(images: PresizedImages, recipe: Recipe, loader: BatchLoader, epoch: int) -> Iterator[torch.Tensor]:
    """An epoch's batches as `FineTune` makes and normalises them: all is drawn before the first."""
    mean, std = (255 * torch.tensor(values, device=DEVICE).view(1, 3, 1, 1) for values in (MEAN, STD))
    settings = {"epoch": epoch, "batch_size": recipe.batch_size, "rows": slice(recipe.batch_size)}
    steps = list(plan_epoch(recipe, np.arange(len(images)), labels=np.asarray(images.labels), **settings))
    plans = ((step.indices, step.augmentations) for step in steps)
    for batch in loader.batches(plans, recipe.image_size, DEVICE):
        yield normalized(batch, mean, std)


def first_batches(folder: ImageFolder, recipe: Recipe, epoch: int) -> Iterator[torch.Tensor]:
    """The same with nothing presized yet."""
    with tempfile.TemporaryDirectory() as cache:
        images = presize(folder, recipe.presize, cache=Path(cache))
        loader = BatchLoader(images, num_threads=CPUS)
        yield from our_batches(images, recipe, loader, epoch)
        loader.close()


class Photos(Dataset):
    """What a careful user of torchvision writes: uint8 tensors, and the crop before all else, as its docs advise."""

    def __init__(self, images: PresizedImages, root: Path, size: int) -> None:
        self.paths, self.labels = [str(root / path) for path in images.paths], images.labels.tolist()
        affine = v2.RandomAffine(degrees=10, scale=(1, 1.1), interpolation=InterpolationMode.BILINEAR)
        self.transform = v2.Compose([
            v2.RandomResizedCrop(size, scale=(0.75, 1)), v2.RandomHorizontalFlip(), v2.RandomPerspective(0.2, p=0.75),
            v2.RandomApply([affine], p=0.75), v2.ColorJitter(brightness=0.2, contrast=0.2),
            v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD),
        ])  # fmt: skip

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = decode_image(self.paths[index], "RGB", apply_exif_orientation=True)
        return self.transform(image), self.labels[index]


def epochs_of(folder: ImageFolder, images: PresizedImages, recipe: Recipe) -> dict[str, Epoch]:
    """All images are to train on. fastai starts its processes every epoch, as in training; torchvision's stay."""
    loader = BatchLoader(images, num_threads=CPUS)
    theirs = data_loaders(recipe, images, folder.root, valid=[], mean=MEAN, std=STD).train
    options = {"shuffle": True, "drop_last": True, "num_workers": CPUS, "persistent_workers": True}
    options["pin_memory"] = DEVICE.type == "cuda"
    plain = DataLoader(Photos(images, folder.root, recipe.image_size), recipe.batch_size, **options)
    return {
        "ours": lambda epoch: our_batches(images, recipe, loader, epoch),
        "ours_first": lambda epoch: first_batches(folder, recipe, epoch),
        "fastai": lambda epoch: (inputs for inputs, _ in theirs),
        "torchvision": lambda epoch: (inputs.to(DEVICE, non_blocking=True) for inputs, _ in plain),
    }


def timed(epoch: Iterable[torch.Tensor], shape: tuple[int, ...]) -> dict[str, float]:
    """An epoch's seconds, and images a second in all of it and after its first batch, without the start-up."""
    ends, started = [], time.perf_counter()
    for batch in epoch:
        if (batch.shape, batch.dtype) != (shape, torch.float32):
            raise TypeError(f"a batch of {batch.dtype}, {tuple(batch.shape)}, expected float32, {shape}")
        batch[:, :, ::16, ::16].sum().item()  # it must be there now
        ends.append(time.perf_counter())
    seconds, steady = ends[-1] - started, (len(ends) - 1) / (ends[-1] - ends[0])
    rate = shape[0] * len(ends) / seconds
    return {"seconds": seconds, "images_per_second": rate, "steady_images_per_second": shape[0] * steady}


def fetch_rate(images: PresizedImages, batch_size: int) -> float:
    """Images a second whose whole rectangles one thread copies, shuffled, batch by batch, from the map to a buffer."""
    order = np.random.default_rng(0).permutation(len(images))
    buffer = np.empty(batch_size * max(images[i].nbytes for i in order), np.uint8)
    for _ in range(2):  # the first round maps the pages, which are in memory
        started = time.perf_counter()
        for start in range(0, len(order), batch_size):
            end = 0
            for i in order[start : start + batch_size]:
                pixels = images[i].reshape(-1)
                buffer[end : end + len(pixels)] = pixels
                end += len(pixels)
        seconds = time.perf_counter() - started
    return len(order) / seconds


def measure(folder: ImageFolder, recipe: Recipe, repeats: int) -> dict[str, Any]:
    shape, runs = (recipe.batch_size, 3, recipe.image_size, recipe.image_size), []
    with tempfile.TemporaryDirectory() as cache:
        images = presize(folder, recipe.presize, cache=Path(cache))
        epochs = epochs_of(folder, images, recipe)
        for repeat in range(repeats + 1):  # the first is not counted: it warms files and processes
            shift = repeat % len(epochs)
            order = ([*epochs][shift:] + [*epochs][:shift])[:: -1 if repeat % 2 else 1]
            run: dict[str, Any] = {"order": order}
            for side in order:
                run[side] = timed(epochs[side](repeat), shape)
                rates = "{seconds:7.3f} s  {images_per_second:7.1f} images/s".format(**run[side])
                print(f"{f'repeat {repeat}' if repeat else 'warm-up':9}  {side:11}  {rates}", flush=True)
            run["fetch_images_per_second"] = fetch_rate(images, recipe.batch_size)
            runs.append(run)
    megabytes = fmean(images[i].nbytes for i in range(len(images))) / 1e6
    return summarise(runs[1:]) | {"images": len(images), "presized_megabytes_per_image": megabytes, "runs": runs[1:]}


def summarise(runs: list[dict]) -> dict[str, Any]:
    """Medians over the repeats, their ratios, and the lowest and highest."""
    medians: dict[str, dict] = {}
    ranges: dict[str, dict] = {}
    for name in ("seconds", "images_per_second", "steady_images_per_second"):
        values = {side: [run[side][name] for run in runs] for side in NAMES}
        medians[name] = {side: median(of_repeats) for side, of_repeats in values.items()}
        ranges[f"{name}_range"] = {side: [min(of_repeats), max(of_repeats)] for side, of_repeats in values.items()}
    seconds, rates, steady = medians.values()
    return {
        "ratio": rates["ours"] / rates["fastai"],
        "ratio_steady": steady["ours"] / steady["fastai"],
        "torchvision_ratio": rates["ours"] / rates["torchvision"],
        "torchvision_ratio_steady": steady["ours"] / steady["torchvision"],
        "first_epoch_ratio": seconds["ours_first"] / seconds["fastai"],
        "fetch_images_per_second_per_core": median(run["fetch_images_per_second"] for run in runs),
        **medians,
        **ranges,
    }


def markdown(result: dict[str, Any]) -> str:
    used, fetched = result["settings"], result["fetch_images_per_second_per_core"]

    def line(side: str) -> str:
        low, high = result["images_per_second_range"][side]
        rate, steady, seconds = (result[n][side] for n in ("images_per_second", "steady_images_per_second", "seconds"))
        return f"| {NAMES[side]} | {rate:.0f} ({low:.0f} to {high:.0f}) | {steady:.0f} | {seconds:.2f} |"

    return f"""# Images per second of the input pipeline, without a network

`{result["command"]}`

{result["images"]} images of {result["data"]}; {used["presize"]} -> {used["image_size"]} px, batch size
{used["batch_size"]}, all augmentations, normalised. Medians (lowest to highest) of n = {used["repeats"]} repeats, in
which all take turns; seed {result["seed"]}.

| | images/s in an epoch | after its first batch | seconds an epoch |
|---|---|---|---|
{chr(10).join(map(line, NAMES))}

This project makes {result["ratio"]:.2f} times the images of fastai ({result["ratio_steady"]:.2f} times after the first
batch) and {result["torchvision_ratio"]:.2f} times those of torchvision. Its first epoch, the cache being built, takes
{result["first_epoch_ratio"]:.2f} times the seconds of fastai's. One thread copies whole presized images from the memory
map to a buffer at {fetched:.0f} images/s, {fetched * result["presized_megabytes_per_image"] / 1e3:.1f} GB/s, with a
warm page cache.

fastai starts its processes anew every epoch, as in training; the second column leaves that out. torchvision's stay, and
it crops straight to {used["image_size"]} px, without presizing. Processes (fastai, torchvision), threads (this project)
and torch threads: {result["hardware"]["cores"]} each.
{footer(result)}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of labelled images; drawn photos without it")
    numbers = {"images": 1200, "presize": 460, "image-size": 224, "batch-size": 32, "repeats": 5, "seed": 0}
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{default} without it")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    fastai.set_seed(args.seed)
    with tempfile.TemporaryDirectory() as drawn:
        try:
            if args.repeats < 1 or args.images < 12:
                raise ValueError("expected at least one repeat and 12 images")
            if args.data is None:
                draw_photos(Path(drawn), args.images, args.seed)
            folder = find_images(args.data or drawn)
            args.images = len(folder.paths)
            args.batch_size = min(args.batch_size, args.images // 3)  # at least two batches, for the steady rate
            names = ("presize", "image_size", "batch_size", "seed")
            recipe = Recipe(**{name: getattr(args, name) for name in names})
        except ValueError as error:
            parser.error(str(error))
        numbers = measure(folder, recipe, args.repeats)
    settings = {name: value for name, value in vars(args).items() if name not in ("data", "out", "seed")}
    data = folder.root.name if args.data else "500 x 375 px, drawn"
    gpu = torch.cuda.get_device_name() if DEVICE.type == "cuda" else None
    packages = ("torch", "torchvision", "fastai", "opencv-python-headless", "finetune-search")
    result = {**numbers, "data": data, "settings": settings, "seed": args.seed, "command": command_line(),
              "hardware": hardware(gpu), "versions": versions(*packages)}  # fmt: skip
    write(args.out, "input_pipeline", result, markdown(result))


if __name__ == "__main__":
    main()
