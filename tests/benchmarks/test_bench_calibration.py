"""bench/calibration.py: what it measures, and that it runs from images to the table."""

import json
import sys

import numpy as np
import pytest
from in_process import run_here
from searches import ROOT
from weights import draw_weights

sys.path.insert(0, str(ROOT / "bench"))

import calibration as bench

from trainables.network.calibration import softmax


def test_the_errors_before_and_after_are_those_of_raw_and_of_calibrated_logits():
    rng = np.random.default_rng(0)
    right = rng.normal(0, 2, (5000, 4))
    labels = (rng.random((5000, 1)) > softmax(right).cumsum(axis=1)).sum(axis=1)
    found = bench.errors_of(right, labels, temperature=3.0)  # the raw logits are three times as large
    assert found["before"] > 0.15 and found["after"] < 0.03
    assert found["after"] == pytest.approx(found["chance"], abs=0.01)
    assert found["error_rate"] == np.mean(right.argmax(axis=1) != labels)
    assert found["answered"][0][1] <= 5000


def test_the_table_has_a_row_per_data_set_and_training_with_means_over_the_seeds():
    numbers = {"images": 20, "valid_images": 15, "error_rate": 0.1, "temperature": 1.5, "chance": 0.02, "told": 0.03}
    runs = [
        {"data": data, "epochs": 0, "seed": seed, "before": 0.1, "after": after, **numbers}
        for data, afters in (("a", (0.02, 0.04)), ("b", (0.01, 0.01)))
        for seed, after in enumerate(afters)
    ]
    first, second = bench.summarise(runs)
    assert (first["data"], first["seeds"], first["after_max"]) == ("a", 2, 0.04)
    assert first["after"] == pytest.approx(0.03) and second["after"] == 0.01


def test_the_benchmark_writes_its_results(colour_folder, tmp_path):
    weights = draw_weights(tmp_path / "weights", "test_resnet")
    words = ["--data", colour_folder, "--weights", weights, "--arch", "test_resnet", "--image-size", "32"]
    done = run_here(bench.main, *words, "--presize", "48", "--epochs", "1", "--out", tmp_path, cwd=tmp_path)
    assert done.returncode in (0, None), done.stderr[-3000:]
    result = json.loads((tmp_path / "calibration.json").read_text())
    assert [(row["data"], row["epochs"], row["images"]) for row in result["summary"]] == [
        (colour_folder.name, 0, 9), (colour_folder.name, 1, 9),
    ]  # fmt: skip
    assert all(row["temperature"] != 1 for row in result["runs"])
    assert {"hardware", "versions", "command", "settings", "runs"} < set(result)
    table = (tmp_path / "calibration.md").read_text()
    assert f"| {colour_folder.name} | probe | 9 | " in table and f"| {colour_folder.name} | 1 epoch | 9 | " in table
    assert str(tmp_path) not in table + json.dumps(result)
