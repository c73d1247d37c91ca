"""What each trial and each result costs the driver, the process of `python -m search.run`, measured without a cluster.

The product's own search runs here (Tune's loop, Optuna and its journal, early termination, tables, TensorBoard files)
and what is in the place of the trials' actors answers at once, so that the driver never waits for them and its seconds
can be told apart, at any number of trials. What Ray's calls add is measured with that many calls under way to one real
actor.
"""

import argparse
import asyncio
import os
import random
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

from cluster_trials import taken_by
from empty_trials import end_search_when, epoch_metrics, pretend_room, run_search, search_options, start_bare_ray

MOST_SECONDS = 60.0
CALLS = 200


class ImmediateActors:
    """Tune's actor manager, but for the actors: what a trial is asked for is there at once, in a random order."""

    num_pending_actors = 0
    num_live_actors = num_total_actors = 1

    def __init__(self, resource_manager: Any) -> None:
        self.starting: list[Any] = []
        self.ready: list[tuple] = []
        self.trials: dict[Any, Any] = {}  # by actor: the config, and how many epochs are done
        self.random = random.Random(0)
        self._live_actors_to_ray_actors_resources = defaultdict(lambda: (None, None))

    @property
    def num_actor_tasks(self) -> int:
        return len(self.ready)

    def add_actor(self, cls: Any, resource_request: Any, kwargs: dict, on_start: Callable, **callbacks: Any) -> Any:
        from ray.air.execution._internal.tracked_actor import TrackedActor

        actor = TrackedActor(len(self.trials), on_start=on_start)
        self.trials[actor] = kwargs["config"], 0
        self.starting.append(actor)
        return actor

    def schedule_actor_task(
        self, tracked_actor: Any, method_name: str, args: tuple = (), kwargs: Any = None,
        on_result: Callable | None = None, on_error: Any = None, _return_future: bool = False,
    ) -> None:  # fmt: skip
        if on_result is not None:
            self.ready.append((tracked_actor, method_name, args, on_result))

    def next(self, timeout: float | None = None) -> bool:
        if self.starting:
            actor = self.starting.pop()
            actor._on_start(actor)
        elif self.ready:
            n = self.random.randrange(len(self.ready))
            self.ready[n], self.ready[-1] = self.ready[-1], self.ready[n]
            actor, method, args, on_result = self.ready.pop()
            on_result(actor, getattr(self, method)(actor, *args))
        else:
            return False
        return True

    def reset(self, actor: Any, config: dict[str, Any]) -> bool:
        self.trials[actor] = config, 0
        return True

    def train(self, actor: Any) -> dict[str, Any]:
        from trainables.recipe import Recipe

        config, done = self.trials[actor]
        settings = {name: value for name, value in config.items() if not name.startswith("__")}
        recipe = Recipe.from_dict(_window.settings | settings)
        done = recipe.total_epochs if _window.filling else done + 1
        self.trials[actor] = config, done
        own = {"seconds": 0.002 * done, "overhead_seconds": 0.1, "epochs_total": recipe.total_epochs, "failure": ""}
        tunes = {"training_iteration": done, "date": "2000-01-01_00-00-00", "timestamp": 946684800, "config": settings,
                 "time_this_iter_s": 0.1, "time_total_s": 0.1 * done, "pid": 1, "hostname": "head",
                 "node_ip": "127.0.0.1", "time_since_restore": 0.1, "iterations_since_restore": done}  # fmt: skip
        return epoch_metrics(recipe, done) | own | tunes | {"done": done == recipe.total_epochs}

    def is_actor_started(self, tracked_actor: Any) -> bool:
        return True

    def is_actor_failed(self, tracked_actor: Any) -> bool:
        return False

    def clear_actor_task_futures(self, tracked_actor: Any) -> None:
        self.ready = [task for task in self.ready if task[0] != tracked_actor]

    def remove_actor(self, tracked_actor: Any, **how: Any) -> bool:
        return False

    def cleanup(self) -> None:
        self.num_total_actors = 0


class Window:
    """A part of the search in which the driver's seconds are counted: `running` trials run and `known` are in the
    tables. Before it, trials that end with their first result fill the tables, and every trial has some results."""

    def __init__(self, running: int, known: int, results: int, settings: dict[str, Any]) -> None:
        self.running, self.known, self.wanted, self.settings = running, known, results, settings
        self.parts: Counter[str] = Counter()  # by kind of event and part of the driver
        self.saved: Counter[str] = Counter()
        self.ended = self.results = self.saves = 0
        self.before: dict[str, float] = {}
        self.found: dict[str, Any] | None = None

    @property
    def filling(self) -> bool:
        return self.ended + self.running < self.known

    def on_result(self) -> None:
        self.results += not self.filling
        if not self.before and self.results == self.running:
            self.before = self.now()
            self.parts.clear()
            self.saved.clear()
        late = self.before and clock() - self.before["seconds"] > MOST_SECONDS
        if self.found is None and (late or self.results == self.running + self.wanted):
            self.found = {name: value - self.before[name] for name, value in self.now().items()}
            self.found |= {"running": self.running, "known": self.known, "parts": self.parts, "saved": self.saved}
            self.found["mb"] = taken_by([os.getpid()])["pss_mb"]

    def now(self) -> dict[str, float]:
        return counters() | {"results": self.results, "ended": self.ended, "saves": self.saves}


_window: Window
"""Of this process. Tune pickles its callbacks, and they must not hold it."""


def on_result(result: dict[str, Any]) -> None:
    _window.on_result()


def is_over() -> bool:
    return _window.found is not None


def on_end(now: float) -> None:
    _window.ended += 1


_waited = 0.0
"""Seconds that the main thread has waited for its disk, and for TensorBoard's threads to write."""


def clock() -> float:
    """Seconds that the main thread has worked or waited. What others do on the machine hardly counts."""
    return time.thread_time() + _waited


def count_waits(owner: Any, name: str) -> None:
    function = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        global _waited
        started, worked = time.perf_counter(), time.thread_time()
        result = function(*args, **kwargs)
        if threading.current_thread() is threading.main_thread():
            _waited += time.perf_counter() - started - (time.thread_time() - worked)
        return result

    setattr(owner, name, call)


def counters() -> dict[str, float]:
    """Of the main thread: its seconds, those it waited, bytes and calls of `write`; and the same of all others."""
    own, all_threads = (
        dict(line.split(": ") for line in Path(f"/proc/{who}/io").read_text().splitlines())
        for who in ("thread-self", "self")
    )
    found = {"seconds": clock(), "waited": _waited, "other_seconds": time.process_time() - time.thread_time()}
    for name, key in (("bytes", "wchar"), ("writes", "syscw")):
        found |= {name: int(own[key]), f"other_{name}": int(all_threads[key]) - int(own[key])}
    return found


def timed(owner: type, method: str, kind: str, part: str) -> None:
    """Adds the seconds of each call of `owner.method` to the window's."""
    function = getattr(owner, method)

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        started = clock()
        try:
            return function(*args, **kwargs)
        finally:
            _window.parts[f"{kind} {part}"] += clock() - started

    setattr(owner, method, call)


def count_writes(owner: type, method: str) -> None:
    """Counts the saves of the window, and what each writes."""
    function = getattr(owner, method)

    def call(*args: Any, **kwargs: Any) -> None:
        before = counters()
        function(*args, **kwargs)
        for name, value in counters().items():
            _window.saved[name] += value - before[name]
        _window.saves += 1

    setattr(owner, method, call)


def time_the_parts() -> None:
    from ray.tune.execution.tune_controller import TuneController
    from ray.tune.logger import TBXLoggerCallback

    from search.runs.results_table import ResultsTable
    from search.tuning.forecast_stopping import ForecastScheduler
    from search.tuning.searcher import OptunaSearcher

    for owner, part in ((ResultsTable, "table"), (TBXLoggerCallback, "tensorboard")):
        for event, kind in (("start", "trial"), ("complete", "trial"), ("result", "result")):
            timed(owner, f"on_trial_{event}", kind, part)
    timed(ForecastScheduler, "on_trial_result", "result", "scheduler")
    timed(ForecastScheduler, "on_trial_complete", "trial", "scheduler")
    timed(OptunaSearcher, "on_trial_result", "result", "searcher")
    timed(OptunaSearcher, "_ask", "trial", "searcher")
    timed(OptunaSearcher, "on_trial_complete", "trial", "searcher")
    timed(TuneController, "save_to_dir", "save", "state")
    count_writes(TuneController, "save_to_dir")


def measure_driver(args: argparse.Namespace, running: int, known: int) -> dict[str, Any]:
    """Seconds of the driver by part, per result, per trial and per save of Tune's state, with `running` trials running
    and `known` in the tables. Bytes and calls of `write`, per save and per result with its share of trials' ends. Call
    it once in a process."""
    global _window
    from ray.tune.execution import tune_controller

    from search.tuning.tuner import import_tensorboardx

    import_tensorboardx()
    tune_controller.RayActorManager = ImmediateActors
    with tempfile.TemporaryDirectory() as root:
        start_bare_ray(Path(root) / "cache")
        settings = (f"epochs={args.epochs - 1}", "freeze_epochs=1")
        options = search_options(Path(root), settings, trials=10**6, concurrent=running, seed=args.seed)
        options = replace(options, options=replace(options.options, report="off"))
        wanted = max(args.results, running)
        _window = Window(running, known, wanted, options.space.full_settings)
        count_waits(os, "fsync")
        for name in ("flush", "close"):
            count_waits(sys.modules["tensorboardX"].SummaryWriter, name)
        time_the_parts()
        pretend_room(running)
        end_search_when(is_over)
        run_search(options, on_end, on_result)
    return per_event(_window.found)


def per_event(found: dict[str, Any]) -> dict[str, Any]:
    """What a window has counted, by kind of event; the rest of the time is Tune's, for its results."""
    numbers = {"result": found["results"], "trial": max(1, found["ended"]), "save": max(1, found["saves"])}
    costs: dict[str, Any] = {kind: {} for kind in numbers}
    for name, seconds in found["parts"].items():
        kind, part = name.split()
        costs[kind][part] = seconds / numbers[kind]
    costs["result"]["tune"] = (found["seconds"] - sum(found["parts"].values())) / found["results"]
    costs["save"]["copy"] = found["other_seconds"] / numbers["save"]  # of files, by a thread of Tune after each save
    per_result = {name: found[name] / found["results"] for name in ("seconds", "waited")}
    for name in ("bytes", "writes"):
        costs["save"][name] = (found["saved"][name] + found[f"other_{name}"]) / numbers["save"]
        per_result[name] = (found[name] - found["saved"][name]) / found["results"]
    return {**costs, **per_result, **{name: found[name] for name in ("running", "known", "results", "mb")}}


def measure_calls(numbers: list[int]) -> list[dict[str, float]]:
    """Seconds that the driver works to ask an actor for an epoch and take the answer, while so many such calls are
    under way."""
    import ray
    from ray.air.execution._internal.actor_manager import RayActorManager
    from ray.air.execution.resources.fixed import FixedResourceManager

    class Trial:
        async def never(self) -> None:
            await asyncio.Event().wait()

        async def now(self) -> dict[str, Any]:
            return {f"metric_{n}": n / 7 for n in range(30)}

    with tempfile.TemporaryDirectory() as root:
        start_bare_ray(Path(root) / "cache")
        trial = ray.remote(num_cpus=0, max_concurrency=2 * max(numbers))(Trial).remote()
        manager, rows = RayActorManager(FixedResourceManager()), []
        events = manager._actor_task_events
        for number in numbers:
            for _ in range(number - events.num_futures):
                events.track_future(trial.never.remote())
            work = seconds_of_call(lambda: events.track_future(trial.now.remote()), manager.next)
            rows.append({"running": number, "seconds": work})
        ray.shutdown()
    return rows


def seconds_of_call(ask: Callable[[], None], take: Callable[[], bool]) -> float:
    """The mean over `CALLS`, each taken when it is there."""
    before = clock()
    for _ in range(CALLS):
        ask()
        time.sleep(0.01)
        take()
    return (clock() - before) / CALLS
