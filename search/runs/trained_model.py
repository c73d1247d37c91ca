"""Opens a trained model: an exported folder, or the best model of a run."""

from pathlib import Path
from typing import Any

from search.options.arguments import resume_command
from search.runs.command import FILE
from trainables.inference import predictor
from trainables.inference.model_folder import ModelFolder, read_model
from trainables.training.checkpoint import PREPROCESSING_FILE


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
    return read_model(path)


def open_run(path: Path) -> ModelFolder:
    """The best model of the run in `path`. Raises `ValueError`."""
    require_run(path)
    if not (path / "best").is_dir():
        raise ValueError(
            f"{path} has no best model yet: no trial has completed. See {path / 'trials.csv'} for the state of its "
            f"trials, or resume it: {resume_command(path.resolve(), None)}"
        )
    return read_model(path / "best")


def is_run(path: Path) -> bool:
    return (path / FILE).is_file()


def require_run(path: Path) -> None:
    """Raises `ValueError` where a path is not the folder of a run."""
    if not is_run(path):
        what = "is no run: it has no command.json" if path.exists() else "does not exist"
        raise ValueError(f"{path} {what}. Expected the folder of a run, such as results/<name>.")


class Predictor(predictor.Predictor):
    """`trainables.inference.predictor.Predictor` for an exported folder, or for the best model of a run."""

    def __init__(self, path: Path | str, **options: Any) -> None:
        super().__init__(open_model(path), **options)
