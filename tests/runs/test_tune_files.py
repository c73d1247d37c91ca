"""Where Tune writes its state: at every moment the old file is there, or the new one."""

import gc
import os
import pickle
import subprocess
from functools import partial
from pathlib import Path

import pyarrow.fs
import pytest

from search.runs import tune_files
from search.runs.atomic_files import append_whole
from search.runs.paths import RunFolder
from search.runs.tune_files import EventFiles, _AtomicFile, atomic_filesystem
from trainables.system import full_disk


@pytest.fixture
def filesystem():
    return pickle.loads(pickle.dumps(atomic_filesystem()))  # Tune sends it to its actors


def test_a_file_is_the_old_one_until_the_new_one_is_whole(filesystem, tmp_path):
    file = tmp_path / "state.json"
    file.write_text("old")
    stream = filesystem.open_output_stream(str(file))
    stream.write(b"new, and longer")
    assert file.read_text() == "old"
    stream.close()
    assert file.read_text() == "new, and longer"
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]


def test_folders_are_copied_into_it_as_tune_does(filesystem, tmp_path):
    (tmp_path / "from" / "inner").mkdir(parents=True)
    (tmp_path / "from" / "inner" / "state.json").write_text("state")
    (tmp_path / "to" / "inner").mkdir(parents=True)
    (tmp_path / "to" / "inner" / "state.json").write_text("before")
    pyarrow.fs.copy_files(str(tmp_path / "from"), str(tmp_path / "to"), destination_filesystem=filesystem)
    assert (tmp_path / "to" / "inner" / "state.json").read_text() == "state"
    assert [path.name for path in (tmp_path / "to" / "inner").iterdir()] == ["state.json"]


def test_a_full_disk_leaves_the_old_file(filesystem, tmp_path):
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "small", tmp_path], capture_output=True)
    if made.returncode:
        pytest.skip("needs the right to mount a disk in memory")
    try:
        file = tmp_path / "state.json"
        file.write_text("old")
        large = tmp_path.parent / "large"
        large.mkdir()
        (large / "state.json").write_bytes(bytes(200_000))
        with pytest.raises(OSError, match="No space left"):
            pyarrow.fs.copy_files(str(large), str(tmp_path), destination_filesystem=filesystem)
        gc.collect()
        assert file.read_text() == "old"
        assert [path.name for path in tmp_path.iterdir()] == ["state.json"]
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


def test_a_file_that_nobody_finished_is_not_taken(tmp_path):
    file = tmp_path / "state.json"
    file.write_text("old")
    stream = _AtomicFile(str(file))
    stream.write(b"half")
    del stream
    gc.collect()
    assert file.read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["state.json"]


class LoggedTrial:
    evaluated_params = {"lr_max": 1e-3, "arch": "resnet18"}  # noqa: RUF012

    def __init__(self, tunes_folder) -> None:
        self.local_path = str(tunes_folder / "t1")

    def init_local_path(self) -> None:
        """As Tune does it."""
        Path(self.local_path).mkdir(parents=True, exist_ok=True)


def logged(folder, tunes_folder, epochs: int = 3) -> None:
    trial, events = LoggedTrial(tunes_folder), EventFiles(folder)
    events.log_trial_start(trial)
    for epoch in range(1, epochs + 1):
        events.log_trial_result(epoch, trial, {"training_iteration": epoch, "error_rate": 0.5 / epoch})
    events.log_trial_end(trial)


@pytest.mark.parametrize("name", ["run", "a run: the second"])
def test_event_files_lie_in_the_run_and_not_where_tune_copies_all_of_them_each_second(tmp_path, name):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = RunFolder(tmp_path / name)
    logged(folder, tmp_path / "tunes")
    assert [path for path in (tmp_path / "tunes").rglob("*") if path.is_file()] == []
    read = event_accumulator.EventAccumulator(str(folder.tune / "t1")).Reload()
    assert [event.value for event in read.Scalars("ray/tune/error_rate")] == pytest.approx([0.5, 0.25, 0.5 / 3])


def test_event_files_wait_while_the_disk_is_full(tmp_path, monkeypatch):
    monkeypatch.setattr(full_disk, "RETRY_SECONDS", 0.01)
    write, tries = os.write, []

    def half_of_it_twice(file: int, content: bytes) -> int:
        tries.append(content)
        return write(file, content[:10] if len(tries) < 3 else content)

    monkeypatch.setattr(tune_files, "append_whole", partial(append_with, half_of_it_twice, monkeypatch))
    logged(RunFolder(tmp_path / "full"), tmp_path / "tunes", epochs=1)
    logged(RunFolder(tmp_path / "whole"), tmp_path / "tunes", epochs=1)
    full, whole = (next((tmp_path / name).rglob("events.*")).stat().st_size for name in ("full", "whole"))
    assert full == whole and tries[0] == tries[1] == tries[2]


def append_with(write, monkeypatch, path, content) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", write)
        append_whole(path, content)
