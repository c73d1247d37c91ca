"""The benchmarks of trials that train nothing run from start to end, and what they write is complete."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.ray


def run_bench(name: str, out: Path, *arguments: object) -> dict:
    """What the benchmark found; its table is there, and neither names a folder of this machine."""
    command = [sys.executable, str(ROOT / f"bench/{name}.py"), "--out", str(out), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=out, timeout=500)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    texts = [(out / f"{name}.{suffix}").read_text() for suffix in ("json", "md")]
    assert not any(str(folder) in text for text in texts for folder in (out, ROOT))
    result = json.loads(texts[0])
    assert {"hardware", "versions", "command", "seed"} < set(result)
    return result


def test_a_search_is_watched_as_it_goes_on(tmp_path):
    result = run_bench("search_scale", tmp_path, "--trials", 9, "--part", 4, "--seed", 1)
    assert result["trials_at"] == [4, 8, 9]
    assert result["last_over_first"] == result["seconds_per_trial"][-1] / result["seconds_per_trial"][0] > 0
    assert sum(result["ended"].values()) == 9
    assert result["rss_growth_mb"] == result["rss_mb"][-1] - result["rss_warm_mb"] < 300
    assert min(result["rss_mb"] + result["actor_rss_mb"]) > 50
    assert 9 <= result["epochs"] <= 27  # 1 to 3 each


def test_both_sides_overheads_are_timed(tmp_path):
    sizes = ("--trials", 3, "--nested-trials", 1, "--rounds", 1, "--workers", 1)
    result = run_bench("trial_overhead", tmp_path, *sizes)
    ours, nested = ([run["seconds"] for run in result["runs"] if run["side"] == side] for side in ("ours", "nested"))
    assert [len(seconds) for seconds in ours + nested] == [1 + 3, 1 + 1]
    assert result["ours_1_worker_seconds"] == sorted(ours[0][1:])[1]
    assert result["ratio_1_worker"] == nested[0][1] / result["ours_1_worker_seconds"] > 5
    assert result["ours_without_result"] == 0
