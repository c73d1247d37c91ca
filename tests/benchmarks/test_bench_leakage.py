"""bench/leakage.py: views of a photo are in one half, and what the table says is what was measured."""

import json
import sys

import numpy as np
import pytest
from in_process import run_here
from PIL import Image
from searches import ROOT
from weights import draw_weights

sys.path.insert(0, str(ROOT / "bench"))

import leakage

from trainables.data.groups import grouped
from trainables.data.layouts import find_images


@pytest.fixture
def photos(tmp_path):
    """Two classes of eight photos, one of which is twice among them."""
    for label, name in enumerate(("robin", "wren")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(8):
            rng = np.random.default_rng(100 * label + number % 7)
            coarse = Image.fromarray(rng.integers(0, 256, (8, 10, 3), dtype=np.uint8))
            coarse.resize((120, 96), Image.Resampling.BICUBIC).save(tmp_path / "photos" / name / f"{number}.png")
    return tmp_path / "photos"


def test_views_of_a_photo_and_photos_that_look_the_same_are_in_one_half(photos, tmp_path):
    found = grouped(find_images(photos), "duplicates").images
    halves = [find_images(folder) for folder in leakage.draw_views(found, tmp_path / "views", seed=0)]
    groups = [set(grouped(half, leakage.PHOTO).images.groups) for half in halves]
    assert [len(half.paths) for half in halves] == [leakage.VIEWS * len(each) for each in groups]
    numbers = [{path.split("/")[1].split("_")[0] for path in half.paths} for half in halves]
    assert numbers[0].isdisjoint(numbers[1]) and len(numbers[0] | numbers[1]) == 16
    for twice in ({"00000", "00007"}, {"00008", "00015"}):
        assert any(twice <= half for half in numbers)


def test_the_table_says_how_much_too_low_errors_are():
    runs = [
        {"groups": name, "valid_error": valid, "out_of_fold_error": 0.1, "true_error": 0.2}
        for name, valid in (("none", 0.05), ("none", 0.15), ("duplicates", 0.25))
    ]
    none, duplicates = leakage.summarise(runs)
    assert (none["groups"], none["runs"], none["valid_error"]) == ("none", 2, pytest.approx(0.1))
    assert none["valid_error_too_low"] == pytest.approx(0.1)
    assert duplicates["valid_error_too_low"] == pytest.approx(-0.05)


def test_the_benchmark_runs_from_photos_to_the_table(photos, tmp_path):
    weights = draw_weights(tmp_path / "weights", "test_resnet.r160_in1k")
    words = ["--data", photos, "--weights", weights, "--arch", "test_resnet.r160_in1k", "--image-size", "32"]
    done = run_here(leakage.main, *words, "--presize", "48", "--seeds", "1", "--out", tmp_path, cwd=tmp_path)
    assert done.returncode in (0, None), done.stderr[-3000:]
    result = json.loads((tmp_path / "leakage.json").read_text())
    assert [row["groups"] for row in result["rows"]] == list(leakage.WAYS)
    assert sum(half["of"] for half in result["pairs"]) == 16 * 6
    assert sum(half["alike_photos"] for half in result["pairs"]) > 0
    assert [half["other_photos"] for half in result["pairs"]] == [0, 0]
    assert {"hardware", "versions", "command", "settings", "runs"} < set(result)
    table = (tmp_path / "leakage.md").read_text()
    assert "photos: 16 photos, 4 JPEGs of each" in table and "\n| duplicates | " in table
    assert str(tmp_path) not in table + json.dumps(result)
