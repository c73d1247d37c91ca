"""Real searches, and everything that can happen to them: faults at random moments, then every promise is checked.

    python bench/chaos.py --faults 30 --seed 0

Small searches (a network of timm's for tests, drawn images) run one after another, with one worker, with two, and on a
cluster of two nodes, until all faults have happened. Meanwhile a witness reads their tables. A search with one trial at
a time must end with the very tables and weights of one that nothing happened to. Exit code 0 if all promises were kept.

The runs are on a disk of 128 MB in memory, which a fault fills; without the right to mount one it is left out.
"""

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import common
from chaos_faults import LEAVE_SECONDS, OF_A_CLUSTER, OF_THIS_MACHINE, Fault, Victim, disk_full
from chaos_promises import Verdict, Witness, content, judge, processes_with
from searches import PINNED, Search, settings
from tiny_run import draw_images

CACHE = "FINETUNE_SEARCH_CACHE"
DISK = "128m"
FAULTS_PER_SEARCH = 6
STALL = "15s"
SETTINGS = f"{PINNED} weight_decay=0.01 tta_views=0 arch=test_resnet.r160_in1k lr_max=0.001..0.01 epochs=2..4"


@dataclass
class Kind:
    """A way to run a search."""

    name: str
    arguments: list[object]
    faults: list[Fault]
    cluster: bool = False


KINDS = [
    Kind("1 worker", ["--max-concurrent", 1], OF_THIS_MACHINE),
    Kind("2 workers", ["--workers-per-trial", 2], OF_THIS_MACHINE),
    Kind("2 nodes", ["--workers-per-trial", 1], OF_A_CLUSTER, cluster=True),
]


@dataclass
class Report:
    """All searches together."""

    faults: Counter = field(default_factory=Counter)
    searches: int = 0
    verdicts: list[Verdict] = field(default_factory=list)
    equal: int = 0
    compared: int = 0
    left_behind: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def result(self) -> dict[str, Any]:
        of_tables = max((sum(verdict.epochs_repeated.values()) for verdict in self.verdicts), default=0)
        return {
            "faults": sum(self.faults.values()),
            "by_kind": dict(sorted(self.faults.items())),
            "searches": self.searches,
            "searches_finished": sum(verdict.finished for verdict in self.verdicts),
            "searches_equal_to_undisturbed": f"{self.equal} of {self.compared}",
            "rows_lost": sum(len(verdict.rows_lost) for verdict in self.verdicts),
            "trials_run_twice": sum(len(verdict.trials_run_twice) for verdict in self.verdicts),
            # the one that a fault cut off, and whatever was in the table already
            "max_epochs_repeated": 1 + of_tables,
            "left_behind": len(self.left_behind),
            "problems": self.problems + [problem for verdict in self.verdicts for problem in verdict.problems],
        }


def main() -> int:
    args = parse_arguments()
    began = time.monotonic()
    with small_disk() as (root, is_small):
        report = run(args, root, can_fill=is_small)
    result = report.result() | {"minutes": round((time.monotonic() - began) / 60, 1), "seed": args.seed}
    result |= {"command": common.command_line(), "hardware": common.hardware()}
    result |= {"versions": common.versions("ray", "optuna", "torch", "timm")}
    common.write(args.out, "chaos", result, markdown(result))
    for what in [*result["problems"], *report.left_behind]:
        print(f"broken: {what}")
    kept = result["searches"] == result["searches_finished"] and result["max_epochs_repeated"] <= 1
    none = ("rows_lost", "trials_run_twice", "left_behind")
    return 0 if kept and not result["problems"] and not any(result[name] for name in none) else 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=30, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trials", type=int, default=8, metavar="N", help="of each search; default 8")
    parser.add_argument("--kinds", nargs="*", choices=[kind.name for kind in KINDS], help="default: all")
    parser.add_argument("--out", type=Path, default=common.RESULTS, metavar="DIR")
    return parser.parse_args()


@contextmanager
def small_disk() -> Iterator[tuple[Path, bool]]:
    """A folder on a disk of its own that can be filled, and whether it is one."""
    root = Path(tempfile.mkdtemp(prefix="chaos"))
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "chaos", root], capture_output=True)
    try:
        yield root, mounted.returncode == 0
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", "-l", root], check=False)
        shutil.rmtree(root, ignore_errors=True)


def run(args: argparse.Namespace, root: Path, *, can_fill: bool) -> Report:
    rng, report = random.Random(args.seed), Report()
    with tempfile.TemporaryDirectory(prefix="chaos_data") as apart:
        os.environ |= {CACHE: f"{apart}/cache", "TMPDIR": f"{apart}/tmp", "XDG_STATE_HOME": f"{apart}/state"}
        os.environ |= {"RAY_worker_niceness": "0", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}
        Path(f"{apart}/tmp").mkdir()
        tempfile.tempdir = None
        common_arguments = arguments(draw_images(Path(apart) / "data", each=100), args.trials)
        kinds = [kind for kind in KINDS if kind.name in (args.kinds or [kind.name])]
        expected = undisturbed(root / "undisturbed", common_arguments)
        faults = {kind.name: fault_order(kind, rng, can_fill) for kind in kinds}
        while (left := args.faults - sum(report.faults.values())) > 0:
            kind = kinds[report.searches % len(kinds)]
            folder = root / f"search{report.searches}"
            report.searches += 1
            many = min(left, FAULTS_PER_SEARCH)
            equal = hurt(kind, folder, common_arguments, faults[kind.name], many, rng, report, args.trials)
            if equal is not None and kind.name == KINDS[0].name:
                report.compared += 1
                report.equal += equal == expected
                report.problems += [f"{name} differ from those of the undisturbed search" for name in expected
                                    if equal[name] != expected[name]]  # fmt: skip
            shutil.rmtree(folder)
        # Ray's session folders, and what its dashboard leaves of itself after a clean end, too
        of_ray = ("ray", "_ray_lockfiles", "pymp-")
        folders = [path.name for path in Path(f"{apart}/tmp").iterdir() if not path.name.startswith(of_ray)]
        report.left_behind += [f"the folder {name}" for name in folders]
    return report


def arguments(data: Path, num_trials: int) -> list[object]:
    common_arguments = ["--space", "quickstart", "--data", data, "--cpus-per-worker", 1, "--report", "off", "--seed", 1]
    return [*common_arguments, "--trials", num_trials, "--stall-timeout", STALL, *settings(SETTINGS)]


def undisturbed(folder: Path, common_arguments: list[object]) -> dict[str, Any]:
    search = Search(folder, *common_arguments, *KINDS[0].arguments)
    if search.wait(1200):
        raise RuntimeError(f"a search that nothing happened to failed:\n{search.text}")
    found = content(folder)
    shutil.rmtree(folder)
    return found


def fault_order(kind: Kind, rng: random.Random, can_fill: bool) -> Iterator[Fault]:
    """All of a kind's faults in a random order, and again."""
    faults = [fault for fault in kind.faults if can_fill or fault is not disk_full]
    if not can_fill:
        print("no disk can be mounted in memory: the fault of a full one is left out")
    while True:
        yield from rng.sample(faults, len(faults))


def hurt(
    kind: Kind,
    folder: Path,
    common_arguments: list[object],
    faults: Iterator[Fault],
    many: int,
    rng: random.Random,
    report: Report,
    num_trials: int,
) -> dict[str, Any] | None:
    """One search to its end, with so many faults unless it ends before; its content, if it ended well."""
    with cluster_of(kind) as cluster:
        where = ["--address", cluster.address] if cluster else []
        victim = Victim(folder, [*common_arguments, *kind.arguments, *where], cluster)
        witness, fault = Witness(folder), None
        try:
            for _ in range(many):
                victim.wait_for_progress()
                time.sleep(rng.uniform(0, 2))
                if not victim.alive:
                    break
                fault = next(faults)
                before = time.monotonic()
                if fault(victim, rng):
                    report.faults[fault.__name__.replace("_", " ")] += 1
                    took = time.monotonic() - before
                    print(f"search {report.searches} ({kind.name}): {fault.__name__} ({took:.0f} s)", flush=True)
            code = victim.search.wait(1200)
        except (TimeoutError, subprocess.TimeoutExpired) as error:
            report.problems.append(f"a search hangs after {fault.__name__ if fault else 'its start'}")
            print(error)
            victim.search.process.kill()
            code = -1
        witness.end()
        report.left_behind += victim.left_behind() + groups_of(cluster)
    if code:
        print(victim.search.text)
    report.left_behind += left(LEAVE_SECONDS)
    report.verdicts.append(judge(folder, witness, code, num_trials))
    return None if code else content(folder)


@contextmanager
def cluster_of(kind: Kind) -> Iterator[Any]:
    """A cluster of two nodes with a CPU each and a head without, or None."""
    if not kind.cluster:
        yield None
        return
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    try:
        yield cluster
    finally:
        cluster.shutdown()


def groups_of(cluster) -> list[str]:
    """Placement groups that still hold something of a cluster."""
    if cluster is None:
        return []
    code = """
import ray, ray.util
ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
print([group["name"] for group in ray.util.placement_group_table().values() if group["state"] != "REMOVED"])
"""
    environment = os.environ | {"RAY_ADDRESS": cluster.address}
    shown = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True).stdout
    return [] if shown.strip().endswith("[]") else [f"placement groups: {shown.strip()}"]


def left(seconds: float) -> list[str]:
    """Processes of searches that still run so long after their end."""
    deadline = time.monotonic() + seconds
    while (found := processes_with(CACHE, os.environ[CACHE])) and time.monotonic() < deadline:
        time.sleep(0.5)
    return found


def markdown(result: dict[str, Any]) -> str:
    rows = "".join(f"| {name} | {count} |\n" for name, count in result["by_kind"].items())
    promises = {
        "searches, and how many finished": f"{result['searches']}, {result['searches_finished']}",
        "with one trial at a time: equal to the undisturbed search, weights included":
            result["searches_equal_to_undisturbed"],
        "rows of ended trials lost or changed": result["rows_lost"],
        "finished trials run twice": result["trials_run_twice"],
        "epochs repeated per fault and trial, at most (the one under way, none of a table)":
            result["max_epochs_repeated"],
        "processes, placement groups and folders left behind": result["left_behind"],
        "other broken promises": len(result["problems"]),
    }  # fmt: skip
    kept = "".join(f"| {name} | {value} |\n" for name, value in promises.items())
    return (
        f"# Chaos\n\n`{result['command']}`, {result['minutes']} min.\n\n| fault | times |\n|---|---|\n{rows}"
        f"| **all** | {result['faults']} |\n\n| promise | |\n|---|---|\n{kept}\n{common.footer(result)}"
    )


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        sys.exit(main())
