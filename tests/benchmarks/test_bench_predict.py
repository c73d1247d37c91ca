"""The benchmark of prediction runs from start to end, and what it writes is complete."""

import json
import math
import sys
from pathlib import Path

import pytest
from in_process import run_here

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "bench"))

import predict  # noqa: E402


@pytest.mark.slow
def test_the_benchmark_runs_and_writes_its_results(tmp_path):
    small = ["--images", "20", "--repeats", "2", "--batch-size", "8", "--presize", "64", "--image-size", "48"]
    done = run_here(predict.main, *small, "--arch", "test_resnet", "--out", tmp_path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "predict.json").read_text())
    found = result["models"]["test_resnet"]
    assert all(0 < found[name] < math.inf for name in ("predict", "bare", "ratio", "start_seconds"))
    assert len(found["runs"]) == 2 and result["images"] == 20
    assert "| test_resnet |" in (tmp_path / "predict.md").read_text()
