"""Early termination that knows one-cycle schedules: trials are compared late, and at equal progress of their own."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from search.files import write_atomically
from trainables.trial import RETRAINS

RUNGS = (50, 75)
KEEP = 0.8
"""Gently: what ends best is often not yet among the best at a rung, see results/bench/search_quality.md."""
MIN_RECORDED = 3
MEDIAN_RUNGS = tuple(range(10, 100, 10))


def cut_off(recorded: Sequence[float], keep: float) -> float | None:
    """The largest metric with which a trial still belongs to the best `keep` share; None while too few are recorded."""
    return float(np.quantile(recorded, keep)) if len(recorded) >= MIN_RECORDED else None


def rung_at(progress: int, rungs: Sequence[int]) -> int | None:
    """The highest rung that `progress` percent has reached; None below the first, and at the end."""
    return max((rung for rung in rungs if rung <= progress < 100), default=None)


def new_scheduler(name: str, metric: str, state_file: Path) -> TrialScheduler:
    """What ends bad trials early: those beyond a cut-off at late rungs, those worse than the median, or none."""
    if name == "rungs":
        return ProgressHalvingScheduler(metric, state_file)
    if name == "median":
        return ProgressHalvingScheduler(metric, state_file, rungs=MEDIAN_RUNGS, keep=0.5)
    return FIFOScheduler()


def stop_reasons(state_file: Path) -> dict[str, str]:
    """Why trials were stopped, by trial id, as a scheduler left it in its state file."""
    return json.loads(state_file.read_text())["reasons"] if state_file.is_file() else {}


class ProgressHalvingScheduler(FIFOScheduler):
    """Asynchronous successive halving (Li et al. 2020) over `progress`, the percent of the unfrozen stage that is done.

    Half-way through a one-cycle schedule the rate is high and the metric says little, and epoch 4 of 5 is not epoch 4
    of 20. So a trial is judged at a few late rungs in percent, never in its frozen stage, against the trials that were
    at the same rung before it: its first result between one rung and the next is the one that counts.

    Tune does not save its scheduler, so the rungs are kept in `state_file`, with the reason of every stop.
    """

    def __init__(self, metric: str, state_file: Path, *, rungs: Sequence[int] = RUNGS, keep: float = KEEP) -> None:
        super().__init__()
        self.watched = metric
        self.state_file = Path(state_file)
        self.keep = keep
        self.recorded: dict[int, dict[str, float]] = {rung: {} for rung in rungs}
        self.reasons: dict[str, str] = {}

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """Called once before the search starts or goes on: take up the rungs of the time before."""
        if self.state_file.is_file():
            saved = json.loads(self.state_file.read_text())
            self.recorded = {int(rung): by_trial for rung, by_trial in saved["recorded"].items()}
            self.reasons = saved["reasons"]
        return True

    def on_trial_result(self, tune_controller, trial, result: dict[str, Any]) -> str:
        if trial.trial_id in self.reasons:  # a kill came before anyone took note
            return TrialScheduler.STOP
        if RETRAINS in trial.config:
            return TrialScheduler.CONTINUE
        value, rung = result[self.watched], rung_at(result["progress"], list(self.recorded))
        if rung is None or trial.trial_id in self.recorded[rung] or not np.isfinite(value):
            return TrialScheduler.CONTINUE
        limit = cut_off(list(self.recorded[rung].values()), self.keep)
        stop = limit is not None and value > limit
        self.recorded[rung][trial.trial_id] = value
        if stop:
            self.reasons[trial.trial_id] = f"{self.watched} {value:.4f} above the cut-off {limit:.4f} of rung {rung} %"
        write_atomically(self.state_file, json.dumps({"recorded": self.recorded, "reasons": self.reasons}))
        return TrialScheduler.STOP if stop else TrialScheduler.CONTINUE
