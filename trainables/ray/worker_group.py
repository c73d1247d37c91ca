"""Warm worker groups: one Ray Train run whose workers serve one trial after another.

A trial talks to a `GroupHost`, an actor that runs one trainer of Ray Train for as long as the search lasts. Its train
function (`worker.serve`) is a loop that asks the host for commands: "train the next epoch of this trial". Starting a
worker (process, imports, process group) happens once per slot of the search instead of once per trial.

The host keeps the trial's last state, so when Ray Train restarts a group whose worker was lost, the new workers rebuild
the trial and repeat the command. Workers that stop making progress are killed and count as lost.
"""

import asyncio
import contextlib
import fnmatch
import logging
import math
import pickle
import random
import shutil
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import ray

from trainables.ray.keeper import keeper_on
from trainables.ray.messages import Command, KeepOrder, Kept, Outcome, TrialSpec
from trainables.ray.retry_limits import MAX_LOST_NODES, MAX_START_FAILURES, MAX_TRIES
from trainables.training.checkpoint import Files, model_only, with_best

logger = logging.getLogger(__name__)

KEEPER_SECONDS = 60.0
"""How long a host waits for a node's keeper, which the search starts when the node has come."""
IDLE_SECONDS = 30.0
"""Workers that have been idle for this long leave, so that others can have their CPUs and GPUs."""


@dataclass(frozen=True, kw_only=True)
class GroupSize:
    """The workers of one trial and what each of them reserves."""

    num_workers: int = 1
    cpus_per_worker: float = 1
    gpus_per_worker: float = 0  # a share of one GPU below 1, and only for one worker

    def for_arch(self, arch: str, num_workers: Mapping[str, int]) -> "GroupSize":
        """The size for an architecture; `num_workers` maps patterns such as resnet101* to counts, the last one wins."""
        found = [count for pattern, count in num_workers.items() if fnmatch.fnmatchcase(arch, pattern)]
        return replace(self, num_workers=found[-1]) if found else self


class GroupEnded(RuntimeError):
    """The worker group has ended for good."""


class GroupReleased(GroupEnded):
    """The worker group was idle and released its resources."""


def living_nodes() -> dict[str, dict[str, float]]:
    """Node id -> all resources of the node."""
    return {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}


def node_with_room(size: GroupSize) -> str | None:
    """A node on which a worker could run. (Not the head by default: it runs the trials, and a host and Ray Train need
    0.4 GB.)"""
    needed = {"CPU": size.cpus_per_worker, "GPU": size.gpus_per_worker}
    nodes = living_nodes()
    fitting = [node for node, has in nodes.items() if all(has.get(name, 0) >= n for name, n in needed.items())]
    return random.choice(fitting) if fitting else None


class GroupHost:
    """Async actor between a trial slot and its workers."""

    def __init__(self, size: GroupSize, stall_timeout: float = math.inf) -> None:
        self._stall_timeout = stall_timeout  # seconds
        self._trial: TrialSpec | None = None
        self._epochs_done = 0
        self._state: Files | None = None
        self._before: Files | None = None  # the state before that
        self._copying: Any = None  # the other node's answer when it has the state, too
        self._command: Command | None = None
        self._num_workers = size.num_workers
        self._tries = self._lost_nodes = 0
        self._why_lost = ""
        self._batch_parts = 1
        self._workers: dict[int, Any] = {}  # actors by rank
        self._last_sign: float | None = None  # of progress in the command, or when it was taken; None before that
        self._taken = 0  # number of the command that the first worker took
        self._numbers = 0  # of commands given
        self._closing = False
        self._nodes: set[str] = set()
        self._met: set[int] = set()  # workers that have the images of the command
        self._idle: asyncio.TimerHandle | None = None
        self._changed = asyncio.Condition()
        self._run_ended = asyncio.Event()
        self._outcome: asyncio.Future[Outcome] | None = None
        self._ended: str | None = None  # why the Ray Train run ended
        self._loop = asyncio.get_event_loop()
        myself = ray.get_runtime_context().current_actor
        threading.Thread(target=self._run_trainer, args=(size, myself), daemon=True).start()
        self._loop.call_soon_threadsafe(self._rest)

    # --- Called by the trial ------------------------------------------------------------------------------------------

    async def node(self) -> str:
        """The node that this actor runs on."""
        return ray.get_runtime_context().get_node_id()

    async def begin(self, trial: TrialSpec, epochs_done: int, state: Files | None) -> None:
        """Make `trial` the current one, at the end of `epochs_done` epochs with `state`."""
        if self._closing:
            raise GroupReleased("the worker group was idle and has left")
        self._trial, self._epochs_done = trial, epochs_done
        self._state = self._before = state
        self._batch_parts = 1

    async def run_epoch(self, with_state: bool = True) -> Outcome:
        """Train the current trial's next epoch. Without the state, which stays here, if it is to be kept on the nodes.
        Raises `GroupEnded` if the workers are gone for good."""
        if self._closing:
            raise GroupReleased("the worker group was idle and has left")
        if self._idle:
            self._idle.cancel()
        self._tries = self._lost_nodes = 0
        self._why_lost = ""
        self._outcome = self._loop.create_future()
        if self._ended is not None:
            self._outcome.set_exception(GroupEnded(self._ended))
        await self._give_command()
        outcome = await self._watched(self._outcome)
        self._rest()
        if outcome.failure is None:
            self._epochs_done += 1
            self._before, self._state = None if with_state else self._state, outcome.state
        return outcome if with_state else replace(outcome, state=None)

    async def keep(self, order: KeepOrder) -> Kept:
        """Returns when the first node has the state. The copy to the other one goes on meanwhile, until the next call
        waits for it."""
        state = self._state
        assert state is not None  # of the epoch that has just ended
        if order.is_best is not None:
            self._state = state = with_best(state, self._before or {}, is_best=order.is_best)
        self._before = None  # which frees its memory
        if order.finished:
            state = model_only(state)
        copied = await self._copied()
        # Outside of the pickle, so that the keepers write from Ray's shared memory.
        files = ray.put({name: pickle.PickleBuffer(content) for name, content in state.items()})
        keeper = await self._keeper(order.search, order.places[0])
        crc32 = await keeper.save.remote(order.trial, files, order.result)
        for node in order.places[1:]:
            with contextlib.suppress(ValueError):  # it has no keeper yet: the next epoch tries again
                self._copying = keeper_on(order.search, node).save.remote(order.trial, files, order.result, crc32)
        return Kept(crc32=crc32, before_copied=copied)

    async def _copied(self) -> bool:
        """Wait until the other node has the state before; whether it has."""
        copying, self._copying = self._copying, None
        try:
            return bool(copying is not None and await copying)
        except (ray.exceptions.RayError, ValueError, OSError) as error:
            logger.warning("the copy of a state on another node failed: %s", error)
            return False

    async def _keeper(self, search: str, node: str) -> Any:
        deadline = self._loop.time() + KEEPER_SECONDS
        while True:
            try:
                return keeper_on(search, node)
            except ValueError as error:
                if self._loop.time() > deadline:
                    raise GroupEnded(f"no keeper of states on a node: {error}") from error
                await asyncio.sleep(0.2)

    async def _give_command(self) -> None:
        self._numbers += 1
        self._met.clear()
        self._last_sign = None
        assert self._trial is not None  # `begin` has set it
        self._command = Command(self._numbers, self._trial, self._epochs_done, self._batch_parts)
        await self._notify()

    async def _watched(self, outcome: asyncio.Future[Outcome]) -> Outcome:
        """Waits for the outcome and kills workers that make no progress: Ray Train starts others."""
        looks = None if math.isinf(self._stall_timeout) else max(0.1, self._stall_timeout / 10)
        while not (await asyncio.wait({outcome}, timeout=looks))[0]:
            if self._last_sign is not None and self._loop.time() - self._last_sign > self._stall_timeout:
                self._last_sign = None
                self._why_lost = f"no progress for {self._stall_timeout:g} s"
                for worker in self._workers.values():
                    ray.kill(worker)
        return outcome.result()

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
        """Wait until the Ray Train run has ended and released its resources."""
        await self._run_ended.wait()

    # --- Called by the workers ----------------------------------------------------------------------------------------

    async def join(self, rank: int, node: str, worker: Any = None) -> None:
        """A worker (an actor) entered its loop on `node`, again or for the first time. A command that the first worker
        had taken before has lost its workers."""
        self._workers[rank] = worker
        self._last_sign = None
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
            why = f" (the last time: {self._why_lost})" if self._why_lost else ""
            failure = f"lost its workers {times} times in epoch {epoch}{why}"
            self._resolve(self._command.number, Outcome(failure=failure))
        self._why_lost = ""

    async def next_command(self, rank: int, after: int) -> Command | None:
        """Wait for a command numbered above `after`; None tells the worker to leave."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._closing or (self._command and self._command.number > after))
        command = None if self._closing else self._command
        if command and rank == 0:
            self._taken = command.number
            self._last_sign = self._loop.time()
        return command

    async def meet(self, rank: int, number: int) -> None:
        """Wait until all workers have the images of a command. Fetching and presizing them may take one worker longer
        than a collective's timeout."""
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

    async def progress(self, number: int) -> None:
        """A sign that the workers of a command make progress."""
        if number == self._numbers:
            self._last_sign = self._loop.time()

    async def deliver(self, number: int, outcome: Outcome) -> None:
        if not outcome.split_batches:
            self._resolve(number, outcome)
        elif self._command is not None and self._command.number == number:  # or another worker was first
            self._batch_parts *= 2
            await self._give_command()

    def _resolve(self, number: int, outcome: Outcome) -> None:
        if self._command and self._command.number == number and self._outcome and not self._outcome.done():
            self._command = None
            self._outcome.set_result(outcome)

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    # --- The Ray Train run, in its own thread -------------------------------------------------------------------------

    def _run_trainer(self, size: GroupSize, myself: Any) -> None:
        from ray import train
        from ray._private import worker

        from trainables.ray.process_group import GroupTrainer, ProcessGroup
        from trainables.ray.worker import serve

        # Ray Train needs a folder for checkpoints, although a trial's state travels through the object store. This
        # process may be killed before it removes the folder, so it lies in that of Ray's session.
        session: Any = worker._global_node
        storage = tempfile.mkdtemp(prefix="worker_group_", dir=session.get_session_dir_path())
        resources = {"CPU": size.cpus_per_worker}
        if size.gpus_per_worker:
            resources["GPU"] = size.gpus_per_worker
        trainer = GroupTrainer(
            serve,
            train_loop_config={
                "host": myself,
                "num_threads": max(1, int(size.cpus_per_worker)),
                "gpu_share": size.gpus_per_worker,
            },
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
                # `join` counts failures, per command. Ray counts the workers that die before they join.
                failure_config=train.FailureConfig(max_failures=-1, controller_failure_limit=MAX_START_FAILURES),  # type: ignore[call-arg]
            ),
        )
        try:
            trainer.fit()
            ended = "the worker group left its loop"
        except Exception as error:  # any error of Ray Train's ends the group, and the trial must learn of it
            ended = f"the worker group ended: {error}"
        finally:
            shutil.rmtree(storage, ignore_errors=True)
        self._loop.call_soon_threadsafe(self._end, ended)

    def _end(self, reason: str) -> None:
        self._ended = reason
        self._run_ended.set()
        if self._outcome is not None and not self._outcome.done():
            self._outcome.set_exception(GroupEnded(reason))
