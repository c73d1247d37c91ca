"""The benchmark of an epoch against fastai runs from start to end, and what it writes is complete."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = ["--repeats", "1", "--epochs", "1", "--freeze-epochs", "1"]
SMALL += ["--presize", "64", "--image-size", "32", "--batch-size", "8"]
SIDES = {"ours", "ours_fp32", "fastai"}


@pytest.mark.oracle
def test_the_benchmark_runs_and_writes_its_results(colour_folder, tmp_path):
    # No weights are given, so that it starts from random ones without being told.
    data = ["--data", str(colour_folder), "--arch", "test_resnet", "--out", str(tmp_path)]
    command = [sys.executable, str(ROOT / "bench/epoch.py"), *data, *SMALL]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "epoch.json").read_text())
    for stage in ("frozen", "unfrozen"):
        for name in (f"{stage}_ratio", f"{stage}_ratio_fp32"):
            assert set(result[name]) == {"test_resnet"}
            assert 0 < result[name]["test_resnet"] < math.inf
    assert {"settings", "hardware", "versions", "command", "data", "precision"} < set(result)

    summary = result["archs"]["test_resnet"]
    [run] = summary["runs"]
    assert (run["train_images"], run["valid_images"], run["batch_size"], run["pretrained"]) == (29, 7, 8, False)
    assert set(run["order"]) == SIDES == set(summary["error_rate"])
    for side in SIDES:
        assert [row["stage"] for row in run[side]] == ["frozen", "unfrozen"]
        assert all(math.isfinite(row[name]) for row in run[side] for name in row if name != "stage")
        assert summary["error_rate"][side] == {"mean": run[side][-1]["error_rate"], "sem": None}
        for row in run[side]:
            assert summary["seconds"][row["stage"]][side] == {"median": row["seconds"], "min": row["seconds"]}

    table = (tmp_path / "epoch.md").read_text()
    assert "| test_resnet | random |" in table
    for text in (table, json.dumps(result)):
        assert str(colour_folder) not in text and str(tmp_path) not in text and str(ROOT) not in text
