"""Where Tune writes its state: at every moment the old file is there, or the new one."""

import gc
import json
import pickle
import subprocess

import pyarrow.fs
import pytest
from ray.tune.experiment import Trial

from search.runs.tune_files import ShortState, _WholeFile, whole_files


@pytest.fixture
def filesystem():
    return pickle.loads(pickle.dumps(whole_files()))  # Tune sends it to its actors


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
    stream = _WholeFile(str(file))
    stream.write(b"half")
    del stream
    gc.collect()
    assert file.read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["state.json"]


def test_an_ended_trial_takes_less_of_the_state_and_keeps_its_last_result():
    trial = Trial("trainable", stub=True)
    result = {"training_iteration": 1, "error_rate": 0.5, "valid_loss": 1.5}
    trial.update_last_result(result)
    running = trial.get_json_state()[1]
    ShortState().on_trial_complete(1, [trial], trial)
    ended = trial.get_json_state()[1]
    assert len(ended) < 0.5 * len(running)
    assert json.loads(ended)["last_result"] == json.loads(running)["last_result"] == result
    trial.restore_run_metadata(ended)
    trial.update_last_result(result | {"error_rate": 0.25})  # a trial that a kill made Tune forget ends once more
    assert trial.metric_analysis["error_rate"]["min"] == 0.25
