"""The files of a checkpoint: the weights, the preprocessing they want, and what going on with the training needs.

A trial in training has a folder `epoch_<n>` with them for its last epoch; a kill at any moment leaves a whole one.
"""

import json
import logging
import shutil
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainables.system.full_disk import when_there_is_room

WEIGHTS_FILE = "model.safetensors"
PREPROCESSING_FILE = "preprocessing.json"
TRAINING_FILE = "training.pt"
SPLIT_FILE = "split.json"
"""See `split_record`."""
RESULT_FILE = "result.json"
"""The epoch's result, and the CRC-32 of each other file."""

ENDED_FILE = "ended.json"
"""There once a trial has ended and its weights and its training are no longer kept here."""

logger = logging.getLogger(__name__)

Files = dict[str, bytes]
"""File name -> content."""


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """From an image to the input of the network, as validation does it in training."""

    presize: int
    """px; images are brought to this first, by Pillow's bilinear filter."""
    resize_method: str
    """crop: `presize` is the shorter side, pad: the longer one, reflected to a square, squish: both."""
    image_size: int
    """px; side of the square that the centre square is then brought to, see `warp_cpu.apply`."""
    mean: tuple[float, float, float]
    """Per RGB channel, of values in 0..1; taken off first."""
    std: tuple[float, float, float]
    """Per RGB channel; then divided by."""
    white_level: int = 65535  # `image_file.WHITE_16_BIT`, whose module imports Pillow
    """The value that becomes 255 in images of more than 8 bits, see `image_file.white_level`."""


def save(folder: Path, epoch: int, files: Files, result: dict[str, Any]) -> None:
    """Make `epoch`'s files and its result the checkpoint in a trial's folder, in the place of the one before. Waits
    while the disk is full."""
    before = newest(folder)
    partial, whole = folder / f".epoch_{epoch:04}.partial", folder / f"epoch_{epoch:04}"

    def write_whole() -> None:
        for leftover in (partial, whole):
            shutil.rmtree(leftover, ignore_errors=True)
        record = {"result": result, "crc32": {name: zlib.crc32(content) for name, content in files.items()}}
        write(partial, {**files, RESULT_FILE: json.dumps(record).encode()})
        partial.rename(whole)

    when_there_is_room(write_whole, folder)
    if before not in (None, whole):
        shutil.rmtree(before)


def newest(folder: Path) -> Path | None:
    """The checkpoint in a trial's folder; the later one where a kill left two."""
    return max(folder.glob("epoch_*"), default=None)


def last_whole(folder: Path) -> tuple[Files, dict[str, Any]] | None:
    """The files and the result of the newest checkpoint that is as it was written, or None: a training begins anew
    then."""
    for checkpoint in sorted(folder.glob("epoch_*"), reverse=True):
        try:
            record, files = json.loads((checkpoint / RESULT_FILE).read_bytes()), read(checkpoint)
            expected = files if (checkpoint / ENDED_FILE).exists() else record["crc32"]
            if damaged := [name for name in expected if zlib.crc32(files[name]) != record["crc32"][name]]:
                raise ValueError(f"{', '.join(damaged)} is not what was written")
            return files, record["result"]
        except (FileNotFoundError, ValueError, KeyError, TypeError) as error:  # not what a disk says that fails
            logger.warning("the checkpoint %s is damaged and left out: %s", checkpoint, error)
            shutil.rmtree(checkpoint, ignore_errors=True)
    return None


def drop(folder: Path) -> None:
    """Of a trial that has ended keep no more than its last result."""
    for checkpoint in folder.glob("*epoch_*"):
        when_there_is_room((checkpoint / ENDED_FILE).touch, checkpoint)
        for name in (WEIGHTS_FILE, TRAINING_FILE):
            (checkpoint / name).unlink(missing_ok=True)


def write(folder: Path, files: Files) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def read(folder: Path) -> Files:
    paths = [folder / name for name in (WEIGHTS_FILE, PREPROCESSING_FILE, SPLIT_FILE, TRAINING_FILE)]
    return {path.name: path.read_bytes() for path in paths if path.is_file()}


def model_only(files: Files) -> Files:
    """What is worth keeping of a finished training."""
    return {name: content for name, content in files.items() if name != TRAINING_FILE}
