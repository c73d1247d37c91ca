"""`search.check --cache` shows what is kept on this machine, and removes it and nothing else."""

from pathlib import Path

import pytest
from filelock import FileLock

from search import check
from trainables.data.layouts import find_images
from trainables.data.presize import caches_folder, presize


@pytest.fixture
def kept(colour_folder, tmp_path, monkeypatch) -> dict:
    """A cache of each storage."""
    monkeypatch.setenv("FINETUNE_SEARCH_CACHE", str(tmp_path))
    folder = find_images(colour_folder)
    return {storage: presize(folder, 48, storage=storage) for storage in ("memory-map", "jpeg", "off")}


def folders() -> list[Path]:
    return [path for path in caches_folder().iterdir() if path.is_dir()]


def test_the_list_shows_what_each_cache_holds(kept, colour_folder, capsys):
    (kept["jpeg"].path / "index.json").write_text("{}")
    (caches_folder() / f".{kept['off'].path.name}.partial").mkdir()
    assert check.main(["--cache"]) == 0
    shown = capsys.readouterr().out
    lines = {storage: line for line in shown.splitlines() for storage in kept if f" {storage} " in line}
    assert set(lines) == {"memory-map", "off"}
    for line in lines.values():
        assert str(colour_folder) in line and " 48 " in line and " crop " in line and " 36 " in line
        assert "just now" in line
    assert f"not readable: {kept['jpeg'].path.name}" in shown and "not finished: ." in shown
    assert f"4 caches in {caches_folder()}" in shown
    assert len(folders()) == 4


def test_clear_removes_them_and_says_what_that_freed(kept, capsys):
    (caches_folder() / "mine").mkdir()
    stored = sum(file.stat().st_size for images in kept.values() for file in images.path.iterdir())
    assert check.main(["--cache", "clear"]) == 0
    assert f"removed 3 caches, {stored / 1e6:.1f} MB" in capsys.readouterr().out
    assert [path.name for path in folders()] == ["mine"]
    assert check.main(["--cache"]) == 0
    assert "there are no presized images in" in capsys.readouterr().out


def test_what_is_being_built_is_left_alone(kept, capsys):
    key = kept["off"].path.name[:32]
    with FileLock(caches_folder() / f".{key}.lock"):
        assert check.main(["--cache", "clear"]) == 0
    assert "kept: 3 that are still being built" in capsys.readouterr().out
    assert len(folders()) == 3


def test_a_wrong_word_and_a_missing_space_are_refused(capsys):
    for words, problem in ((["--cache", "wipe"], "invalid choice: 'wipe'"), ([], "--space is required")):
        with pytest.raises(SystemExit) as ended:
            check.main(words)
        assert ended.value.code == 2
        assert problem in capsys.readouterr().err
