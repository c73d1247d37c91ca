"""A trial whose states are on the nodes of a cluster, and nodes that go. Nodes, keepers and hosts are real ones; the
workers are played, so that a state is the digest of all epochs before it, and what was lost shows in the next loss.
"""

import asyncio
import hashlib
import shutil
import sys
import time
from pathlib import Path

import pytest
import ray
from ray import tune
from ray.cluster_utils import Cluster

from trainables.ray import trial as module
from trainables.ray.keeper import folder_of, keeper_on, start_keeper
from trainables.ray.messages import Outcome
from trainables.ray.node_states import NodeStates, bring_model, drop_state, is_head
from trainables.ray.trial import LOST_EPOCHS, FineTuneTrial, TrialOptions
from trainables.ray.worker_group import GroupHost, GroupSize, living_nodes
from trainables.recipe import Recipe
from trainables.training import checkpoint
from trainables.training.checkpoint import BEST_FILE, TRAINING_FILE, WEIGHTS_FILE

pytestmark = pytest.mark.ray

EPOCHS = 6
SETTINGS = Recipe(epochs=EPOCHS, freeze_epochs=0, head_init="zeros").to_dict()
BEST_EPOCH = 2


class Host(GroupHost):
    """Its workers are a thread that hashes."""

    def _run_trainer(self, size, myself) -> None:
        after = 0
        while True:
            command = asyncio.run_coroutine_threadsafe(self.next_command(0, after), self._loop).result()
            if command is None:
                return self._loop.call_soon_threadsafe(self._end, "left")
            after, epoch = command.number, command.epochs_done + 1
            before = self._state[TRAINING_FILE] if command.epochs_done else b""
            momenta = hashlib.sha256(before + bytes([epoch])).digest()
            error = 0.1 if epoch == BEST_EPOCH else 0.5
            metrics = {"epoch": epoch, "error_rate": error, "valid_loss": float(int.from_bytes(momenta[:4]))}
            metrics |= {"overhead_seconds": 1.0, "train_seconds": 2.0, "valid_seconds": 0.5}
            state = {WEIGHTS_FILE: f"weights {epoch}".encode(), TRAINING_FILE: momenta}
            asyncio.run_coroutine_threadsafe(self.deliver(after, Outcome(metrics, state)), self._loop).result()


def loss(epoch: int) -> float:
    """That of an undisturbed trial."""
    momenta = b""
    for number in range(1, epoch + 1):
        momenta = hashlib.sha256(momenta + bytes([number])).digest()
    return float(int.from_bytes(momenta[:4]))


@pytest.fixture(scope="module")
def cluster(search_cache):
    """A head that trains nothing; a test adds nodes, and takes them away."""
    soon = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 2}
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": soon}  # so that it notices lost nodes soon
    found = Cluster(initialize_head=True, head_node_args=head)
    ray.init(address=found.address, log_to_driver=False, logging_level="ERROR")
    myself = sys.modules[__name__]
    ray.cloudpickle.register_pickle_by_value(myself)  # the cluster's processes cannot import it
    yield found
    ray.cloudpickle.unregister_pickle_by_value(myself)
    ray.shutdown()
    found.shutdown()


class Search:
    """What of a search a trial needs: keepers on the nodes, and the run's folder."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.id = hashlib.sha256(str(folder).encode()).hexdigest()[:32]
        self.states = folder_of(self.id)
        self.keepers, self.nodes = {}, {node.node_id: node for node in cluster.worker_nodes}
        self.trial: FineTuneTrial | None = None

    def have_nodes(self, count: int) -> None:
        """Besides the head; a test gets those that the one before has left."""
        for _ in range(len(self.nodes), count):
            node = self.cluster.add_node(num_cpus=1)
            self.nodes[node.node_id] = node
        self.lose(*list(self.nodes)[count:])
        self.cluster.wait_for_nodes()
        self.start_keepers()

    def start_keepers(self) -> None:
        self.keepers = {node: self.keepers.get(node) or start_keeper(self.id, node) for node in living_nodes()}
        ray.get([keeper.newest.remote("") for keeper in self.keepers.values()])

    def lose(self, *nodes: str) -> None:
        """With their disks."""
        for node in nodes:
            self.cluster.remove_node(self.nodes.pop(node), allow_graceful=False)
            shutil.rmtree(self.states / node, ignore_errors=True)
            self.keepers.pop(node, None)
        deadline = time.monotonic() + 60
        while set(nodes) & living_nodes().keys() and time.monotonic() < deadline:
            time.sleep(0.05)

    def new_trial(self, **options) -> FineTuneTrial:
        given = {"settings": SETTINGS, "data": "", "weights": None, "group_size": GroupSize(), "keepers": self.id}
        given |= {"checkpoints": str(self.folder)} | options
        self.trial = tune.with_parameters(FineTuneTrial, options=TrialOptions(**given))({})
        return self.trial

    @property
    def on_head(self) -> list[str]:
        return sorted(path.name for path in self.folder.glob("*/*/*"))

    def on_nodes(self) -> dict[str, int]:
        """Node -> the epoch of the trial's state there."""
        return {p.parts[-3]: int(p.name[-4:]) for p in self.states.glob("*/*/epoch_*")}


@pytest.fixture
def search(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "GroupHost", Host)
    found = Search(cluster, tmp_path)
    yield found
    if found.trial is not None:
        found.trial.cleanup()
    shutil.rmtree(found.states, ignore_errors=True)


def until(condition, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_node_that_goes_costs_one_epoch_at_most_and_changes_no_loss(search):
    search.have_nodes(3)
    trial = search.new_trial(keep_epoch="best")
    results = [trial.step() for _ in range(3)]
    assert search.on_head == ["result.json"]
    until(lambda: sorted(search.on_nodes().values()) == [3, 3])
    assert len(set(search.on_nodes()) & set(search.nodes)) == 2  # and none on the head
    ray.kill(trial.host)  # wherever Ray has put it
    search.lose(trial.states.last[0])
    results += [trial.step() for _ in range(EPOCHS - 3)]
    assert [(result["epoch"], result["valid_loss"]) for result in results] == [(n, loss(n)) for n in range(1, 7)]
    assert all(result.get(LOST_EPOCHS, 0) <= 1 for result in results)
    assert [result["best_epoch"] for result in results] == [1, 2, 2, 2, 2, 2]
    assert results[-1]["done"] and search.on_head == ["result.json"]

    # It has ended. Its model goes to the head if it is among the best, and then it leaves the nodes.
    folder = next(search.folder.iterdir())
    assert bring_model(folder, search.id)
    files, _ = checkpoint.last_whole(folder)
    assert files == {WEIGHTS_FILE: b"weights 6", BEST_FILE: b"weights 2"}
    drop_state(folder, search.id)
    until(lambda: NodeStates(search.id, folder.name, list(search.nodes)).newest(0) is None)
    until(lambda: search.on_nodes() == {})


def test_a_trial_that_loses_both_copies_begins_again_and_says_so(search):
    search.have_nodes(3)
    trial = search.new_trial()
    for _ in range(3):
        trial.step()
    until(lambda: sorted(search.on_nodes().values()) == [3, 3])
    ray.kill(trial.host)  # wherever Ray has put it; it has the state in its memory
    search.lose(*search.on_nodes())
    result = trial.step()
    assert (result["epoch"], result["valid_loss"], result[LOST_EPOCHS]) == (4, loss(4), 3)
    assert LOST_EPOCHS not in trial.step()
    search.have_nodes(2)  # the new one gets the copies now, instead of the head
    trial.step()
    until(lambda: search.on_nodes().items() >= dict.fromkeys(search.nodes, 6).items())


def test_a_trial_finds_its_state_on_the_nodes_when_the_search_was_killed(search):
    search.have_nodes(2)
    trial = search.new_trial()
    for _ in range(2):
        trial.step()
    record = next(search.folder.glob("*/epoch_0002"))
    shutil.copytree(record, search.folder / "before")
    trial.step()
    until(lambda: sorted(search.on_nodes().values()) == [3, 3])
    # Killed after the nodes had the third epoch, before the head knew of it. The keepers are new ones.
    shutil.rmtree(next(search.folder.glob("*/epoch_0003")))
    (search.folder / "before").rename(record)
    trial.cleanup()
    for keeper in search.keepers.values():
        ray.kill(keeper)
    search.keepers = {}
    search.start_keepers()
    again = search.new_trial()
    results = [again.step() for _ in range(3)]
    assert [(result["epoch"], result["valid_loss"]) for result in results] == [(n, loss(n)) for n in (2, 3, 4)]
    assert not any(LOST_EPOCHS in result for result in results)


def test_a_keeper_that_is_killed_comes_back_with_its_files(search):
    search.have_nodes(1)
    trial = search.new_trial()
    trial.step()
    ray.kill(keeper_on(search.id, trial.states.last[0]), no_restart=False)
    assert trial.step()["valid_loss"] == loss(2)
    until(lambda: sorted(search.on_nodes().values()) == [2, 2])  # the other one is on the head: there is no other node
    assert any(is_head(living_nodes()[node]) for node in search.on_nodes())


def test_states_stay_on_the_head_where_it_is_alone_or_its_disk_is_copied(search):
    search.have_nodes(1)
    for options in ({"keeps_here": True}, {"keepers": None}):
        trial = search.new_trial(**options)
        trial.step()
        assert {TRAINING_FILE, WEIGHTS_FILE} < set(search.on_head) and search.on_nodes() == {}
        trial.cleanup()
    # From there a trial goes to the nodes with what it has.
    trial = search.new_trial()
    results = [trial.step() for _ in range(3)]
    assert [(r["epoch"], r["valid_loss"]) for r in results] == [(n, loss(n)) for n in (1, 2, 3)]
    assert search.on_head == ["result.json"] and search.on_nodes()
    until(lambda: set(search.on_nodes().values()) == {3})
