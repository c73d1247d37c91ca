"""How much too low is the error where photos of one scene lie on both sides of the split, and do groups mend it?

    python bench/leakage.py --data DIR --weights DIR

Of each photo in DIR (class folders) it makes four JPEGs, with another crop, brightness and quality each. Half of the
photos are the data set, of which a split validates a fifth; the other half are new photos, on which the error is the
true one. Then the halves change places, so that every photo is validated and is new. The model is the linear probe of
a search. Writes leakage.json and leakage.md.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from common import CPUS, RESULTS, command_line, footer, hardware, versions, write
from PIL import Image, ImageEnhance

from trainables.data.groups import grouped
from trainables.data.labelled_images import ImageFolder, split
from trainables.data.layouts import find_images
from trainables.data.near_duplicates import find_duplicates
from trainables.data.presize import presize
from trainables.data.presized_images import PresizedImages
from trainables.data.splits import group_numbers
from trainables.probe.logistic_regression import fit
from trainables.recipe import Recipe
from trainables.training.fine_tune import FineTune

VIEWS = 4
MAX_CROP, BRIGHTNESS, QUALITY = 0.06, 0.2, (80, 95)
"""The largest share that a crop takes from each side, the largest change of the brightness, and JPEG's quality."""
PHOTO = r"/(\d+)_view"
PAIRS = ("same_photo", "alike_photos", "other_photos")
WAYS = {"none": None, "regular expression": PHOTO, "duplicates": "duplicates"}
"""How a search groups, by its `--group`."""
Run = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Half:
    """The views of half of the photos, and their features."""

    folder: ImageFolder
    images: PresizedImages
    rows: torch.Tensor
    labels: torch.Tensor


# --- The data ---------------------------------------------------------------------------------------------------------


def draw_views(photos: ImageFolder, root: Path, seed: int) -> list[Path]:
    """`VIEWS` JPEGs of each photo in two folders, each with about half of the photos of every class, whole groups."""
    halves = split(photos.labels, valid_fraction=0.5, seed=seed, groups=photos.groups)
    for number, indices in enumerate(halves):
        for index in indices.tolist():
            folder = root / f"half{number}" / photos.classes[photos.labels[index]]
            folder.mkdir(parents=True, exist_ok=True)
            rng = np.random.default_rng((seed, index))
            with Image.open(photos.root / photos.paths[index]) as image:
                for view in range(VIEWS):
                    quality = int(rng.integers(*QUALITY))
                    view_of(image.convert("RGB"), rng).save(folder / f"{index:05}_view{view}.jpg", quality=quality)
    return [root / f"half{number}" for number in range(2)]


def view_of(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The photo with a little cut off at each side, and a little brighter or darker."""
    left, top, right, bottom = rng.uniform(0, MAX_CROP, 4)
    box = (left * image.width, top * image.height, (1 - right) * image.width, (1 - bottom) * image.height)
    piece = image.crop((round(box[0]), round(box[1]), round(box[2]), round(box[3])))
    return ImageEnhance.Brightness(piece).enhance(rng.uniform(1 - BRIGHTNESS, 1 + BRIGHTNESS))


def with_features(args: argparse.Namespace, folder: ImageFolder, cache: Path) -> Half:
    """The features as a search's probe computes them."""
    recipe = Recipe(
        arch=args.arch, image_size=args.image_size, presize=args.presize, head_init="probe", freeze_epochs=0, epochs=0,
        tta_views=0,
    )  # fmt: skip
    images = presize(folder, recipe.presize, cache=cache)
    training = FineTune(recipe, images, weights=args.weights, num_threads=CPUS)
    rows = torch.tensor(training.probing().features().rows)
    training.close()
    return Half(folder=folder, images=images, rows=rows, labels=torch.from_numpy(images.labels))


# --- The errors -------------------------------------------------------------------------------------------------------


def errors(half: Half, other: Half, groups: tuple[str, ...] | None, seed: int) -> Run:
    """Errors of the probe on the training images of a split: validation, cross-validation, and the other half's."""
    half.images.groups = groups
    train, valid = (torch.from_numpy(part) for part in half.images.split(seed=seed))
    numbers = None if groups is None else torch.from_numpy(group_numbers([groups[i] for i in train.tolist()]))
    head = fit(half.rows[train], half.labels[train], len(half.images.classes), groups=numbers)

    def error(rows: torch.Tensor, labels: torch.Tensor) -> float:
        return float((head.logits(rows).argmax(1) != labels).float().mean())

    return {
        "valid_error": error(half.rows[valid], half.labels[valid]),
        "out_of_fold_error": head.out_of_fold_error_rate,
        "true_error": error(other.rows, other.labels),
        "train_images": len(train),
        "valid_images": len(valid),
    }


def measure(halves: Sequence[Half], seeds: int) -> list[Run]:
    """A run for each way to group, half and seed."""
    runs = []
    for name, how in WAYS.items():
        for number, half in enumerate(halves):
            groups = grouped(half.folder, how).images.groups
            for seed in range(seeds):
                found = errors(half, halves[1 - number], groups, seed)
                runs.append({"groups": name, "half": number, "seed": seed, **found})
                shown = "  ".join(f"{kind} {found[kind]:.4f}" for kind in ("valid_error", "true_error"))
                print(f"groups: {name:18}  half {number}  seed {seed}  {shown}", flush=True)
    return runs


def found_pairs(folder: ImageFolder, photos: ImageFolder) -> Run:
    """How many pairs of views of one photo are found as near-duplicates, how many of two photos that look the same
    before anything is cut off, and how many others."""
    photo = [int(path.rpartition("/")[2].partition("_")[0]) for path in folder.paths]
    groups = photos.groups or photos.paths
    started = time.perf_counter()
    pairs = find_duplicates(folder)
    seconds = time.perf_counter() - started
    of_photos = [(photo[pair.first], photo[pair.second]) for pair in pairs]
    same = sum(one == other for one, other in of_photos)
    alike = sum(groups[one] == groups[other] for one, other in of_photos) - same
    counts = {"same_photo": same, "of": len(set(photo)) * VIEWS * (VIEWS - 1) // 2, "alike_photos": alike}
    return counts | {"other_photos": len(pairs) - same - alike, "seconds": seconds}


# --- The table --------------------------------------------------------------------------------------------------------


def summarise(runs: Sequence[Run]) -> list[Run]:
    """Means by the way to group; how much too low the errors of validation and of cross-validation are."""
    rows = []
    for name in dict.fromkeys(run["groups"] for run in runs):
        mine = [run for run in runs if run["groups"] == name]
        kinds = ("valid_error", "out_of_fold_error", "true_error")
        means = {kind: fmean(run[kind] for run in mine) for kind in kinds}
        gaps = {f"{kind}_too_low": means["true_error"] - means[kind] for kind in kinds[:2]}
        rows.append({"groups": name, "runs": len(mine), **means, **gaps})
    return rows


def markdown(result: dict[str, Any]) -> str:
    rows, used, pairs = result["rows"], result["settings"], result["pairs"]
    cells = ("valid_error", "out_of_fold_error", "true_error", "valid_error_too_low", "out_of_fold_error_too_low")
    table = "\n".join(f"| {row['groups']} | {' | '.join(f'{100 * row[cell]:.1f}' for cell in cells)} |" for row in rows)
    same, alike, others = (sum(half[name] for half in pairs) for name in PAIRS)
    return f"""# What a split that separates views of one photo hides

`{result["command"]}`

{result["data"]}: {result["photos"]} photos, {VIEWS} JPEGs of each, with up to {100 * MAX_CROP:.0f} % cut off at each
side and up to {100 * BRIGHTNESS:.0f} % brighter or darker. One half of the photos is split into training and validation
images, the other half, in which no photo looks the same, has the true error; then they change places. The linear probe
of {used["arch"]} at {used["image_size"]} px, n = {used["seeds"]} splits of each half. Errors in %, and by how many
points they are too low.

| `--group` | validation | cross-validation | new photos | validation too low by | cross-validation too low by |
|---|---|---|---|---|---|
{table}

`--group duplicates` found {same} of the {sum(half["of"] for half in pairs)} pairs of views of one photo, {alike} of two
photos that look the same before anything is cut off, and {others} others, in
{sum(half["seconds"] for half in pairs):.1f} s.

{footer(result)}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="photos as class folders")
    parser.add_argument("--weights", type=Path, metavar="DIR", help="folder with <arch>.safetensors")
    parser.add_argument("--arch", default="tf_efficientnet_lite0", help="tf_efficientnet_lite0 without it")
    parser.add_argument("--image-size", type=int, default=128, metavar="PX", help="128 without it")
    parser.add_argument("--presize", type=int, default=160, metavar="PX", help="160 without it")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="splits of each half; 5 without it")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR")
    args = parser.parse_args()
    started, photos = time.perf_counter(), grouped(find_images(args.data), "duplicates").images
    with tempfile.TemporaryDirectory() as cache:
        os.environ["FINETUNE_SEARCH_CACHE"] = cache  # features, too, are computed here
        folders = [find_images(folder) for folder in draw_views(photos, Path(cache, "views"), seed=0)]
        halves = [with_features(args, folder, Path(cache)) for folder in folders]
        runs, pairs = measure(halves, args.seeds), [found_pairs(folder, photos) for folder in folders]
    result = {
        "rows": summarise(runs),
        "pairs": pairs,
        "photos": len(photos.paths),
        "data": args.data.name,
        "command": command_line(),
        "settings": {name: getattr(args, name) for name in ("arch", "image_size", "presize", "seeds")},
        "seconds": time.perf_counter() - started,
        "hardware": hardware(),
        "versions": versions("torch", "timm", "finetune-search"),
        "runs": runs,
    }
    write(args.out, "leakage", result, markdown(result))


if __name__ == "__main__":
    main()
