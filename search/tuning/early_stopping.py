"""Early stopping for one-cycle schedules: trials are compared late, by forecasts of their final metric."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from search.runs.objective import Objective
from search.runs.rungs_file import Known, RungsFile
from search.spaces.space import Space
from search.tuning.forecast import AtRung, forecast
from search.tuning.forecast_stopping import ForecastScheduler, Goal
from trainables.ray.trial import REFITS, RETRAINS

RUNGS = (60, 80)
KEEP = 0.8
"""High, because the final best is often not yet among the best at a rung, see results/bench/search_quality.md."""
MIN_PROGRESS = 50
"""Percent at which a result below the first rung starts to count: trials of two epochs have no later one."""
MIN_RECORDED = 3
MEDIAN_RUNGS = tuple(range(10, 100, 10))


def cut_off(recorded: Sequence[float], keep: float) -> float | None:
    """The largest metric that is still in the best `keep` share; None until `MIN_RECORDED` are recorded."""
    return float(np.quantile(recorded, keep)) if len(recorded) >= MIN_RECORDED else None


def rung_at(progress: int, rungs: Sequence[int]) -> int | None:
    """The highest rung that `progress` percent has reached; None below the first rung and at the end."""
    return max((rung for rung in rungs if rung <= progress < 100), default=None)


def new_scheduler(name: str, metric: str, space: Space, state_file: Path, goal: Goal | None = None) -> TrialScheduler:
    """The scheduler for `--scheduler`; halving stops no trial early."""
    if name == "forecast":
        return ForecastScheduler(goal or Goal(metric, Objective("error_rate")), space, state_file)
    if name == "rungs":
        return ProgressHalvingScheduler(metric, space, state_file)
    if name == "median":
        return ProgressHalvingScheduler(metric, space, state_file, rungs=MEDIAN_RUNGS, keep=0.5, forecasts=False)
    return FIFOScheduler()


def rungs_of(name: str) -> Sequence[int]:
    """The rungs of the scheduler for `--scheduler`, in percent."""
    return {"rungs": RUNGS, "median": MEDIAN_RUNGS}.get(name, ())


@dataclass
class Curve:
    """A trial's results that are used for forecasts."""

    point: list[float | None]
    """The config's coordinates, see `Space.coordinates`."""
    results: dict[int, tuple[int, float]] = field(default_factory=dict)
    """Rung -> progress and metric of the first result there. Rung 0 has the latest result below the first rung."""
    final: float | None = None
    """The metric at the end of the training, if it was completed."""
    probe: float | None = None
    """The metric of the probe that the training started from, if it did."""
    cache: dict[int, AtRung] = field(default_factory=dict, repr=False, compare=False)
    """Results of `at_rung`."""

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> "Curve":
        results = {int(rung): (progress, metric) for rung, (progress, metric) in saved["results"].items()}
        return cls(saved["point"], results, saved["final"], saved.get("probe"))

    def add(self, progress: int, metric: float, rung: int | None) -> bool:
        """Record a result at `rung`, or below the first one. Returns False if it does not count."""
        if rung in self.results or (rung is None and progress < MIN_PROGRESS):
            return False
        self.results[rung or 0] = (progress, metric)
        self.cache.clear()
        return True

    def at_rung(self, rung: int) -> AtRung:
        """The first result at `rung` or later; the last one if there is none."""
        if rung not in self.cache:
            nearest = min((r for r in self.results if r >= rung), default=max(self.results))
            progress, metric = self.results[nearest]
            self.cache[rung] = AtRung(metric, progress, self.point, self.probe)
        return self.cache[rung]


class ProgressHalvingScheduler(FIFOScheduler):
    """Asynchronous successive halving (Li et al. 2020) over `progress`, the percent of the unfrozen stage that is done.

    Half-way through a one-cycle schedule the learning rate is high and the metric says little, and epoch 4 of 5 is not
    comparable to epoch 4 of 20. So a trial is compared at a few late rungs in percent, never in its frozen stage, with
    the trials that were at the same rung before it. Its first result between two rungs counts for the lower one. With
    `forecasts`, the forecast final metrics are compared instead of the metrics at the rung, see `forecast`.

    Tune does not save its scheduler, so the results are saved in `state_file`, with the reason and rung of every stop.
    """

    def __init__(
        self,
        metric: str,
        space: Space,
        state_file: Path,
        *,
        rungs: Sequence[int] = RUNGS,
        keep: float = KEEP,
        forecasts: bool = True,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # Ray's
        self.watched = metric
        self.space = space
        self.file = RungsFile(state_file)
        self.rungs = rungs
        self.keep = keep
        self.forecasts = forecasts
        self.curves: dict[str, Curve] = {}
        self.reasons: dict[str, str] = {}
        self.stop_rungs: dict[str, int] = {}

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """Load the saved state. Tune calls this once, when a search starts or resumes."""
        saved = self.file.restored("results")
        self.curves = {trial: Curve.from_json(curve) for trial, curve in saved["curves"].items()}
        self.reasons, self.stop_rungs = dict(saved["reasons"]), dict(saved["rungs"])
        return True

    def on_trial_result(self, tune_controller: TuneController, trial: Trial, result: dict[str, Any]) -> str:
        if trial.trial_id in self.reasons:  # the search was killed before Tune saved the stop
            return TrialScheduler.STOP
        value, progress = result[self.watched], result["progress"]
        if {RETRAINS, REFITS} & set(trial.config) or not np.isfinite(value) or progress == 100:
            return TrialScheduler.CONTINUE
        if result.get("stage") == "probe":
            self.curves[trial.trial_id] = Curve(self.space.coordinates(trial.config), probe=value)
            self._save(trial.trial_id)
        if progress == 0:
            return TrialScheduler.CONTINUE
        if trial.trial_id not in self.curves:
            self.curves[trial.trial_id] = Curve(self.space.coordinates(trial.config))
        curve = self.curves[trial.trial_id]
        rung = rung_at(progress, self.rungs)
        if not curve.add(progress, value, rung):
            return TrialScheduler.CONTINUE
        reason = self._reason_to_stop(curve, rung) if rung else ""
        if rung and reason:
            self.reasons[trial.trial_id] = reason
            self.stop_rungs[trial.trial_id] = rung
        self._save(trial.trial_id)
        return TrialScheduler.STOP if reason else TrialScheduler.CONTINUE

    def on_trial_complete(self, tune_controller: TuneController, trial: Trial, result: dict[str, Any]) -> None:
        if trial.trial_id in self.curves and result.get("progress") == 100 and np.isfinite(result[self.watched]):
            self.curves[trial.trial_id].final = result[self.watched]
            self._save(trial.trial_id)

    def expected(self, curves: Sequence[Curve], rung: int) -> list[float]:
        """The expected final metric of each curve, from its result at `rung`."""
        finished = self._finished()
        known, finals = [curve.at_rung(rung) for curve, _ in finished], [final for _, final in finished]
        expected: list[float] = forecast(self.space, known, finals, [curve.at_rung(rung) for curve in curves]).tolist()
        return expected

    def _finished(self) -> list[tuple[Curve, float]]:
        """The curves, with their final metrics, on which forecasts are based; empty without `forecasts`."""
        curves = self.curves.values() if self.forecasts else ()
        return [(curve, curve.final) for curve in curves if curve.results and curve.final is not None]

    def _reason_to_stop(self, curve: Curve, rung: int) -> str:
        """Empty if the trial continues."""
        others = [other for other in self.curves.values() if rung in other.results and other is not curve]
        *before, expected = self.expected([*others, curve], rung)
        limit = cut_off(before, self.keep)
        if limit is None or expected <= limit:
            return ""
        final = f", {expected:.4f} expected in the end," if self._finished() else ""
        return f"{self.watched} {curve.results[rung][1]:.4f}{final} above the cut-off {limit:.4f} of rung {rung} %"

    def _save(self, changed: str) -> None:
        curve = self.curves[changed]
        known = {"point": curve.point, "results": dict(curve.results), "final": curve.final, "probe": curve.probe}
        more: Known = {"curves": {changed: known}}
        if changed in self.reasons:
            more |= {"reasons": {changed: self.reasons[changed]}, "rungs": {changed: self.stop_rungs[changed]}}
        self.file.add(more)
