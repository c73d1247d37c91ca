"""How many trials at once does one head carry, and what gives way first?

    python bench/cluster_model.py
    python bench/cluster_model.py --costs results/bench/cluster_model.json --epoch-seconds 20 --memory-gb 64

Measures on this machine what a result, a trial's end and a trial's actor cost the head (`cluster_costs`,
`cluster_trials`), and simulates 10, 100 and 1000 trials at once whose hosts and workers are on other nodes
(`cluster_head`). A real run through Ray with as many trials as this machine holds checks the model; its costs come from
runs with fewer trials. Costs are straight lines over the trials that run and over those in the tables. `--costs` takes
what was measured before. Writes cluster_model.json and cluster_model.md. Needs a machine with nothing else to do.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from cluster_head import (
    MB,
    SAVE_PERIOD,
    Costs,
    Head,
    Line,
    Load,
    Simulation,
    Work,
    demands,
    driver_cpu,
    largest,
    memory_mb,
    parts_of_result,
    seconds_to_start,
    shortest_epoch,
)
from cluster_table import markdown
from common import CPUS, RESULTS, command_line, hardware, versions, write

CALIBRATION = [
    {"epoch_seconds": 0.5, "checkpoint_mb": 0, "seconds": 20},
    {"epoch_seconds": 2, "checkpoint_mb": 24, "seconds": 20},
    {"epoch_seconds": 10, "checkpoint_mb": 0, "seconds": 30},
]
"""Many results, large checkpoints, and little of both: what each of them costs, and a trial's actor alone."""
CHECK = [
    {"epoch_seconds": 3, "checkpoint_mb": 0, "seconds": 30},
    {"epoch_seconds": 0.1, "checkpoint_mb": 0, "seconds": 30},
    {"epoch_seconds": 10, "checkpoint_mb": 12, "seconds": 40},
]
"""A driver that is busy in part, one that cannot keep up, and checkpoints."""
CHECKPOINT_FILES = 4
"""That an actor writes for each result: weights, preprocessing, optimizer, result."""


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Every part in a process of its own, with a Ray of its own."""
    low, *between, high = sorted(args.sizes)
    pairs = [(low, low), *((n, n) for n in between), (low, high), (high, high)]
    phases = {name: json.dumps(scaled(rows, args.scale)) for name, rows in (("c", CALIBRATION), ("k", CHECK))}
    return {
        "driver": [arm(args, "driver", running, known) for running, known in pairs],
        "calls": arm(args, "calls", low, high),
        "calibration": arm(args, "trials", args.calibration_trials, phases["c"]),
        "check": arm(args, "trials", args.check_trials, phases["k"]),
        "disk_mb": disk_mb(),
    }


def scaled(phases: list[dict[str, float]], scale: float) -> list[dict[str, float]]:
    return [phase | {name: scale * phase[name] for name in ("epoch_seconds", "seconds")} for phase in phases]


def arm(args: argparse.Namespace, name: str, *numbers: Any) -> Any:
    """What `run_arm` says of `name`."""
    print(" ".join(map(str, (name, *numbers))), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "arm.json", Path(folder) / "log"
        common = [f"--{given}={getattr(args, given)}" for given in ("epochs", "seed", "results", "scale")]
        with log.open("w") as file:
            command = [sys.executable, __file__, *common, f"--out={out}", "--arm", name, *map(str, numbers)]
            done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT)
        if done.returncode:
            raise RuntimeError(f"{name} {numbers} ended with {done.returncode}:\n{log.read_text()[-4000:]}")
        return json.loads(out.read_text())


def run_arm(args: argparse.Namespace) -> None:
    name, *numbers = args.arm
    if name == "trials":
        from cluster_trials import run_trials

        found = run_trials(args, int(numbers[0]), json.loads(numbers[1]))
    else:
        from cluster_costs import measure_calls, measure_driver

        sizes = [int(number) for number in numbers]
        found = measure_driver(args, *sizes) if name == "driver" else measure_calls(sizes)
    args.out.write_text(json.dumps(found))


def disk_mb() -> float:
    """MB/s of this machine's disk, for files of 12 MB."""
    content = os.urandom(12 * MB)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        for n in range(20):
            with (Path(folder) / str(n)).open("wb") as file:
                file.write(content)
                os.fsync(file.fileno())
        return 20 * 12 / (time.perf_counter() - started)


def costs_of(measured: dict[str, Any]) -> Costs:
    """Lines for what the driver does; from the phases of the calibration, by what they differ in, the work and the
    memory of actors and of Ray."""
    rows = measured["driver"]

    def line(*keys: str) -> Line:
        values = rows
        for key in keys:
            values = [value.get(key, 0.0) for value in values]
        return Line.fit([(row["running"], row["known"], value) for row, value in zip(rows, values, strict=True)])

    calls = Line.fit([(row["running"], 0, row["seconds"]) for row in measured["calls"]])
    calibration = measured["calibration"]
    trials, alone, phases = calibration["trials"], calibration["alone"], calibration["phases"]
    fast, large, slow = phases
    actors, ray = (work_of(phases, trials, who) for who in ("actors", "ray"))
    ray = Work(alone["ray_cpu"], max(0.0, ray.per_trial - alone["ray_cpu"] / trials), ray.per_result, ray.per_mb)
    private, own = (fast["memory"]["actors"][key] for key in ("uss_mb", "pss_mb"))
    held = large["memory"]["actors"]["uss_mb"] - private, shared_mb(large) - shared_mb(fast)
    copies, in_store = (max(0.0, mb) / trials / large["checkpoint_mb"] for mb in held)
    costs = Costs(
        result={part: line("result", part) for part in rows[0]["result"]} | {"ray": calls},
        trial={part: line("trial", part) for part in rows[0]["trial"]},
        save=line("save", "state"),
        copy=line("save", "copy"),
        actors=actors,
        ray=ray,
        bytes_per_result=line("bytes"),
        bytes_per_save=line("save", "bytes"),
        writes_per_result=line("writes"),
        writes_per_save=line("save", "writes"),
        cpu_share=1 - sum(row["waited"] for row in rows) / sum(row["seconds"] for row in rows),
        driver_mb=line("mb"),
        ray_mb=alone["ray_mb"],
        actor_mb=private / trials,
        shared_mb=max(0.0, own - private),
        checkpoint_copies=copies,
        store_copies=in_store,
        start_seconds=calibration["start_seconds"],
    )
    in_driver = sum(parts_of_result(costs, load_of(slow), trials).values())
    known_delay = in_driver + actors.per_result + ray.per_result
    return replace(costs, latency=max(0.0, slow["delay_p50"] - known_delay))


def shared_mb(phase: dict[str, Any]) -> float:
    """Memory that processes share, the object store's for the most part."""
    return sum(taken["pss_mb"] - taken["uss_mb"] for taken in phase["memory"].values())


def work_of(phases: list[dict[str, Any]], trials: int, who: str) -> Work:
    """CPU seconds of actors or of Ray, from the phases of a run: so much a trial, a result and a MB."""
    rates = [phase["results_per_second"] for phase in phases]
    sizes = [phase["checkpoint_mb"] for phase in phases]
    matrix = [[trials, rate, rate * size] for rate, size in zip(rates, sizes, strict=True)]
    per_trial, per_result, per_mb = np.linalg.lstsq(matrix, [phase["cpu"][who] for phase in phases])[0]
    return Work(0.0, max(0.0, per_trial), max(0.0, per_result), max(0.0, per_mb))


def load_of(phase: dict[str, float]) -> Load:
    """What the driver got to do in a phase of a real run."""
    epochs = max(1, round(phase["results"] / max(1, phase["ended"])))
    return Load(epoch_seconds=phase["epoch_seconds"], epochs=epochs, checkpoint_mb=phase["checkpoint_mb"],
                search=phase["known"])  # fmt: skip


def results_of(costs: Costs, head: Head, load: Load, running: int, seed: int) -> dict[str, Any]:
    """A row of the table: what the simulation says of so many trials, and how much of the head they want."""
    simulated = Simulation(costs, head, load, running, seed=seed).run()
    rate, known = simulated["results_per_second"], max(running, load.search)
    save = costs.save(running, known)
    saves = 1 / (SAVE_PERIOD + save)
    written = rate * costs.bytes_per_result(running, known) + saves * costs.bytes_per_save(running, known)
    writes = rate * costs.writes_per_result(running, known) + saves * costs.writes_per_save(running, known)
    return {
        "running": running,
        **simulated,
        "of_wanted": rate * load.epoch_seconds / running,
        "demands": demands(costs, head, load, running),
        "memory_mb": memory_mb(costs, head, load, running),
        "checkpoint_mb_per_second": rate * load.checkpoint_mb,
        "driver_mb_per_second": written / MB,
        "writes_per_second": writes + rate * CHECKPOINT_FILES,
        "parts": parts_of_result(costs, load, running),
        "save_seconds": save,
        "shortest_epoch": shortest_epoch(costs, load, running),
        "seconds_to_start": seconds_to_start(costs, load, running),
    }


def checked(costs: Costs, measured: dict[str, Any], seed: int) -> list[dict[str, Any]]:
    """Each phase of the real run: (predicted, measured) by quantity."""
    run, rows = measured["check"], []
    trials = run["trials"]
    memory_gb = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    head = Head(cores=CPUS, memory_gb=memory_gb, disk_mb=measured["disk_mb"], network_mb=1e9)
    for phase in run["phases"]:
        load = load_of(phase)
        found = results_of(costs, head, load, trials, seed)
        rate, memory = found["results_per_second"], found["memory_mb"]
        cpu = {who: work.alone + work.per_trial * trials + rate * work.of_result(load.checkpoint_mb)
               for who, work in (("actors", costs.actors), ("ray", costs.ray))}  # fmt: skip
        cpu["driver"] = driver_cpu(costs, trials, load.search, found["driver"])
        pairs = {
            "results per second": (rate, phase["results_per_second"]),
            "delay of a result, median, s": (found["delay_p50"], phase["delay_p50"]),
            "delay of a result, 95th percentile, s": (found["delay_p95"], phase["delay_p95"]),
            "CPU of the driver, cores": (cpu["driver"], phase["cpu"]["driver"]),
            "CPU of the trials' actors, cores": (cpu["actors"], phase["cpu"]["actors"]),
            "CPU of Ray's own processes, cores": (cpu["ray"], phase["cpu"]["ray"]),
            "memory of the trials' actors, GB": ((memory["actors"] - costs.shared_mb + memory["checkpoints"]) / 1000,
                                                 phase["memory"]["actors"]["uss_mb"] / 1000),
            "memory of the object store, GB": (memory["object store"] / 1000,
                                               (shared_mb(phase) - shared_mb(run["phases"][0])) / 1000),
            "memory of the driver, GB": (memory["driver"] / 1000, phase["memory"]["driver"]["pss_mb"] / 1000),
        }  # fmt: skip
        rows.append({"phase": {name: phase[name] for name in ("epoch_seconds", "checkpoint_mb", "results", "seconds")},
                     "driver_demand": found["demands"]["driver"], "pairs": pairs})  # fmt: skip
    return rows


def checkpoint_mb(arch: str) -> float:
    """Of a training with `arch`: weights, and AdamW's two moments of each, in fp32."""
    import timm
    import torch

    with torch.device("meta"):
        model = timm.create_model(arch, num_classes=37)
    buffers = sum(buffer.numel() for buffer in model.buffers())
    return 4 * (3 * sum(parameter.numel() for parameter in model.parameters()) + buffers) / MB


def main() -> None:
    args = parse_args()
    if args.arm:
        return run_arm(args)
    if args.costs:
        measured = json.loads(args.costs.read_text())["measured"]
    else:
        measured = measure(args) | {"hardware": hardware()}
    costs, size = costs_of(measured), checkpoint_mb(args.arch)
    head = Head(cores=args.cores, memory_gb=args.memory_gb, disk_mb=args.disk_mb, network_mb=args.network_mb)
    load = Load(epoch_seconds=args.epoch_seconds, epochs=args.epochs, checkpoint_mb=size, search=args.search)
    most = largest(costs, head, load)
    first = min(most, key=most.get)
    result = {
        "first_bottleneck": first, "largest": most,
        "rows": [results_of(costs, head, load, running, args.seed) for running in args.trials],
        "check": checked(costs, measured, args.seed), "costs": asdict(costs), "head": asdict(head),
        "load": asdict(load), "arch": args.arch, "seed": args.seed, "measured": measured,
        "command": command_line(), "hardware": measured["hardware"],
        "versions": versions("ray", "optuna", "torch", "timm", "tensorboardX", "finetune-search"),
    }  # fmt: skip
    write(args.out, "cluster_model", result, markdown(result))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--trials", type=int, nargs="+", default=[10, 100, 1000], help="at once; 10 100 1000 without it")
    add("--search", type=int, default=1000, help="trials in the tables, at least; 1000 without it")
    add("--epoch-seconds", type=float, default=60, help="60 without it")
    add("--epochs", type=int, default=10, help="of a trial; 10 without it")
    add("--arch", default="resnet50", help="timm architecture, for the size of a checkpoint; resnet50 without it")
    add("--cores", type=int, default=4, help="of the head; 4 without it, as cluster.yaml's m5.xlarge")
    add("--memory-gb", type=float, default=16, help="of the head; 16 without it")
    add("--disk-mb", type=float, default=125, help="MB/s of the head's disk; 125 without it, as a gp3")
    add("--network-mb", type=float, default=156, help="MB/s of the head's network; 156 without it (1.25 Gbit/s)")
    add("--sizes", type=int, nargs="+", default=[10, 100, 1000], help="trials that the driver is measured with")
    add("--results", type=int, default=200, help="each time, at least; 200 without it")
    add("--calibration-trials", type=int, default=8, help="actors in the run that tells what an actor costs")
    add("--check-trials", type=int, default=48, help="actors in the run that checks the model; 48 without it")
    add("--scale", type=float, default=1, help="of all seconds of those two runs, for a quick look")
    add("--costs", type=Path, help="cluster_model.json whose measurements to take")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=RESULTS)
    add("--arm", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if len(set(args.sizes)) < 2:
        parser.error("--sizes: at least two are needed")
    return args


if __name__ == "__main__":
    main()
