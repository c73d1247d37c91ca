"""Where things are in the folder of one run."""

import json
import os
from pathlib import Path


class RunFolder:
    """Its paths; none of them needs to exist."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path).resolve()  # Tune pickles it, and a search may go on from another folder
        self.trials = self.path / "trials.csv"
        self.epochs = self.path / "epochs.csv"
        self.space = self.path / "space.json"
        self.command = self.path / "command.json"
        self.models = self.path / "models"
        self.best = self.path / "best"
        self.first = self.path / "first"
        self.test = self.path / "test.json"
        self.checkpoints = self.path / "checkpoints"
        self.journal = self.path / "study.journal"
        self.rungs = self.path / "rungs.json"
        self.lr_find = self.path / "lr_find"
        self.interpretation = self.path / "interpretation"
        self.report = self.path / "report.html"
        self.tune = self.path / "tune"

    def __str__(self) -> str:
        """The path as a person would type it here."""
        return os.path.relpath(self.path) if self.path.is_relative_to(Path.cwd()) else str(self.path)

    def stop_reasons(self) -> dict[str, str]:
        """Why trials were stopped early, by trial id, as the scheduler left it in its state file."""
        return json.loads(self.rungs.read_text())["reasons"] if self.rungs.is_file() else {}
