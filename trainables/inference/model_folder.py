"""The folder of a trained model, `best/` of a run or an export, and how it is read. Imports no torch."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from trainables.recipe import Recipe
from trainables.training.checkpoint import PREPROCESSING_FILE, TEMPERATURE, WEIGHTS_FILE, Preprocessing

METRICS_FILE = "metrics.json"
"""The table's row of the model's trial."""


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

    @property
    def temperature(self) -> float:
        """What the logits are divided by. Raises `ValueError` if the weights are damaged."""
        try:
            with safe_open(self.weights, framework="numpy") as file:
                return float((file.metadata() or {}).get(TEMPERATURE, 1.0))
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{self.weights} cannot be read: {error}") from error

    @property
    def is_calibrated(self) -> bool:
        """Whether a temperature was fitted for it, which its weights may include; not by earlier versions."""
        metrics = self.path / "metrics.json"
        return metrics.is_file() and not math.isnan(read_json(metrics).get(TEMPERATURE, math.nan))


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file of a model's folder. Raises `ValueError` if it is missing or damaged."""
    content: dict[str, Any] = _read_json(file, dict)
    return content


def read_model(path: Path) -> ModelFolder:
    """The model in `path`. Raises `ValueError` that names what is missing or damaged."""
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
        thresholds = stored.get("thresholds")
        (red, green, blue), (red_std, green_std, blue_std) = (map(float, stored[name]) for name in ("mean", "std"))
        return Preprocessing(
            presize=int(stored["presize"]),
            resize_method=str(stored["resize_method"]),
            image_size=int(stored["image_size"]),
            mean=(red, green, blue),
            std=(red_std, green_std, blue_std),
            white_level=int(stored.get("white_level", Preprocessing.white_level)),  # earlier versions had none
            thresholds=None if thresholds is None else tuple(map(float, thresholds)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path / PREPROCESSING_FILE} is damaged ({error!r}). Export the run again.") from error


def _read_json(file: Path, expected: type) -> Any:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{file.parent} is incomplete: {file.name} is missing.") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    if not isinstance(value, expected):
        raise ValueError(f"{file} is damaged: it contains a {type(value).__name__}, expected a {expected.__name__}.")
    return value
