"""A run folder with real files in it, made in a few seconds: small drawn images and a tiny network of timm's."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from trainables.data.held_out_images import without_test_images
from trainables.data.layouts import find_images
from trainables.data.presize import presize
from trainables.data.source import images_digest
from trainables.inference.split_record import split_file
from trainables.recipe import Recipe
from trainables.training.checkpoint import SPLIT_FILE, WEIGHTS_FILE, model_only, write
from trainables.training.fine_tune import FineTune

COLOURS = {"blue_tit": (40, 60, 220), "robin": (220, 60, 40), "wren": (120, 160, 60)}
SETTINGS = {
    "arch": "test_resnet.r160_in1k",
    "pretrained": False,
    "freeze_epochs": 0,
    "epochs": 4,
    "bn_momentum": 0.3,
    "batch_size": 8,
    "lr_max": 0.01,
    "presize": 40,
    "image_size": 32,
    "precision": "fp32",
}


def draw_images(root: Path, *, each: int = 20) -> Path:
    """Noisy squares, coloured by class, some portrait and some landscape, as class folders."""
    rng = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (root / name).mkdir(parents=True)
        for i in range(each):
            height, width = (56, 48) if i % 2 else (48, 60)
            noise = rng.normal(0, 70, (height, width, 3))
            pixels = np.clip(np.asarray(colour) + noise, 0, 255).astype(np.uint8)
            pixels[: height // 3] = pixels[: height // 3] // 2  # so that up is not down
            Image.fromarray(pixels).save(root / name / f"{i}.jpg", quality=95)
    return root


def make_run(
    folder: Path,
    data: Path,
    *,
    weights: Path | None = None,
    test_share: float | None = None,
    left_out: tuple[str, ...] = (),
    **settings,
) -> Path:
    """Train one recipe on `data` and write what a search leaves of its winner. Returns the run's folder."""
    recipe = Recipe.from_dict(SETTINGS | settings)
    known = without_test_images(find_images(data), test_share, 3, left_out)
    images = presize(known, recipe.presize, recipe.resize_method)
    training = FineTune(recipe, images, weights=weights, split_seed=3)
    for _ in range(recipe.before_first_epoch, recipe.total_epochs):
        metrics = training.run_epoch()
    training.close()
    split = split_file(images, images_digest(known), seed=3, test_share=test_share, left_out=left_out)
    write(folder / "best", model_only(training.state() | {SPLIT_FILE: split}))
    assert (folder / "best" / WEIGHTS_FILE).is_file()
    command = {"data": str(data), "weights": str(weights) if weights else None, "split_seed": 3}
    command["left_out"] = left_out
    command["arguments"] = {"test_split": test_share}
    command["group_size"] = {"num_workers": 1, "gpus_per_worker": 0}
    write_json(folder / "command.json", command)
    write_json(folder / "best" / "recipe.json", recipe.to_dict())
    write_json(folder / "best" / "labels.json", list(images.classes))
    write_json(folder / "best" / "metrics.json", {"trial_id": "abc_00007", "status": "completed", **metrics})
    return folder


def write_json(file: Path, value: object) -> None:
    file.write_text(json.dumps(value))
