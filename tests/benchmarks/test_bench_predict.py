"""The benchmark of prediction runs from start to end, and what it writes is complete."""

import json
import math
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_benchmark_runs_and_writes_its_results(tmp_path):
    small = ["--images", "20", "--repeats", "2", "--batch-size", "8", "--presize", "64", "--image-size", "48"]
    command = [sys.executable, str(ROOT / "bench/predict.py"), *small, "--arch", "test_resnet", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "predict.json").read_text())
    found = result["models"]["test_resnet"]
    assert all(0 < found[name] < math.inf for name in ("predict", "bare", "ratio", "start_seconds"))
    assert len(found["runs"]) == 2 and result["images"] == 20
    assert "| test_resnet |" in (tmp_path / "predict.md").read_text()
