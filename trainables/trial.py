"""One trial as Ray Tune sees it: a `tune.Trainable` whose step is one epoch.

The actor trains nothing and imports no torch. It drives a warm worker group, which outlives the trial: with
`reuse_actors=True` Tune hands the next trial to the same actor through `reset_config`.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import tune

from trainables import checkpoint
from trainables.recipe import Recipe
from trainables.worker_group import GroupEnded, GroupHost, GroupSize, Outcome, TrialSpec

PROGRESS_FILE = "trial.json"
MAX_HOSTS = 3
"""How often a trial starts a new worker group for one epoch before it gives up."""


@dataclass(frozen=True, kw_only=True)
class TrialOptions:
    """What all trials of a search share."""

    settings: dict[str, Any]  # the recipe, but for what is searched
    data: str
    weights: str | None
    group_size: GroupSize
    cache: str = "auto"  # how presized images are stored, see `presize`
    split_seed: int = 0


class FineTuneTrial(tune.Trainable):
    """Reports one result per epoch: the metrics of `FineTune.run_epoch`, `epochs_total` and `overhead_seconds`.

    A trial that cannot go on (diverged, no weights, workers lost again and again) reports `failure`, the reason, and is
    done: trying again would give the same.
    """

    def setup(self, config: dict[str, Any], options: TrialOptions) -> None:
        self.options = options
        self.host = None
        self._begin(config)
        self._start_host()

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._begin(new_config)
        return True

    def _begin(self, config: dict[str, Any]) -> None:
        self.recipe = {**self.options.settings, **config}
        self.files: checkpoint.Files | None = None
        self.epochs_done = 0
        self.overhead_seconds = 0.0
        self.handed_over = False
        self.last_result: dict[str, Any] = {}

    def step(self) -> dict[str, Any]:
        try:
            total = Recipe.from_dict(self.recipe).total_epochs
        except ValueError as error:
            return _failed(str(error))
        if self.epochs_done == total:  # restored from its end: the search was killed before it took note
            return self.last_result
        outcome = self._run_epoch()
        if outcome.failure:
            self.handed_over = False
            return _failed(outcome.failure)
        self.epochs_done = outcome.metrics["epoch"]
        finished = self.epochs_done == total
        self.files = checkpoint.model_only(outcome.state) if finished else outcome.state
        if self.epochs_done == 1:
            self.overhead_seconds = outcome.metrics["overhead_seconds"]
        overhead = {"overhead_seconds": self.overhead_seconds}
        result = {**outcome.metrics, **overhead, "epochs_total": total, "failure": "", "done": finished}
        self.last_result = dict(result)  # Tune adds to the one that it gets
        return result

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        progress = {"epochs_done": self.epochs_done, "overhead_seconds": self.overhead_seconds}
        progress["last_result"] = self.last_result
        (Path(checkpoint_dir) / PROGRESS_FILE).write_text(json.dumps(progress))
        checkpoint.write(Path(checkpoint_dir), self.files or {})

    def load_checkpoint(self, checkpoint_dir: str) -> None:
        progress = json.loads((Path(checkpoint_dir) / PROGRESS_FILE).read_text())
        self.epochs_done, self.overhead_seconds = progress["epochs_done"], progress["overhead_seconds"]
        self.last_result = progress["last_result"]
        self.files = checkpoint.read(Path(checkpoint_dir))
        self.handed_over = False

    def cleanup(self) -> None:
        if self.host is not None:
            self.host.close.remote()

    def _run_epoch(self) -> Outcome:
        """One epoch, on a new worker group where the old one is gone."""
        for _ in range(MAX_HOSTS):
            if self.host is None:
                self._start_host()
            try:
                if not self.handed_over:
                    ray.get(self.host.begin.remote(self._spec(), self.epochs_done, self.files))
                    self.handed_over = True
                return ray.get(self.host.run_epoch.remote())
            except (ray.exceptions.RayActorError, GroupEnded) as error:
                self.host, self.handed_over, reason = None, False, str(error)
        return Outcome(failure=f"lost its worker group {MAX_HOSTS} times: {reason}")

    def _spec(self) -> TrialSpec:
        options = self.options
        return TrialSpec(
            trial_id=self.trial_id,
            recipe=self.recipe,
            data=options.data,
            weights=options.weights,
            cache=options.cache,
            split_seed=options.split_seed,
        )

    def _start_host(self) -> None:
        # No CPU of its own: the workers reserve what the training uses. Not inside Tune's placement group, which is
        # pinned to the head node.
        strategy = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(placement_group=None)
        host = ray.remote(num_cpus=0, max_concurrency=1000, scheduling_strategy=strategy)(GroupHost)
        self.host = host.remote(self.options.group_size)
        self.handed_over = False


def _failed(reason: str) -> dict[str, Any]:
    return {"failure": reason, "error_rate": math.nan, "valid_loss": math.nan, "done": True}
