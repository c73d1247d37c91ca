"""Works out a trial's workers and the number of concurrent trials from the cluster's resources."""

import fnmatch
import math
import os
import platform
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from search.options.search_options import SearchOptions
from trainables.ray.worker_group import GroupSize
from trainables.system.gpu_share import gpu_share, num_sharing, reserved

WORKER_MEMORY = 1.0e9
"""Bytes that a worker needs: measured 0.5 GB with a toy network, 1.1 to 2.0 with EfficientNet-Lite0 at 96 px."""
TRIAL_MEMORY = 0.6e9
"""Bytes that a trial needs besides its workers: 0.12 GB each for its actor and its group's host, the rest for workers
that need more than the above."""
AUTO_TRIALS_PER_GPU = (1, 2, 4, 8)
"""What `--trials-per-gpu auto` tries."""
AUTOSCALER_CONFIG = Path("~/ray_bootstrap_config.yaml")
"""`ray up` writes the cluster's configuration here on the head node; cluster/kubernetes/ writes the relevant part."""


@dataclass(frozen=True)
class Node:
    cpus: float
    gpus: float
    memory: float | None = field(default=None, compare=False)
    """Bytes that Ray found free for processes when it started; None if unknown."""

    def workers(self, size: GroupSize) -> int:
        """How many workers of this size its CPUs and GPUs suffice for."""
        fits = [self.cpus / size.cpus_per_worker] if size.cpus_per_worker else []
        per_gpu = num_sharing(size.gpus_per_worker)
        if size.gpus_per_worker:  # a share is one of a single GPU
            fits.append(self.gpus * per_gpu if per_gpu > 1 else self.gpus / size.gpus_per_worker)
        return math.floor(min(fits))

    def workers_in_memory(self, size: GroupSize) -> int:
        """The same, limited by its memory."""
        if self.memory is None:
            return self.workers(size)
        return min(self.workers(size), int(self.memory / (WORKER_MEMORY + TRIAL_MEMORY / size.num_workers)))


def group_size(
    nodes: list[Node],
    *,
    num_workers: int,
    cpus_per_worker: float | None,
    gpus_per_worker: float | None,
    trials_per_gpu: int = 1,
) -> GroupSize:
    """The size of a trial's worker group; None means that the nodes decide.

    A GPU per worker if there are GPUs, with its share of the node's CPUs; else two CPUs: they train one trial faster
    than two concurrent ones, which the second start-up slows. `trials_per_gpu` divides both.
    """
    largest = _largest(nodes)
    if gpus_per_worker is None:
        gpus_per_worker = 1 if largest.gpus else 0
    if cpus_per_worker is None:
        cpus = largest.cpus * gpus_per_worker / largest.gpus if gpus_per_worker and largest.gpus else 2
        share = cpus / trials_per_gpu
        share = min(share // 1, 8, largest.cpus // (1 if gpus_per_worker else num_workers))
        few = 1 if trials_per_gpu == 1 else max(0.01, math.floor(100 * cpus / trials_per_gpu) / 100)
        cpus_per_worker = share if share >= 1 else min(1, few)
    if trials_per_gpu > 1:
        gpus_per_worker = gpu_share(trials_per_gpu)
    return GroupSize(num_workers=num_workers, cpus_per_worker=cpus_per_worker, gpus_per_worker=gpus_per_worker)


def _largest(nodes: list[Node]) -> Node:
    return max(nodes, key=lambda node: (node.gpus, node.cpus), default=Node(0, 0))


def room(nodes: list[Node], size: GroupSize) -> int:
    """How many workers of this size fit on the nodes; a worker never spans nodes, a trial may."""
    return sum(node.workers(size) for node in nodes)


def room_in_memory(nodes: list[Node], size: GroupSize, at_least: int) -> int:
    """How many of them should run at once: at least `at_least`, since the need for memory is only an estimate."""
    return min(room(nodes, size), max(at_least, sum(node.workers_in_memory(size) for node in nodes)))


def trials_at_once(nodes: list[Node], size: GroupSize, asked: int | None) -> int:
    """How many trials run at once: as many as requested, or as many as CPUs, GPUs and memory suffice for.

    Raises `ValueError` with the arithmetic if the request can never be scheduled.
    """
    workers = room(nodes, size)
    if workers // size.num_workers >= max(1, asked or 1):
        return asked or room_in_memory(nodes, size, size.num_workers) // size.num_workers
    counts = Counter(nodes).items()
    have = ", ".join(f"{f'{n} x ' if n > 1 else ''}{node.cpus:g} CPUs and {node.gpus:g} GPUs" for node, n in counts)
    per_worker = reserved(size.cpus_per_worker, size.gpus_per_worker)
    wanted = f"{asked} concurrent trials of {size.num_workers}" if asked else f"A trial of {size.num_workers}"
    raise ValueError(
        f"This can never be scheduled. {wanted} workers, each with {per_worker}, needs room for "
        f"{(asked or 1) * size.num_workers} workers, but the cluster's nodes ({have or 'nothing'}) have room for "
        f"{workers}. Lower --max-concurrent, --workers-per-trial, --cpus-per-worker or --gpus-per-worker, or add nodes."
    )


def memory_note(nodes: list[Node], size: GroupSize, asked: int | None) -> str:
    """A note if memory limits the number of concurrent trials, or may not suffice for the requested number."""
    enough, fit = trials_at_once(nodes, size, None), room(nodes, size) // size.num_workers
    if enough >= (asked or fit):
        return ""
    memory = f"free memory of {sum(node.memory or 0 for node in nodes) / 1e9:.1f} GB suffices for about {enough}"
    return f" (the {memory})" if asked else f" ({fit} fit by CPUs and GPUs, but {memory}; see --max-concurrent)"


def present_nodes() -> list[Node]:
    """The nodes of the connected cluster that are up."""
    import ray

    return [_node(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def reachable_nodes(present: list[Node], *, launched: bool) -> list[Node]:
    """The nodes that are up, or those that the cluster's autoscaler can start, whichever is more.

    `launched`: the cluster existed before; a Ray that the search started on this machine has no autoscaler.
    """
    choices = (present, _nodes_of_launcher()) if launched else (present,)
    return max(choices, key=lambda nodes: (sum(n.gpus for n in nodes), sum(n.cpus for n in nodes)))


def _nodes_of_launcher() -> list[Node]:
    """From the cluster's configuration: the autoscaler itself does not tell (Ray 2.60)."""
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

    prefix = "accelerator_type:"
    return {
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "system": f"{platform.system()} {platform.machine()}",
        "nodes": [{"cpus": node.cpus, "gpus": node.gpus} for node in nodes],
        "gpu_types": sorted(name.removeprefix(prefix) for name in ray.cluster_resources() if name.startswith(prefix)),
    }


def _processor() -> str:
    """Its name in Linux, else its architecture."""
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
    largest = _shared(options, nodes, options.max_trials_per_gpu or 1, num_workers=max(counts))
    _require_shareable(options, nodes, largest)
    trials_at_once(nodes, largest, None)
    smallest = replace(largest, num_workers=min(counts))
    if options.max_trials_per_gpu is None:  # what does not fit at first may do so later
        smallest = [smallest, *shared_sizes(replace(options, max_concurrent=None), nodes).values()][-1]
    trials_at_once(nodes, smallest, options.max_concurrent)
    return replace(largest, num_workers=num_workers), by_arch


def _shared(options: SearchOptions, nodes: list[Node], trials_per_gpu: int, num_workers: int = 1) -> GroupSize:
    gpus = options.gpus_per_worker
    return group_size(
        nodes,
        num_workers=num_workers,
        cpus_per_worker=options.cpus_per_worker,
        gpus_per_worker=1 if gpus is not None and 0 < gpus < 1 else gpus,
        trials_per_gpu=trials_per_gpu,
    )


def _require_shareable(options: SearchOptions, nodes: list[Node], size: GroupSize) -> None:
    """Raises `ValueError` unless so many trials can share a GPU of these nodes."""
    largest, asked = _largest(nodes), num_sharing(size.gpus_per_worker)
    if asked == 1 or largest.workers(size) >= asked * largest.gpus > 0:
        return
    if not largest.gpus:
        raise ValueError(f"{asked} trials are to share a GPU, but the cluster's nodes have none. Omit --trials-per-gpu")
    needed, have = (asked * size.cpus_per_worker, largest.cpus / largest.gpus)
    raise ValueError(
        f"{asked} trials are to share a GPU, each with {size.cpus_per_worker:g} CPUs, but there are {have:g} CPUs for "
        f"each GPU, not {needed:g}. Lower --trials-per-gpu or --cpus-per-worker"
    )


def shared_sizes(options: SearchOptions, nodes: list[Node]) -> dict[int, GroupSize]:
    """The sizes of a trial's worker group by the number of trials that share a GPU, where a search may change it:
    those that `auto` tries, or the number that was asked for and, should memory run out, its halves.

    `auto` tries no more than run at once: of fewer it could not learn what they gain.
    """
    num_gpus, most = sum(node.gpus for node in nodes), options.max_trials_per_gpu
    if most == 1 or not num_gpus:
        return {}
    counts = AUTO_TRIALS_PER_GPU if most is None else sorted(halves(most))
    found = {n: _shared(options, nodes, n) for n in counts}
    if most is not None:
        return found
    limit, largest = options.max_concurrent or math.inf, _largest(nodes)
    fits = {n: n * num_gpus <= limit and n * largest.gpus <= largest.workers_in_memory(found[n]) for n in counts}
    return {n: size for n, size in found.items() if n == 1 or fits[n]}


def sharing_note(sizes: Mapping[int, GroupSize], *, measures: bool) -> str:
    """What a search says at its start of the trials that share a GPU, by their `shared_sizes`; nothing if none do."""
    most = max(sizes, default=1)
    if measures and most > 1:
        return (
            f"GPU: one trial at a time on each, then up to {most} while they train over 10 % more images per second "
            "together"
        )
    if measures and sizes:
        return "GPU: one trial at a time on each, the CPUs, memory and --max-concurrent leave no room for more"
    share = f"{most} trials share each, with 1/{most} of its memory; where that is not enough, fewer will"
    return f"GPU: {share}" if most > 1 else ""


def halves(count: int) -> list[int]:
    """Of a count, down to 1, such as 6, 3, 1."""
    return [count, *(halves(count // 2) if count > 1 else [])]
