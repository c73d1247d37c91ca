"""Drawn images with several labels, and none, as a table has them."""

import csv
from pathlib import Path

import numpy as np
from PIL import Image

from trainables.data import quickstart_images
from trainables.data.labelled_images import ImageFolder
from trainables.data.layouts import find_images

LIGHTS = ("amber", "blue", "green")


def as_folder(root: Path, cell_of: dict[str, str]) -> ImageFolder:
    """The images of labels.csv, which is written beside them."""
    with (root / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label"), *cell_of.items()])
    return find_images(root / "labels.csv")


def draw_lights(root: Path, *, each: int = 8) -> ImageFolder:
    """Noisy squares of 48 px that one, two, all or none of three lights light up; `each` images of the eight kinds."""
    root.mkdir(parents=True, exist_ok=True)
    rng, cell_of = np.random.default_rng(0), {}
    for kind in range(8):
        on = [light for place, light in enumerate(LIGHTS) if kind >> place & 1]
        colour = [200 if light in on else 50 for light in ("amber", "green", "blue")]
        for n in range(each):
            pixels = np.clip(rng.normal(colour, 40, (48, 48, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / f"{kind}_{n}.png")
            cell_of[f"{kind}_{n}.png"] = ";".join(on)
    return as_folder(root, cell_of)


def draw_animals(root: Path, *, each: int) -> ImageFolder:
    """The quickstart's animals, `each` of every breed, labelled by their muzzle, their coat, and if it is night."""
    root.mkdir(parents=True)
    cell_of = {}
    for number, breed in enumerate(quickstart_images.BREEDS):
        for n in range(each):
            rng = np.random.default_rng([5, number, n])
            photo, is_night = quickstart_images._photo(breed, rng), n % 2 == 0
            photo = (0.35 * photo).astype(np.uint8) if is_night else photo
            quickstart_images._save(root / f"{breed.name}_{n}.jpg", photo, quality=90)
            cell_of[f"{breed.name}_{n}.jpg"] = ";".join([breed.muzzle, breed.coat, *["night"] * is_night])
    return as_folder(root, cell_of)
