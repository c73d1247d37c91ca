"""The models that a run keeps: those of its best trials in `models/<number>/`, the best one also in `best/`.

At a search's end, `best/` is the best trial trained again on all images, see `refit`; `models/` keeps the one whose
error is known.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from search.runs.atomic_files import link_or_copy, replace_folder
from search.runs.paths import RunFolder
from trainables.inference.model_folder import METRICS_FILE, read_json
from trainables.system.full_disk import when_there_is_room
from trainables.training.checkpoint import BEST_FILE, PREPROCESSING_FILE, SPLIT_FILE, WEIGHTS_FILE

REFIT = "refit"
"""In the metrics of `best/`: the images that trained it, and its error rate on those for validation among them."""


class KeptModels:
    """Folders with a model's weights, preprocessing, split, recipe, labels and metrics. A file that is in several of
    them takes disk space once."""

    def __init__(self, folder: RunFolder, *, first: bool) -> None:
        self.folder = folder
        self.first = first  # also trial 0, in `first/`

    def add(self, checkpoint: Path, *, kept: list[int], **parts: Any) -> None:
        """Add the model of a trial that has completed. `kept` are the numbers of the trials to keep now, the best one
        first; `parts` the contents of JSON files by name, of which `metrics` has the trial's number."""
        number = parts["metrics"]["number"]

        def fill(folder: Path) -> None:
            best = checkpoint / BEST_FILE  # where its best epoch is kept instead of its last
            link_or_copy(best if best.is_file() else checkpoint / WEIGHTS_FILE, folder / WEIGHTS_FILE)
            link_or_copy(checkpoint / PREPROCESSING_FILE, folder / PREPROCESSING_FILE)
            if (checkpoint / SPLIT_FILE).is_file():  # absent if an earlier version trained it
                link_or_copy(checkpoint / SPLIT_FILE, folder / SPLIT_FILE)
            for name, content in parts.items():
                (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")

        if self.first and number == 0:
            _replace(self.folder.first, fill)
        if number in kept:
            _replace(self.folder.models / str(number), fill)
        if number == kept[0]:
            _replace(self.folder.best, fill)

    def retain(self, kept: list[int]) -> None:
        """Keep the models of these trials, the best one first, and remove the others."""
        if self.folder.models.is_dir():
            for folder in self.folder.models.iterdir():
                if folder.name not in map(str, kept):
                    shutil.rmtree(folder)
        if kept and self._best() != kept[0]:
            self._make_best(self.folder.models / str(kept[0]))

    def deliver_refit(self, checkpoint: Path, number: int, refit: dict[str, Any]) -> None:
        """Make a checkpoint the best model: of the best trial, with this number, trained again on all images; `refit`
        is what is known of it. Its recipe, labels, metrics and split are the trial's."""
        trial = self.folder.models / str(number)
        if self._best() != number or not trial.is_dir():
            return

        def fill(folder: Path) -> None:
            for file in trial.iterdir():
                if file.name not in (WEIGHTS_FILE, PREPROCESSING_FILE, METRICS_FILE):
                    link_or_copy(file, folder / file.name)
            for name in (WEIGHTS_FILE, PREPROCESSING_FILE):
                link_or_copy(checkpoint / name, folder / name)
            metrics = read_json(trial / METRICS_FILE) | {REFIT: refit}
            (folder / METRICS_FILE).write_text(json.dumps(metrics, indent=2) + "\n")

        _replace(self.folder.best, fill)

    def _best(self) -> int | None:
        metrics = self.folder.best / "metrics.json"
        return json.loads(metrics.read_text())["number"] if metrics.is_file() else None

    def _make_best(self, model: Path) -> None:
        if not model.is_dir():  # absent if an earlier version began the run
            return

        def fill(folder: Path) -> None:
            for file in model.iterdir():
                link_or_copy(file, folder / file.name)

        _replace(self.folder.best, fill)


def _replace(folder: Path, fill: Callable[[Path], None]) -> None:
    when_there_is_room(lambda: replace_folder(folder, fill), folder)
