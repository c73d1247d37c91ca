"""Where the nodes of a cluster have the states of a trial, and getting them from there."""

import random
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray

from trainables.ray.keeper import keeper_on
from trainables.ray.messages import Kept
from trainables.ray.worker_group import living_nodes
from trainables.training import checkpoint
from trainables.training.checkpoint import WEIGHTS_FILE, Elsewhere, Files

ANSWER_SECONDS = 60.0
"""How long a keeper may take to say what it has, or to send it."""
LOST = (
    ray.exceptions.RayActorError,
    ray.exceptions.ActorUnschedulableError,  # of an actor that was to start again on a node that is gone
    ray.exceptions.ObjectLostError,
    ray.exceptions.GetTimeoutError,
    OSError,
)
"""What asking a keeper raises where its node is gone or its disk fails."""
NOT_THERE = (*LOST, ValueError)
"""The same, or where it never was there, or has no whole state."""


def is_head(resources: Mapping[str, float]) -> bool:
    return "node:__internal_head__" in resources


class NodeStates:
    """The nodes that have a trial's states: the one that trains it, and another one."""

    def __init__(self, search: str, trial: str, nodes: Sequence[str] = ()) -> None:
        self.search = search  # see `keeper`
        self.trial = trial
        self.nodes = set(nodes)  # that may have a state of the trial
        self.last = tuple(nodes[:2])  # those to which the last epoch's state went

    def places(self, host: str) -> tuple[str, ...]:
        """The node for the next state and the one for its copy, if there is another one: that of the trial's host and
        the one before, so that no node has more states than it must. The head only where there are too few others."""
        nodes = living_nodes()
        workers = [node for node, resources in nodes.items() if not is_head(resources)]
        wanted = [host, *reversed(self.last), *random.sample(workers, len(workers)), *nodes]
        found = [node for node in dict.fromkeys(wanted) if node in nodes]
        return tuple(sorted(found, key=lambda node: is_head(nodes[node]))[:2])

    def note(self, kept: Kept, places: tuple[str, ...]) -> Elsewhere:
        """A newer state is at the first of these places and on its way to the second. Returns where it is."""
        needed = {*places, *(self.last if kept.before_copied else self.nodes)}
        self._tell(self.nodes - needed, "forget")
        self.nodes, self.last = needed, places
        return Elsewhere(nodes=(*places, *sorted(needed - {*places})), crc32=kept.crc32)

    def newest(self, enough: int) -> tuple[ray.ObjectRef[Any], dict[str, Any]] | None:
        """An undamaged state of epoch `enough` or later, or else the newest one, left where it is, and its result; None
        if all are lost."""
        for keeper in self._newest_first(enough):
            files, result = keeper.load.remote(self.trial)
            try:
                return files, ray.get(result, timeout=ANSWER_SECONDS)
            except NOT_THERE:
                continue
        return None

    def model(self, epoch: int) -> Files | None:
        """The files of the model of an epoch, if the newest state is of that one."""
        for keeper in self._newest_first(epoch):
            try:
                files, result = ray.get(keeper.load_model.remote(self.trial), timeout=ANSWER_SECONDS)
            except NOT_THERE:
                continue
            if result["epoch"] == epoch:
                return dict(files)
        return None

    def drop(self) -> None:
        """The trial has ended: all nodes delete its state, those that are about to receive it, too."""
        self._tell(self.nodes, "drop")
        self.nodes, self.last = set(), ()

    def _newest_first(self, enough: int) -> Iterator[Any]:
        """Keepers that have a state of the trial. One of epoch `enough` need not wait for the others' answers: Ray
        takes many seconds to notice that a node is gone. Nodes that the trial does not know of are asked if none of the
        others has a state: a cluster that was started anew gives its nodes other ids."""
        living = living_nodes().keys()
        for nodes in (self.nodes & living, living - self.nodes):
            asked = {keeper.newest.remote(self.trial): keeper for keeper in self._keepers(nodes)}
            waiting, deadline = list(asked), time.monotonic() + ANSWER_SECONDS
            found: dict[Any, int] = {}
            while waiting and time.monotonic() < deadline:
                answered, waiting = ray.wait(waiting, timeout=ANSWER_SECONDS)
                found |= {asked[answer]: epoch for answer in answered if (epoch := _now(answer)) is not None}
                yield from (asked[answer] for answer in answered if found.get(asked[answer], -2) >= enough)
            yield from sorted((keeper for keeper in found if found[keeper] < enough), key=lambda each: -found[each])
            if found:
                break

    def _keepers(self, nodes: Collection[str]) -> Iterator[Any]:
        for node in nodes:
            try:
                yield keeper_on(self.search, node)
            except NOT_THERE:
                continue

    def _tell(self, nodes: Collection[str], what: str) -> None:
        for keeper in self._keepers(nodes):
            getattr(keeper, what).remote(self.trial)


def bring_model(folder: Path, search: str) -> bool:
    """Have the model of the newest checkpoint in a trial's folder on the head's disk; whether it is there."""
    where, found = checkpoint.elsewhere(folder), checkpoint.newest(folder)
    if found is None or where is None or (found / WEIGHTS_FILE).is_file():
        return found is not None
    if not ray.is_initialized():
        return False
    epoch = int(found.name.removeprefix("epoch_"))
    files = NodeStates(search, folder.name, where.nodes).model(epoch)
    if files is not None:
        checkpoint.add(found, files)
    return files is not None


def drop_state(folder: Path, search: str) -> None:
    """Delete all of an ended trial's checkpoint but its result, also on the nodes."""
    where = checkpoint.elsewhere(folder)
    if where is not None and ray.is_initialized():
        NodeStates(search, folder.name, where.nodes).drop()
    checkpoint.drop(folder)


def _now(answer: ray.ObjectRef[Any]) -> int | None:
    """An answer that has come; None for one that has not, or is an error."""
    try:
        found: int | None = ray.get(answer, timeout=0)
    except NOT_THERE:
        return None
    return found
