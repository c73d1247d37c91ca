"""Early stopping by forecasts: after every epoch, how likely is it that this trial ends better than the incumbent?"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from search.runs.objective import Objective
from search.runs.rungs_file import Known, RungsFile
from search.spaces.space import Space
from search.tuning.curve_forecast import Curve, Level, Prior, Regression, default_prior
from trainables.ray.trial import REFITS, RETRAINS

CHANCE_PER_EPOCH, MOST_CHANCE = 0.01, 0.1
"""Of ending better than the incumbent: a trial goes on where each epoch that it has left is worth so much of a chance,
and always above the second one. Where little is left to save, a stop has to be surer, for it also takes from the
searcher what the trial's end would have taught. See results/bench/early_termination.md."""
MIN_FINISHED = 3
"""Trials that a search trains to their ends before a forecast stops one: only they show what the prior cannot know."""
MOST_FINISHED = 100
"""Of the last trials, from which forecasts learn: a decision takes no longer in a long search."""
LOST = 0.85
"""How far a trial is from its probe, or from 0, to guessing: no curve of the published tables came back from there."""
SMALLEST = 1e-9
HALF = 50
"""Percent of the schedule after which a trial without a probe should have learned something."""


@dataclass(frozen=True)
class Goal:
    """What the search minimises."""

    column: str
    """In a trial's result."""
    objective: Objective
    num_classes: int | None = None
    both: bool = False
    """Whether the seconds of a training are minimised, too."""

    @property
    def guessing(self) -> float | None:
        """What a model reaches that has learned nothing, where the number of classes tells it."""
        known = self.num_classes and self.objective.metric in ("error_rate", "balanced_error")
        return 1 - 1 / self.num_classes if known and self.num_classes else None


class ForecastScheduler(FIFOScheduler):
    """Stops a trial that is unlikely to become the incumbent, see `curve_forecast`; with two objectives, one that is
    unlikely to join the Pareto front.

    The incumbent is the best of the trials that were trained to their ends and of the screen's probes. A trial whose
    error has come near that of guessing stops whatever the forecasts.

    Tune does not save its scheduler, so the curves are saved in `state_file`, with the reason of every stop. The
    decisions follow from the order of the results alone: a resumed search makes those that it would have made.
    """

    def __init__(
        self,
        goal: Goal,
        space: Space,
        state_file: Path,
        *,
        chance_per_epoch: float = CHANCE_PER_EPOCH,
        prior: Prior | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # Ray's
        self.goal = goal
        self.space = space
        self.file = RungsFile(state_file)
        self.chance_per_epoch = chance_per_epoch
        self.prior = prior or default_prior()
        self.curves: dict[str, Curve] = {}
        self.reasons: dict[str, str] = {}
        self.chances: list[tuple[str, int, float]] = []
        """Trial, progress and chance of each decision since the start, for measurements."""
        self._finished: dict[str, Curve] = {}
        self._regressions: dict[str, Regression] = {}  # by incumbent, until another trial has finished

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """Load the saved state. Tune calls this once, when a search starts or resumes."""
        saved = self.file.restored("epochs")
        self.curves = {trial: Curve.from_json(curve) for trial, curve in saved["curves"].items()}
        self.reasons = dict(saved["reasons"])
        self._learn()
        return True

    def on_trial_result(self, tune_controller: TuneController, trial: Trial, result: dict[str, Any]) -> str:
        if trial.trial_id in self.reasons:  # the search was killed before Tune saved the stop
            return TrialScheduler.STOP
        if not self._counts(trial, result) or result["progress"] == 100:
            return TrialScheduler.CONTINUE
        curve = self.curves.setdefault(trial.trial_id, self._new_curve(trial, result))
        if not curve.add(result["epoch"], result["progress"], result[self.goal.column], result["valid_loss"]):
            return TrialScheduler.CONTINUE  # a restored trial repeats its last result
        if result.get("stage") == "probe":
            curve.probe = result[self.goal.column]
        curve.seconds = expected_seconds(result)
        reason = self._lost(curve, result) or self._unlikely(trial.trial_id, curve, epochs_left(result))
        if reason:
            self.reasons[trial.trial_id] = reason
        self._save(trial.trial_id)
        return TrialScheduler.STOP if reason else TrialScheduler.CONTINUE

    def on_trial_complete(self, tune_controller: TuneController, trial: Trial, result: dict[str, Any]) -> None:
        if result.get("progress") != 100 or not self._counts(trial, result):
            return
        curve = self.curves.setdefault(trial.trial_id, self._new_curve(trial, result))
        curve.final = (result[self.goal.column], result["valid_loss"])
        curve.seconds = expected_seconds(result)
        self._learn()
        self._save(trial.trial_id)

    def _learn(self) -> None:
        """To be called when another trial has finished."""
        self._finished = {trial: curve for trial, curve in self.curves.items() if curve.final is not None}
        self._regressions.clear()

    def _counts(self, trial: Trial, result: dict[str, Any]) -> bool:
        """Whether a result tells how trials go: retrainings have other seeds, and failed ones no metric."""
        return not {RETRAINS, REFITS} & set(trial.config) and bool(
            np.isfinite([result.get(self.goal.column, np.nan), result.get("valid_loss", np.nan)]).all()
        )

    def _new_curve(self, trial: Trial, result: dict[str, Any]) -> Curve:
        config = {name: trial.config[name] for name in self.space.dimensions if name in trial.config}
        rate = self.space.full(config)["lr_max"]
        return Curve(self.space.coordinates(config), rate, num_images=int(result.get("valid_images", 1000)))

    def _lost(self, curve: Curve, result: dict[str, Any]) -> str:
        """Why a trial has lost what its probe knew, or learned nothing; empty if it has not."""
        guessing, _, progress, metric, _ = self.goal.guessing, *curve.epochs[-1]
        one_label = "balanced_error" in result  # of images with several, guessing has another error
        too_soon = result.get("stage") != "unfrozen" or (curve.probe is None and progress < HALF)
        if guessing is None or too_soon or not one_label:
            return ""
        start = min(curve.probe or 0.0, guessing)
        if metric < start + LOST * (guessing - start):
            return ""
        text, name = self.goal.objective.text, self.goal.objective.name
        began = "" if curve.probe is None else f", after {text(curve.probe)} of its probe"
        return f"{name} {text(metric)} at {progress} % of the schedule{began}: guessing has {text(guessing)}"

    def _unlikely(self, trial_id: str, curve: Curve, epochs: int) -> str:
        """Why the trial is too unlikely to become the incumbent for the epochs that it has left; empty if it is not."""
        incumbent = self._incumbent(curve)
        if incumbent is None:
            return ""
        best = self.curves[incumbent]
        assert best.final is not None
        if incumbent not in self._regressions:
            trained = [other for other in self._finished.values() if other.epochs]
            if len(trained) < MIN_FINISHED:
                return ""
            self._regressions[incumbent] = Regression(self.prior, trained[-MOST_FINISHED:], Level.of(best))
        forecast = self._regressions[incumbent].forecast(curve)
        chance = forecast.chance_below(math.log(max(best.final[0], SMALLEST)))  # by an image at least
        self.chances.append((trial_id, curve.epochs[-1][1], chance))
        if chance >= min(MOST_CHANCE, self.chance_per_epoch * epochs):
            return ""
        text = self.goal.objective.text
        likely = f"{100 * chance:.0f} %" if chance >= 0.005 else "less than 1 %"
        expected = f"expected {text(forecast.expected).removesuffix(' %')} ± {text(forecast.error)}"
        return f"{likely} likely to beat {text(best.final[0])}: {expected}"

    def _incumbent(self, curve: Curve) -> str | None:
        """The best that has finished; with two objectives, of those that take no longer than this one."""
        done = [
            (other.final, trial)
            for trial, other in self._finished.items()
            if not self.goal.both or other.seconds <= curve.seconds
        ]
        return min(done)[1] if done else None

    def _save(self, changed: str) -> None:
        more: Known = {"curves": {changed: asdict(self.curves[changed])}}
        if changed in self.reasons:
            more |= {"reasons": {changed: self.reasons[changed]}}
        self.file.add(more)


def epochs_left(result: dict[str, Any]) -> int:
    return int(result.get("epochs_total", 1) - result.get("epoch", 0))


def expected_seconds(result: dict[str, Any]) -> float:
    """That the whole training takes, if it goes on as it has begun."""
    share: float = max(1, result.get("epoch", 1)) / max(1, result.get("epochs_total", 1))
    seconds: float = result.get("seconds", 0.0)
    return seconds / min(1.0, share)
