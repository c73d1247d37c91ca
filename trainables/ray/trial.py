"""One trial as Ray Tune sees it: a `tune.Trainable` whose step is one epoch.

The actor trains nothing and imports no torch. It drives a warm worker group, which outlives the trial: with
`reuse_actors=True` Tune hands the next trial to the same actor through `reset_config`.
"""

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray import tune

from trainables.data.held_out_images import Remaining
from trainables.data.labelled_images import MAX_UNREADABLE
from trainables.ray.messages import Outcome, TrialSpec
from trainables.ray.retry_limits import MAX_HOSTS
from trainables.ray.worker_group import (
    GroupEnded,
    GroupHost,
    GroupReleased,
    GroupSize,
    living_nodes,
)
from trainables.recipe import Recipe
from trainables.training import checkpoint

CLOSE_SECONDS = 10.0
"""So long workers may take to leave."""
RETRAINS = "retrains"
"""In a config: the table's id of the trial whose recipe is trained once more. No setting of the recipe."""


@dataclass(frozen=True, kw_only=True)
class TrialOptions:
    """What all trials of a search share."""

    settings: dict[str, Any]  # the recipe, but for what is searched
    data: str | Remaining  # source of the images, see `source`
    data_digest: str | None = None  # of the images that every node must have
    weights: str | None  # source of pretrained weights
    checkpoints: str  # the folder with one of its own for each trial
    group_size: GroupSize
    num_workers: Mapping[str, int] = field(default_factory=dict)  # of architectures by pattern, see `GroupSize`
    cache: str = "auto"  # how presized images are stored, see `presize`
    max_unreadable: float = MAX_UNREADABLE  # the share of the images that may be unreadable
    split_seed: int = 0
    stall_timeout: float = math.inf  # seconds without progress after which workers are killed


def table_id(trial) -> str:
    """Tune's trial id, such as 00876659 or 976e1612, made unmistakable for a number."""
    return unmistakable(trial.trial_id)


def unmistakable(trial_id: str) -> str:
    return f"t{trial_id}"


class FineTuneTrial(tune.Trainable):
    """Reports one result per epoch: the metrics of `FineTune.run_epoch`, `epochs_total`, `seconds` of training and
    validation so far, and `overhead_seconds`.

    A trial that cannot go on (diverged, no weights, workers lost again and again) reports `failure`, the reason, and is
    done: trying again would give the same.

    It keeps its own checkpoint, of its last epoch. (For each of Tune's own, Tune writes the state of all trials anew:
    after some hundred trials nothing cost more.) A trial that finds one first reports that epoch's result once more,
    since a kill may have come before anyone took note, and then goes on.
    """

    def setup(self, config: dict[str, Any], options: TrialOptions) -> None:
        self.options = options
        self.host = self.host_size = self.host_node = None
        self._begin(config)
        if not self.repeat:  # such a trial may have ended: its workers would wait in the place of others
            self._start_host()

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._begin(new_config)
        if self.size != self.host_size:
            self.cleanup()  # these workers are too few or too many
        return True

    def _begin(self, config: dict[str, Any]) -> None:
        self.recipe = {**self.options.settings, **{name: v for name, v in config.items() if name != RETRAINS}}
        self.size = self.options.group_size.for_arch(self.recipe["arch"], self.options.num_workers)
        self.folder = Path(self.options.checkpoints) / table_id(self)
        self.handed_over = False
        saved = checkpoint.last_whole(self.folder)
        self.files, self.last_result = saved or (None, {})
        self.repeat = saved is not None
        self.epochs_done = self.last_result.get("epoch", 0)
        self.overhead_seconds = self.last_result.get("overhead_seconds", 0.0)
        self.seconds = self.last_result.get("seconds", 0.0)

    def step(self) -> dict[str, Any]:
        if self.repeat:
            self.repeat = False
            ended = checkpoint.TRAINING_FILE not in self.files
            return self.last_result | {"done": ended}
        result = self._next_result()
        checkpoint.save(self.folder, self.epochs_done + bool(result["failure"]), self.files or {}, result)
        return result

    def _next_result(self) -> dict[str, Any]:
        try:
            total = Recipe.from_dict(self.recipe).total_epochs
        except ValueError as error:
            return self._failed(str(error))
        outcome = self._run_epoch()
        if outcome.failure:
            self.handed_over = False
            return self._failed(outcome.failure)
        self.epochs_done = outcome.metrics["epoch"]
        finished = self.epochs_done == total
        self.files = checkpoint.model_only(outcome.state) if finished else outcome.state
        if self.epochs_done == 1:
            self.overhead_seconds = outcome.metrics["overhead_seconds"]
        self.seconds += outcome.metrics["train_seconds"] + outcome.metrics["valid_seconds"]
        of_trial = {"seconds": self.seconds, "overhead_seconds": self.overhead_seconds}
        of_trial |= {"epochs_total": total, "training_iteration": self.epochs_done}
        return {**outcome.metrics, **of_trial, "failure": "", "done": finished}

    def _failed(self, reason: str) -> dict[str, Any]:
        self.files = None
        return {"failure": reason, "error_rate": math.nan, "valid_loss": math.nan, "done": True}

    def cleanup(self) -> None:
        if self.host is not None:
            # Without this actor the host is gone, too. A group that still waits for room cannot leave; what it reserved
            # is freed by the search, see `search.cluster.abandoned_room`.
            self.host.close.remote()
            ray.wait([self.host.ended.remote()], timeout=CLOSE_SECONDS)
        self.host = None

    def _run_epoch(self) -> Outcome:
        """One epoch, on a new worker group where the old one is gone."""
        lost_on, reason = [], ""  # nodes
        while _num_that_count(lost_on) < MAX_HOSTS:
            if self.host is None:
                self._start_host()
            try:
                if not self.handed_over:
                    self.host_node = ray.get(self.host.node.remote())
                    ray.get(self.host.begin.remote(self._spec(), self.epochs_done, self.files))
                    self.handed_over = True
                return ray.get(self.host.run_epoch.remote())
            except GroupReleased:
                self.host = None
            except (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError, GroupEnded) as error:
                self.host, reason = None, str(error)
                lost_on.append(self.host_node)
            self.handed_over = False
        return Outcome(failure=f"lost its worker group {MAX_HOSTS} times: {reason}")

    def _spec(self) -> TrialSpec:
        options = self.options
        return TrialSpec(
            trial_id=self.trial_id,
            recipe=self.recipe,
            data=options.data,
            data_digest=options.data_digest,
            weights=options.weights,
            cache=options.cache,
            max_unreadable=options.max_unreadable,
            split_seed=options.split_seed,
        )

    def _start_host(self) -> None:
        # No CPU of its own: the workers reserve what the training uses. Any strategy but the default one keeps it out
        # of Tune's placement group, which is pinned to the head node.
        strategies, node = ray.util.scheduling_strategies, _node_with_room(self.size)
        strategy = strategies.PlacementGroupSchedulingStrategy(placement_group=None)
        if node is not None:
            strategy = strategies.NodeAffinitySchedulingStrategy(node, soft=True)
        host = ray.remote(num_cpus=0, max_concurrency=1000, scheduling_strategy=strategy)(GroupHost)
        self.host = host.remote(self.size, self.options.stall_timeout)
        self.host_size, self.host_node = self.size, node
        self.handed_over = False


def _num_that_count(lost_on: list[str | None]) -> int:
    """How many hosts were lost for another reason than the loss of their node. Ray reports a lost node many seconds
    after its actors, so a loss that counts at first may not count later."""
    nodes = living_nodes() if lost_on else {}
    return sum(node is None or node in nodes for node in lost_on)


def _node_with_room(size: GroupSize) -> str | None:
    """A node on which a worker could run: a host and Ray Train hold 0.4 GB, and the head has the trials already."""
    asked = {"CPU": size.cpus_per_worker, "GPU": size.gpus_per_worker}
    nodes = living_nodes()
    fitting = [node for node, has in nodes.items() if all(has.get(name, 0) >= least for name, least in asked.items())]
    return random.choice(fitting) if fitting else None
