"""The files of a checkpoint: the weights, their preprocessing, and the state of the training.

A trial in training has a folder `epoch_<n>` with the files of its last epoch. A kill always leaves a complete one. On a
cluster the nodes may have the files instead, and the folder says which.
"""

import json
import logging
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainables.system.full_disk import when_there_is_room

WEIGHTS_FILE = "model.safetensors"
"""Its metadata have the `TEMPERATURE`, so that it goes wherever the weights go."""
TEMPERATURE = "temperature"
"""What the logits are divided by, see `calibration`. Without it, 1: weights of an earlier version, or of an export."""
PREPROCESSING_FILE = "preprocessing.json"
TRAINING_FILE = "training.pt"
BEST_FILE = "best.safetensors"
"""The weights of a trial's best epoch, where these are kept."""
SPLIT_FILE = "split.json"
"""See `split_record`."""
RESULT_FILE = "result.json"
"""The epoch's result, the CRC-32 of each other file, and `Elsewhere`, if that is where they are."""

ENDED_FILE = "ended.json"
"""Marks the checkpoint of a trial that has ended, whose weights and training state are deleted."""

logger = logging.getLogger(__name__)

Files = dict[str, bytes]
"""File name -> content."""


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How an image becomes the input of the network, as in validation during training."""

    presize: int
    """px; images are resized to this first, by Pillow's bilinear filter."""
    resize_method: str
    """crop: `presize` is the shorter side, pad: the longer one, reflected to a square, squish: both."""
    image_size: int
    """px; then the centre square is resized to this side, see `warp_cpu.apply`."""
    mean: tuple[float, float, float]
    """Per RGB channel, subtracted from values in 0..1."""
    std: tuple[float, float, float]
    """Per RGB channel, the divisor after that."""
    white_level: int = 65535  # `image_file.WHITE_16_BIT`, whose module imports Pillow
    """The value that becomes 255 in images of more than 8 bits, see `image_file.white_level`."""
    thresholds: tuple[float, ...] | None = None
    """Where an image may have several labels: the probability of each class, by itself, above which it is one."""

    @property
    def several_labels(self) -> bool:
        return self.thresholds is not None

    def to_dict(self) -> dict[str, Any]:
        """Without thresholds where there are none."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class Elsewhere:
    """The files of a checkpoint that nodes of a cluster have on their disks."""

    nodes: tuple[str, ...]
    """Ids of the nodes that may have them, or those of the epoch before."""
    crc32: Mapping[str, int]
    """By file name."""


def save(
    folder: Path, epoch: int, files: Files, result: dict[str, Any], elsewhere: Elsewhere | None = None
) -> dict[str, int]:
    """Replaces the checkpoint in a trial's folder by `epoch`'s files and result. Waits while the disk is full. Returns
    the CRC-32 of each file."""
    before = newest(folder)
    partial, whole = folder / f".epoch_{epoch:04}.partial", folder / f"epoch_{epoch:04}"
    crc32 = checksums(files)
    record = {"result": result, "crc32": crc32} | ({"elsewhere": asdict(elsewhere)} if elsewhere else {})

    def write_whole() -> None:
        for leftover in (partial, whole):
            shutil.rmtree(leftover, ignore_errors=True)
        write(partial, {**files, RESULT_FILE: json.dumps(record).encode()})
        partial.rename(whole)

    when_there_is_room(write_whole, folder)
    if before and before != whole:
        shutil.rmtree(before)
    return crc32


def checksums(files: Files) -> dict[str, int]:
    """The CRC-32 of each file."""
    return {name: zlib.crc32(content) for name, content in files.items()}


def newest(folder: Path) -> Path | None:
    """The checkpoint in a trial's folder; the later one if a kill left two."""
    return max(folder.glob("epoch_*"), default=None)


def elsewhere(folder: Path) -> Elsewhere | None:
    """Where the newest checkpoint's files are that are not in a trial's folder; None if all are here, or deleted."""
    found = newest(folder)
    if found is None or (found / ENDED_FILE).exists():
        return None
    try:
        stored = json.loads((found / RESULT_FILE).read_bytes()).get("elsewhere")
        return stored and Elsewhere(nodes=tuple(stored["nodes"]), crc32=stored["crc32"])
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None  # `last_whole` says that it is damaged


def thresholds(folder: Path) -> tuple[float, ...] | None:
    """`Preprocessing.thresholds` of the model in a trial's folder, which `drop` leaves there; None without them."""
    found = newest(folder)
    if found is None or not (found / PREPROCESSING_FILE).is_file():
        return None
    stored = json.loads((found / PREPROCESSING_FILE).read_text()).get("thresholds")
    return None if stored is None else tuple(stored)


def last_whole(folder: Path) -> tuple[Files, dict[str, Any]] | None:
    """The files in the folder and the result of the newest undamaged checkpoint; None if there is none, and training
    starts over."""
    for checkpoint in sorted(folder.glob("epoch_*"), reverse=True):
        try:
            record, files = json.loads((checkpoint / RESULT_FILE).read_bytes()), read(checkpoint)
            crc32 = record["crc32"] | record.get("elsewhere", {}).get("crc32", {})
            expected = files if (checkpoint / ENDED_FILE).exists() else {*files, *record["crc32"]}
            if damaged := [name for name in expected if zlib.crc32(files[name]) != crc32[name]]:
                raise ValueError(f"wrong checksum of {', '.join(damaged)}")
            return files, record["result"]
        except (FileNotFoundError, ValueError, KeyError, TypeError) as error:  # errors of a failing disk are raised
            logger.warning("skipping the damaged checkpoint %s: %s", checkpoint, error)
            shutil.rmtree(checkpoint, ignore_errors=True)
    return None


def add(checkpoint: Path, files: Files) -> None:
    """Add files to a checkpoint that has them elsewhere, each whole or not at all. Waits while the disk is full."""

    def write_whole() -> None:
        for name, content in files.items():
            partial = checkpoint / f".{name}.partial"
            partial.write_bytes(content)
            partial.rename(checkpoint / name)

    when_there_is_room(write_whole, checkpoint)


def drop(folder: Path) -> None:
    """Deletes all of an ended trial's checkpoint but its result."""
    for checkpoint in folder.glob("*epoch_*"):
        when_there_is_room((checkpoint / ENDED_FILE).touch, checkpoint)
        for name in (WEIGHTS_FILE, BEST_FILE, TRAINING_FILE):
            (checkpoint / name).unlink(missing_ok=True)


def write(folder: Path, files: Files) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def read(folder: Path) -> Files:
    names = (WEIGHTS_FILE, BEST_FILE, PREPROCESSING_FILE, SPLIT_FILE, TRAINING_FILE)
    paths = [folder / name for name in names]
    return {path.name: path.read_bytes() for path in paths if path.is_file()}


def with_best(state: Files, before: Files, *, is_best: bool) -> Files:
    """An epoch's files with the weights of the trial's best epoch, which is this one or in the files `before`."""
    found = {**state, BEST_FILE: state[WEIGHTS_FILE] if is_best else before[BEST_FILE]}
    if not is_best and PREPROCESSING_FILE in before:  # with the thresholds of that epoch
        found[PREPROCESSING_FILE] = before[PREPROCESSING_FILE]
    return found


def model_only(files: Files) -> Files:
    """The files to keep of a finished training."""
    return {name: content for name, content in files.items() if name != TRAINING_FILE}
