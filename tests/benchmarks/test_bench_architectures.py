"""The sweep over timm's families runs from start to end, and its table says what trains and what is refused."""

import json
import sys
from pathlib import Path

import pytest
from in_process import run_here

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "bench"))

import architectures  # noqa: E402


@pytest.mark.slow
def test_the_sweep_runs_and_writes_its_results(tmp_path):
    archs = ["--arch", "test_resnet", "gemma4_vit_167m_enc", "--size", "96", "--out", str(tmp_path)]
    done = run_here(architectures.main, *archs, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    table = (tmp_path / "architectures.md").read_text()
    assert "| test_resnet | 0.5 | 96 | trains |  |" in table
    assert "| gemma4_vit_167m_enc | 167.4 | 96 | refused | arch=gemma4_vit_167m_enc cannot be trained: " in table
    rows = json.loads((tmp_path / "architectures.json").read_text())["rows"]
    assert {row["arch"] for row in rows} == {"test_resnet", "gemma4_vit_167m_enc"}
