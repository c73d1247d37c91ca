"""A full disk: everything that is written waits for room, and what was there stays whole."""

import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from processes import as_user, open_to_all

from search.runs import disk_space as search_disk
from search.runs.atomic_files import append_line, write_atomically
from search.runs.disk_space import DiskWatch, features_needed, needed, needed_on_nodes, needs
from search.runs.paths import RunFolder
from trainables.system import full_disk
from trainables.training import checkpoint
from trainables.training.checkpoint import TRAINING_FILE, WEIGHTS_FILE

MB = 1_000_000


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 4 MB, which only some users may make."""
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "small", tmp_path], capture_output=True)
    if made.returncode:
        pytest.skip("needs the right to mount a disk in memory")
    yield tmp_path
    subprocess.run(["umount", "-l", tmp_path], check=True)


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(full_disk, "RETRY_SECONDS", 0.05)
    monkeypatch.setattr(search_disk, "RETRY_SECONDS", 0.05)


def fill(folder: Path) -> Path:
    ballast = folder / "ballast"
    with pytest.raises(OSError, match="No space left"), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 12))
    return ballast


def waits_for_room(write, ballast: Path) -> None:
    thread = threading.Thread(target=write)
    thread.start()
    time.sleep(0.5)
    assert thread.is_alive()
    ballast.unlink()
    thread.join(10)
    assert not thread.is_alive()


def test_a_table_keeps_its_old_content_until_there_is_room_for_the_new_one(small_disk, caplog):
    table = small_disk / "trials.csv"
    write_atomically(table, "old\n" * 1000)
    ballast = fill(small_disk)

    def look_and_write() -> None:
        write_atomically(table, "new\n" * 1000)

    thread = threading.Thread(target=look_and_write)
    thread.start()
    time.sleep(0.5)
    assert table.read_text() == "old\n" * 1000 and thread.is_alive()
    ballast.unlink()
    thread.join(10)
    assert table.read_text() == "new\n" * 1000
    assert "is full: waiting for room, nothing is lost" in caplog.text


def test_a_row_is_added_as_a_whole_or_not_yet(small_disk):
    table = small_disk / "epochs.csv"
    table.write_text("first\n" + "x" * 4080)  # the rest of its page takes 10 bytes, and the row more
    ballast = fill(small_disk)
    before = table.read_text()
    thread = threading.Thread(target=append_line, args=(table, "y" * 5000 + "\n"))
    thread.start()
    time.sleep(0.5)
    assert table.read_text() == before and thread.is_alive()
    ballast.unlink()
    thread.join(10)
    assert table.read_text() == before + "y" * 5000 + "\n"


def test_a_checkpoint_waits_and_the_one_before_stays(small_disk):
    small, large = ({WEIGHTS_FILE: bytes(size), TRAINING_FILE: bytes(size)} for size in (1000, 500_000))
    checkpoint.save(small_disk / "t", 1, small, {"epoch": 1})
    ballast = fill(small_disk)
    waits_for_room(lambda: checkpoint.save(small_disk / "t", 2, large, {"epoch": 2}), ballast)
    assert checkpoint.last_whole(small_disk / "t") == (large, {"epoch": 2})


@pytest.fixture
def closed(tmp_path):
    """A folder to which its own user may not write."""
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o555)
    return folder


def test_a_folder_that_may_not_be_written_is_refused_with_the_option_to_change(closed):
    open_to_all(closed.parent)
    said = as_user(65534, lambda: full_disk.require_writable(closed / "run", "--results"))
    assert said.startswith(f"ValueError: {closed}/run cannot be written (Permission denied)") and "--results" in said
    assert as_user(65534, lambda: full_disk.require_writable(closed, "--out")).startswith("ValueError")  # it is there
    assert not any(closed.iterdir())


@pytest.mark.parametrize("place", ["taken", "taken/run", "/proc/results", "x" * 300])
def test_a_place_that_can_be_no_folder_is_refused(tmp_path, place):
    (tmp_path / "taken").touch()
    with pytest.raises(ValueError, match=r"cannot be written \(.+\)\. Give another place with --results"):
        full_disk.require_writable(tmp_path / place, "--results")


def test_a_disk_that_is_full_from_the_start_is_refused(small_disk):
    fill(small_disk)
    with pytest.raises(ValueError, match="No space left"):
        full_disk.require_writable(small_disk / "run", "--results")


def test_a_folder_is_no_file_to_write(tmp_path):
    with pytest.raises(ValueError, match=r"is a folder\. Give the name of a file"):
        full_disk.require_writable_file(tmp_path)
    full_disk.require_writable_file(tmp_path / "new" / "curve.png")
    assert not any((tmp_path / "new").iterdir())


def test_other_errors_are_not_waited_out(tmp_path):
    with pytest.raises(OSError, match="No such file"):
        write_atomically(tmp_path / "nowhere" / "trials.csv", "text")


def test_a_search_says_what_it_will_need(tmp_path, monkeypatch):
    assert needed(20 * MB, at_once=2, kept=3) == 20 * MB * (2 * 6 + 3) + 32 * MB
    monkeypatch.setattr(search_disk, "free_bytes", lambda folder: 1000 * MB)
    folder = RunFolder(tmp_path / "run")
    assert needs(folder, 20 * MB, at_once=2, kept=3) == ("disk: up to 332 MB for checkpoints and 3 models, 1.0 GB free")
    assert needs(folder, 200 * MB, at_once=2, kept=3).endswith(
        "1.0 GB free: TOO LITTLE, the search will wait for space"
    )
    assert needs(folder, None, at_once=2, kept=3).startswith("disk: 1.0 GB free; the size of a trial is known")


def test_where_nodes_keep_the_training_states_the_head_needs_room_for_models_only(tmp_path, monkeypatch):
    monkeypatch.setattr(search_disk, "free_bytes", lambda folder: 1000 * MB)
    assert needs(RunFolder(tmp_path), 20 * MB, at_once=8, kept=3, nodes=4) == (
        "disk: up to 92 MB for 3 models, up to 480 MB in each node's cache for training states, 1.0 GB free"
    )
    assert needed_on_nodes(20 * MB, at_once=1, nodes=64) == needed_on_nodes(20 * MB, at_once=1, nodes=1) == 120 * MB


def test_the_features_of_a_screen_count_too(tmp_path, monkeypatch):
    assert features_needed(6000, 12, concat_pool=False) == 6000 * 12 * 2048 * 2
    assert features_needed(6000, 12, concat_pool=True) == 6000 * 12 * 4096 * 2
    monkeypatch.setattr(search_disk, "free_bytes", lambda folder: 500 * MB)
    said = needs(RunFolder(tmp_path), 20 * MB, at_once=2, kept=3, features=295 * MB)
    assert said == (
        "disk: up to 332 MB for checkpoints and 3 models; up to 295 MB in each machine's cache for features, "
        "500 MB free: TOO LITTLE, the search will wait for space"
    )
    assert "TOO LITTLE" not in needs(RunFolder(tmp_path), 20 * MB, at_once=2, kept=3)


def test_a_search_pauses_before_its_disk_is_full_and_goes_on_by_itself(tmp_path, monkeypatch, capsys):
    free = [100 * MB]
    monkeypatch.setattr(search_disk, "free_bytes", lambda folder: free[0])
    watch = DiskWatch(RunFolder(tmp_path))
    trial = SimpleNamespace(trial_id="a", status="RUNNING", RUNNING="RUNNING")
    checkpoint.save(tmp_path / "checkpoints" / "ta", 1, {WEIGHTS_FILE: bytes(30 * MB)}, {"epoch": 1})
    watch.on_trial_result(0, [trial], trial, {})
    watch.on_step_begin(0, [trial, trial])
    assert capsys.readouterr().out == ""
    free[0] = 80 * MB  # two trials need 30 MB each, and 32 MB are for the rest
    thread = threading.Thread(target=watch.on_step_begin, args=(0, [trial, trial]))
    thread.start()
    time.sleep(0.3)
    assert thread.is_alive()
    free[0] = 100 * MB
    thread.join(10)
    said = capsys.readouterr().out
    assert "DISK FULL: 80 MB left" in said and "needs 92 MB" in said and "there is space again" in said
