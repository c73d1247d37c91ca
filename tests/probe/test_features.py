"""Pooled features of frozen backbones: what they are, what tells them apart, and how they are kept."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from weights import draw_weights

from trainables.batches import augmentation
from trainables.network.model import Network, build
from trainables.probe import feature_files
from trainables.probe.feature_files import FEATURES_FILE, FeatureSet, features_folder, open_features, write_features
from trainables.probe.features import LARGEST, as_float16, backbone_digest, feature_path
from trainables.probe.views import augmented_view, centre_view
from trainables.recipe import Recipe
from trainables.system.cache import DamagedCache
from trainables.training.fine_tune import FineTune

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {"arch": "test_resnet", "head_init": "probe", "presize": 48, "image_size": 32, "batch_size": 8, "hidden": 16}
SMALL |= {"freeze_epochs": 0, "epochs": 0, "precision": "fp32"}
RECIPE = Recipe(**SMALL)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch, colour_images) -> Path:
    """The folder of the test's features; the images are in the cache of all tests."""
    monkeypatch.setenv("FINETUNE_SEARCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "features"


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return draw_weights(tmp_path_factory.mktemp("weights"), "test_resnet", "test_vit", "test_efficientnet")


# --- What they are ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{}, {"concat_pool": True}, {"head": "mlp"}, {"arch": "test_vit"}, {"arch": "test_efficientnet"}],
    ids=str,
)
def test_they_are_what_a_plain_forward_pass_gives_the_classifier_one_row_per_image(colour_images, weights, settings):
    training = FineTune(Recipe(**SMALL | settings), colour_images, weights=weights)
    found = training.probing().features().rows
    everything = np.arange(len(colour_images))
    [images] = training.inputs.batches([(everything, augmentation.centre(len(colour_images)))], 32)
    model = training.network.model.eval()
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(images), pre_logits=True)
    assert found.dtype == np.float16 and found.shape == tuple(expected.shape)
    np.testing.assert_allclose(found, expected.numpy(), rtol=2e-3, atol=1e-3 * float(expected.abs().max()))
    training.close()


def test_numbers_beyond_float16_are_its_largest_and_others_are_not_hidden():
    kept = as_float16(torch.tensor([[1e6, -1e6, 0.5], [float("nan"), float("inf"), -float("inf")]]))
    assert kept[0].tolist() == [LARGEST, -LARGEST, 0.5]
    assert np.isnan(kept[1, 0]) and kept[1, 1:].tolist() == [float("inf"), -float("inf")]


def test_a_classifier_of_maps_instead_of_vectors_is_refused_in_words():
    with pytest.raises(ValueError, match=r"input has the shape \(4, 2, 2\) per image; expected head_init=zeros"):
        as_float16(torch.zeros(3, 4, 2, 2))


# --- What tells them apart --------------------------------------------------------------------------------------------


def path_of(images, recipe: Recipe, network: Network, *, view=None, dtype=None) -> Path:
    digest = backbone_digest(network, torch.device("cpu"), dtype)
    return feature_path(digest, images, recipe, view or centre_view(36, recipe))


def test_all_that_decides_them_is_in_their_name(colour_images, weights):
    def path(images=colour_images, change=None, statistics=None, view=None, dtype=None, **settings) -> Path:
        recipe = Recipe(**SMALL | settings)
        network = build(recipe, 3, weights)
        if change:
            with torch.no_grad():
                network.model.get_parameter(change)[0] += 1e-3
        return path_of(images, recipe, replace(network, **statistics or {}), view=view, dtype=dtype)

    class Other:
        """The same images, of which one more could not be read."""

        path, digest = colour_images.path, "other"

    paths = [
        path(),
        path(arch="test_efficientnet"),
        path(concat_pool=True),
        path(image_size=40),
        path(resize_method="squish"),
        path(dtype=torch.bfloat16),
        path(statistics={"mean": (0.1, 0.2, 0.3)}),
        path(change="layer1.0.conv1.weight"),
        path(images=Other),
        *(path(view=augmented_view(number, np.arange(count), RECIPE)) for number in (1, 2) for count in (20, 30)),
        path(view=augmented_view(1, np.arange(20), Recipe(flip=False))),
    ]
    assert len(set(paths)) == len(paths)
    assert {each.parent for each in paths} == {features_folder()}


def test_trainings_with_other_heads_and_settings_share_them(colour_images, weights):
    expected = path_of(colour_images, RECIPE, build(RECIPE, 3, weights))
    for settings in (
        {"head": "mlp"},
        {"seed": 3},
        {"epochs": 4, "lr_max": 0.1},
        {"bn_momentum": 0.3},
        {"batch_size": 4},
    ):
        recipe = Recipe(**SMALL | settings)
        assert path_of(colour_images, recipe, build(recipe, 3, weights)) == expected
    assert path_of(colour_images, RECIPE, build(RECIPE, 7, weights)) == expected


# --- How they are kept ------------------------------------------------------------------------------------------------


def drawn(folder: Path, name: str = "a" * 32) -> FeatureSet:
    folder.mkdir(parents=True, exist_ok=True)
    rows = np.random.default_rng(0).normal(size=(10, 6)).astype(np.float16)
    return FeatureSet(rows=rows, seconds=2.5, path=folder / name)


def test_they_come_back_as_they_were_read_only(cache):
    features = drawn(cache)
    assert open_features(features.path) is None
    for found in (write_features(features, {"arch": "x"}), open_features(features.path)):
        assert found.rows.tobytes() == features.rows.tobytes() and found.seconds == 2.5
        with pytest.raises(ValueError, match="read-only"):
            found.rows[0, 0] = 1


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def wrong_index(path: Path) -> None:
    """An index with a right checksum that says something else than the file."""
    index = json.loads((path / "index.json").read_text())
    feature_files.write_index(path, index | {"num_images": 11})


DAMAGES = {
    "flipped byte": lambda path: flip_byte(path / FEATURES_FILE),
    "flipped byte in the index": lambda path: flip_byte(path / "index.json"),
    "truncated": lambda path: os.truncate(path / FEATURES_FILE, 50),
    "empty": lambda path: os.truncate(path / FEATURES_FILE, 0),
    "lost": lambda path: (path / FEATURES_FILE).unlink(),
    "lost index": lambda path: (path / "index.json").unlink(),
    "index of more images": wrong_index,
    "a folder of something else": lambda path: [file.unlink() for file in path.iterdir()],
}


@pytest.mark.parametrize("opened_before", [False, True])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_noticed_also_by_a_process_that_has_seen_them_whole(cache, damage, opened_before):
    path = write_features(drawn(cache), {}).path
    if opened_before:
        assert open_features(path)
    DAMAGES[damage](path)
    with pytest.raises(DamagedCache, match=path.name):
        open_features(path)


def test_a_process_reads_a_large_set_only_once_to_check_it(cache, monkeypatch):
    path = write_features(drawn(cache), {}).path
    digest, read = feature_files.file_digest, []
    monkeypatch.setattr(feature_files, "file_digest", lambda *args: (read.append(1), digest(*args))[1])
    for _ in range(3):
        assert open_features(path)
    assert len(read) == 1


def test_they_are_on_the_disk_before_they_have_their_name(cache, monkeypatch):
    """Otherwise a power cut may leave a file whose pages are empty."""
    synced, sync = {}, os.fsync

    def watch(file: int) -> None:
        sync(file)
        synced[os.fstat(file).st_ino] = os.fstat(file).st_size

    monkeypatch.setattr(os, "fsync", watch)
    path = write_features(drawn(cache), {}).path
    assert {file.stat().st_ino: file.stat().st_size for file in path.iterdir()} == synced


def write_and_hang(features: FeatureSet, written) -> None:
    def hang(file) -> None:
        file.flush()
        written.set()
        time.sleep(60)

    feature_files.flush = hang
    write_features(features, {})


def test_a_killed_process_leaves_nothing_that_is_taken_for_whole(cache):
    features = drawn(cache)
    fork = multiprocessing.get_context("fork")  # it only writes, without torch's threads
    written = fork.Event()
    process = fork.Process(target=write_and_hang, args=(features, written))
    process.start()
    assert written.wait(30)
    os.kill(process.pid, signal.SIGKILL)
    process.join(10)
    assert [path.name for path in cache.iterdir()] == [f".{features.path.name}.partial"]
    assert open_features(features.path) is None
    write_features(features, {})
    assert [path for path in cache.iterdir() if path.is_dir()] == [features.path]


def test_listing_them_needs_no_torch():
    """`search.check --cache` starts in a moment."""
    code = "import sys, trainables.probe.feature_files, search.runs.caches; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "trainables.probe.feature_files" in loaded and not {"torch", "ray", "timm"} & set(loaded)
