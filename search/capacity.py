"""How many trials may run at once, as the cluster grows and shrinks."""

import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ray import tune

from search.cli import say
from search.resources import present_nodes, reachable_nodes, room
from search.wording import duration, many
from trainables.worker_group import GroupSize

LOOK_SECONDS = 5.0
"""How old what is known of the cluster may be."""
REMIND_SECONDS = 120.0


class Capacity:
    """What the nodes of the connected cluster have room for, and what the search in `folder` asks of them.

    Tune saves it with its state. A search that goes on elsewhere takes up what its own start has found instead.
    """

    def __init__(
        self, folder: Path, size: GroupSize, num_workers: Mapping[str, int], max_trials: int | None = None
    ) -> None:
        self.folder = folder
        self.size = size
        self.num_workers = num_workers  # of architectures by pattern, see `GroupSize`
        self.max_trials = max_trials  # None: as many as fit
        self._looked = -LOOK_SECONDS
        _capacities[folder] = self

    def __reduce__(self) -> tuple:
        return _capacity_of, (self.folder,)

    @property
    def largest(self) -> int:
        """Workers of the largest trial."""
        return max([self.size.num_workers, *self.num_workers.values()])

    def group_size(self, arch: str) -> GroupSize:
        return self.size.for_arch(arch, self.num_workers)

    def has_room(self, live: Collection[int], more: int) -> bool:
        """Whether a trial of `more` workers may start beside those with `live` workers; the first one always may."""
        if self.max_trials is not None:
            return len(live) < self.max_trials
        return not live or sum(live) + more <= self.reachable

    @property
    def present(self) -> int:
        """Workers that the nodes which are up have room for."""
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
        nodes = present_nodes()
        self._present, self._reachable = room(nodes, self.size), room(reachable_nodes(nodes), self.size)
        self._looked = time.monotonic()


_capacities: dict[Path, Capacity] = {}
"""Of each search in this process, by its folder."""


def _capacity_of(folder: Path) -> Capacity:
    return _capacities[folder]


class CapacityNews(tune.Callback):
    """Says when trials wait for nodes, and when nodes come or go."""

    def __init__(self, capacity: Capacity) -> None:
        self.capacity = capacity
        self.told: int | None = None
        self.waiting_since: float | None = None
        self.reminded = 0.0

    def setup(self, **info: Any) -> None:
        self.told = self.waiting_since = None

    def on_step_begin(self, iteration: int, trials: list, **info: Any) -> None:
        present = self.capacity.present
        if present < self.capacity.largest:
            self._wait(present)
        elif self.waiting_since is not None:
            self.waiting_since = None
            say(f"cluster: room for {many(present, 'worker')} now, the search goes on")
        elif self.told is not None and present != self.told:
            say(f"cluster: {'more' if present > self.told else 'fewer'} nodes, room for {many(present, 'worker')} now")
        self.told = present

    def _wait(self, present: int) -> None:
        now = time.monotonic()
        if self.waiting_since is None:
            self.waiting_since = self.reminded = now
            say(waiting(present, self.capacity.reachable, self.capacity.largest))
        elif now - self.reminded >= REMIND_SECONDS:
            self.reminded = now
            say(f"cluster: still waiting for nodes, for {duration(now - self.waiting_since)} now")


def waiting(present: int, reachable: int, num_workers: int) -> str:
    """What a search says whose trials do not fit on the nodes that are up."""
    adds = f"its autoscaler can make it {reachable}" if reachable > present else "it waits for a node to come back"
    return (
        f"cluster: waiting for nodes. A trial needs {many(num_workers, 'worker')}, there is room for {present}; {adds}"
    )
