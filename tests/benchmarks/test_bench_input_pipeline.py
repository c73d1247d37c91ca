"""The benchmark of the input pipeline runs from start to end, and what it writes is complete."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = ["--repeats", "1", "--presize", "64", "--image-size", "32", "--batch-size", "8"]
SIDES = ("ours", "ours_first", "fastai", "torchvision")
RATIOS = ("ratio", "ratio_steady", "torchvision_ratio", "first_epoch_ratio", "fetch_images_per_second_per_core")


@pytest.mark.oracle
@pytest.mark.parametrize("drawn", [True, False])
def test_the_benchmark_runs_and_writes_its_results(drawn, colour_folder, tmp_path):
    data = ["--images", "26"] if drawn else ["--data", str(colour_folder)]
    command = [sys.executable, str(ROOT / "bench/input_pipeline.py"), *data, *SMALL, "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "input_pipeline.json").read_text())
    assert all(0 < result[name] < math.inf for name in RATIOS)
    for name in ("images_per_second", "steady_images_per_second", "seconds"):
        assert set(result[name]) == set(SIDES)
        assert all(0 < value < math.inf for value in result[name].values())
    assert {"settings", "hardware", "versions", "command", "data", "seed"} < set(result)
    assert result["ratio"] == result["images_per_second"]["ours"] / result["images_per_second"]["fastai"]

    [run] = result["runs"]  # the first round is not counted
    images = 26 if drawn else 36
    assert (result["images"], result["settings"]["images"]) == (images, images)
    for side in SIDES:  # whole batches only
        assert run[side]["images_per_second"] * run[side]["seconds"] == pytest.approx(images // 8 * 8)
    assert sorted(run["order"]) == sorted(SIDES)

    table = (tmp_path / "input_pipeline.md").read_text()
    assert "| fastai |" in table
    for text in (table, json.dumps(result)):
        assert str(colour_folder) not in text and str(tmp_path) not in text and str(ROOT) not in text
