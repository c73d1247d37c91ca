"""How the images of a training were split, kept in the model's folder as `split.json`. Imports no torch.

It holds digests and no names: whoever gets the model learns nothing of the images, and who has them can tell which ones
validated the model and which it was trained on.
"""

import json
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np

from trainables.data.held_out_images import set_aside
from trainables.data.labelled_images import DataError, ImageFolder
from trainables.data.presized_images import PresizedImages
from trainables.inference.model_folder import read_json
from trainables.system.text import printable
from trainables.training.checkpoint import SPLIT_FILE

SPLITS = ("train", "valid", "test", "all")
ALL_INSTEAD = "--split all labels all images in the folder; the model may have been trained on some of them."


@dataclass(frozen=True, kw_only=True)
class SplitRecord:
    """What tells the images apart that a model was trained on, validated with, and never shown."""

    images: str
    """`source.images_digest` of those that it was trained and validated on, unreadable ones included."""
    seed: int
    """Of the split where the data has none of its own, and of the test images."""
    test_share: float | None
    """The share of every class that was held out as test images; None where there was none, or another folder."""
    parts: str
    """`parts_digest` of the images that could be read."""


def split_file(images: PresizedImages, digest: str, *, seed: int, test_share: float | None) -> bytes:
    """The content of `split.json` for a training on `images`, whose `source.images_digest` is `digest`."""
    record = SplitRecord(images=digest, seed=seed, test_share=test_share, parts=parts_digest(images, seed))
    return json.dumps(asdict(record), indent=2).encode()


def parts_digest(images: PresizedImages, seed: int) -> str:
    """SHA-256 over the paths that train and those that validate."""
    parts = [[images.paths[i] for i in part] for part in images.split(seed=seed)]
    return sha256(ascii(parts).encode()).hexdigest()


def read_split(model: Path) -> SplitRecord | None:
    """The record in a model's folder; None where an earlier version wrote the model. Raises `ValueError`."""
    if not (model / SPLIT_FILE).is_file():
        return None
    found = read_json(model / SPLIT_FILE)
    try:
        share = found["test_share"]
        return SplitRecord(
            images=str(found["images"]),
            seed=int(found["seed"]),
            test_share=None if share is None else float(share),
            parts=str(found["parts"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{model / SPLIT_FILE} is damaged ({error!r}). Export the run again.") from error


def known_and_test(images: ImageFolder, record: SplitRecord) -> tuple[ImageFolder, ImageFolder | None] | None:
    """The images that a model was trained and validated on, and those held out as a share of `images`.

    None where these are not the images that the record is of.
    """
    from trainables.data.source import images_digest

    try:
        known, test = (images, None) if record.test_share is None else set_aside(images, record.test_share, record.seed)
    except DataError:  # too few of a class
        return None
    return (known, test) if images_digest(known) == record.images else None


def part_of(folder: ImageFolder, split: str, record: SplitRecord | None, model: Path) -> ImageFolder:
    """The images that may be opened for a split. Raises `ValueError` where nobody can tell which those are."""
    if split == "all":
        return folder
    if record is None:
        raise ValueError(
            f"{printable(model)} does not tell which images validated it: it has no split.json, as an earlier version "
            f"wrote it. {ALL_INSTEAD}"
        )
    if (parts := known_and_test(folder, record)) is None:
        raise ValueError(
            f"The images in {printable(folder.root)} are not those that {printable(model)} was trained and validated "
            f"on: some are new, gone, changed, or in another class. Give the data set as it was then. {ALL_INSTEAD}"
        )
    known, test = parts
    if split != "test":
        return known
    if test is None:
        raise ValueError(
            f"--split test: no share was held out of the images in {printable(folder.root)}. If the search tested on "
            "another folder (--test-split DIR), give that as --data, with --split all."
        )
    return test


def indices_of(images: PresizedImages, split: str, record: SplitRecord | None, model: Path) -> np.ndarray:
    """Of the images that may be opened for a split, those in it. Raises `ValueError` where it was drawn from others."""
    if split in ("test", "all"):
        return np.arange(len(images))
    if parts_digest(images, record.seed) != record.parts:
        raise ValueError(
            f"The images that can be read in {printable(images.root)} (all but {len(images.unreadable)}) are not those "
            f"that could be read when {printable(model)} was trained, so its split cannot be drawn again. {ALL_INSTEAD}"
        )
    train, valid = images.split(seed=record.seed)
    return train if split == "train" else valid


def warning_of(folder: ImageFolder, split: str, record: SplitRecord | None) -> str:
    """What an error on images is worth that the model has learned from, or may have; empty for others."""
    if split in ("valid", "test"):
        return ""
    if split == "train":
        return "the model was trained on these images: expect more errors on others"
    was = "was" if record and known_and_test(folder, record) else "may have been"
    return f"the model {was} trained on some of these images: expect more errors on others"
