"""The driver of a search with a thousand trials at once: the product's own, with Ray's calls, and trials that wait.

One actor answers for all trials: each epoch of a trial takes its time there, and then its metrics are there. So what
the driver takes is what it takes of a cluster. It runs in a process of its own, which is killed at the end.
"""

import argparse
import asyncio
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from empty_trials import end_search_when, epoch_metrics, pretend_room, run_search, search_options, start_bare_ray

EPOCHS = 10
SLICE_SECONDS = 10.0
"""Of a row of the table."""
MOST_BEHIND = 1.0
"""Seconds that a running trial's row may be behind."""


class Slots:
    """Async actor: the trials of all slots."""

    def __init__(self, settings: dict[str, Any], epoch_seconds: float) -> None:
        self.settings, self.epoch_seconds = settings, epoch_seconds
        self.trials: dict[int, tuple[dict[str, Any], int]] = {}  # by slot: the config, and how many epochs are done

    async def begin(self, slot: int, config: dict[str, Any], **options: Any) -> bool:
        # As in the middle of a search: the first trials are anywhere in their schedules.
        done = 0 if slot in self.trials else random.randrange(EPOCHS)
        self.trials[slot] = {name: value for name, value in config.items() if not name.startswith("__")}, done
        return True

    async def train(self, slot: int) -> dict[str, Any]:
        from trainables.recipe import Recipe

        config, done = self.trials[slot]
        await asyncio.sleep(self.epoch_seconds * random.uniform(0.9, 1.1))
        recipe, done = Recipe.from_dict(self.settings | config), done + 1
        self.trials[slot] = config, done
        own = {"seconds": 0.002 * done, "overhead_seconds": 0.1, "epochs_total": recipe.total_epochs, "failure": "",
               "ended_at": time.time(), "done": done == recipe.total_epochs}  # fmt: skip
        tunes = {"training_iteration": done, "date": "2000-01-01_00-00-00", "timestamp": 946684800, "config": config,
                 "time_this_iter_s": 0.1, "time_total_s": 0.1 * done, "pid": 1, "hostname": "node",
                 "node_ip": "127.0.0.1", "time_since_restore": 0.1, "iterations_since_restore": done}  # fmt: skip
        return epoch_metrics(recipe, done) | own | tunes

    async def nothing(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {}


def slots_for_actors(slots: Any) -> None:
    """Tune starts no actors: each trial gets a slot, as if an actor that trains were there."""
    from ray.air.execution._internal.actor_manager import RayActorManager
    from ray.air.execution._internal.tracked_actor import TrackedActor
    from ray.tune.execution import tune_controller

    class Handle:
        def __init__(self, slot: int) -> None:
            calls = {"train": slots.train, "reset": slots.begin}
            self.calls = {name: SimpleNamespace(remote=bound(call, slot)) for name, call in calls.items()}

        def __getattr__(self, name: str) -> Any:
            return self.calls.get(name) or slots.nothing

    class Manager(RayActorManager):
        def add_actor(self, cls: Any, kwargs: dict, resource_request: Any, **callbacks: Callable) -> TrackedActor:
            actor = TrackedActor(len(self._live_actors_to_ray_actors_resources), **callbacks)
            self._live_actors_to_ray_actors_resources[actor] = Handle(actor.actor_id), None
            future = slots.begin.remote(actor.actor_id, kwargs["config"])
            self._actor_state_events.track_future(
                future, on_result=lambda _: actor._on_start and actor._on_start(actor)
            )
            return actor

        def remove_actor(self, tracked_actor: TrackedActor, **how: Any) -> bool:
            tracked_actor._on_start = None  # its trial has got another one
            return False

        def cleanup(self) -> None:
            self._live_actors_to_ray_actors_resources.clear()

    tune_controller.RayActorManager = Manager


def bound(call: Any, slot: int) -> Callable:
    return lambda *args, **kwargs: call.remote(slot, *args, **kwargs)


class Watch:
    """What the driver has heard of, and what it has taken, by slices of time."""

    def __init__(self, at_once: int, seconds: float, root: Path) -> None:
        self.at_once, self.seconds, self.root = at_once, seconds, root
        self.log = (root / "heard.jsonl").open("a", buffering=1)
        self.started, self.results, self.ended = 0, 0, 0
        self.delays: list[tuple[float, float]] = []  # of results: when the epoch ended, and when the driver was done
        self.rows: list[dict[str, float]] = []
        self.mark: dict[str, float] = {}

    def on_start(self) -> None:
        """The slices begin when all trials run."""
        self.started += 1
        if self.started == self.at_once:
            self.mark = self.first = self.now()

    def on_result(self, trial_id: str, result: dict[str, Any]) -> None:
        now = time.time()
        self.results += 1
        self.log.write(json.dumps({"at": now, "trial": trial_id, "epoch": result["epoch"]}) + "\n")
        self.delays.append((result["ended_at"], now))
        if not self.mark:
            return
        if now - self.mark["at"] >= SLICE_SECONDS:
            self.slice()
        if now - self.first["at"] >= self.seconds:
            self.tell()

    def now(self) -> dict[str, float]:
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
        return {"at": time.time(), "cpu": time.process_time(), "mb": resident, "results": self.results,
                "ended": self.ended}  # fmt: skip

    def slice(self) -> None:
        before, self.mark = self.mark, self.now()
        took = {name: self.mark[name] - before[name] for name in ("at", "cpu", "results", "ended")}
        delays = [done - ended for ended, done in self.delays if done > before["at"]]
        self.rows.append({"at": self.mark["at"], "seconds": took["at"], "results": took["results"],
                          "cores": took["cpu"] / took["at"], "mb": self.mark["mb"], "ended": took["ended"],
                          "cpu_per_result": took["cpu"] / max(1, took["results"]),
                          "delay_p50": float(np.quantile(delays, 0.5)),
                          "delay_p95": float(np.quantile(delays, 0.95))})  # fmt: skip

    def tell(self) -> None:
        """Write down what it saw, once."""
        for row in self.rows:
            row["waiting"] = sum(ended <= row["at"] < done for ended, done in self.delays)
            row["at"] -= self.first["at"]
        self.seconds = math.inf
        path = self.root / "told.partial"
        path.write_text(json.dumps({"slices": self.rows, "started": self.started, "ended": self.ended}))
        path.rename(path.with_suffix(".json"))


_watch: Watch
"""Of this process. Tune pickles its callbacks, and they must not hold it."""


def hear_of_trials() -> None:
    from ray.tune.execution.tune_controller import TuneController

    took, began = TuneController._on_training_result, TuneController._actor_started

    def take(controller: TuneController, trial: Any, result: dict[str, Any]) -> None:
        took(controller, trial, result)
        _watch.on_result(trial.trial_id, result)

    def begin(controller: TuneController, tracked_actor: Any, **options: Any) -> None:
        began(controller, tracked_actor, **options)
        _watch.on_start()

    TuneController._on_training_result, TuneController._actor_started = take, begin


def drive(args: argparse.Namespace, root: Path) -> None:
    """The driver: a search that is never over. It writes what it saw to `told.json`, and waits for its end."""
    global _watch
    _watch = Watch(args.at_once, args.seconds, root)
    start_bare_ray(root / "cache")
    import ray

    settings = (f"epochs={EPOCHS - 1}", "freeze_epochs=1")
    options = search_options(root, settings, trials=10**6, concurrent=args.at_once, seed=args.seed)
    make = ray.remote(num_cpus=0, max_concurrency=4 * args.at_once)(Slots)
    slots = make.remote(options.space.full_settings, args.epoch_seconds)
    slots_for_actors(slots)
    hear_of_trials()
    pretend_room(args.at_once)
    end_search_when(never)
    run_search(replace(options, options=replace(options.options, report="off")), on_end)


def never() -> bool:
    return False


def on_end(now: float) -> None:
    _watch.ended += 1


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the driver in a process of its own, kills it, and looks at what it has left."""
    names = ("at_once", "seconds", "epoch_seconds", "seed")
    given = [word for name in names for word in (f"--{name.replace('_', '-')}", str(getattr(args, name)))]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
        command = [sys.executable, "-c", "import scale_at_once; scale_at_once.main()", str(root), *given]
        driver = subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.PIPE)
        try:
            while not (root / "told.json").is_file():
                if driver.poll() is not None:
                    raise RuntimeError(driver.stderr.read().decode()[-3000:])
                time.sleep(0.2)
            time.sleep(2)  # it goes on
            driver.kill()
            killed_at = time.time()
            driver.wait()
            return json.loads((root / "told.json").read_text()) | {"after_kill": left(root, killed_at)}
        finally:
            end_session(driver.pid)


def left(root: Path, killed_at: float) -> dict[str, int]:
    """What a killed driver has left. Raises `ValueError` unless its tables are whole and nearly up to date."""
    from search.runs.paths import RunFolder
    from search.runs.result_rows import read_epochs, read_trials

    folder = RunFolder(root / "run")
    for path in (folder.trials, folder.epochs):
        if not path.read_text().endswith("\n"):
            raise ValueError(f"{path.name} ends in half a line")
    rows = {row["trial_id"]: row for row in read_trials(folder.trials)}
    epochs = {(row["trial_id"], row["epoch"]) for row in read_epochs(folder.epochs)}
    heard: dict[str, int] = defaultdict(int)
    for line in (root / "heard.jsonl").read_text().splitlines():
        result = json.loads(line)
        trial_id = f"t{result['trial']}"
        if (trial_id, result["epoch"]) not in epochs:
            raise ValueError(f"epoch {result['epoch']} of {trial_id} is not in epochs.csv")
        if killed_at - result["at"] > MOST_BEHIND:
            heard[trial_id] = max(heard[trial_id], result["epoch"])
    behind = [trial_id for trial_id, epoch in heard.items() if rows[trial_id]["epochs_done"] < epoch]
    if behind:
        raise ValueError(f"trials.csv is more than {MOST_BEHIND:g} s behind for {len(behind)} trials")
    return {"trials": len(rows), "epochs": len(epochs),
            "ended": sum(row["status"] != "running" for row in rows.values())}  # fmt: skip


def end_session(session: int) -> None:
    """End Ray's processes, which a killed driver leaves."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[3]) == session:
                os.kill(int(stat.parent.name), signal.SIGKILL)
        except OSError:  # it has just ended
            continue


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--at-once", type=int, help="trials at once, whose epochs take time and nothing else")
    parser.add_argument("--seconds", type=float, default=120, help="with --at-once: how long (120 without it)")
    parser.add_argument("--epoch-seconds", type=float, default=60, help="with --at-once: of an epoch (60 without it)")


def markdown(result: dict[str, Any]) -> str:
    slices, left = result["slices"], result["after_kill"]
    seconds = sum(row["seconds"] for row in slices)
    cores = sum(row["cores"] * row["seconds"] for row in slices) / seconds
    rate = sum(row["results"] for row in slices) / seconds
    rows = [
        f"| {row['at']:.0f} | {row['results'] / row['seconds']:.1f} | {row['ended'] / row['seconds']:.1f} | "
        f"{row['cores']:.2f} | {row['mb']:.0f} | {row['waiting']} | {row['delay_p50']:.2f} | {row['delay_p95']:.2f} |"
        for row in slices
    ]
    return f"""# Many trials at once: the driver

`{result["command"]}`

{result["at_once"]} trials at once of {EPOCHS} epochs of {result["epoch_seconds"]:g} s (± 10 %), which one actor
answers for; the driver, its tables, its study and Ray's calls are real. **{rate:.1f} results a second, {cores:.2f}
cores, at most {max(row["mb"] for row in slices):.0f} MB.**

| second | results a second | trials ended a second | cores | MB | results waiting | delay, median, s | 95 %, s |
|---|---|---|---|---|---|---|---|
{chr(10).join(rows)}

Cores are CPU seconds of all threads of the driver's process by seconds. A delay is from the end of an epoch until the
driver is done with its result; results that wait at a slice's end are the queue. The trials are anywhere in their
schedules when the first slice begins, when all of them run. The report that a search renews while it runs is off.
CPU seconds hardly depend on what else the machine does, as it did here; delays do.

After `kill -9` the tables were whole: {left["trials"]} trials, {left["ended"]} of them ended, and {left["epochs"]}
epochs, none missing that the driver had handled, and no trial's row more than {MOST_BEHIND:g} s behind.
"""


def main() -> None:
    """Of the driver's process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("root", type=Path)
    parser.add_argument("--seed", type=int)
    add_options(parser)
    args = parser.parse_args()
    drive(args, args.root)
