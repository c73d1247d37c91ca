"""Early termination that knows one-cycle schedules: trials are compared late, and by how they are expected to end."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from search.runs.atomic_files import write_atomically
from search.spaces.space import Space
from search.tuning.forecast import AtRung, forecast
from trainables.ray.trial import RETRAINS

RUNGS = (60, 80)
KEEP = 0.8
"""Gently: what ends best is often not yet among the best at a rung, see results/bench/search_quality.md."""
HALF_WAY = 50
"""Percent; the latest that trials of two epochs, which reach no rung, tell of their way."""
MIN_RECORDED = 3
MEDIAN_RUNGS = tuple(range(10, 100, 10))


def cut_off(recorded: Sequence[float], keep: float) -> float | None:
    """The largest metric with which a trial still belongs to the best `keep` share; None while too few are recorded."""
    return float(np.quantile(recorded, keep)) if len(recorded) >= MIN_RECORDED else None


def rung_at(progress: int, rungs: Sequence[int]) -> int | None:
    """The highest rung that `progress` percent has reached; None below the first, and at the end."""
    return max((rung for rung in rungs if rung <= progress < 100), default=None)


def new_scheduler(name: str, metric: str, space: Space, state_file: Path) -> TrialScheduler:
    """What ends bad trials early: those beyond a cut-off at late rungs, those worse than the median, or none."""
    if name == "rungs":
        return ProgressHalvingScheduler(metric, space, state_file)
    if name == "median":
        return ProgressHalvingScheduler(metric, space, state_file, rungs=MEDIAN_RUNGS, keep=0.5, forecasts=False)
    return FIFOScheduler()


@dataclass
class Curve:
    """What is known of a trial: its config's coordinates, see `Space.coordinates`, its first result at each rung, its
    latest one before them all, and the metric in the end of one that was trained to it."""

    point: list[float | None]
    results: dict[int, tuple[int, float]] = field(default_factory=dict)
    """Progress and metric by rung; 0 is before the first."""
    final: float | None = None
    seen: dict[int, AtRung] = field(default_factory=dict, repr=False, compare=False)
    """What `seen_from` has found since the last result."""

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> "Curve":
        results = {int(rung): (progress, metric) for rung, (progress, metric) in saved["results"].items()}
        return cls(saved["point"], results, saved["final"])

    def add(self, progress: int, metric: float, rung: int | None) -> bool:
        """Take in a result at `rung`, or before the first one. Returns whether it tells anything that is of use."""
        if rung in self.results or (rung is None and progress < HALF_WAY):
            return False
        self.results[rung or 0] = (progress, metric)
        self.seen.clear()
        return True

    def seen_from(self, rung: int) -> AtRung:
        """Its first result from `rung` on, or the last where it has none."""
        if rung not in self.seen:
            known = min((one for one in self.results if one >= rung), default=None)
            progress, metric = self.results[max(self.results) if known is None else known]
            self.seen[rung] = AtRung(metric, progress, self.point)
        return self.seen[rung]


class ProgressHalvingScheduler(FIFOScheduler):
    """Asynchronous successive halving (Li et al. 2020) over `progress`, the percent of the unfrozen stage that is done.

    Half-way through a one-cycle schedule the rate is high and the metric says little, and epoch 4 of 5 is not epoch 4
    of 20. So a trial is judged at a few late rungs in percent, never in its frozen stage, against the trials that were
    at the same rung before it: its first result between one rung and the next is the one that counts. With `forecasts`
    it is not their metrics there that are compared but what these let expect for the end, see `forecast`.

    Tune does not save its scheduler, so what trials reported is kept in `state_file`, with the reason of every stop.
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
        super().__init__()
        self.watched = metric
        self.space = space
        self.state_file = Path(state_file)
        self.rungs = rungs
        self.keep = keep
        self.forecasts = forecasts
        self.curves: dict[str, Curve] = {}
        self.texts: dict[str, str] = {}  # `_text` of each curve: a thousand are not formatted for each result
        self.reasons: dict[str, str] = {}
        self.stop_rungs: dict[str, int] = {}

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """Called once before the search starts or goes on: take up what was there before."""
        if self.state_file.is_file():
            saved = json.loads(self.state_file.read_text())
            curves = saved.get("curves", {})  # none in what an older version left
            self.curves = {trial: Curve.from_json(curve) for trial, curve in curves.items()}
            self.texts = {trial: self._text(trial) for trial in self.curves}
            self.reasons = saved["reasons"]
            self.stop_rungs = saved.get("rungs", {})
        return True

    def on_trial_result(self, tune_controller, trial, result: dict[str, Any]) -> str:
        if trial.trial_id in self.reasons:  # a kill came before anyone took note
            return TrialScheduler.STOP
        value, progress = result[self.watched], result["progress"]
        if RETRAINS in trial.config or not np.isfinite(value) or not 0 < progress < 100:
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

    def on_trial_complete(self, tune_controller, trial, result: dict[str, Any]) -> None:
        if trial.trial_id in self.curves and result.get("progress") == 100 and np.isfinite(result[self.watched]):
            self.curves[trial.trial_id].final = result[self.watched]
            self._save(trial.trial_id)

    def expected(self, curves: Sequence[Curve], rung: int) -> list[float]:
        """What the metric of each is expected to be in the end, as seen from `rung`."""
        asked = [curve.seen_from(rung) for curve in curves]
        finished = self._finished()
        known, finals = [curve.seen_from(rung) for curve in finished], [curve.final for curve in finished]
        return forecast(self.space, known, finals, asked).tolist()

    def _finished(self) -> list[Curve]:
        """Those from which forecasts are made; none where nothing is forecast."""
        return [one for one in self.curves.values() if self.forecasts and one.results and one.final is not None]

    def _reason_to_stop(self, curve: Curve, rung: int) -> str:
        """Empty where the trial is to go on."""
        others = [other for other in self.curves.values() if rung in other.results and other is not curve]
        *before, expected = self.expected([*others, curve], rung)
        limit = cut_off(before, self.keep)
        if limit is None or expected <= limit:
            return ""
        forecasted = f", {expected:.4f} expected in the end," if self._finished() else ""
        return f"{self.watched} {curve.results[rung][1]:.4f}{forecasted} above the cut-off {limit:.4f} of rung {rung} %"

    def _save(self, changed: str) -> None:
        self.texts[changed] = self._text(changed)
        curves, stops = ", ".join(self.texts.values()), json.dumps({"reasons": self.reasons, "rungs": self.stop_rungs})
        write_atomically(self.state_file, f'{{"curves": {{{curves}}}, {stops[1:]}')

    def _text(self, trial_id: str) -> str:
        """A trial's part of the state file."""
        curve = self.curves[trial_id]
        known = {"point": curve.point, "results": curve.results, "final": curve.final}
        return f"{json.dumps(trial_id)}: {json.dumps(known)}"
