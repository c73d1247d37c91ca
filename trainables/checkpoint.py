"""The files of a checkpoint: the weights, the preprocessing they want, and what going on with the training needs."""

from dataclasses import dataclass
from pathlib import Path

WEIGHTS_FILE = "model.safetensors"
PREPROCESSING_FILE = "preprocessing.json"
TRAINING_FILE = "training.pt"

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


def write(folder: Path, files: Files) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def read(folder: Path) -> Files:
    paths = [folder / name for name in (WEIGHTS_FILE, PREPROCESSING_FILE, TRAINING_FILE)]
    return {path.name: path.read_bytes() for path in paths if path.is_file()}


def model_only(files: Files) -> Files:
    """What is worth keeping of a finished training."""
    return {name: content for name, content in files.items() if name != TRAINING_FILE}
