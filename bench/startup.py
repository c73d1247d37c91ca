"""How long a user waits before the first trial trains, and what of the processors it takes.

    python bench/startup.py --rounds 5
    python bench/startup.py --before ../as-it-was      # another checkout, measured in turns with this one

Runs `python -m search.run --space quickstart` as a user does, with the images drawn and presized before, until the
first batch of trial 0 is trained, and then interrupts it. The moments are told by a `sitecustomize` that all Python
processes of the search import; CPU seconds and memory are those of all its processes, read from /proc (Linux only).
Writes startup.json and startup.md. Needs a machine with nothing else to do.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

from common import RESULTS, command_line, footer, hardware, versions, write

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 180.0
"""A start that takes longer has failed."""
LOOK_SECONDS = 0.2
MOMENTS = {
    "ray_init": "Ray's start begins (`ray.init`)",
    "ray_up": "Ray is up",
    "trial": "the trial's actor is up",
    "host": "its group host is up",
    "worker": "its worker is up",
    "training": "the first epoch begins",
    "batch": "**the first batch is trained**",
}
SITECUSTOMIZE = """
import functools, importlib.machinery, os, sys, time


def tell(moment):
    line = f"{moment} {time.monotonic()}\\n".encode()
    file = os.open(os.environ["STARTUP_MOMENTS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, line)
    os.close(file)


def telling(moment, function, then=None):
    @functools.wraps(function)
    def told(*args, **kwargs):
        tell(moment)
        result = function(*args, **kwargs)
        if then:
            tell(then)
        return result
    return told


def telling_batches(init):
    @functools.wraps(init)
    def told(*args, on_progress=lambda: None, **kwargs):
        return init(*args, on_progress=telling("batch", on_progress), **kwargs)
    return told


CLASSES = {
    "FineTuneTrial": ("setup", "trial"), "GroupHost": ("__init__", "host"), "FineTune": ("run_epoch", "training")
}


def watch(module):
    name = module.__name__
    if name == "ray":
        module.init = telling("ray_init", module.init, then="ray_up")
    for of, (method, moment) in CLASSES.items():
        found = getattr(module, of, None)
        if found is not None and found.__module__ == name:
            setattr(found, method, telling(moment, getattr(found, method)))
            if of == "FineTune":
                found.__init__ = telling_batches(found.__init__)
    if hasattr(module, "serve") and module.serve.__module__ == name:
        module.serve = telling("worker", module.serve)


class Finder:
    def find_spec(self, name, path, target=None):
        if name != "ray" and not name.startswith("trainables."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module
            spec.loader.exec_module = lambda module: (run(module), watch(module))
        return spec


sys.meta_path.insert(0, Finder())
"""
KINDS = (
    ("gcs_server", "Ray: gcs_server"),
    ("raylet/raylet", "Ray: raylet"),
    ("dashboard/dashboard.py", "Ray: dashboard"),
    ("ray-dashboard", "Ray: dashboard"),
    ("multiprocessing", "Ray: dashboard"),
    ("dashboard/agent.py", "Ray: agents"),
    ("ray::DashboardAgent", "Ray: agents"),
    ("ray::RuntimeEnvAgent", "Ray: agents"),
    ("runtime_env/agent", "Ray: agents"),
    ("log_monitor.py", "Ray: log monitor"),
    ("monitor.py", "Ray: autoscaler's monitor"),
    ("ray::FineTuneTrial", "trial actor"),
    ("ray::ResourceTrainable", "trial actor"),
    ("ray::GroupHost", "group host"),
    ("ray::TrainController", "Ray Train: controller"),
    ("ray::_AutoscalingCoordinatorActor", "Ray Train: requests to the autoscaler"),
    ("ray::SynchronizationActor", "Ray Train: reports"),
    ("ray::RayTrainWorker", "worker"),
    ("ray::IDLE", "Ray: idle processes"),
    ("default_worker.py", "Ray: idle processes"),
)
OF_SLOT = ("trial actor", "group host", "Ray Train: controller", "Ray Train: reports", "worker")
"""The processes that each trial which runs at the same time adds."""


class Watch:
    """The CPU seconds of a process and of all that it has started, by pid; those of ended ones stay."""

    def __init__(self, pid: int) -> None:
        self.root = pid
        self.found: dict[int, tuple[str, float]] = {pid: ("", 0.0)}

    def look(self) -> None:
        parents, seconds = {}, {}
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                try:
                    fields = (folder / "stat").read_text().rpartition(")")[2].split()
                except OSError:
                    continue
                pid = int(folder.name)
                parents[pid] = int(fields[1])
                seconds[pid] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        ours = set(self.found)
        while more := {pid for pid, parent in parents.items() if parent in ours} - ours:
            ours |= more
        for pid in ours & parents.keys():
            try:
                words = (Path("/proc") / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
            except OSError:
                words = ""
            before = self.found.get(pid, ("", 0.0))[0]
            self.found[pid] = (words or before, seconds[pid])

    def by_kind(self) -> dict[str, float]:
        sums: dict[str, float] = defaultdict(float)
        for pid, (words, seconds) in self.found.items():
            sums[self._kind(pid, words)] += seconds
        return dict(sums)

    def memory(self) -> dict[str, tuple[int, float]]:
        """By kind, how many processes live, and their MB; what several of them share counts for each in part."""
        sums: dict[str, tuple[int, float]] = defaultdict(lambda: (0, 0.0))
        for pid, (words, _) in self.found.items():
            if (kilobytes := _kilobytes(pid)) is not None:
                count, megabytes = sums[self._kind(pid, words)]
                sums[self._kind(pid, words)] = count + 1, megabytes + kilobytes / 1e3
        return dict(sums)

    def _kind(self, pid: int, words: str) -> str:
        return "driver" if pid == self.root else kind_of(words)


def _kilobytes(pid: int) -> float | None:
    """The proportional set size of a process; None where it has ended."""
    try:
        lines = (Path("/proc") / str(pid) / "smaps_rollup").read_text().splitlines()
    except OSError:
        return None
    return next((1.024 * int(line.split()[1]) for line in lines if line.startswith("Pss:")), None)


def kind_of(words: str) -> str:
    return next((kind for part, kind in KINDS if part in words), "others")


def moments_in(path: Path, since: float) -> dict[str, float]:
    """Seconds from `since` to the first time that each moment came."""
    found: dict[str, float] = {}
    for line in path.read_text().splitlines() if path.is_file() else ():
        name, when = line.split()
        found.setdefault(name, float(when) - since)
    return found


def start_once(repo: Path, *, cold: bool = False) -> dict[str, Any]:
    """One start of the search in a checkout: seconds to each moment, and by kind of process the CPU seconds until then,
    their number and their memory. `cold` is without images, which the search then draws and presizes first."""
    with tempfile.TemporaryDirectory() as folder:
        told, log = Path(folder) / "moments", Path(folder) / "log"
        (Path(folder) / "sitecustomize.py").write_text(SITECUSTOMIZE)
        environment = {**os.environ, "PYTHONPATH": f"{folder}:{repo}", "STARTUP_MOMENTS": str(told)}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # a user's modules are compiled once
        if cold:
            environment["FINETUNE_SEARCH_CACHE"] = f"{folder}/cache"
        load = os.getloadavg()[0]
        command = [sys.executable, "-m", "search.run", "--space", "quickstart", "--results", folder, "--name", "run"]
        with log.open("w") as file:
            since = time.monotonic()
            search = subprocess.Popen(command, cwd=repo, env=environment, stdout=file, stderr=subprocess.STDOUT)
        watch = Watch(search.pid)
        try:
            while "batch" not in (moments := moments_in(told, since)):
                if search.poll() is not None or time.monotonic() - since > SECONDS:
                    raise RuntimeError(f"no first batch in {repo}:\n{log.read_text()[-4000:]}")
                watch.look()
                time.sleep(LOOK_SECONDS)
            watch.look()
            memory = watch.memory()
        finally:
            search.send_signal(signal.SIGINT)
            search.wait(60)
    return {"moments": moments, "cpu_seconds": watch.by_kind(), "memory": memory, "load": load}


def summarise(runs: list[dict[str, Any]], sides: list[str]) -> dict[str, Any]:
    """Medians over the rounds, by side."""
    result = {}
    for side in sides:
        of_side = [run for run in runs if run["side"] == side]
        kinds = sorted({kind for run in of_side for kind in run["cpu_seconds"]})
        result[side] = {
            "n": len(of_side),
            "moments": {name: median(run["moments"][name] for run in of_side) for name in MOMENTS},
            "range": [f(run["moments"]["batch"] for run in of_side) for f in (min, max)],
            "cpu_seconds": {kind: median(run["cpu_seconds"].get(kind, 0.0) for run in of_side) for kind in kinds},
            "cpu_seconds_in_all": median(sum(run["cpu_seconds"].values()) for run in of_side),
            "processes": {kind: median(run["memory"].get(kind, (0, 0.0))[0] for run in of_side) for kind in kinds},
            "megabytes": {kind: median(run["memory"].get(kind, (0, 0.0))[1] for run in of_side) for kind in kinds},
        }
    return result


def markdown(result: dict[str, Any]) -> str:
    sides = result["sides"]
    header = " | ".join(sides)

    def row(name: str, values: list[float]) -> str:
        return f"| {name} | {' | '.join(f'{value:.1f}' for value in values)} |"

    of = [result[side] for side in sides]
    moments = [row(words, [side["moments"][name] for side in of]) for name, words in MOMENTS.items()]
    kinds = sorted({kind for side in of for kind in side["cpu_seconds"]})
    kinds.sort(key=lambda kind: -of[-1]["cpu_seconds"].get(kind, 0.0))
    processors = [row(kind, [side["cpu_seconds"].get(kind, 0.0) for side in of]) for kind in kinds]
    processors.append(row("**in all**", [side["cpu_seconds_in_all"] for side in of]))
    held = [f"| {kind} | {_held(of, kind)} |" for kind in kinds]
    held.append(f"| **of a slot: {', '.join(OF_SLOT)}** | {_held(of, *OF_SLOT)} |")
    cold = "; ".join(f"{side} {result['cold'][side]:.1f}" for side in sides)
    low, high = result["load"]
    ranges = "; ".join(f"{side} {low:.1f} to {high:.1f}" for side in sides for low, high in [result[side]["range"]])
    line = "\n"
    return f"""# Seconds from the command to the first trained batch

`{result["command"]}`

`python -m search.run --space quickstart`, its images drawn and presized before: seconds from the command, medians of
{of[0]["n"]} starts, the sides in turns. The first batch, over all starts: {ranges}. Without images, which are drawn and
presized first (1 start): {cold}. Load of the machine when they began: {low:.0f} to {high:.0f}.
{result["note"]}

| seconds until | {header} |
|---|{"---|" * len(sides)}
{line.join(moments)}

CPU seconds that its processes have taken by then:

| processes | {header} |
|---|{"---|" * len(sides)}
{line.join(processors)}

How many of them live then: their memory in MB (proportional set size):

| processes | {header} |
|---|{"---|" * len(sides)}
{line.join(held)}

{footer(result)}"""


def _held(sides: list[dict[str, Any]], *kinds: str) -> str:
    """The cells of the sides: how many processes of these kinds, and their MB."""
    sums = [[sum(side[what].get(kind, 0) for kind in kinds) for what in ("processes", "megabytes")] for side in sides]
    return " | ".join(f"{processes:.0f}: {megabytes:.0f}" if processes else "-" for processes, megabytes in sums)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="5 without it")
    parser.add_argument("--before", type=Path, help="another checkout, measured in turns with this one")
    parser.add_argument("--note", default="", help="a sentence for the table, on how it was measured")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    repos = ({"before": args.before.resolve()} if args.before else {}) | {"now": ROOT}
    for repo in repos.values():
        start_once(repo)  # draws and presizes the images, compiles the modules, and brings the files into memory
    cold = {side: start_once(repo, cold=True)["moments"]["batch"] for side, repo in repos.items()}
    runs = []
    for turn in range(args.rounds):
        for side in list(repos)[:: 1 if turn % 2 == 0 else -1]:
            run = {"round": turn, "side": side, **start_once(repos[side])}
            runs.append(run)
            cpu = sum(run["cpu_seconds"].values())
            print(f"round {turn}  {side:7} first batch {run['moments']['batch']:.1f} s, {cpu:.1f} CPU s", flush=True)
    result = {**summarise(runs, list(repos)), "sides": list(repos), "rounds": args.rounds,
              "cold": cold, "note": args.note,
              "load": [f(run["load"] for run in runs) for f in (min, max)], "command": command_line(),
              "hardware": hardware(), "runs": runs,
              "versions": versions("ray", "torch", "timm", "optuna", "finetune-search")}  # fmt: skip
    write(args.out, "startup", result, markdown(result))


if __name__ == "__main__":
    main()
