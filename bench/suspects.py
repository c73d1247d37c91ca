"""Are the labels that a search suspects wrong, and does leaving them out help?

    python bench/suspects.py --data DIR --data DIR --weights DIR

For each data set and seed, a quarter of every class is set aside with its labels. Of the other images, a share gets a
random other class: links in the folder of that class. A linear probe on them, without fine-tuning, gives the suspects.
Precision is the share of flipped labels among the first N suspects, where N labels were flipped; cleanlab's is on the
same probabilities. The probe's error on the quarter is measured before and after all suspects are left out of what it
learns from. Writes suspects.json and suspects.md. Needs cleanlab, which is in the extra `oracle`.
"""

import argparse
import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from cleanlab.filter import find_label_issues
from common import CPUS, RESULTS, command_line, footer, hardware, versions, write

from trainables.data.labelled_images import ImageFolder, split
from trainables.data.layouts import find_images
from trainables.data.presize import presize
from trainables.inference.suspects import honest_probabilities, judge
from trainables.probe.logistic_regression import LinearHead
from trainables.recipe import Recipe
from trainables.training.fine_tune import FineTune
from trainables.training.inputs import Inputs

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CLEANLABS = {
    "cleanlab's, by default": {"filter_by": "prune_by_noise_rate"},
    "cleanlab's low_self_confidence": {"filter_by": "low_self_confidence"},
}
RANKED = {"return_indices_ranked_by": "self_confidence", "n_jobs": 1}
Run = dict[str, Any]


def flipped_copy(images: ImageFolder, root: Path, share: float, rng: np.random.Generator) -> set[str]:
    """Links to the images in class folders, that share of them in the folder of a random other class; their paths."""
    count, classes = len(images.paths), images.num_classes
    labels, flipped = np.array(images.labels), rng.permutation(count)[: round(share * count)]
    labels[flipped] = (labels[flipped] + rng.integers(1, classes, len(flipped))) % classes
    paths = [f"{images.classes[labels[i]]}/{images.paths[i].replace('/', '--')}" for i in range(count)]
    for name in images.classes:
        (root / name).mkdir(parents=True)
    for path, original in zip(paths, images.paths, strict=True):
        (root / path).symlink_to(images.root / original)
    return {paths[i] for i in flipped}


def probe_of(images: ImageFolder, args: argparse.Namespace, seed: int) -> FineTune:
    """A training that is a probe alone."""
    recipe = Recipe(
        arch=args.arch, image_size=args.image_size, presize=args.image_size, seed=seed, head_init="probe",
        freeze_epochs=0, epochs=0, tta_views=0,
    )  # fmt: skip
    presized = presize(images, recipe.presize, recipe.resize_method)
    return FineTune(recipe, presized, weights=args.weights, device=DEVICE, num_threads=CPUS, split_seed=seed)


def error_on(training: FineTune, linear: LinearHead, images: ImageFolder) -> float:
    """The share of other images that a probe of the training's backbone gets wrong."""
    network, recipe = training.network, training.recipe
    presized = presize(images, recipe.presize, recipe.resize_method)
    inputs = Inputs(presized, mean=network.mean, std=network.std, device=DEVICE, num_threads=CPUS)
    features = replace(training.probing(), images=presized, inputs=inputs).features()
    inputs.close()
    rows = torch.from_numpy(np.array(features.rows))
    return float((linear.logits(rows).argmax(1) != inputs.labels).double().mean())


def run_of(data: Path, args: argparse.Namespace, seed: int, folder: Path) -> Run:
    """Flips labels, finds suspects, and leaves them out."""
    everything = find_images(data)
    kept, quarter = split(everything.labels, valid_fraction=0.25, seed=seed)
    clean = everything.only(quarter)
    wrong = flipped_copy(everything.only(kept), folder, args.flip, np.random.default_rng(seed))
    noisy = find_images(folder)
    training = probe_of(noisy, args, seed)
    images, probing, train = training.images, training.probing(), training.train_indices
    features = probing.features()
    probabilities = honest_probabilities(training, features)
    found = judge(images, features.rows, probabilities, training.valid_indices)
    labels = [each.path for each in found if each.kind == "label"]
    others = {
        name: [images.paths[i] for i in find_label_issues(images.labels, probabilities, **how, **RANKED)]
        for name, how in CLEANLABS.items()
    }
    suspected = {each.path for each in found}
    rest = np.array([i for i in train if images.paths[i] not in suspected])
    result = {
        "data": data.name, "seed": seed, "images": len(images), "flipped": len(wrong),
        "suspects": len(labels), "outliers": len(found) - len(labels),
        "precision": precision(labels, wrong), "found": len(wrong & set(labels)),
        **{name: precision(ranked, wrong) for name, ranked in others.items()},
        "train_images": len(train), "train_images_left": len(rest), "test_images": len(clean.paths),
        "error_before": error_on(training, probing.linear_probe(features, train), clean),
        "error_after": error_on(training, probing.linear_probe(features, rest), clean),
    }  # fmt: skip
    training.close()
    numbers = (
        f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value}" for name, value in result.items()
    )
    print("  ".join(numbers), flush=True)
    return result


def precision(ranked: Sequence[str], wrong: set[str]) -> float:
    """The share of wrong labels among the first suspects, as many as labels are wrong; one that is lacking counts as
    right."""
    return len(wrong & set(ranked[: len(wrong)])) / len(wrong)


# --- The table --------------------------------------------------------------------------------------------------------


def summarise(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """Means and deviations over the seeds, by data set."""
    found = {}
    for name in dict.fromkeys(run["data"] for run in runs):
        mine = [run for run in runs if run["data"] == name]
        numbers = [key for key, value in mine[0].items() if isinstance(value, int | float) and key != "seed"]
        of_set: dict[str, Any] = {key: fmean(run[key] for run in mine) for key in numbers}
        gains = [run["error_before"] - run["error_after"] for run in mine]
        of_set |= {"gain": fmean(gains), "gain_deviation": stdev(gains) if len(gains) > 1 else None}
        precisions = [run["precision"] for run in mine]
        found[name] = of_set | {"precision_deviation": stdev(precisions) if len(precisions) > 1 else None}
    return found


def markdown(result: dict[str, Any]) -> str:
    sets, used = result["sets"], result["settings"]

    def deviation(value: float | None) -> str:
        return f" ± {100 * value:.1f}" if value is not None else ""

    def line(words: str, form: str, key: str, scale: float = 100, spread: str = "") -> str:
        cells = [f"{scale * of[key]:{form}}{deviation(of[spread]) if spread else ''}" for of in sets.values()]
        return f"| {words} | {' | '.join(cells)} |"

    lines = [
        line("images with labels that may be wrong", ".0f", "images", 1),
        line("labels flipped, N", ".0f", "flipped", 1),
        line("labels suspected", ".0f", "suspects", 1),
        line("of them flipped", ".1f", "found", 1),
        line("images like no other", ".1f", "outliers", 1),
        line("**precision of the first N, %**", ".1f", "precision", spread="precision_deviation"),
        *(line(f"{name}, %", ".1f", name) for name in CLEANLABS),
        line("images that the probe learns from", ".0f", "train_images", 1),
        line("of them left without the suspects", ".0f", "train_images_left", 1),
        line("clean images to test on", ".0f", "test_images", 1),
        line("error before, %", ".1f", "error_before"),
        line("error without the suspects, %", ".1f", "error_after"),
        line("**gain, points**", ".1f", "gain", spread="gain_deviation"),
    ]
    joint = "\n"
    return f"""# Wrong labels, found

`{result["command"]}`

{100 * used["flip"]:g} % of the labels flipped at random, {used["seeds"]} seeds: mean, and deviation over the seeds.
Linear probe of {used["arch"]} at {used["image_size"]} px.

| | {" | ".join(sets)} |
|---|{"---|" * len(sets)}
{joint.join(lines)}

{footer(result)}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, action="append", required=True, metavar="DIR", help="labelled; repeatable")
    parser.add_argument("--weights", type=Path, metavar="DIR", help="folder with <arch>.safetensors")
    parser.add_argument("--arch", default="tf_efficientnet_lite0", help="tf_efficientnet_lite0 without it")
    parser.add_argument("--image-size", type=int, default=160, metavar="PX", help="160 without it")
    parser.add_argument("--flip", type=float, default=0.05, metavar="SHARE", help="of the labels (0.05)")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="3 without it")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FINETUNE_SEARCH_CACHE"] = f"{folder}/cache"
        places = [(data, seed) for data in args.data for seed in range(args.seeds)]
        runs = [run_of(data, args, seed, Path(folder, f"{data.name}-{seed}")) for data, seed in places]
    names = ("flip", "arch", "image_size", "seeds")
    result = {
        "sets": summarise(runs),
        "command": command_line(),
        "settings": {name: getattr(args, name) for name in names},
        "hardware": hardware(torch.cuda.get_device_name() if DEVICE.type == "cuda" else None),
        "versions": versions("torch", "timm", "cleanlab", "finetune-search"),
        "runs": runs,
    }
    write(args.out, "suspects", result, markdown(result))


if __name__ == "__main__":
    main()
