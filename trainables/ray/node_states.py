"""Where the nodes of a cluster have the states of a trial, and getting them from there."""

import random
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

    def second(self, first: str) -> str | None:
        """The node for the copy of a state that `first` has: the one before if it is alive, so that none has more than
        it must; else any but the head, unless there is no other. None where `first` is alone."""
        nodes = living_nodes()
        others = nodes.keys() - {first}
        before = [node for node in self.last if node in others]
        workers = [node for node in others if not is_head(nodes[node])]
        if before and (not is_head(nodes[before[0]]) or not workers):
            return before[0]
        return random.choice(workers or list(others) or [None])

    def note(self, kept: Kept, second: str | None) -> Elsewhere:
        """A newer state is on a node, and on its way to a second one. Returns where it is."""
        now = (kept.node,) if second is None else (kept.node, second)
        needed = {*now, *(self.last if kept.before_copied else self.nodes)}
        self._tell(self.nodes - needed, "forget")
        self.nodes, self.last = needed, now
        # The newest first, so that a trial that goes on finds it at once.
        return Elsewhere(nodes=(*now, *sorted(needed - {*now})), crc32=kept.crc32)

    def newest(self) -> tuple[ray.ObjectRef[Any], dict[str, Any]] | None:
        """The newest undamaged state, left where it is, and its result; None if all are lost."""
        for keeper in self._newest_first():
            files, result = keeper.load.remote(self.trial)
            try:
                return files, ray.get(result, timeout=ANSWER_SECONDS)
            except NOT_THERE:
                continue
        return None

    def model(self, epoch: int) -> Files | None:
        """The files of the model of an epoch, if the newest state is of that one."""
        for keeper in self._newest_first():
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

    def _newest_first(self) -> Iterator[Any]:
        """Keepers that have a state of the trial. Nodes that it does not know of are asked if none of the others has
        one: a cluster that was started anew gives its nodes other ids."""
        living = living_nodes().keys()
        for nodes in (self.nodes & living, living - self.nodes):
            keepers = list(self._keepers(nodes))
            asked = [keeper.newest.remote(self.trial) for keeper in keepers]
            if asked:
                ray.wait(asked, num_returns=len(asked), timeout=ANSWER_SECONDS)
            answers = ((_now(answer), keeper) for answer, keeper in zip(asked, keepers, strict=True))
            found = [(epoch, keeper) for epoch, keeper in answers if epoch is not None]
            yield from (keeper for _, keeper in sorted(found, key=lambda each: -each[0]))
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
