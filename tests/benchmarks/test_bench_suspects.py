"""bench/suspects.py: flips what it says, runs from images to the table, and finds flipped labels of easy images."""

import json
import sys

import numpy as np
import pytest
from in_process import run_here
from searches import ROOT
from tiny_run import draw_images
from weights import draw_weights

from trainables.data.layouts import find_images

pytestmark = pytest.mark.oracle


@pytest.fixture(scope="module")
def bench():
    """The script, which imports cleanlab."""
    sys.path.insert(0, str(ROOT / "bench"))
    import suspects

    return suspects


def test_a_share_of_the_labels_is_flipped_and_the_others_stay(bench, tmp_path):
    images = find_images(draw_images(tmp_path / "birds", each=10))
    wrong = bench.flipped_copy(images, tmp_path / "copy", 0.2, np.random.default_rng(0))
    copy = find_images(tmp_path / "copy")
    assert copy.classes == images.classes and len(copy.paths) == 30 and len(wrong) == 6
    is_wrong = [path.split("/")[0] != path.split("/")[1].split("--")[0] for path in copy.paths]
    assert {path for path, flipped in zip(copy.paths, is_wrong, strict=True) if flipped} == wrong


def test_suspects_that_are_lacking_lower_the_precision(bench):
    assert bench.precision(["a", "x", "b", "c"], {"a", "b", "c"}) == pytest.approx(2 / 3)
    assert bench.precision(["a"], {"a", "b"}) == 0.5


def test_the_benchmark_writes_its_results(bench, tmp_path):
    data, weights = draw_images(tmp_path / "birds", each=32), draw_weights(tmp_path / "weights", "test_resnet")
    words = ["--data", data, "--weights", weights, "--arch", "test_resnet", "--image-size", "32", "--seeds", "2"]
    done = run_here(bench.main, *words, "--flip", "0.1", "--out", tmp_path, cwd=tmp_path)
    assert done.returncode in (0, None), done.stderr[-3000:]
    result = json.loads((tmp_path / "suspects.json").read_text())
    (of_set,) = result["sets"].values()
    assert (of_set["images"], of_set["flipped"], of_set["test_images"]) == (72, 7, 24)
    assert of_set["precision"] > 0.6 and of_set["precision"] >= of_set["cleanlab's low_self_confidence"]
    assert {"hardware", "versions", "command", "settings", "runs"} < set(result) and len(result["runs"]) == 2
    table = (tmp_path / "suspects.md").read_text()
    assert "| **precision of the first N, %** |" in table
    assert str(tmp_path) not in table + json.dumps(result)
