"""How the images of a training were split, in the model's folder as `split.json`. Imports no torch.

The file has digests instead of names: the model reveals nothing about the images, but together with them it tells which
ones trained and which validated it.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
import numpy.typing as npt

from trainables.data.groups import with_text
from trainables.data.held_out_images import set_aside
from trainables.data.labelled_images import DataError, ImageFolder
from trainables.data.left_out_images import path_digest, without_digests
from trainables.data.presized_images import PresizedImages
from trainables.inference.model_folder import read_json
from trainables.system.text import printable
from trainables.training.checkpoint import SPLIT_FILE

SPLITS = ("train", "valid", "test", "all")
ALL_INSTEAD = "--split all predicts all images in the folder; the model may have been trained on some of them."


@dataclass(frozen=True, kw_only=True)
class SplitRecord:
    """Tells which images trained a model, which validated it, and which it has never seen."""

    images: str
    """`source.images_digest` of the training and validation images, including unreadable ones."""
    seed: int
    """Of the test images, and of the split if the data has none of its own."""
    test_share: float | None
    """The share of each class that was held out as test images; None if there was none, or another folder."""
    parts: str
    """`parts_digest` of the readable images."""
    left_out: tuple[str, ...] = ()
    """`path_digest` of the images that were left out of all of these."""
    groups: str = ""
    """Those of all others, test images included, by their numbers, see `groups.to_text`."""


def split_file(
    images: PresizedImages,
    digest: str,
    *,
    seed: int,
    test_share: float | None,
    left_out: Iterable[str] = (),
    groups: str = "",
) -> bytes:
    """The content of `split.json` for a training on `images`, whose `source.images_digest` is `digest`; `left_out` are
    paths."""
    gone = tuple(map(path_digest, left_out))
    parts = parts_digest(images, seed)
    record = SplitRecord(images=digest, seed=seed, test_share=test_share, parts=parts, left_out=gone, groups=groups)
    return json.dumps(asdict(record), indent=2).encode()


def parts_digest(images: PresizedImages, seed: int) -> str:
    """SHA-256 over the paths of the training and of the validation images."""
    parts = [[images.paths[i] for i in part] for part in images.split(seed=seed)]
    return sha256(ascii(parts).encode()).hexdigest()


def read_split(model: Path) -> SplitRecord | None:
    """The record in a model's folder; None if an earlier version wrote the model. Raises `ValueError`."""
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
            groups=str(found.get("groups", "")),
            left_out=tuple(map(str, found.get("left_out", ()))),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{model / SPLIT_FILE} is damaged ({error!r}). Export the run again.") from error


def known_and_test(images: ImageFolder, record: SplitRecord) -> tuple[ImageFolder, ImageFolder | None] | None:
    """A model's training and validation images, and its test images if they were held out from `images`.

    None if the record is not of these images.
    """
    from trainables.data.source import images_digest

    images = without_digests(images, record.left_out)
    try:
        images = with_text(images, record.groups)
        known, test = (images, None) if record.test_share is None else set_aside(images, record.test_share, record.seed)
    except DataError:  # too few of a class, or of all
        return None
    return (known, test) if images_digest(known) == record.images else None


def part_of(folder: ImageFolder, split: str, record: SplitRecord | None, model: Path) -> ImageFolder:
    """The images that may be opened for a split. Raises `ValueError` if it is not known which those are."""
    if split == "all":
        return folder
    if record is None:
        raise ValueError(
            f"{printable(model)} does not record which images validated it: an earlier version wrote it, without "
            f"split.json. {ALL_INSTEAD}"
        )
    if (parts := known_and_test(folder, record)) is None:
        raise ValueError(
            f"The images in {printable(folder.root)} are not those that {printable(model)} was trained and validated "
            f"on: some are new, gone, changed, or in another class. Give the data set as it was. {ALL_INSTEAD}"
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


def indices_of(images: PresizedImages, split: str, record: SplitRecord | None, model: Path) -> npt.NDArray[np.int64]:
    """The images of a split among those of `part_of`. Raises `ValueError` if it was drawn from other images."""
    if split in ("test", "all"):
        return np.arange(len(images))
    assert record is not None  # see `part_of`
    if parts_digest(images, record.seed) != record.parts:
        raise ValueError(
            f"The readable images in {printable(images.root)} (all but {len(images.unreadable)}) are not those that "
            f"were readable when {printable(model)} was trained, so its split cannot be drawn again. {ALL_INSTEAD}"
        )
    train, valid = images.split(seed=record.seed)
    return train if split == "train" else valid


def warning_of(folder: ImageFolder, split: str, record: SplitRecord | None) -> str:
    """Says that the model has learned from the images, or may have; empty for a split that it has not seen."""
    if split in ("valid", "test"):
        return ""
    if split == "train":
        return "the model was trained on these images: expect more errors on others"
    was = "was" if record and known_and_test(folder, record) else "may have been"
    return f"the model {was} trained on some of these images: expect more errors on others"
