"""Tune's loop, whose state and steps do not grow with the trials that have ended.

Tune keeps each trial of a search in memory and writes all of them to its state each time: with ten thousand trials that
is a core's work. Nothing needs an ended trial of it: its results are in the tables and in the study.
"""

import importlib
import time
from typing import Any

from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial
from ray.tune.trainable.metadata import _TrainingRunMetadata

FORGET_SECONDS = 60.0
"""After a trial's last result. By then the tables have its end even if the machine crashes."""
SAVE_SHARE = 0.05
"""Of the driver's time, that saves of its state may take. What a kill costs a running trial is what it did since."""


class ShortController(TuneController):
    """`TuneController` that forgets ended trials and keeps no statistics of the others."""

    def add_trial(self, trial: Trial) -> None:
        # Minima, means and the like of each metric take most of a trial's state, and nobody reads them.
        trial.run_metadata.__class__ = _WithoutStatistics
        super().add_trial(trial)

    def save_to_dir(self) -> None:
        self.forget_ended()
        started = time.thread_time()
        super().save_to_dir()  # type: ignore[no-untyped-call]  # Ray's
        shortest = float(self._checkpoint_period)
        self._checkpoint_manager._checkpoint_period = max(shortest, (time.thread_time() - started) / SAVE_SHARE)

    def forget_ended(self) -> None:
        """Forget the trials whose end the callbacks have heard of some time ago. One always stays: Tune cannot restore
        a search without trials."""
        before = time.time() - FORGET_SECONDS
        ended = {
            trial
            for trial in self._stopped_trials - self._live_trials  # a search's end stops trials that stay live
            if trial.run_metadata.last_result_time < before
        } - {self._trials[-1] if self._trials else None}
        if not ended:
            return
        self._trials[:] = [trial for trial in self._trials if trial not in ended]
        self._stopped_trials -= ended
        self._trials_to_cache -= ended
        for trial in ended:
            self._trial_metadata.pop(trial.trial_id, None)


class _WithoutStatistics(_TrainingRunMetadata):
    def update_metric(self, metric: str, value: Any, step: int | None = 1) -> None:
        pass


def use_short_controller() -> None:
    """Let `Tuner.fit` use it."""
    importlib.import_module("ray.tune.tune").TuneController = ShortController  # type: ignore[attr-defined]
