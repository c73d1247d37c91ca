"""Whole learning curves of configurations of the space `images`, trained on a folder of images.

`bench/learning_curves.py --data DIR` makes them. Test images, which no training or validation sees, say of every
training what it reaches in truth.
"""

import argparse
import contextlib
import time
from dataclasses import replace
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

TEST_SHARE, VALID_SHARE = 0.4, 1 / 3
"""Of the images, for the true error; and of the others, for validation: many, since they cost little."""
METRICS = ("epoch", "stage", "progress", "train_loss", "valid_loss", "error_rate", "expected_error_rate")
COUNTS = ("train_images", "valid_images", "test_images", "classes")
DIMENSIONS = ("arch", "epochs", "head_init", "freeze_epochs", "lr_max", "lr_ratio", "head_softening", "train_bn",
              "mixup_alpha", "smoothing")  # fmt: skip
COLUMNS = ("number", "seed", *DIMENSIONS, *METRICS, "seconds", *COUNTS, "test_error_rate", "failure")
CHANGES = ("head_init=probe,zeros", "freeze_epochs=0..1", "frozen_layers=0")
"""To the dimensions of the space: the published curves train all layers."""
Config = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("curves of a folder of images")
    group.add_argument("--data", type=Path, help="the folder; without it, the curves are of the quickstart")
    group.add_argument("--name", help="of the set, for learning_curves_NAME.csv.gz (the folder's without it)")
    group.add_argument("--weights", type=Path, help="a folder of <arch>.safetensors")
    group.add_argument("--archs", default="mobilenetv2_100,tf_efficientnet_lite0", help="(%(default)s without it)")
    group.add_argument("--image-size", type=int, default=96, help="px (96 without it)")
    group.add_argument("--presize", type=int, default=128, help="px (128 without it)")
    group.add_argument("--max-classes", type=int, help="take so many, drawn (all without it)")
    group.add_argument("--max-images", type=int, help="take so many, evenly of the classes (all without it)")
    group.add_argument("--epochs", default="3..12", help="unfrozen ones, LOW..HIGH (3..12 without it)")
    group.add_argument("--configs", type=int, default=72, help="configurations (72 without it)")
    group.add_argument("--repeat-share", type=Fraction, default=Fraction(0), help="of them, with two seeds (0)")


def space(archs: str = "mobilenetv2_100,tf_efficientnet_lite0", epochs: str = "3..12", size: int = 96, presize=128):
    """The space `images`, and also with frozen epochs and heads that start from zeros; of one image size."""
    from search.spaces.space import load_space

    found = load_space("images")
    texts = [f"arch={archs}", f"epochs={epochs}", f"image_size={size}", f"presize={presize}", *CHANGES]
    return replace(found.with_settings(texts), first=())


def configurations(args: argparse.Namespace) -> list[Config]:
    """Trial 0, then points of a scrambled Sobol sequence; as many as asked for. Those that have two seeds, and their
    second one, come in between."""
    import optuna

    from search.tuning.study_configs import params_of, propose

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    images = space_of(args)
    study = optuna.create_study(sampler=optuna.samplers.QMCSampler(seed=args.seed, scramble=True))
    study.enqueue_trial(params_of(images, images.first_configs()[0]))
    found: list[Config] = []
    for number in range(args.configs):
        trial = study.ask()
        config = propose(trial, images)
        study.tell(trial, 0.0)
        twice = int((number + 1) * args.repeat_share) > int(number * args.repeat_share)
        found += [config | {"seed": images.seed + seed} for seed in range(1 + twice)]
    return found


def space_of(args: argparse.Namespace):
    return space(args.archs, args.epochs, args.image_size, args.presize)


def options(args: argparse.Namespace) -> Config:
    """What a process needs to train."""
    names = ("archs", "epochs", "image_size", "presize", "max_classes", "max_images")
    return {name: getattr(args, name) for name in names} | {
        "data": str(args.data), "weights": str(args.weights) if args.weights else None, "images_seed": args.seed
    }  # fmt: skip


@cache
def _images(data: str, presize: int, max_classes: int | None, max_images: int | None, seed: int):
    """The presized images, and the rows of those for validation and for the test; the others train."""
    from trainables.data import presize as presizing
    from trainables.data.layouts import find_images
    from trainables.data.splits import some_of_each_class, split

    found = find_images(Path(data))
    if max_classes:
        kept = np.sort(np.random.default_rng(seed).permutation(found.num_classes)[:max_classes]).tolist()
        found = found.only(i for i, label in enumerate(found.labels) if label in kept)
        labels = tuple(kept.index(label) for label in found.labels)
        found = replace(found, labels=labels, classes=tuple(found.classes[label] for label in kept))
    if max_images and max_images < len(found.paths):
        found = found.only(some_of_each_class(np.array(found.labels), max_images, seed=seed).tolist())
    rest, test = split(found.labels, valid_fraction=TEST_SHARE, seed=seed)
    valid = rest[split([found.labels[i] for i in rest], valid_fraction=VALID_SHARE, seed=seed)[1]]
    found = replace(found, valid=tuple(np.isin(np.arange(len(found.paths)), [*valid, *test]).tolist()))
    images = presizing.presize(found, presize)
    assert len(images) == len(found.paths), "an image cannot be read"
    return images, valid, test


def train(job: tuple[int, Config, str, Config]) -> tuple[int, Config, list[Config], str]:
    """Number, configuration, an entry an epoch, the last with the test's error, and the reason where it diverged."""
    import torch

    from trainables.recipe import Recipe
    from trainables.training.fine_tune import Diverged, FineTune

    torch.set_num_threads(1)
    number, config, device, given = job
    settings = space(given["archs"], given["epochs"], given["image_size"], given["presize"]).settings
    recipe = Recipe.from_dict(settings | {"tta_views": 0, "precision": "fp32"} | config)
    images, valid, test = _images(
        given["data"], given["presize"], given["max_classes"], given["max_images"], given["images_seed"]
    )
    weights = Path(given["weights"]) if given["weights"] else None
    training = FineTune(recipe, images, weights=weights, device=device, num_threads=1)
    training.valid_indices = valid
    counts = (len(training.train_indices), len(valid), len(test), len(images.classes))
    epochs: list[Config] = []
    failure = ""
    with contextlib.closing(training):
        try:
            while training.epochs_done < recipe.total_epochs:
                started = time.perf_counter()
                metrics = training.run_epoch()
                seconds = time.perf_counter() - started
                known = {name: metrics[name] for name in METRICS if name in metrics}
                epochs.append(known | {"seconds": seconds} | dict(zip(COUNTS, counts, strict=True)))
            training.valid_indices, training.reference = test, None
            epochs[-1]["test_error_rate"] = training.evaluate()["error_rate"]
        except Diverged as error:
            failure = str(error)
    return number, config, epochs, failure
