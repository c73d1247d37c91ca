"""Searches on clusters of several nodes, all on this machine: nodes that go, that come, and that are waited for.

Machines of their own, with addresses and disks of their own, are in tests/cluster/.
"""

import contextlib
import json
import os
import re
import signal
import socket
import sys
from pathlib import Path

import pytest
import ray
from processes import descendants, left_after, named, stopped
from ray import train
from ray._common.usage.usage_constants import CLUSTER_METADATA_KEY
from ray._private.ray_constants import KV_NAMESPACE_CLUSTER
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.train.backend import Backend, BackendConfig
from ray.util import get_node_ip_address, placement_group, placement_group_table
from searches import PINNED, Search, completed, settings, tables
from tiny_run import draw_images

from search.cluster.connect import check_address
from search.cluster.orphaned_placement_groups import remove_orphaned_placement_groups
from trainables.ray.process_group import GroupTrainer

pytestmark = pytest.mark.ray

SETTINGS = f"{PINNED} arch=test_resnet.r160_in1k weight_decay=0.01 lr_max=0.001..0.01 tta_views=0"
FAKE_PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
FAKE_HEAD_NODE = "fffffffffffffffffffffffffffffffffffffffffffffffffff00000"


@pytest.fixture(scope="module")
def class_folders(search_cache, tmp_path_factory) -> Path:
    return draw_images(tmp_path_factory.mktemp("clusters") / "data", each=20)


@pytest.fixture(scope="module")
def cluster():
    """A head with one CPU; a test adds nodes of one CPU each, and takes them away.

    Without a dashboard, as where another process has its port: Ray Train's own way to free room needs one.
    """
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    yield found
    processes = {pid for node in found.list_all_nodes() for info in node.all_processes.values() for pid in pids(info)}
    found.shutdown()
    assert not left_after(20, processes)


def pids(infos: list) -> set[int]:
    return {pid for info in infos for pid in (info.process.pid, *descendants(info.process.pid))}


@pytest.fixture
def start(class_folders, tmp_path):
    """Begins a search on a cluster; none is left at the test's end."""
    started: list[Search] = []

    def begin(cluster: Cluster, *arguments: object) -> Search:
        cluster.wait_for_nodes()  # one that a test took away may still be there
        where = ("--data", class_folders, "--address", cluster.address, "--cpus-per-worker", 1, "--report", "off")
        common = ("--space", "quickstart", "--searcher", "random", "--scheduler", "none", *settings(SETTINGS))
        started.append(Search(tmp_path / f"search{len(started)}", *where, *common, *arguments))
        return started[-1]

    yield begin
    for search in started:
        search.process.kill()


def workers() -> list[int]:
    """Those that train, on all nodes."""
    return named("ray::RayTrainWorker", os.getpid())


def test_a_node_that_goes_away_takes_no_finished_epoch_with_it(cluster, start, class_folders):
    node = cluster.add_node(num_cpus=1)
    search = start(cluster, "--trials", 2, "--workers-per-trial", 2, *settings("epochs=3"))
    search.wait_for(r"trial 0 .*epoch 2/")
    with stopped(workers()):  # so that the search cannot end before
        cluster.remove_node(node, allow_graceful=False)
    search.wait_for("cluster: waiting for nodes. Trials need 2 workers, there is room for 1")
    node = cluster.add_node(num_cpus=1)
    assert search.wait() == 0, search.text
    cluster.remove_node(node, allow_graceful=False)
    assert "room for 2 workers now, the search continues" in search.text
    assert [row["status"] for row in tables(search.folder)[0]] == ["completed"] * 2
    reported = re.findall(r"trial +\d+ +epoch \d+/", search.text)
    assert len(reported) == len(set(reported)) == 8
    assert_learns_like_one_worker(search.folder, class_folders)


@pytest.mark.parametrize("other", [{"ray_version": "2.9.3"}, {"python_version": "3.9.18"}])
def test_a_cluster_of_another_ray_or_python_is_refused_with_both_versions(cluster, other):
    client, place = GcsClient(address=cluster.address), (CLUSTER_METADATA_KEY, KV_NAMESPACE_CLUSTER)
    own = client.internal_kv_get(*place)
    client.internal_kv_put(place[0], json.dumps(json.loads(own) | other).encode(), True, place[1])
    try:
        with pytest.raises(ValueError, match=r"Version mismatch: The cluster .*Install the cluster's") as error:
            check_address(cluster.address)
    finally:
        client.internal_kv_put(place[0], own, True, place[1])
    assert all(version in str(error.value) for version in (*other.values(), ray.__version__))
    check_address(cluster.address)


def assert_learns_like_one_worker(folder: Path, data: Path) -> None:
    """The winner's losses are those of its recipe without Ray."""
    from trainables.data.layouts import find_images
    from trainables.data.presize import presize
    from trainables.recipe import Recipe
    from trainables.training.fine_tune import FineTune

    recipe = Recipe.from_dict(json.loads((folder / "best/recipe.json").read_text()))
    trial_id = json.loads((folder / "best/metrics.json").read_text())["trial_id"]
    epochs = [row for row in tables(folder)[1] if row["trial_id"] == trial_id]
    training = FineTune(recipe, presize(find_images(data), recipe.presize, recipe.resize_method))
    assert len(epochs) == recipe.total_epochs
    for row in epochs:
        metrics = training.run_epoch()
        for loss in ("train_loss", "valid_loss"):
            assert float(row[loss]) == pytest.approx(metrics[loss], rel=1e-3)
    training.close()


def test_a_search_grows_and_shrinks_with_its_cluster(cluster, start):
    search = start(cluster, "--trials", 2, *settings("epochs=3"))
    search.wait_for(r"trial 0 .*epoch 1/")
    assert "2 trials, then the winner on all images, 1 at once" in search.text
    with stopped(workers()):  # so that trial 0 cannot end while nodes come and go
        node = cluster.add_node(num_cpus=1)
        search.wait_for("cluster: more nodes, room for 2 workers now")
        search.wait_for(r"trial 1 .*epoch 1/")
        assert most_at_once(search.lines) == 2
        with stopped(workers()):
            cluster.remove_node(node, allow_graceful=False)
            search.wait_for("cluster: waiting for nodes. Trials need 2 workers, there is room for 1")
            # A group's host may be on the lost node. So that this is not left to chance:
            for host in named("ray::GroupHost", os.getpid()):
                os.kill(host, signal.SIGKILL)
    assert search.wait() == 0, search.text
    assert [row["status"] for row in tables(search.folder)[0]] == ["completed"] * 2
    epochs = tables(search.folder)[1]
    assert len(epochs) == len({(row["number"], row["epoch"]) for row in epochs}) == 2 * 4


def most_at_once(lines: list[str]) -> int:
    live, most = 0, 0
    for line in lines:
        live += (": " in line and "starts:" in line) - ("completed: error" in line)
        most = max(most, live)
    return most


@pytest.fixture
def connected(cluster, monkeypatch):
    """This process is a driver on the cluster."""
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "15")  # so that a hang shows
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    myself = sys.modules[__name__]
    ray.cloudpickle.register_pickle_by_value(myself)  # the cluster's processes cannot import it
    yield
    ray.cloudpickle.unregister_pickle_by_value(myself)
    ray.shutdown()


@ray.remote(num_cpus=0)
class Reserver:
    """As the host of a worker group."""

    def reserve(self, cpus: float):
        group = placement_group([{"CPU": cpus}])
        assert group.wait(20)
        return group


def test_room_that_was_reserved_by_what_went_away_with_its_node_is_given_back(connected):
    lost, living = Reserver.remote(), Reserver.remote()
    abandoned, in_use = ray.get([lost.reserve.remote(0.5), living.reserve.remote(0.25)])
    wanted = placement_group([{"CPU": 0.75}])
    ray.kill(lost)
    assert not wanted.wait(2)
    for _ in range(2):
        remove_orphaned_placement_groups()
        assert wanted.wait(20)
    assert [placement_group_table(group)["state"] for group in (abandoned, in_use)] == ["REMOVED", "CREATED"]


class LosesItsFirstWorker(BackendConfig):
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    @property
    def backend_cls(self):
        return _LosesItsFirstWorker


class _LosesItsFirstWorker(Backend):
    def on_start(self, worker_group, backend_config) -> None:
        ray.get(worker_group.execute_single_async(0, die_once, backend_config.marker))


def die_once(marker: Path) -> None:
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)


@ray.remote(num_cpus=0)
class Host:
    def fit(self, folder: Path) -> None:
        GroupTrainer(
            (folder / "trained").touch,
            backend_config=LosesItsFirstWorker(folder / "died"),
            scaling_config=train.ScalingConfig(num_workers=1),
            run_config=train.RunConfig(
                storage_path=str(folder), failure_config=train.FailureConfig(controller_failure_limit=1)
            ),
        ).fit()


def test_workers_that_were_lost_while_they_met_leave_their_room_to_the_next_ones(connected, tmp_path):
    ray.get(Host.remote().fit.remote(tmp_path))
    assert (tmp_path / "died").exists() and (tmp_path / "trained").exists()


@pytest.fixture
def autoscaling(tmp_path, monkeypatch):
    """A head without CPUs whose autoscaler can start two nodes of one CPU each, as processes of this machine."""
    port, dashboard_port = free_ports(2)
    provider = {"type": "external", "module": FAKE_PROVIDER, "head_node_id": FAKE_HEAD_NODE, "launch_multiple": True}
    provider |= {"gcs_address": f"{get_node_ip_address()}:{port}"}
    provider |= dict.fromkeys(("use_node_id_as_ip", "disable_node_updaters", "disable_launch_config_check"), True)
    nothing = {"node_config": {}, "min_workers": 0}
    types = {
        "ray.head.default": nothing | {"resources": {"CPU": 0}, "max_workers": 0},
        "small": nothing | {"resources": {"CPU": 1, "object_store_memory": 150_000_000}, "max_workers": 2},
    }
    config = {"cluster_name": "fake", "max_workers": 2, "provider": provider, "available_node_types": types}
    config |= {"head_node_type": "ray.head.default", "auth": {}, "idle_timeout_minutes": 5}
    config |= {"file_mounts": {}, "cluster_synced_files": []}
    commands = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    config |= {f"{name}_commands": [] for name in commands}
    file = tmp_path / "ray_bootstrap_config.yaml"  # where `ray up` leaves it, in the home folder
    file.write_text(json.dumps(config))
    tokens = Path.home() / ".ray/auth_token"
    if tokens.is_file():
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tokens))
    monkeypatch.setenv("HOME", str(tmp_path))
    told = {"RAY_FAKE_CLUSTER": "1", "RAY_enable_autoscaler_v2": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    told |= {"RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE}
    with monkeypatch.context() as patch:
        for name, value in told.items():
            patch.setenv(name, value)
        node = {
            "num_cpus": 0,
            "gcs_server_port": port,
            "dashboard_port": dashboard_port,
            "autoscaling_config": str(file),
        }
        found = Cluster(initialize_head=True, head_node_args=node)
    yield found
    processes = {pid for info in found.head_node.all_processes.values() for pid in pids(info)}
    found.shutdown()
    for pid in processes:  # the autoscaler's nodes do not end with it
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in sockets:
            probe.bind(("", 0))
        return [probe.getsockname()[1] for probe in sockets]


def test_nodes_that_the_autoscaler_can_add_are_waited_for_by_trials_of_all_sizes(autoscaling, start):
    never = start(autoscaling, "--workers-per-trial", 3)
    assert never.wait() != 0
    assert "This can never be scheduled. A trial of 3 workers" in never.text
    archs = settings("arch=test_resnet.r160_in1k,test_vit.r160_in1k epochs=1")
    mixed = ("--workers-per-trial", "test_vit*=2", "--trials", 3, *archs)
    search = start(autoscaling, *mixed)
    search.wait_for("waiting for nodes. Trials need 2 workers, there is room for 0; the autoscaler can raise that to 2")
    assert search.wait() == 0, search.text
    assert "room for 2 workers now, the search continues" in search.text
    rows = completed(search.folder)
    assert len(rows) == 3 and len({row["arch"] for row in rows}) == 2
