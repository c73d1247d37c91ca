"""What a trained model's folder holds, be it `best/` of a run or an export, and how it is read. Imports no torch."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainables.recipe import Recipe
from trainables.training.checkpoint import PREPROCESSING_FILE, WEIGHTS_FILE, Preprocessing


@dataclass(frozen=True, kw_only=True)
class ModelFolder:
    """A trained model on disk: `best/` of a run, or an export."""

    path: Path
    recipe: Recipe
    labels: tuple[str, ...]
    preprocessing: Preprocessing

    @property
    def weights(self) -> Path:
        return self.path / WEIGHTS_FILE


def read_json(file: Path) -> dict[str, Any]:
    return _read_json(file, dict)


def read_model(path: Path) -> ModelFolder:
    """The model in `path`. Raises `ValueError` naming what is missing or damaged."""
    if not (path / WEIGHTS_FILE).is_file():
        raise ValueError(f"{path} is incomplete: {WEIGHTS_FILE} is missing.")
    labels = _read_json(path / "labels.json", list)
    try:
        recipe = Recipe.from_dict(read_json(path / "recipe.json"))
    except ValueError as error:
        raise ValueError(f"{path / 'recipe.json'}: {error}") from error
    return ModelFolder(path=path, recipe=recipe, labels=tuple(map(str, labels)), preprocessing=_preprocessing(path))


def _preprocessing(path: Path) -> Preprocessing:
    stored = read_json(path / PREPROCESSING_FILE)
    try:
        numbers = {name: tuple(map(float, stored[name])) for name in ("mean", "std")}
        sizes = {name: int(stored[name]) for name in ("presize", "image_size")}
        method = str(stored["resize_method"])
        white_level = int(stored.get("white_level", Preprocessing.white_level))  # earlier versions had none
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path / PREPROCESSING_FILE} is damaged ({error!r}). Export the run again.") from error
    return Preprocessing(**sizes, **numbers, resize_method=method, white_level=white_level)


def _read_json(file: Path, expected: type) -> Any:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{file.parent} is incomplete: {file.name} is missing.") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    if not isinstance(value, expected):
        raise ValueError(f"{file} is damaged: it holds a {type(value).__name__}, expected a {expected.__name__}.")
    return value
