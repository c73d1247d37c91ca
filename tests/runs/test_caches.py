"""`search.check --cache` shows what is kept on this machine, and removes it and nothing else."""

from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from search import check
from trainables.data.layouts import find_images
from trainables.data.presize import caches_folder, presize
from trainables.probe.feature_files import FEATURES_FILE, FeatureSet, features_folder, lock_file, write_features
from trainables.system.cache import cache_dir


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
    assert f"4 caches in {cache_dir()}" in shown
    assert len(folders()) == 4


def test_clear_removes_them_and_says_what_that_freed(kept, capsys):
    (caches_folder() / "mine").mkdir()
    stored = sum(file.stat().st_size for images in kept.values() for file in images.path.iterdir())
    assert check.main(["--cache", "clear"]) == 0
    assert f"removed 3 caches, {stored / 1e6:.1f} MB" in capsys.readouterr().out
    assert [path.name for path in folders()] == ["mine"]
    assert check.main(["--cache"]) == 0
    assert f"there are no presized images and no features in {cache_dir()}" in capsys.readouterr().out


def test_what_is_being_built_is_left_alone(kept, capsys):
    key = kept["off"].path.name[:32]
    with FileLock(caches_folder() / f".{key}.lock"):
        assert check.main(["--cache", "clear"]) == 0
    assert "kept: 3 that are still being built" in capsys.readouterr().out
    assert len(folders()) == 3


# --- Features ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def features(colour_folder, tmp_path, monkeypatch) -> dict[str, Path]:
    """Sets of features by the name of their architecture: two that are whole, and what is left of others."""
    monkeypatch.setenv("FINETUNE_SEARCH_CACHE", str(tmp_path))
    features_folder().mkdir(parents=True)
    paths = {}
    for digit, arch in enumerate(("resnet18", "vit", "lost", "partial", "view")):
        path = paths[arch] = features_folder() / (str(digit) * 32)
        described = {"root": str(colour_folder), "size": 48, "resize_method": "crop", "arch": arch, "image_size": 32}
        described["augmented"] = arch == "view"
        write_features(FeatureSet(rows=np.ones((36, 8), np.float16), seconds=1.0, path=path), described)
    (paths["vit"] / "index.json").write_text("{}")
    (paths["lost"] / FEATURES_FILE).write_bytes(b"")
    paths["partial"] = paths["partial"].rename(features_folder() / f".{'3' * 32}.partial")
    return paths


def test_the_list_shows_features_and_what_is_damaged_or_not_finished(features, colour_folder, capsys):
    assert check.main(["--cache"]) == 0
    shown = capsys.readouterr().out
    [line] = [line for line in shown.splitlines() if "features of resnet18 at 32 px" in line]
    assert str(colour_folder) in line and " 48 " in line and " crop " in line and " 36 " in line and "just now" in line
    assert "features of view at 32 px, augmented" in shown and ", augmented" not in line
    for arch in ("vit", "lost"):
        assert f"not readable: {features[arch].name}" in shown
    assert f"not finished: {features['partial'].name}" in shown
    assert f"5 caches in {cache_dir()}" in shown


def test_features_are_cleared_but_not_while_they_are_built(features, capsys):
    with FileLock(lock_file(features["resnet18"])), FileLock(features_folder() / f".{'3' * 32}.lock"):
        assert check.main(["--cache", "clear"]) == 0
    said = capsys.readouterr().out
    assert "removed 3 caches" in said and "kept: 2 that are still being built" in said
    assert {path for path in features_folder().iterdir() if path.is_dir()} == {
        features["resnet18"],
        features["partial"],
    }
    assert check.main(["--cache", "clear"]) == 0
    assert not [path for path in features_folder().iterdir() if path.is_dir()]


def test_a_wrong_word_and_a_missing_space_are_refused(capsys):
    for words, problem in ((["--cache", "wipe"], "invalid choice: 'wipe'"), ([], "--space is required")):
        with pytest.raises(SystemExit) as ended:
            check.main(words)
        assert ended.value.code == 2
        assert problem in capsys.readouterr().err
