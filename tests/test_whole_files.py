"""Where Tune writes its state: at every moment the old file is there, or the new one."""

import pickle

import pyarrow.fs
import pytest

from search.whole_files import whole_files


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
