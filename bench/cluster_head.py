"""A head that carries many trials at once: what it costs, how much of the head that is, and a simulation of it.

In virtual time a trial's epoch ends on another node. Its checkpoint comes over the head's network; its actor takes it,
on one of the cores that the driver leaves, and writes it to the head's disk. The driver is one server: it takes the
results that wait in a random order, as Tune does, and asks for the trial's next epoch. Once a second it saves Tune's
state instead.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, combinations, count

import numpy as np

MB = 10**6
SAVE_PERIOD = 1.0
"""Seconds from the end of one save of Tune's state to the next, as `search.cluster.connect` sets it."""
PLACES = 1000
"""Each trial's actor takes 0.001 of a resource that the head has one of, see `search.tuning.tuner`."""
MEMORY_SHARE = 0.95
"""With so much of the memory in use, Ray kills processes."""
MOST = 10**6
"""Trials beyond this are not looked for."""
STORE_SHARE = 0.3
"""Of the memory, Ray's object store may have."""
WARM_ROUNDS = 5
NETWORK, CORES, DISK, DRIVER, DONE, SAVE = range(6)


@dataclass(frozen=True)
class Line:
    """A cost that grows with the trials that run, and with those in the tables."""

    constant: float
    per_running: float = 0.0
    per_known: float = 0.0

    def __call__(self, running: int, known: int) -> float:
        return self.constant + self.per_running * running + self.per_known * known

    @classmethod
    def fit(cls, points: Sequence[tuple[int, int, float]]) -> "Line":
        """Least squares over (running, known, cost), without a negative coefficient."""
        running, known, costs = np.array(points, dtype=float).T
        columns = np.stack([np.ones_like(costs), running, known], axis=1)
        best, least = np.zeros(3), np.inf
        for used in chain.from_iterable(combinations(range(3), number) for number in (1, 2, 3)):
            line = np.zeros(3)
            line[list(used)] = np.linalg.lstsq(columns[:, used], costs)[0]
            error = np.square(columns @ line - costs).sum()
            if line.min() >= 0 and error < least:
                best, least = line, error
        return cls(*map(float, best))


@dataclass(frozen=True)
class Work:
    """CPU seconds: each second, each second for each trial, for each result, and for each MB of its checkpoint."""

    alone: float = 0.0
    per_trial: float = 0.0
    per_result: float = 0.0
    per_mb: float = 0.0

    def of_result(self, checkpoint_mb: float) -> float:
        return self.per_result + self.per_mb * checkpoint_mb


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What a search costs its head. The driver's are seconds in which it does nothing else, by part."""

    result: dict[str, Line]
    trial: dict[str, Line]  # of the end of a trial and the start of the next
    save: Line
    copy: Line = Line(0)  # CPU seconds after a save, of a thread of Tune that copies files
    actors: Work = Work()
    ray: Work = Work()
    bytes_per_result: Line = Line(0)  # that the driver writes, with its share of trials' ends
    bytes_per_save: Line = Line(0)
    writes_per_result: Line = Line(0)
    writes_per_save: Line = Line(0)
    cpu_share: float = 1.0  # of the driver's seconds; in the others it waits for files
    latency: float = 0.0  # seconds of a result on its way, beside all that
    driver_mb: Line = Line(0)
    ray_mb: float = 0.0
    actor_mb: float = 0.0
    shared_mb: float = 0.0  # of all actors together
    checkpoint_copies: float = 0.0  # that a trial's actor has in memory
    store_copies: float = 0.0  # that the object store has of each trial's: memory that it has used stays its own
    start_seconds: float = 0.0  # of one trial's actor


@dataclass(frozen=True, kw_only=True)
class Head:
    cores: int
    memory_gb: float
    disk_mb: float  # MB/s
    network_mb: float  # MB/s


@dataclass(frozen=True, kw_only=True)
class Load:
    """A trial's epoch takes `epoch_seconds`, give or take 10 %, and it has `epochs` of them. `search` trials or more
    are in the tables."""

    epoch_seconds: float
    epochs: int
    checkpoint_mb: float
    search: int


def parts_of_result(costs: Costs, load: Load, running: int) -> dict[str, float]:
    """Seconds of the driver per result, the trial's end and next start shared out among its results."""
    known = max(running, load.search)
    parts = {name: line(running, known) for name, line in costs.result.items()}
    for name, line in costs.trial.items():
        parts[name] = parts.get(name, 0.0) + line(running, known) / load.epochs
    return parts


def memory_mb(costs: Costs, head: Head, load: Load, running: int) -> dict[str, float]:
    """Of the head, by who has it."""
    size = load.checkpoint_mb
    return {
        "actors": costs.shared_mb + running * costs.actor_mb,
        "checkpoints": running * costs.checkpoint_copies * size,
        "object store": min(STORE_SHARE * head.memory_gb * 1e9 / MB, running * costs.store_copies * size),
        "driver": costs.driver_mb(running, max(running, load.search)),
        "ray": costs.ray_mb,
    }


def demands(costs: Costs, head: Head, load: Load, running: int) -> dict[str, float]:
    """Which part of each of the head's resources so many trials want; above 1 there is not enough of it."""
    rate, known = running / load.epoch_seconds, max(running, load.search)
    save = costs.save(running, known)
    driver = rate * sum(parts_of_result(costs, load, running).values()) + save / (SAVE_PERIOD + save)
    tables = rate * costs.bytes_per_result(running, known) + costs.bytes_per_save(running, known) / (SAVE_PERIOD + save)
    works = (costs.actors, costs.ray)
    cores = sum(w.alone + w.per_trial * running + rate * w.of_result(load.checkpoint_mb) for w in works)
    return {
        "driver": driver,
        "cores": (cores + driver_cpu(costs, running, known, min(1.0, driver))) / head.cores,
        "memory": sum(memory_mb(costs, head, load, running).values()) * MB / (MEMORY_SHARE * head.memory_gb * 1e9),
        "disk": (rate * load.checkpoint_mb + tables / MB) / head.disk_mb,
        "network": rate * load.checkpoint_mb / head.network_mb,
        "starts": running * costs.start_seconds / (load.epochs * load.epoch_seconds),
        "places": running / PLACES,
    }


def driver_cpu(costs: Costs, running: int, known: int, busy: float) -> float:
    """Cores that the driver takes in all its threads, when its main one is busy for a part of the time."""
    return costs.cpu_share * busy + costs.copy(running, known) / (SAVE_PERIOD + costs.save(running, known))


def seconds_to_start(costs: Costs, load: Load, running: int) -> float:
    """Until so many trials run. Tune starts one actor at a time; when a trial ends meanwhile, its actor takes the trial
    that waits, and the one that was starting is dropped. So with n trials that last T seconds a start takes s seconds
    and is in vain but for a part exp(-n s / T); this is the sum over n."""
    lasts = load.epochs * load.epoch_seconds
    with np.errstate(over="ignore"):
        return float(lasts * np.expm1(costs.start_seconds * running / lasts))


def largest(costs: Costs, head: Head, load: Load) -> dict[str, int]:
    """The most trials at once for which there is enough of each resource."""

    def most(enough: Callable[[int], bool]) -> int:
        low, high = 0, MOST + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if enough(middle) else (low, middle)
        return low

    names = demands(costs, head, load, 1)
    return {name: most(lambda n, name=name: demands(costs, head, load, n)[name] <= 1) for name in names}


def shortest_epoch(costs: Costs, load: Load, running: int) -> float:
    """Seconds of an epoch below which the driver does not keep up."""
    save = costs.save(running, max(running, load.search))
    return running * sum(parts_of_result(costs, load, running).values()) * (SAVE_PERIOD + save) / SAVE_PERIOD


class Servers:
    """Some servers with one queue, first come, first served; arrivals must be told in the order of time."""

    def __init__(self, number: int = 1) -> None:
        self.free_at = [0.0] * number

    def end(self, now: float, seconds: float) -> float:
        end = max(now, heapq.heappop(self.free_at)) + seconds
        heapq.heappush(self.free_at, end)
        return end


class Simulation:
    """So many trials at once, on one head. The same for the same seed."""

    def __init__(self, costs: Costs, head: Head, load: Load, running: int, *, seed: int) -> None:
        known, size = max(running, load.search), load.checkpoint_mb
        self.load, self.running, self.rng = load, running, np.random.default_rng(seed)
        self.service = sum(line(running, known) for line in costs.result.values())
        self.more_at_end = sum(line(running, known) for line in costs.trial.values())
        self.save_seconds = costs.save(running, known)
        pool = max(1, head.cores - 1)  # the driver has one for itself
        works = (costs.actors, costs.ray)
        idle = max(0.05, 1 - sum(work.alone + work.per_trial * running for work in works) / pool)
        self.servers = [Servers(), Servers(pool), Servers()]
        self.seconds = [size / head.network_mb, sum(w.of_result(size) for w in works) / idle, size / head.disk_mb]
        self.latency = costs.latency
        self.events: list[tuple[float, int, int, int]] = []
        self.order = count()
        self.waiting: list[int] = []
        self.ended_at = np.zeros(running)
        self.epochs = self.rng.integers(0, load.epochs, running)
        self.serving: tuple[int, float] | None = None  # what the driver does, DRIVER or SAVE, and since when
        self.save_at, self.busy = SAVE_PERIOD, 0.0
        self.delays: list[float] = []

    def run(self, rounds: int = 15) -> dict[str, float]:
        """Results per second, the driver's busy part of the time, and seconds from an epoch's end until the driver is
        done with its result (median, 95th percentile), over `rounds` results of each trial, 2000 at least, after the
        first rounds."""
        warm, wanted, started = WARM_ROUNDS * self.running, max(2000, rounds * self.running), 0.0
        for trial in range(self.running):
            self._at(self.load.epoch_seconds * self.rng.random(), NETWORK, trial)
        self._at(self.save_at, SAVE, 0)
        while len(self.delays) < warm + wanted:
            now, _, stage, trial = heapq.heappop(self.events)
            self._happens(now, stage, trial)
            if len(self.delays) == warm and stage == DONE:
                started, self.busy = now, 0.0
        p50, p95 = np.quantile(self.delays[warm:], (0.5, 0.95))
        rate, driver = wanted / float(now - started), self.busy / float(now - started)
        return {"results_per_second": rate, "driver": driver, "delay_p50": float(p50), "delay_p95": float(p95)}

    def _at(self, moment: float, stage: int, trial: int) -> None:
        heapq.heappush(self.events, (moment, next(self.order), stage, trial))

    def _happens(self, now: float, stage: int, trial: int) -> None:
        if stage == NETWORK:
            self.ended_at[trial] = now
        if stage < DRIVER:
            later = self.latency if stage == DISK else 0.0
            self._at(self.servers[stage].end(now, self.seconds[stage]) + later, stage + 1, trial)
            return
        if stage == DRIVER:
            self.waiting.append(trial)
        elif stage == DONE:
            self._done(now, trial)
        if self.serving is None:
            self._serve(now)

    def _done(self, now: float, trial: int) -> None:
        self.busy += now - self.serving[1]
        if self.serving[0] == SAVE:
            self.save_at = now + SAVE_PERIOD
            self._at(self.save_at, SAVE, 0)
        else:
            self.delays.append(now - self.ended_at[trial])
            self._at(now + self.load.epoch_seconds * self.rng.uniform(0.9, 1.1), NETWORK, trial)
        self.serving = None

    def _serve(self, now: float) -> None:
        if now >= self.save_at:
            self.serving, trial, seconds = (SAVE, now), 0, self.save_seconds
        elif self.waiting:
            n = int(self.rng.integers(len(self.waiting)))
            self.waiting[n], self.waiting[-1] = self.waiting[-1], self.waiting[n]
            trial = self.waiting.pop()
            self.epochs[trial] += 1
            ends = self.epochs[trial] % self.load.epochs == 0
            self.serving, seconds = (DRIVER, now), self.service + self.more_at_end * ends
        else:
            return
        self._at(now + seconds, DONE, trial)
