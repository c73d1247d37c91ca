"""Warm worker groups: one Ray Train run whose workers serve one trial after another.

A trial talks to a `GroupHost`, an actor that runs one trainer of Ray Train for as long as the search lasts. Its train
function (`serve`) is a loop that asks the host for commands: "train the next epoch of this trial". Starting a worker
(process, imports, process group) is paid once per slot of the search instead of once per trial.

The host keeps the trial's last state, so when Ray Train restarts a group whose worker was lost, the new workers rebuild
the trial and repeat the command.
"""

import asyncio
import fnmatch
import logging
import shutil
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import ray

from trainables.checkpoint import Files
from trainables.held_out import Remaining
from trainables.recipe import Recipe

logger = logging.getLogger(__name__)

MAX_TRIES = 3
"""A command that lost its workers this often fails its trial."""
MAX_LOST_NODES = 10
"""The same where nodes went away with them, which happens to good trials, too, on machines that come and go."""
MAX_START_FAILURES = 10
"""A group whose workers died while they started this often is given up."""
IDLE_SECONDS = 30.0
"""Workers that have had nothing to do for so long leave, and others can have their CPUs and GPUs."""


@dataclass(frozen=True, kw_only=True)
class GroupSize:
    """The workers of one trial and what each of them reserves."""

    num_workers: int = 1
    cpus_per_worker: float = 1
    gpus_per_worker: int = 0

    def for_arch(self, arch: str, num_workers: Mapping[str, int]) -> "GroupSize":
        """The size for an architecture; `num_workers` has those of patterns such as resnet101*, the last one counts."""
        found = [count for pattern, count in num_workers.items() if fnmatch.fnmatchcase(arch, pattern)]
        return replace(self, num_workers=found[-1]) if found else self


@dataclass(frozen=True, kw_only=True)
class TrialSpec:
    """All that a worker needs to build a trial."""

    trial_id: str
    recipe: dict[str, Any]
    data: str | Remaining  # source of the images, see `source`
    data_digest: str | None = None  # of the images that it must have
    weights: str | None = None  # source of pretrained weights
    cache: str = "auto"  # how presized images are stored, see `presize`
    split_seed: int = 0


@dataclass(frozen=True)
class Command:
    """Train the epoch after `epochs_done` of `trial`. Safe to repeat."""

    number: int
    trial: TrialSpec
    epochs_done: int


@dataclass(frozen=True)
class Outcome:
    """What became of a command: an epoch's metrics and the state after it, or the reason why the trial failed."""

    metrics: dict[str, Any] = field(default_factory=dict)
    state: Files | None = None
    failure: str | None = None


class GroupEnded(RuntimeError):
    """The worker group is gone and will not come back by itself."""


class GroupReleased(GroupEnded):
    """It was idle and left its resources to others."""


def living_nodes() -> dict[str, dict[str, float]]:
    """Node id -> all resources of the node."""
    return {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}


class GroupHost:
    """Async actor between a trial slot and its workers."""

    def __init__(self, size: GroupSize) -> None:
        self._trial: TrialSpec | None = None
        self._epochs_done = 0
        self._state: Files | None = None
        self._command: Command | None = None
        self._num_workers = size.num_workers
        self._tries = self._lost_nodes = 0
        self._taken = 0
        self._numbers = 0
        self._closing = False
        self._nodes: set[str] = set()
        self._met: set[int] = set()  # workers that have the images of the command
        self._idle: asyncio.TimerHandle | None = None
        self._changed = asyncio.Condition()
        self._run_ended = asyncio.Event()
        self._outcome: asyncio.Future | None = None
        self._loop = asyncio.get_event_loop()
        myself = ray.get_runtime_context().current_actor
        threading.Thread(target=self._run_trainer, args=(size, myself), daemon=True).start()
        self._loop.call_soon_threadsafe(self._rest)

    # Called by the trial.

    async def node(self) -> str:
        """Where this actor is."""
        return ray.get_runtime_context().get_node_id()

    async def begin(self, trial: TrialSpec, epochs_done: int, state: Files | None) -> None:
        """Make `trial` the current one, at the end of `epochs_done` epochs with `state`."""
        if self._closing:
            raise GroupReleased("the worker group was idle and has left")
        self._trial, self._epochs_done, self._state = trial, epochs_done, state

    async def run_epoch(self) -> Outcome:
        """Train the current trial's next epoch. Raises `GroupEnded` where there are no workers any more."""
        if self._closing:
            raise GroupReleased("the worker group was idle and has left")
        self._idle.cancel()
        self._numbers += 1
        self._tries = self._lost_nodes = 0
        self._met.clear()
        self._outcome = self._outcome_of_ended_group() or self._loop.create_future()
        self._command = Command(self._numbers, self._trial, self._epochs_done)
        await self._notify()
        outcome = await self._outcome
        self._rest()
        if outcome.failure is None:
            self._epochs_done += 1
            self._state = outcome.state
        return outcome

    def _rest(self) -> None:
        self._idle = self._loop.call_later(IDLE_SECONDS, lambda: self._loop.create_task(self._release()))

    async def _release(self) -> None:
        if self._command is None:
            await self.close()

    async def close(self) -> None:
        """Let the workers leave their loop, which ends the Ray Train run."""
        self._closing = True
        await self._notify()

    async def ended(self) -> None:
        """Wait until the Ray Train run has ended and its resources are free."""
        await self._run_ended.wait()

    # Called by the workers.

    async def join(self, rank: int, node: str) -> None:
        """A worker (re)entered its loop on `node`. If the first one had taken a command, that lost its workers."""
        before = set(self._nodes)
        self._nodes.add(node)
        self._met.discard(rank)
        if rank != 0 or self._command is None or self._command.number != self._taken:
            return
        gone = before - living_nodes().keys()
        self._nodes -= gone
        self._tries += not gone
        self._lost_nodes += bool(gone)
        if self._tries >= MAX_TRIES or self._lost_nodes >= MAX_LOST_NODES:
            times, epoch = self._tries + self._lost_nodes, self._command.epochs_done + 1
            self._resolve(self._command.number, Outcome(failure=f"lost its workers {times} times in epoch {epoch}"))

    async def next_command(self, rank: int, after: int) -> Command | None:
        """Wait for a command numbered above `after`; None tells the worker to leave."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._closing or (self._command and self._command.number > after))
        if self._closing:
            return None
        if rank == 0:
            self._taken = self._command.number
        return self._command

    async def meet(self, rank: int, number: int) -> None:
        """Wait until all workers have the images of a command. One may fetch and presize them for hours, while
        collectives time out."""
        if number != self._numbers:
            return
        self._met.add(rank)
        await self._notify()
        async with self._changed:
            await self._changed.wait_for(
                lambda: self._closing or number != self._numbers or len(self._met) == self._num_workers
            )

    async def state(self) -> Files | None:
        """The current trial's last state, for a worker that has to build the trial."""
        return self._state

    async def deliver(self, number: int, outcome: Outcome) -> None:
        self._resolve(number, outcome)

    def _resolve(self, number: int, outcome: Outcome) -> None:
        if self._command is not None and self._command.number == number and not self._outcome.done():
            self._command = None
            self._outcome.set_result(outcome)

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    # The Ray Train run, in its own thread.

    _ended: str | None = None

    def _run_trainer(self, size: GroupSize, myself) -> None:
        from ray import train

        from trainables.process_group import GroupTrainer, ProcessGroup

        # Ray Train wants a folder for checkpoints, but a trial's state travels through the object store.
        storage = tempfile.mkdtemp(prefix="worker_group_")
        resources = {"CPU": size.cpus_per_worker}
        if size.gpus_per_worker:
            resources["GPU"] = size.gpus_per_worker
        trainer = GroupTrainer(
            serve,
            train_loop_config={"host": myself, "num_threads": max(1, int(size.cpus_per_worker))},
            backend_config=ProcessGroup(backend="nccl" if size.gpus_per_worker else "gloo"),
            scaling_config=train.ScalingConfig(
                num_workers=size.num_workers,
                use_gpu=bool(size.gpus_per_worker),
                resources_per_worker=resources,
                placement_strategy="PACK",
            ),
            run_config=train.RunConfig(
                name="worker_group",
                storage_path=storage,
                # Failures count per command, see `join`; Ray counts the workers that die before they come there.
                failure_config=train.FailureConfig(max_failures=-1, controller_failure_limit=MAX_START_FAILURES),
            ),
        )
        try:
            trainer.fit()
            ended = "the worker group left its loop"
        except Exception as error:  # whatever ended Ray Train's run ends the group, and the trial must hear of it
            ended = f"the worker group ended: {error}"
        finally:
            shutil.rmtree(storage, ignore_errors=True)
        self._loop.call_soon_threadsafe(self._end, ended)

    def _end(self, reason: str) -> None:
        self._ended = reason
        self._run_ended.set()
        if self._outcome is not None and not self._outcome.done():
            self._outcome.set_exception(GroupEnded(reason))

    def _outcome_of_ended_group(self) -> asyncio.Future | None:
        if self._ended is None:
            return None
        future = self._loop.create_future()
        future.set_exception(GroupEnded(self._ended))
        return future


def serve(config: dict[str, Any]) -> None:
    """The train function: run the host's commands until it says that there are no more."""
    import ray.train
    import torch

    torch.set_num_threads(config["num_threads"])
    host, context = config["host"], ray.train.get_context()
    rank, several = context.get_world_rank(), context.get_world_size() > 1
    slot = _Slot(host, config["num_threads"])
    ray.get(host.join.remote(rank, ray.get_runtime_context().get_node_id()))
    number = 0
    while (command := ray.get(host.next_command.remote(rank, number))) is not None:
        number = command.number
        outcome, reusable = slot.run(command)
        if rank == 0 or outcome.failure:
            ray.get(host.deliver.remote(number, outcome))
        if several and not reusable:
            # The other workers may be waiting for this one inside a collective; only a restart frees them.
            raise RuntimeError(outcome.failure)


class _Slot:
    """One worker's side of a trial slot: the training in progress."""

    def __init__(self, host, num_threads: int) -> None:
        self.host = host
        self.num_threads = num_threads
        self.training = None
        self.trial_id = None
        self.idle_since = time.perf_counter()

    def run(self, command: Command) -> tuple[Outcome, bool]:
        """The outcome, and whether this worker's group can take the next command as it is."""
        from trainables.finetune import Diverged

        try:
            self._prepare(command)
            overhead = time.perf_counter() - self.idle_since
            metrics = self.training.run_epoch()
            self.idle_since = time.perf_counter()
            # Every worker has the state; only the first one's is wanted.
            state = self.training.state() if self.training.world.rank == 0 else None
            return Outcome(metrics | {"overhead_seconds": overhead}, state), True
        except Diverged as error:  # the losses are summed over the workers, so all of them are here
            self._drop()
            return Outcome(failure=f"diverged: {error}"), True
        except Exception as error:  # anything else fails the trial and is shown; the search goes on
            if _is_of_lost_worker(error):
                raise  # not the trial's fault: Ray Train restarts the group, and the command is repeated
            logger.exception("trial %s failed", command.trial.trial_id)
            self._drop()
            return Outcome(failure=f"{type(error).__name__}: {error}"), False

    def _prepare(self, command: Command) -> None:
        """Have the trial of `command` in memory, at the epoch that it starts from."""
        import ray.train
        import ray.train.torch

        from trainables.finetune import FineTune
        from trainables.source import folder_of

        trial = command.trial
        ready = self.training is not None and self.trial_id == trial.trial_id
        if ready and self.training.epochs_done == command.epochs_done:
            return
        self._drop()
        recipe = Recipe.from_dict(trial.recipe)
        images = _presized_images(trial.data, trial.data_digest, recipe.presize, recipe.resize_method, trial.cache)
        ray.get(self.host.meet.remote(ray.train.get_context().get_world_rank(), command.number))
        self.training = FineTune(
            recipe,
            images,
            weights=folder_of(trial.weights) if trial.weights else None,
            device=ray.train.torch.get_device(),
            num_threads=self.num_threads,
            split_seed=trial.split_seed,
            load_pretrained=command.epochs_done == 0,
        )
        if command.epochs_done:
            self.training.load_state(ray.get(self.host.state.remote()))
        self.trial_id = trial.trial_id

    def _drop(self) -> None:
        if self.training is not None:
            self.training.close()
        self.training = None


def _is_of_lost_worker(error: Exception) -> bool:
    """Whether a collective failed, as it does where another worker of the group is gone."""
    import torch.distributed

    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)  # gloo raises plain RuntimeErrors


@lru_cache(maxsize=4)
def _presized_images(data: str | Remaining, digest: str | None, size: int, method: str, storage: str):
    from trainables.presize import presize
    from trainables.source import images_of

    return presize(images_of(data, digest), size, method, storage=storage)
