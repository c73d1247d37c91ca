"""How many trials may run at once, as the cluster grows and shrinks."""

import math
import time
from collections.abc import Collection, Mapping
from typing import Any

from ray import tune
from ray.tune.experiment import Trial

from search.cli.messages import say
from search.cluster.gpu_sharing import Epoch, GpuSharing
from search.cluster.resources import Node, present_nodes, reachable_nodes, room, room_in_memory
from trainables.ray.trial import TRIALS_PER_GPU, recipe_of
from trainables.ray.worker_group import IDLE_SECONDS, GroupSize
from trainables.recipe import Recipe
from trainables.system.text import duration, many

LOOK_SECONDS = 5.0
"""Maximum age of what is known about the cluster."""
REMIND_SECONDS = 120.0
ROUNDING = 1e-6
OUT_OF_MEMORY = "out of memory"
"""How the failure of such a trial begins, see `trainables.ray.worker`."""
MAX_WAITING = 8
"""How many workers may wait for nodes, at least; with more nodes up, as many as these have room for."""
YIELD_SECONDS = IDLE_SECONDS + 10
"""For this long no new trial takes the workers of an ended one if others wait for room: idle workers are released."""


class Capacity:
    """What the nodes of the connected cluster have room for, and what the search of one run asks of them.

    Tune saves it with its state. A resumed search, maybe in another folder, uses the one that its own start has made.
    """

    def __init__(
        self,
        run_id: str,
        size: GroupSize,
        num_workers: Mapping[str, int],
        max_trials: int | None = None,
        *,
        launched: bool = False,
        shared_sizes: Mapping[int, GroupSize] | None = None,
        measures: bool = False,
    ) -> None:
        self._size = size
        self.shared_sizes = shared_sizes or {}  # by the trials that share a GPU, where that may change
        self.sharing = GpuSharing(self.shared_sizes, measures=measures) if shared_sizes else None
        self.num_workers = num_workers  # of architectures by pattern, see `GroupSize`
        self.max_trials = max_trials  # None: as many as fit
        self.launched = launched  # see `reachable_nodes`
        self._shares: dict[str, int] = {}  # of a GPU, by the trial's id, as the number of trials that share one
        self.run_id = run_id
        self._looked = self._freed = -math.inf
        self._present = 0
        self._lost_nodes = False
        _capacities[run_id] = self

    def __reduce__(self) -> tuple[Any, ...]:
        return _capacity_of, (self.run_id,)

    @property
    def size(self) -> GroupSize:
        """Of the trials to come."""
        return self.shared_sizes[self.sharing.trials_per_gpu] if self.sharing else self._size

    def config(self, trial_id: str) -> dict[str, Any]:
        """What a proposal's config needs beside its settings: a trial keeps the share of a GPU that it begins with."""
        if self.sharing is None:
            return {}
        self._shares[trial_id] = self.sharing.trials_per_gpu
        return {TRIALS_PER_GPU: self.sharing.trials_per_gpu}

    def weighed(self, live: Mapping[str, int]) -> list[float]:
        """The workers of trials by their ids, each as many as workers of the trials to come fit into its place."""
        now = self.sharing.trials_per_gpu if self.sharing else 1
        return [workers * now / self._shares.get(trial_id, now) for trial_id, workers in live.items()]

    def learn(self, trial_id: str, recipe: Mapping[str, Any], result: Mapping[str, Any]) -> str:
        """Learn from a trial's result how many may share a GPU; what changes, as a sentence, or nothing."""
        if self.sharing is None or TRIALS_PER_GPU not in recipe:
            return ""
        before, reserved = self.sharing.trials_per_gpu, recipe[TRIALS_PER_GPU]
        self._shares[trial_id] = reserved  # also of a trial that a resumed search continues
        if result.get("batch_parts", 1) > 1 or result["failure"].startswith(OUT_OF_MEMORY):
            said = self.sharing.ran_out_of_memory(reserved)
        elif result["failure"] or "gpu" not in result:
            return ""
        else:
            said = self.sharing.add(_epoch(trial_id, recipe, result, ended=time.monotonic()))
        if self.sharing.trials_per_gpu != before:
            self._looked = -math.inf  # there is room for another number of workers
        return said

    @property
    def largest(self) -> int:
        """Workers of the largest trial."""
        return max([self.size.num_workers, *self.num_workers.values()])

    def group_size(self, arch: str) -> GroupSize:
        return self.size.for_arch(arch, self.num_workers)

    def has_room(self, live: Collection[float], more: int) -> bool:
        """Whether a trial of `more` workers may start besides those with `live` workers, see `weighed`; the first one
        always may.

        Some may wait for nodes, which is what makes an autoscaler add them.
        """
        if not live:
            return True
        if self.max_trials is not None and len(live) >= self.max_trials:
            return False
        wanted = math.ceil(sum(live) - ROUNDING) + more
        if wanted <= self.present:
            return True
        most_waiting = max(MAX_WAITING, self.largest, self.present)
        yields = time.monotonic() - self._freed < YIELD_SECONDS
        return not yields and wanted <= min(self.reachable, self.present + most_waiting)

    def note_end(self, live: Collection[float]) -> None:
        """One of the trials with `live` workers has ended. Trials that wait for room get it before a new one: they may
        need more workers than it had, or may have lost their node. Otherwise it does not matter which of them waits.
        """
        if sum(live) > self.present and (self.num_workers or self._lost_nodes):
            self._freed = time.monotonic()

    @property
    def present(self) -> int:
        """Workers for which the present nodes have room."""
        self._look()
        return self._present

    @property
    def reachable(self) -> int:
        """The same with the nodes that the autoscaler can add."""
        self._look()
        return self._reachable

    def _look(self) -> None:
        if time.monotonic() - self._looked < LOOK_SECONDS:
            return
        nodes, before = present_nodes(), self._present
        reachable = reachable_nodes(nodes, launched=self.launched)
        # An autoscaler adds nodes for requested CPUs, not for memory: requesting fewer would stop it.
        memory_counts = self.max_trials is None and len(reachable) == len(nodes)
        self._present = self._room(nodes, memory_counts)
        if self._present != before:
            self._lost_nodes = self._present < before
        self._reachable = self._room(reachable, memory_counts)
        self._looked = time.monotonic()

    def _room(self, nodes: list[Node], memory_counts: bool) -> int:
        return room_in_memory(nodes, self.size, self.largest) if memory_counts else room(nodes, self.size)


def _epoch(trial_id: str, settings: Mapping[str, Any], result: Mapping[str, Any], *, ended: float) -> Epoch:
    """That a result tells of; it arrives soon after the epoch's end."""
    recipe = Recipe.from_dict(recipe_of({}, settings))
    done = max(0, result["epoch"] - 1)
    size = recipe.image_size_at(done), recipe.batch_size_at(done)
    return Epoch(
        trial=trial_id,
        gpu=result["gpu"],
        kind=(recipe.arch, result["stage"], *size, result["gpu_kind"]),
        began=ended - result["train_seconds"] - result["valid_seconds"],
        ended=ended,
        images_per_second=result["images_per_second"],
        trials_per_gpu=settings[TRIALS_PER_GPU],
    )


_capacities: dict[str, Capacity] = {}
"""Of each search in this process, by its run's id."""


def _capacity_of(run_id: str) -> Capacity:
    return _capacities[run_id]


class CapacityNews(tune.Callback):
    """Reports when trials wait for nodes, and when nodes come or go."""

    def __init__(self, capacity: Capacity, settings: Mapping[str, Any]) -> None:
        self.capacity = capacity
        self.settings = dict(settings)  # of all trials, except what is searched
        self.reported: int | None = None
        self.waiting_since: float | None = None
        self.reminded = 0.0

    def setup(self, *args: Any, **info: Any) -> None:
        self.reported = self.waiting_since = None

    def on_step_begin(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        if not self.capacity.launched:
            return
        present = self.capacity.present
        wanted = max(self.capacity.largest, self._workers(trials))
        if present < wanted:
            self._wait(present, wanted)
        elif self.waiting_since is not None:
            self.waiting_since = None
            if present != self.reported:
                say(f"cluster: room for {many(present, 'worker')} now, the search continues")
        elif self.reported is not None and present != self.reported:
            change = "more" if present > self.reported else "fewer"
            say(f"cluster: {change} nodes, room for {many(present, 'worker')} now")
        self.reported = present

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        if said := self.capacity.learn(trial.trial_id, {**self.settings, **trial.config}, result):
            say(f"GPU: {said}")
            self.reported = None  # the room has changed, and no node has come or gone

    def _workers(self, trials: list[Trial]) -> int:
        """Of the running trials, see `Capacity.weighed`."""
        default = self.settings["arch"]
        archs = {t.trial_id: t.config.get("arch", default) for t in trials if t.status == t.RUNNING}
        workers_of = {arch: self.capacity.group_size(arch).num_workers for arch in set(archs.values())}
        running = {trial_id: workers_of[arch] for trial_id, arch in archs.items()}
        return math.ceil(sum(self.capacity.weighed(running)) - ROUNDING)

    def _wait(self, present: int, wanted: int) -> None:
        now = time.monotonic()
        if self.waiting_since is None or present != self.reported:
            self.waiting_since, self.reminded = self.waiting_since or now, now
            say(waiting(present, self.capacity.reachable, wanted))
        elif present < self.capacity.largest and now - self.reminded >= REMIND_SECONDS:
            self.reminded = now
            say(f"cluster: still waiting for nodes, for {duration(now - self.waiting_since)} now")


def waiting(present: int, reachable: int, wanted: int) -> str:
    """What a search says if its trials do not fit on the present nodes."""
    more = f"the autoscaler can raise that to {reachable}" if reachable > present else "lost nodes may return"
    return f"cluster: waiting for nodes. Trials need {many(wanted, 'worker')}, there is room for {present}; {more}"
