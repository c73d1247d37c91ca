"""`rungs.json`: what early stopping knows of the trials, and why it has stopped some.

Each line is a JSON object of three: the `curves` of trials, the `reasons` of stops, and the `rungs` of these, all by
trial. Later lines add to the ones before. So a result costs one appended line, and a file of earlier versions is one of
a single line.
"""

import json
from pathlib import Path
from typing import Any

from search.runs.atomic_files import append_line, write_atomically

Known = dict[str, dict[str, Any]]


class RungsFile:
    """The file as far as it has been read; it may grow meanwhile."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0  # bytes of the lines that are in `known`
        self.known: Known = {"curves": {}, "reasons": {}, "rungs": {}}

    def read(self) -> Known:
        """What is known by now. Raises `ValueError` if the file is damaged."""
        if not self.path.is_file():
            return self.known
        with self.path.open("rb") as file:
            file.seek(self.size)
            lines = file.readlines()
        for place, line in enumerate(lines, start=1):
            try:
                more = json.loads(line)
            except ValueError as error:
                if place == len(lines) and not line.endswith(b"\n"):  # cut off by a crash of the machine
                    break
                raise ValueError(f"{self.path} is damaged: {error}. Restore it from a copy, or remove it.") from None
            for name, of_trials in self.known.items():
                of_trials.update(more.get(name, {}))  # earlier versions had no curves, or no rungs
            self.size += len(line)
        return self.known

    def tidy(self) -> None:
        """Make it one line. Nobody else may be reading it."""
        if self.path.is_file():
            text = json.dumps(self.read()) + "\n"
            write_atomically(self.path, text)
            self.size = len(text.encode())

    def restored(self, own: str) -> Known:
        """What is known when a search starts or resumes, in a tidy file. Of the curves those with the field `own`: each
        scheduler keeps other ones."""
        known = self.read()
        self.tidy()
        return known | {"curves": {trial: curve for trial, curve in known["curves"].items() if own in curve}}

    def add(self, more: Known) -> None:
        """Add a line to a tidy file."""
        self.path.touch()
        append_line(self.path, json.dumps(more) + "\n")
