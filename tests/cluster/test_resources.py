"""From a cluster's nodes to the workers of a trial and the trials at once, or a refusal that shows its sums."""

import re

import pytest

from search.cluster import resources
from search.cluster.resources import (
    Node,
    group_size,
    memory_note,
    present_nodes,
    reachable_nodes,
    room,
    shared_sizes,
    sharing_note,
    sizes,
    trials_at_once,
)
from search.options.search_options import SearchOptions
from trainables.ray.worker_group import GroupSize

LAPTOP = [Node(cpus=2, gpus=0)]
WORKSTATION = [Node(cpus=16, gpus=1)]
GPU_NODE = [Node(cpus=96, gpus=8)]
MIXED = [Node(cpus=8, gpus=0), Node(cpus=32, gpus=4), Node(cpus=8, gpus=1)]


def size(nodes, *, num_workers=1, cpus_per_worker=None, gpus_per_worker=None) -> GroupSize:
    return group_size(nodes, num_workers=num_workers, cpus_per_worker=cpus_per_worker, gpus_per_worker=gpus_per_worker)


def workers(cpus: float, gpus: int = 0, num_workers: int = 1) -> GroupSize:
    return GroupSize(num_workers=num_workers, cpus_per_worker=cpus, gpus_per_worker=gpus)


@pytest.mark.parametrize(
    ("nodes", "num_workers", "expected", "at_once"),
    [
        (LAPTOP, 1, workers(2), 1),
        (LAPTOP, 2, workers(1, num_workers=2), 1),
        ([Node(8, 0)], 1, workers(2), 4),
        ([Node(8, 0)], 3, workers(2, num_workers=3), 1),
        ([Node(1, 0)], 1, workers(1), 1),
        (WORKSTATION, 1, workers(8, 1), 1),
        (GPU_NODE, 1, workers(8, 1), 8),
        (GPU_NODE, 4, workers(8, 1, num_workers=4), 2),
        (GPU_NODE, 3, workers(8, 1, num_workers=3), 2),
        (2 * GPU_NODE, 16, workers(8, 1, num_workers=16), 1),
        ([Node(16, 8)], 1, workers(2, 1), 8),
        ([Node(4, 8)], 1, workers(1, 1), 4),
        (MIXED, 1, workers(8, 1), 5),
        (MIXED, 2, workers(8, 1, num_workers=2), 2),
    ],
)
def test_the_defaults_use_what_there_is(nodes, num_workers, expected, at_once):
    chosen = size(nodes, num_workers=num_workers)
    assert chosen == expected
    assert trials_at_once(nodes, chosen, None) == at_once


@pytest.mark.parametrize(
    ("nodes", "group", "at_once"),
    [
        ([Node(64, 0, 10.1e9)], workers(2), 6),  # a machine of 16 GB, of which Ray keeps 30 % for objects
        ([Node(64, 0, 10.1e9)], workers(2, num_workers=4), 2),
        ([Node(64, 0, 200e9)], workers(2), 32),
        ([Node(96, 8, 9.5e9)], workers(8, 1), 5),
        ([Node(96, 8, 9.5e9), Node(96, 8, None)], workers(8, 1), 13),  # what is not known limits nothing
        ([Node(2, 0, 0.5e9)], workers(2), 1),  # the estimate forbids no search
        ([Node(8, 0, 2e9)], workers(2, num_workers=4), 1),
    ],
)
def test_memory_counts_in_how_many_trials_run_at_once(nodes, group, at_once):
    assert trials_at_once(nodes, group, None) == at_once
    fit = room(nodes, group) // group.num_workers
    assert trials_at_once(nodes, group, fit) == fit  # the user has the last word


def test_what_memory_has_to_do_with_it_is_said():
    nodes = [Node(64, 0, 10.1e9)]
    said = memory_note(nodes, workers(2), None)
    assert said == " (32 fit by CPUs and GPUs, but free memory of 10.1 GB suffices for about 6; see --max-concurrent)"
    assert memory_note(nodes, workers(2), 20) == " (the free memory of 10.1 GB suffices for about 6)"
    assert memory_note(nodes, workers(2), 6) == memory_note([Node(64, 0, 200e9)], workers(2), None) == ""
    assert memory_note([Node(64, 0)], workers(2), None) == ""


def test_what_is_asked_for_is_kept():
    assert size(GPU_NODE, gpus_per_worker=2) == workers(8, 2)
    assert size(GPU_NODE, gpus_per_worker=0) == workers(2, 0)
    assert size(GPU_NODE, cpus_per_worker=3) == workers(3, 1)
    assert size(LAPTOP, cpus_per_worker=0.5) == workers(0.5)
    assert trials_at_once(LAPTOP, workers(0.5), None) == 4
    assert trials_at_once(GPU_NODE, workers(8, 1), 3) == 3


def test_a_worker_never_spans_nodes_but_a_trial_may():
    two_small = [Node(cpus=2, gpus=0), Node(cpus=2, gpus=0)]
    assert trials_at_once(two_small, workers(2, num_workers=2), None) == 1
    with pytest.raises(ValueError, match="room for 0"):
        trials_at_once(two_small, workers(3), None)


@pytest.mark.parametrize(
    ("nodes", "group", "asked", "sums"),
    [
        (LAPTOP, workers(2, num_workers=2), None,
         "A trial of 2 workers, each with 2 CPUs, needs room for 2 workers, but the cluster's nodes "
         "(2 CPUs and 0 GPUs) have room for 1."),
        (LAPTOP, workers(1, 1), None, "each with 1 CPUs and 1 GPUs, needs room for 1 workers"),
        (GPU_NODE, workers(8, 1, num_workers=4), 3,
         "3 concurrent trials of 4 workers, each with 8 CPUs and 1 GPUs, needs room for 12 workers, but the cluster's "
         "nodes (96 CPUs and 8 GPUs) have room for 8."),
        (MIXED, workers(1, 1, num_workers=6), None,
         "(8 CPUs and 0 GPUs, 32 CPUs and 4 GPUs, 8 CPUs and 1 GPUs) have room for 5."),
        ([], workers(1), None, "the cluster's nodes (nothing) have room for 0"),
    ],
)  # fmt: skip
def test_a_request_that_can_never_be_met_is_refused_with_the_arithmetic(nodes, group, asked, sums):
    with pytest.raises(ValueError) as error:
        trials_at_once(nodes, group, asked)
    message = str(error.value)
    assert message.startswith("This can never be scheduled.")
    assert sums in message
    assert re.search(r"Lower --max-concurrent, --workers-per-trial, .*, or add nodes", message)
    assert "\n" not in message


def test_the_refusal_of_a_large_cluster_fits_on_a_line():
    with pytest.raises(ValueError, match=r"\(1000 x 8 CPUs and 0 GPUs, 4 CPUs and 1 GPUs\) have room for 1"):
        trials_at_once(1000 * [Node(8, 0)] + [Node(4, 1)], workers(1, 1, num_workers=2), None)


def test_too_many_workers_for_a_laptop_are_refused():
    with pytest.raises(ValueError, match=r"4 workers, each with 1 CPUs, .* room for 2"):
        trials_at_once(LAPTOP, size(LAPTOP, num_workers=4), None)


# --- Trials that share a GPU ------------------------------------------------------------------------------------------


def shared(nodes, **options) -> tuple[GroupSize, dict[int, GroupSize]]:
    found = SearchOptions(space="pets", **options)
    return sizes(found, nodes, ["resnet18"])[0], shared_sizes(found, nodes)


@pytest.mark.parametrize(
    ("nodes", "count", "expected"),
    [
        (WORKSTATION, 2, workers(8, 0.5)),
        (WORKSTATION, 4, workers(4, 0.25)),
        (WORKSTATION, 3, workers(5, 0.3333)),
        (WORKSTATION, 6, workers(2, 0.1666)),  # six sixths, rounded up to Ray's steps, would be more than one GPU
        (GPU_NODE, 4, workers(3, 0.25)),
        ([Node(2, 1)], 4, workers(0.5, 0.25)),
        ([Node(6, 1)], 3, workers(2, 0.3333)),
    ],
)
def test_trials_that_share_a_gpu_share_its_cpus_too(nodes, count, expected):
    size, by_count = shared(nodes, trials_per_gpu=str(count))
    assert size == by_count[count] == expected
    assert trials_at_once(nodes, size, None) == count * nodes[0].gpus
    assert round(10_000 * size.gpus_per_worker) * count <= 10_000


def test_a_share_of_a_gpu_is_the_same_as_the_number_of_trials_on_it():
    for share, count in ((0.25, 4), (0.5, 2), (0.3, 3), (1 / 3, 3), (0.1, 10)):
        assert shared(WORKSTATION, gpus_per_worker=share) == shared(WORKSTATION, trials_per_gpu=str(count))
    assert shared(WORKSTATION, gpus_per_worker=1) == shared(WORKSTATION) == (workers(8, 1), {})


def test_no_share_is_spread_over_two_gpus():
    assert Node(96, 4).workers(workers(1, 0.3333)) == 12
    assert Node(96, 4).workers(GroupSize(gpus_per_worker=0.3)) == 12  # 13 x 0.3 are less than 4


def test_memory_that_runs_out_halves_the_number_so_its_sizes_are_known():
    assert list(shared(WORKSTATION, trials_per_gpu="6")[1]) == [1, 3, 6]
    assert shared(WORKSTATION, trials_per_gpu="6")[1][1] == shared(WORKSTATION)[0]


@pytest.mark.parametrize(
    ("nodes", "options", "tried"),
    [
        (WORKSTATION, {}, [1, 2, 4, 8]),
        (GPU_NODE, {}, [1, 2, 4, 8]),
        (WORKSTATION, {"cpus_per_worker": 4}, [1, 2, 4]),
        (WORKSTATION, {"max_concurrent": 3}, [1, 2]),
        (GPU_NODE, {"max_concurrent": 16}, [1, 2]),
        ([Node(16, 1, 5e9)], {}, [1, 2]),  # 1.6 GB of memory each
        ([Node(16, 1, 1e9)], {}, [1]),
        (LAPTOP, {}, []),
    ],
)
def test_auto_begins_with_one_trial_on_a_gpu_and_tries_what_there_is_room_for(nodes, options, tried):
    size, by_count = shared(nodes, trials_per_gpu="auto", **options)
    assert list(by_count) == tried
    assert size == by_count.get(1, size) == shared(nodes, **options | {"max_concurrent": None})[0]


def test_what_shares_a_gpu_is_said():
    def said(nodes, **options) -> str:
        measures = options["trials_per_gpu"] == "auto"
        return sharing_note(shared(nodes, **options)[1], measures=measures)

    assert said(WORKSTATION, trials_per_gpu="4").startswith("GPU: 4 trials share each, with 1/4 of its memory")
    assert "one trial at a time on each, then up to 8 while they train over 10 %" in said(
        WORKSTATION, trials_per_gpu="auto"
    )
    assert "leave no room for more" in said(WORKSTATION, trials_per_gpu="auto", max_concurrent=1)
    assert said(LAPTOP, trials_per_gpu="auto") == said(WORKSTATION, trials_per_gpu="1") == ""


def test_a_gpu_that_cannot_be_shared_so_is_refused_with_what_to_do():
    with pytest.raises(ValueError, match=r"4 trials are to share a GPU, but the cluster's nodes have none\. Omit"):
        shared(LAPTOP, trials_per_gpu="4")
    with pytest.raises(ValueError, match=r"each with 8 CPUs, but there are 16 CPUs for each GPU, not 32\. Lower"):
        shared(WORKSTATION, trials_per_gpu="4", cpus_per_worker=8)
    with pytest.raises(ValueError, match=r"17 concurrent trials .* each with 1 CPUs and 1/8 of a GPU, .* room for 16"):
        shared([Node(16, 2)], trials_per_gpu="auto", max_concurrent=17)
    with pytest.raises(ValueError, match=r"each with 2 CPUs and 1/4 of a GPU, .* room for 8"):
        shared([Node(16, 2)], trials_per_gpu="4", max_concurrent=9)


def node_of_ray(cpus: float, gpus: float = 0, alive: bool = True) -> dict:
    return {"Alive": alive, "Resources": {"CPU": cpus, "memory": 1e9} | ({"GPU": gpus} if gpus else {})}


@pytest.fixture
def cluster(monkeypatch, tmp_path):
    """A function that sets the nodes of the connected cluster and its autoscaler's configuration."""
    path = tmp_path / "ray_bootstrap_config.yaml"
    monkeypatch.setattr(resources, "AUTOSCALER_CONFIG", path)

    def has(nodes: list[dict], config: str | None = None) -> list[Node]:
        monkeypatch.setattr("ray.nodes", lambda: nodes)
        if config is not None:
            path.write_text(config)
        return reachable_nodes(present_nodes(), launched=True)

    return has


CONFIG = """
max_workers: 3
available_node_types:
  head: {resources: {CPU: 8}, min_workers: 0, max_workers: 0}
  gpu: {resources: {CPU: 32, GPU: 4}, min_workers: 0, max_workers: 2}
  cpu: {resources: {CPU: 16}, min_workers: 0, max_workers: 10}
"""


def test_the_nodes_are_those_that_are_alive(cluster):
    nodes = cluster([node_of_ray(8), node_of_ray(32, 4), node_of_ray(64, 8, alive=False)])
    assert nodes == [Node(8, 0), Node(32, 4)]
    assert [node.memory for node in nodes] == [1e9, 1e9]


def test_nodes_that_the_autoscaler_can_add_count(cluster):
    nodes = cluster([node_of_ray(8)], CONFIG)
    assert nodes == [Node(32, 4), Node(32, 4), Node(16, 0)]  # 3 in all, whatever the types allow
    assert trials_at_once(nodes, size(nodes), None) == 8


def test_the_nodes_with_gpus_come_first_where_not_all_may_come(cluster):
    config = "max_workers: 3\navailable_node_types:\n  cpu: {resources: {CPU: 16}, max_workers: 10}\n"
    nodes = cluster([node_of_ray(8)], config + "  gpu: {resources: {CPU: 8, GPU: 1}, max_workers: 2}\n")
    assert nodes == [Node(8, 1), Node(8, 1), Node(16, 0)]


def test_a_ray_that_the_search_started_itself_has_no_autoscaler(cluster):
    cluster([node_of_ray(8)], CONFIG)
    assert reachable_nodes(present_nodes(), launched=False) == [Node(8, 0)]


def test_a_cluster_that_has_more_than_its_autoscaler_adds_counts_as_it_is(cluster):
    assert cluster([node_of_ray(8, 16)], CONFIG) == [Node(8, 16)]


@pytest.mark.parametrize(
    "config", ["", "cluster_name: x\n", "max_workers: 2\n", "max_workers: 2\navailable_node_types: {}\n"]
)
def test_a_configuration_that_says_nothing_of_nodes_adds_none(cluster, config):
    assert cluster([node_of_ray(8)], config) == [Node(8, 0)]
