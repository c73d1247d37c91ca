"""What a trained model's folder holds, be it `best/` of a run or an export, and how it is opened. Imports no torch."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainables.checkpoint import PREPROCESSING_FILE, WEIGHTS_FILE, Preprocessing
from trainables.recipe import Recipe


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


def open_model(path: Path | str) -> ModelFolder:
    """The model in an exported folder, or the best one of a run. Raises `ValueError`."""
    path = Path(path).expanduser()
    if is_run(path):
        return open_run(path)
    if path.name == "best" and is_run(path.parent):
        return open_run(path.parent)
    if not path.exists():
        raise ValueError(f"There is no folder {path}. Expected an exported model or a run, such as results/<name>.")
    if not (path / PREPROCESSING_FILE).is_file():
        raise ValueError(
            f"{path} is neither an exported model (it has no {PREPROCESSING_FILE}) nor a run (it has no command.json). "
            "Give a folder that python -m search.export has written, or a run such as results/<name>."
        )
    return _model_folder(path)


def open_run(path: Path) -> ModelFolder:
    """The best model of the run in `path`. Raises `ValueError`."""
    if not is_run(path):
        what = "is no run: it has no command.json" if path.exists() else "does not exist"
        raise ValueError(f"{path} {what}. Expected the folder of a run, such as results/<name>.")
    if not (path / "best").is_dir():
        raise ValueError(
            f"{path} has no best model yet: no trial has completed. See {path / 'trials.csv'} for how its trials fare, "
            f"or go on with it: python -m search.run --resume --name {path.name}"
        )
    return _model_folder(path / "best")


def is_run(path: Path) -> bool:
    return (path / "command.json").is_file()


def read_json(file: Path) -> dict[str, Any]:
    return _read_json(file, dict)


def _model_folder(path: Path) -> ModelFolder:
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
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path / PREPROCESSING_FILE} is damaged ({error!r}). Export the run again.") from error
    return Preprocessing(**sizes, **numbers)


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
