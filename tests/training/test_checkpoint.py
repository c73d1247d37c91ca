"""A trial's checkpoint on the disk: the newest one that is whole is gone on from."""

import errno
from pathlib import Path

import pytest

from trainables.training.checkpoint import RESULT_FILE, TRAINING_FILE, WEIGHTS_FILE, drop, last_whole, save

FILES = {WEIGHTS_FILE: b"weights", TRAINING_FILE: b"moments"}


def test_the_newest_one_comes_back_as_it_was(tmp_path):
    save(tmp_path, 1, FILES, {"epoch": 1})
    save(tmp_path, 2, FILES | {WEIGHTS_FILE: b"better"}, {"epoch": 2, "failure": ""})
    assert last_whole(tmp_path) == (FILES | {WEIGHTS_FILE: b"better"}, {"epoch": 2, "failure": ""})
    assert [path.name for path in tmp_path.iterdir()] == ["epoch_0002"]
    assert last_whole(tmp_path / "nothing") is None


def test_of_an_ended_trial_the_result_is_left(tmp_path):
    save(tmp_path, 3, FILES, {"epoch": 3})
    drop(tmp_path)
    assert last_whole(tmp_path) == ({}, {"epoch": 3})


def test_one_that_has_lost_a_file_is_not_taken_for_that_of_an_ended_trial(tmp_path):
    save(tmp_path, 3, FILES, {"epoch": 3})
    (tmp_path / "epoch_0003" / TRAINING_FILE).unlink()
    assert last_whole(tmp_path) is None


def test_a_disk_that_fails_costs_no_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, 3, FILES, {"epoch": 3})

    def fail(path) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(OSError, match="Input/output"):
        last_whole(tmp_path)
    monkeypatch.undo()
    assert last_whole(tmp_path) == (FILES, {"epoch": 3})


@pytest.mark.parametrize(
    ("name", "content"),
    [(WEIGHTS_FILE, b"weightz"), (TRAINING_FILE, b""), (RESULT_FILE, b'{"result": {"ep'), (RESULT_FILE, b"[]")],
)
def test_a_damaged_one_is_left_out_and_said(tmp_path, caplog, name, content):
    save(tmp_path, 1, FILES, {"epoch": 1})
    (tmp_path / "epoch_0001" / name).write_bytes(content)
    assert last_whole(tmp_path) is None
    assert f"skipping the damaged checkpoint {tmp_path / 'epoch_0001'}" in caplog.text
    save(tmp_path, 1, FILES, {"epoch": 1})  # the trial has begun anew
    assert last_whole(tmp_path) == (FILES, {"epoch": 1})


def test_where_a_kill_left_two_the_older_one_stands_in_for_a_damaged_one(tmp_path):
    save(tmp_path / "a", 1, FILES, {"epoch": 1})
    save(tmp_path / "b", 2, FILES, {"epoch": 2})
    (tmp_path / "b" / "epoch_0002").rename(tmp_path / "a" / "epoch_0002")
    assert last_whole(tmp_path / "a") == (FILES, {"epoch": 2})
    (tmp_path / "a" / "epoch_0002" / WEIGHTS_FILE).write_bytes(b"")
    assert last_whole(tmp_path / "a") == (FILES, {"epoch": 1})
