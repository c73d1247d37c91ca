"""Where things are in the folder of one run."""

import os
from functools import cached_property
from pathlib import Path

from search.runs.command import FILE, CommandRecord
from search.runs.rungs_file import RungsFile
from trainables.inference.model_folder import METRICS_FILE, read_json


class RunFolder:
    """Its paths; none of them needs to exist."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path).resolve()  # Tune pickles it, and a search may be resumed from another folder
        self.trials = self.path / "trials.csv"
        self.epochs = self.path / "epochs.csv"
        self.space = self.path / "space.json"
        self.command = self.path / FILE
        self.models = self.path / "models"
        self.best = self.path / "best"
        self.first = self.path / "first"
        self.test = self.path / "test.json"
        self.checkpoints = self.path / "checkpoints"
        self.journal = self.path / "study.journal"
        self.rungs = self.path / "rungs.json"
        self.warm_start = self.path / "warm_start.json"
        self.lr_find = self.path / "lr_find"
        self.near_duplicates = self.path / "near_duplicates.csv"
        self.interpretation = self.path / "interpretation"
        self.suspects = self.path / "suspects.csv"
        self.report = self.path / "report.html"
        self.tune = self.path / "tune"

    @cached_property
    def run_id(self) -> str:
        """What tells this run from others, also those of its name elsewhere. It stays when the folder moves, and a
        pickle keeps it. The path in a folder without a record."""
        return (self.command.is_file() and CommandRecord.load(self.path).run_id) or str(self.path)

    @property
    def validated(self) -> Path:
        """The best trial's model that has not seen the validation images; `best` itself where it was not trained again,
        see `refit`."""
        try:
            kept = self.models / str(read_json(self.best / METRICS_FILE)["number"])
        except (ValueError, KeyError):  # none yet, or an earlier version's
            return self.best
        return kept if kept.is_dir() else self.best

    def __str__(self) -> str:
        """The path as a user would type it here."""
        return os.path.relpath(self.path) if self.path.is_relative_to(Path.cwd()) else str(self.path)

    def stop_reasons(self) -> dict[str, str]:
        """Why trials were stopped early, by trial id, as the scheduler keeps it in its state file."""
        return RungsFile(self.rungs).read()["reasons"]

    def stop_rungs(self) -> dict[str, int]:
        """The rung, in percent, at which trials were stopped early, by trial id; empty for runs of earlier versions."""
        return RungsFile(self.rungs).read()["rungs"]
