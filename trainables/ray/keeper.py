"""The keepers of training states: one actor on each node of a cluster, with a folder on the node's disk.

The state of a trial stays on the node that trains it and is copied to another one, so that the head has those of none.
A keeper knows nothing of other nodes: the group's host hands a state to two of them, and the trial remembers to which
(see `node_states`). A search starts its keepers and ends them. Their files stay on the nodes when it is killed, and a
later keeper of the same search finds them.
"""

import re
import shutil
import time
from collections.abc import Collection
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from trainables.system.cache import cache_dir
from trainables.training import checkpoint
from trainables.training.checkpoint import Files

SAVES_AT_ONCE = 4
"""States that a keeper writes at once; others wait for it, not its other work."""
CALLS_AT_ONCE = 8
ABANDONED_SECONDS = 30 * 86400.0
"""For how long the states of a search stay that was killed and not resumed."""


def states_folder() -> Path:
    """Where this node keeps training states of all searches."""
    return cache_dir() / "states"


def folder_of(search: str) -> Path:
    """Where it keeps those of the search with this id."""
    is_name = re.fullmatch(r"[0-9a-f]{1,64}", search)
    return states_folder() / (search if is_name else sha256(search.encode()).hexdigest()[:32])


class Keeper:
    """Keeps the newest state of each trial in `<cache>/states/<search>/<node>/<trial>/epoch_<n>`, see `checkpoint`."""

    def __init__(self, search: str, node: str) -> None:
        self.root = folder_of(search)
        self.own = self.root / node
        self.dropped: set[str] = set()
        self.own.mkdir(parents=True, exist_ok=True)
        remove_abandoned(states_folder())

    @ray.method(concurrency_group="save")
    def save(
        self, trial: str, files: Files, result: dict[str, Any], expected: dict[str, int] | None = None
    ) -> dict[str, int]:
        """Replaces the trial's state by that of `result["epoch"]`. Returns the CRC-32 of each file. Waits while the
        disk is full. Raises `ValueError` where the files are not the `expected` ones."""
        if trial in self.dropped:  # a copy that comes after its trial's end
            return {}
        content = {name: cast("bytes", memoryview(data)) for name, data in files.items()}
        if expected is not None and (found := checkpoint.checksums(content)) != expected:
            raise ValueError(f"the state of {trial} arrived with other checksums: {found}, not {expected}")
        crc32 = checkpoint.save(self.own / trial, result["epoch"], content, result)
        if trial in self.dropped:
            self.forget(trial)
        return crc32

    def newest(self, trial: str) -> int | None:
        """The epoch of the trial's newest state on this disk."""
        folder = self._folder(trial)
        found = folder and checkpoint.newest(folder)
        return int(found.name.removeprefix("epoch_")) if found else None

    @ray.method(num_returns=2)
    def load(self, trial: str) -> tuple[Files, dict[str, Any]]:
        """Its files and its result. Raises `ValueError` if there is no undamaged one."""
        return self._load(trial)

    def _load(self, trial: str) -> tuple[Files, dict[str, Any]]:
        folder = self._folder(trial)
        found = folder and checkpoint.last_whole(folder)
        if not found:
            raise ValueError(f"no undamaged state of {trial} on this node")
        return found

    @ray.method(num_returns=2)
    def load_model(self, trial: str) -> tuple[Files, dict[str, Any]]:
        """The same without what only the training needs."""
        files, result = self._load(trial)
        return checkpoint.model_only(files), result

    def forget(self, trial: str) -> None:
        """Delete the trial's state: other nodes have newer ones."""
        for folder in self.root.glob(f"*/{trial}"):
            if folder.parent == self.own or trial in self.dropped:
                shutil.rmtree(folder, ignore_errors=True)

    def drop(self, trial: str) -> None:
        """Delete the state of a trial that has ended; none of it is kept later."""
        self.dropped.add(trial)
        self.forget(trial)

    def retain(self, trials: Collection[str]) -> None:
        """Delete the states of all other trials: the search has ended."""
        for folder in self.root.glob("*/*"):
            if folder.name not in trials:
                self.drop(folder.name)
        if not any(self.root.glob("*/*")):
            shutil.rmtree(self.root, ignore_errors=True)

    def _folder(self, trial: str) -> Path | None:
        """That has the trial's state: this node's, or one that a node had which used this disk before."""
        folders = [self.own / trial, *self.root.glob(f"*/{trial}")]
        return next((folder for folder in folders if checkpoint.newest(folder)), None)


def remove_abandoned(states: Path) -> None:
    """Remove the states of searches that nobody has resumed for long."""
    for search in states.glob("*"):
        touched = max((path.stat().st_mtime for path in (search, *search.glob("*"), *search.glob("*/*"))), default=0)
        if touched < time.time() - ABANDONED_SECONDS:
            shutil.rmtree(search, ignore_errors=True)


def start_keeper(search: str, node: str) -> Any:
    """The handle of a new keeper on a node, which ends with the handle. It starts anew if it is killed."""
    actor: Any = ray.remote(concurrency_groups={"save": SAVES_AT_ONCE})(Keeper)  # type: ignore[call-overload]  # Ray's
    return actor.options(
        name=_name(search, node),
        num_cpus=0,
        max_concurrency=CALLS_AT_ONCE,
        max_restarts=-1,
        max_task_retries=-1,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
    ).remote(search, node)


def keeper_on(search: str, node: str) -> Any:
    """The handle of a node's keeper. Raises `ValueError` where none has been started, or its node is gone."""
    return ray.get_actor(_name(search, node))


def _name(search: str, node: str) -> str:
    return f"states of {search} on {node}"
