"""Are probabilities right on images that neither training nor the fit of the temperature has seen?

    python bench/calibration.py --data DIR --data DIR2 --weights DIR --seeds 3

Of each data set and seed, a quarter of the images is held out, stratified. On the rest, without Ray: a probe, and some
epochs of the whole network from its head; the rest's own validation split fits the temperature, as in a search. The
model is saved and opened as `search.predict` does. Writes calibration.json and calibration.md.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from common import CPUS, RESULTS, command_line, footer, hardware, versions, write

from trainables.data.held_out_images import set_aside
from trainables.data.layouts import find_images
from trainables.data.presize import presize
from trainables.data.presized_images import PresizedImages
from trainables.inference.model_folder import ModelFolder, read_model
from trainables.inference.predictor import Predictor
from trainables.network.calibration import Floats, Labels, calibration_of, softmax
from trainables.recipe import Recipe
from trainables.system.text import many
from trainables.training import checkpoint
from trainables.training.fine_tune import FineTune

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HELD_OUT = 0.25
Run = dict[str, Any]


def measure(args: argparse.Namespace, cache: Path) -> list[Run]:
    """A run for each data set, seed, and number of epochs: 0, which is the probe, and `--epochs`."""
    runs = []
    for data in args.data:
        for seed in range(args.seeds):
            known, held_out = set_aside(find_images(data), HELD_OUT, seed)
            images, others = (presize(part, args.presize, cache=cache) for part in (known, held_out))
            for epochs in dict.fromkeys((0, args.epochs)):
                model, metrics = train(recipe_of(args, epochs, seed), images, args.weights, cache / "model", seed)
                run = {"data": data.name, "seed": seed, "epochs": epochs, **metrics, **judge(model, others)}
                runs.append(run)
                numbers = "  ".join(f"{name} {run[name]:.4f}" for name in ("error_rate", "temperature", *ERRORS))
                print(f"{data.name}  seed {seed}  {epochs} epochs  {numbers}", flush=True)
    return runs


def recipe_of(args: argparse.Namespace, epochs: int, seed: int) -> Recipe:
    return Recipe(
        arch=args.arch, image_size=args.image_size, presize=args.presize, seed=seed, tta_views=0, lr_max=args.lr_max,
        batch_size=args.batch_size, smoothing=args.smoothing, head_init="probe", freeze_epochs=0, epochs=epochs,
    )  # fmt: skip


def train(
    recipe: Recipe, images: PresizedImages, weights: Path | None, folder: Path, seed: int
) -> tuple[ModelFolder, Run]:
    """The trained model as it is kept, and what its validation says."""
    training = FineTune(recipe, images, weights=weights, device=DEVICE, num_threads=CPUS, split_seed=seed)
    metrics = training.run_epoch()
    while metrics["epoch"] != recipe.total_epochs:
        metrics = training.run_epoch()
    parts = {"recipe": recipe.to_dict(), "labels": list(images.classes), "metrics": metrics}
    texts = {f"{name}.json": json.dumps(part).encode() for name, part in parts.items()}
    checkpoint.write(folder, checkpoint.model_only(training.state()) | texts)
    training.close()
    told = {"valid_images": metrics["valid_images"], "told": metrics["calibration_error"]}
    return read_model(folder), told


ERRORS = ("before", "after", "chance")


def judge(model: ModelFolder, images: PresizedImages) -> Run:
    """The calibration errors on held-out images: without the temperature, with it, and by chance alone."""
    predictor = Predictor(model, device=DEVICE, num_threads=CPUS)
    batches = predictor.logits([images[i] for i in range(len(images))])
    logits = torch.cat([batch.cpu() for batch in batches]).double().numpy()
    return errors_of(logits, images.labels, predictor.temperature)


def errors_of(logits: Floats, labels: Labels, temperature: float) -> Run:
    """Of calibrated logits (n, classes) and labels (n,)."""
    before, after = (calibration_of(softmax(logits * factor), labels) for factor in (temperature, 1.0))
    wrong = float(np.mean(logits.argmax(axis=1) != labels))
    found = {"before": before.error, "after": after.error, "chance": after.error_by_chance}
    sure = {"answered": [(row.threshold, row.images, row.wrong) for row in after.answered]}
    return {"images": len(labels), "error_rate": wrong, "temperature": temperature, **found, **sure}


# --- Results ----------------------------------------------------------------------------------------------------------


def summarise(runs: Sequence[Run]) -> list[Run]:
    """Means over the seeds, for each data set and number of epochs."""
    kinds = dict.fromkeys((run["data"], run["epochs"]) for run in runs)
    found = []
    for data, epochs in kinds:
        mine = [run for run in runs if (run["data"], run["epochs"]) == (data, epochs)]
        numbers = ("images", "valid_images", "error_rate", "temperature", *ERRORS, "told")
        means = {name: fmean(run[name] for run in mine) for name in numbers}
        extremes = {"after_max": max(run["after"] for run in mine), "seeds": len(mine)}
        found.append({"data": data, "epochs": epochs, **means, **extremes})
    return found


def markdown(result: dict[str, Any]) -> str:
    used, line = result["settings"], "\n"

    def row(kind: Run) -> str:
        trained = many(kind["epochs"], "epoch") if kind["epochs"] else "probe"
        shares = " | ".join(
            f"{100 * kind[name]:.1f}" for name in ("error_rate", "before", "after", "after_max", "chance", "told")
        )
        counts = f"{kind['images']:.0f} | {kind['valid_images']:.0f} | {kind['seeds']}"
        return f"| {kind['data']} | {trained} | {counts} | {kind['temperature']:.2f} | {shares} |"

    return f"""# Calibration on images that nothing has seen

`{result["command"]}`

{used["arch"]} at {used["image_size"]} px. Per seed, {100 * HELD_OUT:.0f} % of the images are held out, and n of them
judged; the temperature was fitted on the validation images of the others. Expected calibration error (ECE) in %, 15
bins of equal width, means over the seeds:

- before: without the temperature. After: with it, also the largest of the seeds.
- chance: what a model with right probabilities would show on as many images.
- told: what the search tells, by cross-fitting on the validation images.

| data | trained | n | fitted on | seeds | temperature | error, % | before | after | largest | chance | told |
|---|---|---|---|---|---|---|---|---|---|---|---|
{line.join(map(row, result["summary"]))}

{footer(result)}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, action="append", metavar="DIR", help="labelled images")
    parser.add_argument("--weights", type=Path, metavar="DIR", help="folder with <arch>.safetensors")
    parser.add_argument("--arch", default="tf_efficientnet_lite0", metavar="NAME", help="tf_efficientnet_lite0")
    parser.add_argument("--image-size", type=int, default=128, metavar="PX", help="128 without it")
    parser.add_argument("--presize", type=int, default=160, metavar="PX", help="160 without it")
    parser.add_argument("--epochs", type=int, default=0, metavar="N", help="of fine-tuning, beside the probe (0)")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="32 without it")
    parser.add_argument("--lr-max", type=float, default=1e-3, metavar="RATE", help="1e-3 without it")
    parser.add_argument("--smoothing", type=float, default=0.0, metavar="EPS", help="of labels (0)")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="1 without it")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["FINETUNE_SEARCH_CACHE"] = cache  # features, too, are computed here
        runs = measure(args, Path(cache))
    names = ("arch", "image_size", "presize", "epochs", "batch_size", "lr_max", "smoothing", "seeds")
    result = {
        "summary": summarise(runs),
        "command": command_line(),
        "settings": {name: getattr(args, name) for name in names},
        "hardware": hardware(torch.cuda.get_device_name() if DEVICE.type == "cuda" else None),
        "versions": versions("torch", "timm", "scipy", "finetune-search"),
        "runs": runs,
    }
    write(args.out, "calibration", result, markdown(result))


if __name__ == "__main__":
    main()
