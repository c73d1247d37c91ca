"""What a cluster's head has of many trials at once, on one machine: the driver, the trials' actors and Ray's processes.

The search and its `FineTuneTrial` actors are the product's. Their hosts and workers would be on other nodes; here one
actor, `Elsewhere`, answers for all of them when an epoch's time is over. All processes of Ray import this module, so
it imports little.
"""

import argparse
import asyncio
import os
import random
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from empty_trials import end_search_when, epoch_metrics, pretend_room, run_search, search_options, start_ray

SETTLE_SECONDS = 3.0
ALONE_SECONDS = 10.0
RAMP_SECONDS = 10.0
"""An epoch while the actors start."""
EPOCHS = 60
"""Of a trial. Many, since Tune drops the actor that is starting when another trial ends."""
MB = 10**6


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of the run: how long a trial's epoch takes (seconds, give or take 10 %), and its checkpoint's size."""

    epoch_seconds: float
    checkpoint_mb: float
    seconds: float


class Elsewhere:
    """Async actor: the hosts and workers of all trials, as far as their actors can see."""

    def __init__(self, epoch_seconds: float) -> None:
        self.trials: dict[str, list] = {}  # by slot: the recipe, and how many epochs are done
        self.load(epoch_seconds, 0)

    def load(self, epoch_seconds: float, checkpoint_mb: float) -> int:
        """Holds from each trial's next epoch on; the id of this process."""
        from trainables.training.checkpoint import PREPROCESSING_FILE, TRAINING_FILE, WEIGHTS_FILE

        size = int(checkpoint_mb * MB) // 3
        self.state = {WEIGHTS_FILE: bytes(size), PREPROCESSING_FILE: b"{}\n", TRAINING_FILE: bytes(2 * size)}
        self.epoch_seconds = epoch_seconds
        return os.getpid()

    async def node(self) -> str:
        return "elsewhere"

    async def begin(self, slot: str, trial, epochs_done: int, state) -> None:
        from trainables.recipe import Recipe

        self.trials[slot] = [Recipe.from_dict(trial.recipe), epochs_done]

    async def run_epoch(self, slot: str, with_state: bool = True):
        from trainables.ray.messages import Outcome

        await asyncio.sleep(self.epoch_seconds * random.uniform(0.9, 1.1))
        recipe, epochs_done = self.trials[slot]
        self.trials[slot][1] += 1
        times = {"overhead_seconds": 0.0, "ended_at": time.time()}
        return Outcome(epoch_metrics(recipe, epochs_done + 1) | times, self.state)

    async def close(self) -> None:
        pass

    async def ended(self) -> None:
        pass


def train_elsewhere() -> None:
    """Ray calls this in every process that it starts: a trial finds `Elsewhere` in the place of a host of its own."""
    from trainables.ray.trial import FineTuneTrial

    def start_host(trial: FineTuneTrial) -> None:
        import ray

        actor, slot = ray.get_actor("elsewhere"), str(os.getpid())
        calls = {name: partial(getattr(actor, name).remote, slot) for name in ("begin", "run_epoch")}
        calls |= {name: getattr(actor, name).remote for name in ("node", "close", "ended")}
        trial.host = SimpleNamespace(**{name: SimpleNamespace(remote=call) for name, call in calls.items()})
        trial.host_size, trial.handed_over = trial.size, False

    FineTuneTrial._start_host = start_host


class Watch:
    """Leads the run from one phase to the next, and counts in each of them."""

    def __init__(self, trials: int, phases: list[Phase], scale: float) -> None:
        self.trials, self.phases = trials, phases
        self.ramp, self.settle, self.quiet = (scale * s for s in (RAMP_SECONDS, SETTLE_SECONDS, ALONE_SECONDS))
        self.ended = 0
        self.actors: dict[int, float] = {}  # process id -> when its first result came
        self.rows: list[dict[str, Any]] = []
        self.before: dict[str, Any] | None = None
        self.deadline = None

    @property
    def over(self) -> bool:
        return len(self.rows) == len(self.phases)

    def begin(self, elsewhere) -> None:
        """`elsewhere` takes part from here on; what Ray alone takes of the CPU is counted before the first trial."""
        import ray

        self.elsewhere, self.load = elsewhere, elsewhere.load.remote  # an actor ends with its last handle
        self.elsewhere_pid = ray.get(self.load(self.ramp, 0))
        before = self.processes()
        time.sleep(self.quiet)
        after = self.processes()
        ray_cpu = spent(before["ray"], after["ray"]) / self.quiet
        self.alone = {"ray_cpu": ray_cpu, "ray_mb": after["ray"]["pss_mb"]}

    def on_result(self, result: dict[str, Any]) -> None:
        now = time.time()
        if self.over:
            return
        self.actors.setdefault(result["pid"], now)
        if len(self.actors) == self.trials and self.deadline is None:
            self.start_seconds = (now - min(self.actors.values())) / (self.trials - 1)
            self._enter()
        elif self.deadline is not None and now > self.deadline:
            self._next(now)
        elif self.before:
            self.delays.append(now - result["ended_at"])

    def _enter(self) -> None:
        phase = self.phases[len(self.rows)]
        self.load(phase.epoch_seconds, phase.checkpoint_mb)
        previous = self.phases[len(self.rows) - 1].epoch_seconds if self.rows else self.ramp
        self.before, self.deadline = None, time.time() + self.settle + 1.2 * (previous + phase.epoch_seconds)

    def _next(self, now: float) -> None:
        """The phase has settled, or it is over."""
        phase = self.phases[len(self.rows)]
        if self.before is None:
            self.delays: list[float] = []
            self.before = {"processes": self.processes(), "ended": self.ended, "time": time.time()}
            self.deadline = self.before["time"] + phase.seconds
            return
        seconds, after = now - self.before["time"], self.processes()
        cpu = {name: spent(self.before["processes"][name], after[name]) / seconds for name in after}
        p50, p95 = np.quantile(self.delays, (0.5, 0.95))
        memory = {name: {key: after[name][key] for key in ("pss_mb", "uss_mb")} for name in after}
        row = {"results": len(self.delays), "seconds": seconds, "results_per_second": len(self.delays) / seconds,
               "delay_p50": p50, "delay_p95": p95, "cpu": cpu, "memory": memory,
               "threads_per_actor": after["actors"]["threads"] / self.trials,
               "ended": self.ended - self.before["ended"],
               "known": self.trials + (self.before["ended"] + self.ended) // 2}  # fmt: skip
        self.rows.append(asdict(phase) | row)
        if not self.over:
            self._enter()

    def processes(self) -> dict[str, dict[str, Any]]:
        """CPU seconds since their start, memory and threads of this process, the trials' actors, Ray's own processes
        and `elsewhere`."""
        groups: dict[str, list[int]] = defaultdict(list, driver=[os.getpid()], elsewhere=[self.elsewhere_pid])
        groups |= {"actors": list(self.actors), "ray": []}
        named = {pid for pids in groups.values() for pid in pids}
        groups["ray"] = [pid for pid in descendants(os.getpid()) if pid not in named]
        return {name: taken_by(pids) for name, pids in groups.items()}


def descendants(pid: int) -> list[int]:
    children = defaultdict(list)
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            children[int(stat.read_text().rpartition(")")[2].split()[1])].append(int(stat.parent.name))
        except OSError:  # it has just ended
            continue
    found, to_see = [], [pid]
    while to_see:
        to_see += (below := children[to_see.pop()])
        found += below
    return found


def spent(before: dict[str, Any], after: dict[str, Any]) -> float:
    """CPU seconds, but for those of processes that are gone."""
    return sum(seconds - before["cpu"].get(pid, 0.0) for pid, seconds in after["cpu"].items())


def taken_by(pids: Iterable[int]) -> dict[str, Any]:
    """CPU seconds by process; threads and memory of all."""
    total: dict[str, Any] = {"cpu": {}} | dict.fromkeys(("pss_mb", "uss_mb", "threads"), 0.0)
    for pid in pids:
        folder = Path(f"/proc/{pid}")
        try:
            stat = (folder / "stat").read_text().rpartition(")")[2].split()
            lines = (folder / "smaps_rollup").read_text().splitlines()[1:]
        except OSError:  # it has just ended
            continue
        kb = {line.split(":")[0]: int(line.split()[1]) for line in lines}
        total["cpu"][pid] = (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")
        total["threads"] += int(stat[17])
        total["pss_mb"] += 1024 * kb["Pss"] / MB
        total["uss_mb"] += 1024 * (kb["Private_Clean"] + kb["Private_Dirty"]) / MB
    return total


_watch: Watch
"""Of this process. Tune pickles its callbacks, and they must not hold it."""


def hear_of_results() -> None:
    """The watch hears of each result when Tune is done with it."""
    from ray.tune.execution.tune_controller import TuneController

    product = TuneController._on_training_result

    def take(controller: TuneController, trial: Any, result: dict[str, Any]) -> None:
        product(controller, trial, result)
        _watch.on_result(result)

    TuneController._on_training_result = take


def is_over() -> bool:
    return _watch.over


def on_end(now: float) -> None:
    _watch.ended += 1


def run_trials(args: argparse.Namespace, trials: int, phases: list[dict[str, float]]) -> dict[str, Any]:
    """One search with so many trials at once, through `phases` (see `Phase`). Call it once in a process."""
    global _watch
    _watch = Watch(trials, [Phase(**phase) for phase in phases], args.scale)
    with tempfile.TemporaryDirectory() as root:
        start_ray(Path(root) / "cache", hook=train_elsewhere)
        import ray

        try:
            options = {"name": "elsewhere", "num_cpus": 0, "max_concurrency": 10 * trials}
            _watch.begin(ray.remote(**options)(Elsewhere).remote(_watch.ramp))
            settings = (f"epochs={EPOCHS - 1}", "freeze_epochs=1")
            options = search_options(Path(root), settings, trials=10**6, concurrent=trials, seed=args.seed)
            pretend_room(trials)
            end_search_when(is_over)
            hear_of_results()
            run_search(replace(options, options=replace(options.options, report="off")), on_end)
        finally:
            ray.shutdown()
    return {"trials": trials, "start_seconds": _watch.start_seconds, "alone": _watch.alone,
            "phases": _watch.rows}  # fmt: skip
