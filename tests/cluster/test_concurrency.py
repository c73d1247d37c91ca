"""How many trials may run at once as nodes come and go, and what a search says of it (real nodes: test_clusters.py)."""

import itertools
import pickle
from types import SimpleNamespace

import pytest

from search.cluster import concurrency as module
from search.cluster.concurrency import Capacity, CapacityNews
from search.cluster.resources import Node
from trainables.ray.worker_group import GroupSize
from trainables.recipe import Recipe


@pytest.fixture
def cluster(monkeypatch):
    """The cluster's nodes, and a clock that a test sets."""
    world = SimpleNamespace(present=[Node(2, 0)], more=[], now=1000.0)
    monkeypatch.setattr(module, "present_nodes", lambda: world.present)
    monkeypatch.setattr(module, "reachable_nodes", lambda present, launched: present + world.more * launched)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: world.now))

    def become(*nodes: Node) -> None:
        world.present, world.now = list(nodes), world.now + module.LOOK_SECONDS

    world.become = become
    return world


def capacity(tmp_path, num_workers=1, of_archs=None, max_trials=None) -> Capacity:
    return Capacity("run", GroupSize(num_workers=num_workers), of_archs or {}, max_trials, launched=True)


def test_as_many_workers_run_as_the_nodes_have_room_for(cluster, tmp_path):
    cluster.present = [Node(2, 0), Node(3, 0)]
    found = capacity(tmp_path)
    assert found.has_room([2, 2], 1)
    assert not found.has_room([2, 2], 2)
    assert not found.has_room([2, 2, 1], 1)


def test_the_first_trial_always_may_start(cluster, tmp_path):
    cluster.present = []
    assert capacity(tmp_path).has_room([], 4)


def test_a_limit_of_trials_counts_trials_and_asks_for_no_more_than_there_is(cluster, tmp_path):
    found = capacity(tmp_path, max_trials=2)
    assert found.has_room([1], 1)
    assert not found.has_room([1], 2)
    assert not found.has_room([1, 1], 0)


def test_no_more_trials_start_than_the_memory_is_enough_for(cluster, tmp_path):
    cluster.present = [Node(64, 0, memory=5e9)]
    found = capacity(tmp_path)
    assert found.has_room([1, 1], 1) and not found.has_room([1, 1, 1], 1)
    assert capacity(tmp_path, max_trials=40).has_room([1] * 30, 1)  # as the user says
    cluster.more = [Node(64, 0)]  # an autoscaler adds it for CPUs that are asked for, whatever the memory is
    assert capacity(tmp_path).has_room([1] * 60, 1)
    cluster.more = []
    large = capacity(tmp_path, of_archs={"resnet101": 8})
    assert large.present == 8  # the largest trial waits for no nodes: the memory is only estimated


def test_some_trials_wait_for_nodes_that_the_autoscaler_can_add_and_more_once_it_has(cluster, tmp_path):
    cluster.present, cluster.more = [], 100 * [Node(1, 0)]
    found = capacity(tmp_path)
    most = module.MAX_WAITING
    assert found.has_room([1] * (most - 1), 1) and not found.has_room([1] * most, 1)
    cluster.become(*20 * [Node(1, 0)])
    assert found.has_room([1] * 39, 1) and not found.has_room([1] * 40, 1)
    cluster.more = []
    cluster.become(*20 * [Node(1, 0)])
    assert found.has_room([1] * 19, 1) and not found.has_room([1] * 20, 1)


def test_a_trial_that_waits_for_room_gets_it_before_a_new_one(cluster, tmp_path):
    cluster.more = [Node(8, 0)]
    found = capacity(tmp_path, of_archs={"resnet101": 2})
    assert found.has_room([1, 1], 2)
    found.note_end([1, 1, 2])
    assert not found.has_room([1, 2], 1)
    assert found.has_room([1], 1)  # room for both
    cluster.now += module.YIELD_SECONDS
    assert found.has_room([1, 2], 1)


def test_a_trial_whose_node_was_lost_gets_room_before_a_new_one(cluster, tmp_path):
    cluster.present, cluster.more = [Node(2, 0), Node(2, 0)], [Node(8, 0)]
    found = capacity(tmp_path)
    found.note_end([1, 1, 1, 1, 1])
    assert found.has_room([1, 1, 1, 1], 1)  # of trials that have not begun it does not matter which one waits
    cluster.become(Node(2, 0))
    found.note_end([1, 1, 1, 1])
    assert not found.has_room([1, 1, 1], 1)


def test_trials_that_end_all_the_time_do_not_keep_a_cluster_from_growing(cluster, tmp_path):
    cluster.more = [Node(8, 0)]
    found = capacity(tmp_path, of_archs={"resnet101": 2})
    found.note_end([1, 1])
    assert found.has_room([1], 2)


def test_room_follows_the_nodes_that_come_and_go(cluster, tmp_path):
    found = capacity(tmp_path)
    assert not found.has_room([1, 1], 1)
    cluster.become(Node(2, 0), Node(2, 0))
    assert found.has_room([1, 1], 1)
    cluster.become(Node(1, 0))
    assert not found.has_room([1], 1)


def test_some_architectures_need_more_workers(cluster, tmp_path):
    found = capacity(tmp_path, of_archs={"resnet101*": 4, "resnet101d": 2})
    archs = ("resnet101.tv_in1k", "resnet18.tv_in1k", "resnet101d")
    assert [found.group_size(arch).num_workers for arch in archs] == [4, 1, 2]
    assert found.largest == 4


def test_a_restored_search_takes_up_the_capacity_of_its_own_start_wherever_its_folder_is(cluster, tmp_path):
    before = pickle.dumps(capacity(tmp_path / "here" / "run"))
    now = capacity(tmp_path / "there" / "run", num_workers=2)
    assert pickle.loads(before) is now


SETTINGS = {"arch": "resnet18"}
NUMBERS = itertools.count()

# --- Trials that share a GPU ------------------------------------------------------------------------------------------


SHARES = {n: GroupSize(cpus_per_worker=8 / n, gpus_per_worker=1 / n) for n in (1, 2, 4)}


def sharing(**options) -> Capacity:
    return Capacity("run", SHARES[1], {}, shared_sizes=SHARES, launched=True, **options)


def result(**more) -> dict:
    found = {"epoch": 2, "stage": "unfrozen", "failure": "", "gpu": "node 0", "gpu_kind": "A100", "batch_parts": 1}
    return found | {"train_seconds": 8.0, "valid_seconds": 2.0, "images_per_second": 1000.0} | more


def of(number: int, **result_of) -> tuple[str, dict, dict]:
    recipe = Recipe(arch="resnet18", epochs=9).to_dict()
    return "a", recipe | {"trials_per_gpu": number, "retrains": "t7"}, result(**result_of)


def test_as_many_trials_run_as_share_the_gpus_and_another_one_waits(cluster):
    cluster.become(Node(16, 2))
    found = sharing()
    assert found.has_room([1] * 7, 1) and not found.has_room([1] * 8, 1)
    assert found.group_size("resnet18") == SHARES[4] and found.config("next") == {"trials_per_gpu": 4}


@pytest.mark.parametrize("what", [{"batch_parts": 2}, {"failure": "out of memory even with 1 image at a time: x"}])
def test_where_memory_runs_out_fewer_trials_run_from_then_on(cluster, what):
    cluster.become(Node(8, 1))
    found = sharing()
    assert found.has_room([1] * 3, 1)
    assert "1/4 of its memory was not enough for a trial; 2 share it from now on" in found.learn(*of(4, **what))
    assert found.has_room([1], 1) and not found.has_room([1] * 2, 1)
    assert found.config("next") == {"trials_per_gpu": 2}
    assert found.learn(*of(4, **what)) == ""


def test_other_failures_do_not_lower_the_number(cluster):
    found = sharing()
    assert found.learn(*of(4, failure="diverged: training loss is nan")) == ""
    assert found.learn(*of(4)) == "" and found.config("next") == {"trials_per_gpu": 4}


def test_the_trials_at_once_grow_as_far_as_that_pays(cluster):
    cluster.become(Node(8, 1))
    found = sharing(measures=True)
    assert not found.has_room([1], 1)
    said = []
    for _ in range(4):
        cluster.now += 10
        said.append(found.learn(*of(1)))
    assert said == ["", "", "", "one trial at a time is measured, trying 2 at once"]
    assert found.has_room([1], 1) and not found.has_room([1, 1], 1)  # at once, not when it next looks at the nodes


def test_nothing_is_learned_from_a_search_that_shares_no_gpu(cluster):
    found = Capacity("run", GroupSize(), {})
    assert found.config("next") == {} and found.learn(*of(4, batch_parts=2)) == ""


def test_trials_count_by_the_share_of_a_gpu_that_they_have(cluster):
    cluster.become(Node(8, 1))
    found = sharing()
    live = dict.fromkeys("abcd", 1)
    for name in live:
        found.config(name)
    found.learn(*of(4, batch_parts=2))
    assert found.weighed(live) == [0.5] * 4
    assert not found.has_room(found.weighed(live), 1)
    assert not found.has_room(found.weighed(dict.fromkeys("abc", 1)), 1)
    assert found.has_room(found.weighed(dict.fromkeys("ab", 1)), 1)  # a half is free, not two quarters
    growing = sharing(measures=True)
    growing.config("a")
    for _ in range(4):
        cluster.now += 10
        growing.learn(*of(1))
    assert not growing.has_room(growing.weighed({"a": 1}), 1)  # it has the GPU to itself until it ends
    growing.config("b")
    assert growing.has_room(growing.weighed({"b": 1}), 1)


def test_a_number_that_changes_is_said_and_is_no_news_of_nodes(cluster, capsys):
    cluster.become(Node(8, 1))
    found = sharing()
    news = CapacityNews(found, SETTINGS)
    trials = [trial("RUNNING") for _ in range(4)]
    for one in trials:
        one.config |= found.config(one.trial_id)
    assert steps(news, capsys, *trials) == ""
    one, config, ended = of(4, batch_parts=2)
    news.on_trial_result(1, [], SimpleNamespace(trial_id=one, config=config), ended)
    assert "GPU: 1/4 of its memory was not enough for a trial; 2 share it from now on" in capsys.readouterr().out
    assert steps(news, capsys, *trials) == ""  # the four that run fill what two will


def steps(news: CapacityNews, capsys, *trials) -> str:
    news.on_step_begin(0, list(trials))
    return capsys.readouterr().out


def trial(status: str, **config):
    return SimpleNamespace(status=status, config=config, RUNNING="RUNNING", trial_id=f"t{next(NUMBERS)}")


def test_a_search_says_what_it_waits_for_again_and_again_and_when_it_goes_on(cluster, tmp_path, capsys):
    cluster.present, cluster.more = [Node(1, 0)], [Node(4, 0)]
    news = CapacityNews(capacity(tmp_path, num_workers=2), SETTINGS)
    waits = steps(news, capsys)
    assert "waiting for nodes. Trials need 2 workers, there is room for 1; the autoscaler can raise that to 5" in waits
    assert steps(news, capsys) == ""
    cluster.now += module.REMIND_SECONDS
    assert "still waiting for nodes, for 2 min" in steps(news, capsys)
    cluster.become(Node(1, 0), Node(4, 0))
    assert "room for 5 workers now, the search continues" in steps(news, capsys)


def test_trials_that_run_already_are_waited_for_too(cluster, tmp_path, capsys):
    news = CapacityNews(capacity(tmp_path, of_archs={"resnet101": 2}), SETTINGS)
    assert steps(news, capsys, trial("RUNNING", arch="resnet101"), trial("TERMINATED")) == ""
    waits = steps(news, capsys, trial("RUNNING", arch="resnet101"), trial("RUNNING"))
    assert "Trials need 3 workers, there is room for 2; lost nodes may return" in waits
    cluster.now += 2 * module.REMIND_SECONDS
    assert steps(news, capsys, trial("RUNNING", arch="resnet101"), trial("RUNNING")) == ""  # the others go on
    assert steps(news, capsys, trial("RUNNING")) == ""


def test_a_search_on_one_machine_says_nothing_of_nodes(cluster, tmp_path, capsys):
    alone = Capacity("run", GroupSize(num_workers=8), {})
    assert steps(CapacityNews(alone, SETTINGS), capsys, trial("RUNNING")) == ""


def test_a_search_says_when_nodes_come_and_go(cluster, tmp_path, capsys):
    news = CapacityNews(capacity(tmp_path), SETTINGS)
    said = [steps(news, capsys)]
    for nodes in ([Node(2, 0), Node(2, 0)], [Node(1, 0)], [Node(1, 0)]):
        cluster.become(*nodes)
        said.append(steps(news, capsys))
    assert said[0] == said[3] == ""
    assert "more nodes, room for 4 workers now" in said[1]
    assert "fewer nodes, room for 1 worker now" in said[2]
