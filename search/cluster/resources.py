"""From what the cluster has to the workers of a trial and the number of trials at once."""

import fnmatch
import math
import os
import platform
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from search.options.search_options import SearchOptions
from trainables.ray.worker_group import GroupSize

WORKER_MEMORY = 1.0e9
"""Bytes that a worker takes: measured 0.5 GB with a toy network, 1.1 to 2.0 with EfficientNet-Lite0 at 96 px."""
TRIAL_MEMORY = 0.6e9
"""What a trial takes beside its workers: its actor and its group's host have 0.12 GB each. The rest is for workers that
take more than the above."""
AUTOSCALER_CONFIG = Path("~/ray_bootstrap_config.yaml")
"""`ray up` leaves the cluster's configuration here on the head node, cluster/kubernetes/ the part that counts."""


@dataclass(frozen=True)
class Node:
    cpus: float
    gpus: float
    memory: float | None = field(default=None, compare=False)
    """Bytes that Ray found free for processes when it started; None where that is not known."""

    def workers(self, size: GroupSize) -> int:
        """How many workers of this size fit on the node."""
        fits = [self.cpus / size.cpus_per_worker] if size.cpus_per_worker else []
        fits += [self.gpus / size.gpus_per_worker] if size.gpus_per_worker else []
        return math.floor(min(fits))

    def workers_in_memory(self, size: GroupSize) -> int:
        """The same, of those that its memory is enough for."""
        if self.memory is None:
            return self.workers(size)
        return min(self.workers(size), int(self.memory / (WORKER_MEMORY + TRIAL_MEMORY / size.num_workers)))


def group_size(nodes: list[Node], *, num_workers: int, cpus_per_worker: float | None, gpus_per_worker: int | None):
    """The size of a trial's worker group; what is not asked for follows from the nodes.

    A GPU per worker where there are GPUs, with its share of the node's CPUs; else two CPUs, which train one trial
    faster than they train two at once slowed by the second start-up.
    """
    largest = max(nodes, key=lambda node: (node.gpus, node.cpus), default=Node(0, 0))
    if gpus_per_worker is None:
        gpus_per_worker = 1 if largest.gpus else 0
    if cpus_per_worker is None:
        share = largest.cpus * gpus_per_worker // largest.gpus if gpus_per_worker and largest.gpus else 2
        cpus_per_worker = max(1, min(share, 8, largest.cpus // (1 if gpus_per_worker else num_workers)))
    return GroupSize(num_workers=num_workers, cpus_per_worker=cpus_per_worker, gpus_per_worker=gpus_per_worker)


def room(nodes: list[Node], size: GroupSize) -> int:
    """How many workers of this size the nodes have room for; a worker never spans nodes, a trial may."""
    return sum(node.workers(size) for node in nodes)


def room_in_memory(nodes: list[Node], size: GroupSize, at_least: int) -> int:
    """How many of them should run at once: `at_least` may, whatever the memory is, which is only estimated."""
    return min(room(nodes, size), max(at_least, sum(node.workers_in_memory(size) for node in nodes)))


def trials_at_once(nodes: list[Node], size: GroupSize, asked: int | None) -> int:
    """How many trials run at once: those that were asked for, or those that CPUs, GPUs and memory are enough for.

    Raises `ValueError` with the arithmetic where the request can never be scheduled.
    """
    workers = room(nodes, size)
    most = workers // size.num_workers
    if most >= max(1, asked or 1):
        return asked or room_in_memory(nodes, size, size.num_workers) // size.num_workers
    per_worker = f"{size.cpus_per_worker:g} CPUs" + (
        f" and {size.gpus_per_worker} GPUs" if size.gpus_per_worker else ""
    )
    have = ", ".join(_kinds(nodes)) or "nothing"
    wanted = f"{asked} trials at once of {size.num_workers}" if asked else f"A trial of {size.num_workers}"
    raise ValueError(
        f"This can never be scheduled. {wanted} workers, each with {per_worker}, needs room for "
        f"{(asked or 1) * size.num_workers} workers, but the cluster's nodes ({have}) have room for {workers}. "
        f"Lower --max-concurrent, --workers-per-trial, --cpus-per-worker or --gpus-per-worker, or add nodes."
    )


def memory_note(nodes: list[Node], size: GroupSize, asked: int | None) -> str:
    """What to say where memory limits the trials at once, or is not enough for those that were asked for."""
    enough, fit = trials_at_once(nodes, size, None), room(nodes, size) // size.num_workers
    if enough >= (asked or fit):
        return ""
    memory = sum(node.memory or 0 for node in nodes) / 1e9
    if asked:
        return f" (the free memory of {memory:.1f} GB is enough for about {enough})"
    return f" (there is room for {fit}, and {memory:.1f} GB of memory free for about {enough}; see --max-concurrent)"


def _kinds(nodes: list[Node]) -> list[str]:
    """Such as "3 x 8 CPUs and 1 GPUs"."""
    counts = Counter(nodes)
    return [f"{f'{n} x ' if n > 1 else ''}{node.cpus:g} CPUs and {node.gpus:g} GPUs" for node, n in counts.items()]


def present_nodes() -> list[Node]:
    """The nodes of the connected cluster that are up."""
    import ray

    return [_node(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def reachable_nodes(present: list[Node], *, launched: bool) -> list[Node]:
    """The nodes that are up, or those that the cluster's autoscaler can make it have, whichever is more.

    `launched`: the cluster was there before; a Ray that the search started on this machine has no autoscaler.
    """
    choices = (present, _nodes_of_launcher()) if launched else (present,)
    return max(choices, key=lambda nodes: (sum(n.gpus for n in nodes), sum(n.cpus for n in nodes)))


def _nodes_of_launcher() -> list[Node]:
    """From the cluster's configuration: the autoscaler itself tells nobody (Ray 2.60)."""
    path = AUTOSCALER_CONFIG.expanduser()
    if not path.is_file():
        return []
    import yaml

    config = yaml.safe_load(path.read_text()) or {}
    types = config.get("available_node_types", {}).values()
    nodes = [_node(kind.get("resources", {})) for kind in types for _ in range(kind.get("max_workers", 0))]
    return sorted(nodes, key=lambda node: (node.gpus, node.cpus), reverse=True)[: config.get("max_workers", 0)]


def _node(resources: dict[str, Any]) -> Node:
    return Node(cpus=resources.get("CPU", 0), gpus=resources.get("GPU", 0), memory=resources.get("memory"))


def hardware(nodes: list[Node]) -> dict[str, Any]:
    """This machine and the nodes of the connected cluster, for the record."""
    import ray

    kinds = [
        name.removeprefix("accelerator_type:") for name in ray.cluster_resources() if name.startswith("accelerator")
    ]
    return {
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "system": f"{platform.system()} {platform.machine()}",
        "nodes": [{"cpus": node.cpus, "gpus": node.gpus} for node in nodes],
        "gpu_types": sorted(kinds),
    }


def _processor() -> str:
    """Its name as Linux knows it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def sizes(options: SearchOptions, nodes: list[Node], archs: list[str]) -> tuple[GroupSize, dict[str, int]]:
    """The size of a trial's worker group, and the workers of some of the architectures. Raises `ValueError` where not
    even the nodes that the autoscaler can add have room, or a pattern matches no architecture."""
    num_workers, by_arch = options.num_workers
    for pattern in by_arch:
        if not fnmatch.filter(archs, pattern):
            raise ValueError(f"--workers-per-trial {pattern}={by_arch[pattern]} matches none of {', '.join(archs)}")
    counts = [num_workers, *by_arch.values()]
    largest = group_size(
        nodes,
        num_workers=max(counts),
        cpus_per_worker=options.cpus_per_worker,
        gpus_per_worker=options.gpus_per_worker,
    )
    trials_at_once(nodes, largest, None)
    trials_at_once(nodes, replace(largest, num_workers=min(counts)), options.max_concurrent)
    return replace(largest, num_workers=num_workers), by_arch
