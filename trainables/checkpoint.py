"""The files of a checkpoint: the weights, and what only going on with the training needs."""

from pathlib import Path

WEIGHTS_FILE = "model.safetensors"
TRAINING_FILE = "training.pt"

Files = dict[str, bytes]
"""File name -> content."""


def write(folder: Path, files: Files) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def read(folder: Path) -> Files:
    return {name: (folder / name).read_bytes() for name in (WEIGHTS_FILE, TRAINING_FILE) if (folder / name).is_file()}


def weights_only(files: Files) -> Files:
    """What is worth keeping of a finished training."""
    return {WEIGHTS_FILE: files[WEIGHTS_FILE]}
