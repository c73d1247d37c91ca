"""Updates `report.html` while a search runs, in a separate process, so that no trial waits for it."""

import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.experiment import Trial

from search.runs.paths import RunFolder

INTERVAL_SECONDS = 60.0  # between reports; one takes some seconds of one core
_processes: dict[Path, subprocess.Popen[bytes]] = {}
"""The process that writes the report of each run folder."""


class LiveReport(tune.Callback):
    """Starts a report when a trial ends, unless one was started a short time ago."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.started = -math.inf

    def setup(self, *args: Any, **info: Any) -> None:
        self.started = -math.inf  # a resumed search may have another machine's clock

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        previous = _processes.get(self.folder.path)
        if time.monotonic() - self.started < INTERVAL_SECONDS or (previous and previous.poll() is None):
            return
        self.started = time.monotonic()
        command = [sys.executable, "-m", "search.report", str(self.folder.path), "--no-analysis"]
        null = subprocess.DEVNULL
        _processes[self.folder.path] = subprocess.Popen(command, stdin=null, stdout=null, stderr=null)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self.on_trial_complete(iteration, trials, trial)


def end_live_report(folder: RunFolder) -> None:
    """Stop a report in progress, so that the caller alone writes the run's report."""
    process = _processes.pop(folder.path, None)
    if process is not None:
        process.kill()
        process.wait()
