"""A node's keeper of training states, without Ray: what is on its disk, and when it goes from there."""

import os
import time

import pytest

from trainables.ray import keeper as module
from trainables.ray.keeper import Keeper, folder_of, states_folder
from trainables.training import checkpoint
from trainables.training.checkpoint import TRAINING_FILE, WEIGHTS_FILE, Elsewhere

SEARCH = "0123456789abcdef"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_SEARCH_CACHE", str(tmp_path / "cache"))


def state(epoch: int) -> dict[str, bytes]:
    return {WEIGHTS_FILE: f"weights {epoch}".encode(), TRAINING_FILE: f"momenta {epoch}".encode()}


def test_it_has_the_newest_state_of_each_trial_and_none_of_those_that_ended():
    keeper = Keeper(SEARCH, "node")
    for epoch in (0, 1, 2):
        crc32 = keeper.save("ta", state(epoch), {"epoch": epoch})
    keeper.save("tb", state(7), {"epoch": 7})
    assert (keeper.newest("ta"), keeper.newest("tb"), keeper.newest("tc")) == (2, 7, None)
    assert keeper.load("ta") == (state(2), {"epoch": 2}) and crc32 == checkpoint.checksums(state(2))
    assert keeper.load_model("ta") == ({WEIGHTS_FILE: b"weights 2"}, {"epoch": 2})
    assert [path.name for path in folder_of(SEARCH).glob("*/*/*")] in (
        ["epoch_0002", "epoch_0007"],
        ["epoch_0007", "epoch_0002"],
    )
    keeper.drop("ta")
    assert keeper.save("ta", state(3), {"epoch": 3}) == {}  # a copy that comes late
    assert keeper.newest("ta") is None
    keeper.forget("tb")  # it may come back
    keeper.save("tb", state(8), {"epoch": 8})
    assert keeper.newest("tb") == 8
    keeper.retain([])
    assert list(states_folder().iterdir()) == []


def test_a_damaged_state_is_not_given_out_and_one_that_arrives_damaged_is_not_kept():
    keeper = Keeper(SEARCH, "node")
    keeper.save("ta", state(1), {"epoch": 1})
    with pytest.raises(ValueError, match="other checksums"):
        keeper.save("ta", state(2), {"epoch": 2}, checkpoint.checksums(state(2)) | {WEIGHTS_FILE: 1})
    assert keeper.load("ta") == (state(1), {"epoch": 1})
    (folder_of(SEARCH) / "node/ta/epoch_0001" / WEIGHTS_FILE).write_bytes(b"weight5 1")
    with pytest.raises(ValueError, match="no undamaged state of ta"):
        keeper.load("ta")


def test_a_later_keeper_finds_what_an_earlier_one_left_on_the_disk_also_as_another_node():
    Keeper(SEARCH, "before").save("ta", state(3), {"epoch": 3})
    for node in ("before", "after"):
        again = Keeper(SEARCH, node)
        assert again.newest("ta") == 3 and again.load("ta") == (state(3), {"epoch": 3})
    again.retain(["ta"])  # the search was interrupted
    assert again.newest("ta") == 3
    again.drop("ta")
    assert list(folder_of(SEARCH).glob("*/*")) == []


def test_states_of_a_search_that_was_left_go_after_a_month_and_others_stay():
    for search in ("a1", "b2"):
        Keeper(search, "node").save("ta", state(1), {"epoch": 1})
    long_ago = time.time() - module.ABANDONED_SECONDS - 60
    for path in (folder_of("a1"), *folder_of("a1").rglob("*")):
        os.utime(path, (long_ago, long_ago))
    Keeper("c3", "node")
    assert {path.name for path in states_folder().iterdir()} == {"b2", "c3"}


def test_a_run_of_which_only_the_path_is_known_has_a_folder_too():
    assert folder_of("/home/user/results/first").parent == states_folder()


def test_the_head_has_the_result_and_says_where_the_rest_is(tmp_path):
    crc32 = checkpoint.checksums(state(1))
    checkpoint.save(tmp_path / "ta", 1, {}, {"epoch": 1}, Elsewhere(nodes=("a", "b"), crc32=crc32))
    assert [path.name for path in tmp_path.glob("ta/*/*")] == ["result.json"]
    assert checkpoint.last_whole(tmp_path / "ta") == ({}, {"epoch": 1})
    assert checkpoint.elsewhere(tmp_path / "ta") == Elsewhere(nodes=("a", "b"), crc32=crc32)
    checkpoint.add(tmp_path / "ta/epoch_0001", checkpoint.model_only(state(1)))  # it may be among the best
    assert checkpoint.last_whole(tmp_path / "ta") == (checkpoint.model_only(state(1)), {"epoch": 1})
    checkpoint.drop(tmp_path / "ta")
    assert checkpoint.elsewhere(tmp_path / "ta") is None
    checkpoint.save(tmp_path / "ta", 2, state(2), {"epoch": 2})
    assert checkpoint.elsewhere(tmp_path / "ta") is None
