"""Splitting images and naming their content. Files are empty here: only names matter."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from files import fill

from trainables.data.labelled_images import fingerprint, split
from trainables.data.layouts import find_images
from trainables.system.cache import cache_dir


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("FINETUNE_SEARCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_split_is_the_same_on_every_machine():
    labels = np.arange(40) % 4
    train, valid = split(labels, seed=7)
    assert valid.tolist() == PINNED
    assert sorted([*train, *valid]) == list(range(40))
    assert split(labels, seed=8)[1].tolist() != PINNED


PINNED = [6, 10, 21, 23, 24, 32, 37, 39]


def test_each_class_gives_its_share_to_validation():
    labels = np.repeat(np.arange(5), [100, 50, 23, 11, 2])
    for seed in range(20):
        train, valid = split(labels, seed=seed)
        assert len(valid) == round(0.2 * len(labels))
        held = np.bincount(labels[valid], minlength=5)
        assert (np.abs(held - 0.2 * np.bincount(labels)) < 1).all()
        assert (np.bincount(labels[train], minlength=5) >= 1).all()


def test_a_thousand_classes_of_two_images_all_train_and_the_seed_chooses_which_validate():
    labels = np.repeat(np.arange(1000), 2)
    train, valid = split(labels)
    assert len(valid) == 400
    assert set(labels[train]) == set(range(1000))
    assert 100 < (labels[valid] < 500).sum() < 300  # not just the first or the last names
    assert len(split(labels, valid_fraction=0.9)[1]) == 1000  # never a class's last image


@pytest.mark.parametrize("fraction", [0, 1, -0.1, float("nan")])
def test_a_fraction_that_leaves_one_side_empty_is_refused(fraction):
    with pytest.raises(ValueError, match="valid_fraction"):
        split([0, 0, 1, 1], valid_fraction=fraction)


def test_fingerprint_notices_every_change_and_survives_a_move(tmp_path):
    root = fill(tmp_path / "a", "cat/1.jpg", "cat/2.jpg", "dog/1.jpg", "dog/2.jpg")
    first = fingerprint(find_images(root))
    root = root.rename(tmp_path / "b")
    assert fingerprint(find_images(root)) == first
    seen = {first}
    (root / "cat/1.jpg").write_bytes(b"x")
    seen.add(fingerprint(find_images(root)))
    os.utime(root / "cat/1.jpg", ns=(0, 1))
    seen.add(fingerprint(find_images(root)))
    (root / "cat/2.jpg").rename(root / "cat/3.jpg")
    seen.add(fingerprint(find_images(root)))
    (root / "cat").rename(root / "kitten")
    seen.add(fingerprint(find_images(root)))
    assert len(seen) == 5


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    assert cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("FINETUNE_SEARCH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg/finetune-search"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache/finetune-search"


def test_finding_images_imports_nothing_heavy():
    heavy = {"torch", "torchvision", "ray", "cv2", "PIL", "pandas"}
    code = "import sys, trainables.data.labelled_images; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "trainables.data.labelled_images" in loaded and not heavy & set(loaded)
