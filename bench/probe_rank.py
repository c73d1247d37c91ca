"""Do probes rank (architecture, image size) pairs as fine-tuning does?

    python bench/probe_rank.py --data DIR --weights DIR --archs A,B,C,D --sizes 160,192,224

Each pair is trained once per seed, without Ray: first the probe, from whose head some epochs of the whole network
start. Kendall's tau compares the validation errors of both. The second figure: how often the best third of the
architectures by probe, which is what a search fine-tunes, holds the pair that is the best after fine-tuning. Writes
probe_rank.json and probe_rank.md.
"""

import argparse
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from common import CPUS, RESULTS, command_line, footer, hardware, versions, write
from scipy.stats import kendalltau

from trainables.data.labelled_images import ImageFolder, split
from trainables.data.layouts import find_images
from trainables.data.presize import presize
from trainables.data.presized_images import PresizedImages
from trainables.recipe import Recipe
from trainables.training.fine_tune import FineTune

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MIN_KEPT = 3
"""Architectures that a search fine-tunes at least."""
Run = dict[str, Any]


def subset(images: ImageFolder, count: int | None, seed: int) -> ImageFolder:
    """About `count` of the images, as many of each class as its share."""
    if count is None or count >= len(images.paths):
        return images
    return images.only(split(images.labels, valid_fraction=count / len(images.paths), seed=seed)[1])


def train(recipe: Recipe, images: PresizedImages, weights: Path | None, seed: int) -> Run:
    """Errors of the probe, which is epoch 0, and of the last epoch; seconds of both."""
    training = FineTune(recipe, images, weights=weights, device=DEVICE, num_threads=CPUS, split_seed=seed)
    rows = [training.run_epoch()]
    while rows[-1]["epoch"] < recipe.total_epochs:
        rows.append(training.run_epoch())
    training.close()
    if rows[0]["stage"] != "probe":
        raise RuntimeError(f"the first epoch's stage is {rows[0]['stage']!r}, expected 'probe'")
    seconds = [row["train_seconds"] + row["valid_seconds"] for row in rows]
    errors = {"probe_error": rows[0]["error_rate"], "tuned_error": rows[-1]["error_rate"]}
    losses = {"probe_loss": rows[0]["valid_loss"], "tuned_loss": rows[-1]["valid_loss"]}
    images_of = {name: rows[0][name] for name in ("train_images", "valid_images")}
    return errors | losses | {"probe_seconds": seconds[0], "tuning_seconds": sum(seconds[1:])} | images_of


def train_all(args: argparse.Namespace, cache: Path) -> list[Run]:
    """A run for each seed, size and architecture; a seed is also that of the images and of their split."""
    runs = []
    for seed in range(args.seeds):
        found = subset(find_images(args.data), args.max_images, seed)
        images = presize(found, args.presize, cache=cache)
        for size in args.sizes:
            for arch in args.archs:
                run = {"seed": seed, "arch": arch, "image_size": size}
                recipe = recipe_of(args, arch, size, seed)
                runs.append(run | train(recipe, images, args.weights, seed))
                errors = "  ".join(f"{kind} {runs[-1][f'{kind}_error']:.4f}" for kind in ("probe", "tuned"))
                print(f"seed {seed}  {arch:24} {size} px  {errors}", flush=True)
    return runs


def recipe_of(args: argparse.Namespace, arch: str, size: int, seed: int) -> Recipe:
    return Recipe(
        arch=arch, image_size=size, presize=args.presize, seed=seed, tta_views=0, batch_size=args.batch_size,
        head_init="probe", freeze_epochs=0, epochs=args.epochs, lr_max=args.lr_max,
    )  # fmt: skip


# --- Ranks ------------------------------------------------------------------------------------------------------------


def summarise(runs: Sequence[Run]) -> dict[str, Any]:
    """Means over the seeds; tau's standard error is None for one seed."""
    seeds = sorted({run["seed"] for run in runs})
    of_seeds = [[run for run in runs if run["seed"] == seed] for seed in seeds]
    taus = [tau_of(of_seed) for of_seed in of_seeds]
    third = math.ceil(len({run["arch"] for run in runs}) / 3)
    return {
        "tau_mean": fmean(taus),
        "tau_sem": stdev(taus) / len(taus) ** 0.5 if len(taus) > 1 else None,
        "taus": taus,
        "seeds": len(seeds),
        "pairs": len(of_seeds[0]),
        "third": third,
        "third_holds_best": fmean(holds_best(of_seed, third) for of_seed in of_seeds),
        "kept": max(third, MIN_KEPT),
        "kept_holds_best": fmean(holds_best(of_seed, max(third, MIN_KEPT)) for of_seed in of_seeds),
        "third_costs": fmean(costs(of_seed, third) for of_seed in of_seeds),
    }


def tau_of(runs: Sequence[Run]) -> float:
    """Kendall's tau-b between the errors of probes and of fine-tuned networks; nan if all of one kind are equal."""
    return float(kendalltau([run["probe_error"] for run in runs], [run["tuned_error"] for run in runs]).statistic)


def kept_archs(runs: Sequence[Run], count: int) -> list[str]:
    """The architectures whose best probe is among the `count` best; a tie goes to the lower loss."""
    ranked = sorted(runs, key=lambda run: (run["probe_error"], run["probe_loss"]))
    return list(dict.fromkeys(run["arch"] for run in ranked))[:count]


def costs(runs: Sequence[Run], count: int) -> float:
    """By how much the best fine-tuned error of the kept architectures is above the best one of all."""
    kept = kept_archs(runs, count)
    best = min(run["tuned_error"] for run in runs)
    return float(min(run["tuned_error"] for run in runs if run["arch"] in kept) - best)


def holds_best(runs: Sequence[Run], count: int) -> bool:
    """Whether the kept architectures have a pair with the lowest fine-tuned error."""
    return costs(runs, count) == 0


def markdown(result: dict[str, Any]) -> str:
    runs, used = result["runs"], result["settings"]
    pairs = list(dict.fromkeys((run["arch"], run["image_size"]) for run in runs))

    def row(arch: str, size: int) -> str:
        of_pair = [run for run in runs if (run["arch"], run["image_size"]) == (arch, size)]
        means = {
            name: fmean(run[name] for run in of_pair) for name in of_pair[0] if name.endswith(("_error", "seconds"))
        }
        errors = f"{100 * means['probe_error']:.1f} | {100 * means['tuned_error']:.1f}"
        return f"| {arch} | {size} | {errors} | {means['probe_seconds']:.1f} | {means['tuning_seconds']:.1f} |"

    spread = "" if result["tau_sem"] is None else f" ± {result['tau_sem']:.2f}"
    line = "\n"
    return f"""# Probes and fine-tuned networks: do they rank alike?

`{result["command"]}`

{result["data"]}: {runs[0]["train_images"]} images to train on and {runs[0]["valid_images"]} to validate. Each pair of
an architecture and an image size: its probe, and {used["epochs"]} epochs of the whole network from there, with a peak
rate of {used["lr_max"]:g}. Means of n = {result["seeds"]} seeds, each with its own images and split.

- Kendall's τ between both errors, over {result["pairs"]} pairs: **{result["tau_mean"]:.2f}**{spread}.
- The best third of the architectures by probe ({result["third"]}) holds the best fine-tuned pair in
  {100 * result["third_holds_best"]:.0f} % of the seeds; without the others, the best error is
  {100 * result["third_costs"]:.2f} points higher.
- What a search keeps (at least {MIN_KEPT}: {result["kept"]}) holds it in {100 * result["kept_holds_best"]:.0f} %.

| architecture | px | probe, error in % | fine-tuned, error in % | probe, s | fine-tuning, s |
|---|---|---|---|---|---|
{line.join(row(*pair) for pair in pairs)}

{footer(result)}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder of labelled images")
    parser.add_argument("--weights", type=Path, metavar="DIR", help="folder with <arch>.safetensors")
    parser.add_argument("--archs", type=lambda text: text.split(","), required=True, metavar="A,B")
    parser.add_argument("--sizes", type=lambda text: [int(word) for word in text.split(",")], default=[160, 192, 224])
    parser.add_argument("--presize", type=int, default=256, metavar="PX", help="256 without it")
    parser.add_argument("--epochs", type=int, default=3, metavar="N", help="3 without it")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="32 without it")
    parser.add_argument("--lr-max", type=float, default=3e-4, metavar="RATE", help="3e-4 without it")
    parser.add_argument("--max-images", type=int, metavar="N", help="a stratified part of the images (all)")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="1 without it")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["FINETUNE_SEARCH_CACHE"] = cache  # features, too, are computed here
        runs = train_all(args, Path(cache))
    names = ("archs", "sizes", "presize", "epochs", "batch_size", "lr_max", "max_images", "seeds")
    gpu = torch.cuda.get_device_name() if DEVICE.type == "cuda" else None
    result = {
        **summarise(runs),
        "data": args.data.name,
        "command": command_line(),
        "settings": {name: getattr(args, name) for name in names},
        "hardware": hardware(gpu),
        "versions": versions("torch", "timm", "scipy", "finetune-search"),
        "runs": runs,
    }
    write(args.out, "probe_rank", result, markdown(result))


if __name__ == "__main__":
    main()
