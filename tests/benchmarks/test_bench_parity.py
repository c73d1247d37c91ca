"""The benchmark against fastai runs from start to end, and what it writes is complete."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = ["--arch", "test_resnet", "--from-scratch", "--seeds", "1", "--epochs", "1", "--freeze-epochs", "1"]
SMALL += ["--presize", "64", "--image-size", "32", "--batch-size", "8"]
NUMBERS = ("ours_error_mean", "fastai_error_mean", "ours_seconds_mean", "fastai_seconds_mean", "seconds_ratio")


@pytest.mark.oracle
def test_the_benchmark_runs_and_writes_its_results(colour_folder, tmp_path):
    command = [sys.executable, str(ROOT / "bench/parity.py"), "--data", str(colour_folder), "--out", str(tmp_path)]
    done = subprocess.run([*command, *SMALL], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "parity.json").read_text())
    assert all(math.isfinite(result[name]) for name in NUMBERS)
    assert result["ours_error_sem"] is None and result["fastai_error_sem"] is None  # of one seed there is none
    assert {"settings", "hardware", "versions", "command", "data"} < set(result)

    [run] = result["runs"]
    assert (run["seed"], run["train_images"], run["valid_images"], run["batch_size"]) == (0, 29, 7, 8)
    for side in ("ours", "fastai"):
        assert [row["stage"] for row in run[side]["epochs"]] == ["frozen", "unfrozen"]
        assert all(math.isfinite(row[name]) for row in run[side]["epochs"] for name in row if name != "stage")
        assert run[side]["error_rate"] == run[side]["epochs"][-1]["error_rate"]
        assert 0 <= run[side]["error_rate"] * 7 == pytest.approx(round(run[side]["error_rate"] * 7))

    table = (tmp_path / "parity.md").read_text()
    assert "| error rate at the end, % |" in table
    for text in (table, json.dumps(result)):
        assert str(colour_folder) not in text and str(tmp_path) not in text
