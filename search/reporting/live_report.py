"""Renews `report.html` while a search runs, in a process of its own, so that no trial waits for it."""

import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ray import tune

from search.runs.paths import RunFolder

PAUSE = 60.0
"""Seconds from one report to the next; one takes some seconds of one core."""
_under_way: dict[Path, subprocess.Popen] = {}
"""The process that writes each run's report."""


class LiveReport(tune.Callback):
    """Begins a report when a trial ends, unless one was begun a short time ago."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.begun = -math.inf

    def setup(self, **info: Any) -> None:
        self.begun = -math.inf  # the clock of a search that goes on may be another machine's

    def on_trial_complete(self, iteration: int, trials: list, trial, **info: Any) -> None:
        before = _under_way.get(self.folder.path)
        if time.monotonic() - self.begun < PAUSE or (before and before.poll() is None):
            return
        self.begun = time.monotonic()
        command = [sys.executable, "-m", "search.report", str(self.folder.path), "--no-analysis"]
        nowhere = subprocess.DEVNULL
        _under_way[self.folder.path] = subprocess.Popen(command, stdin=nowhere, stdout=nowhere, stderr=nowhere)

    def on_trial_error(self, iteration: int, trials: list, trial, **info: Any) -> None:
        self.on_trial_complete(iteration, trials, trial)


def end_live_report(folder: RunFolder) -> None:
    """From here on nobody else writes the run's report."""
    process = _under_way.pop(folder.path, None)
    if process is not None:
        process.kill()
        process.wait()
