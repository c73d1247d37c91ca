"""The benchmark of a GPU runs from start to end on a CPU, in small, and what it writes is complete."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from in_process import run_here

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "bench"))

import gpu  # noqa: E402
import gpu_at_once  # noqa: E402

SMALL = ["--image-size", "16", "--presize", "24", "--images", "24", "--steps", "2", "--warmup", "1", "--matmul", "64"]
RATES = ("step_images_per_second", "pipeline_images_per_second", "epoch_images_per_second")
NUMBERS = (*RATES, "pipeline_over_step", "tflops", "gflops_per_image", "share_of_peak", "contiguous_images_per_second")


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> tuple[dict, str]:
    """gpu.json and gpu.md of two architectures, of which the second cannot take so small images."""
    out = tmp_path_factory.mktemp("results")
    archs = ["--arch", "test_resnet", "test_convnext", "--precision", "fp32", "bf16"]
    done = run_here(gpu.main, "--device", "cpu", "--out", str(out), *archs, *SMALL, "--layouts", cwd=out)
    assert done.returncode == 0, done.stderr[-3000:]
    result, table = json.loads((out / "gpu.json").read_text()), (out / "gpu.md").read_text()
    for text in (json.dumps(result), table):
        assert not any(str(folder) in text for folder in (out, ROOT, Path.home()))
    return result, table


def has_amx() -> bool:
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))


@pytest.mark.slow
def test_every_architecture_precision_and_stage_has_its_numbers(results):
    result, table = results
    assert {"device", "peak_tflops", "rows", "settings", "hardware", "versions", "command", "seed"} < set(result)
    assert result["device"] == "cpu" and result["hardware"]["gpu"] is None and "On the CPU, in small" in table
    assert set(result["peak_tflops"]) == {"fp32", "bf16"} and result["presize_seconds"] > 0
    rows = [row for row in result["rows"] if row["arch"] == "test_resnet"]
    named = [(row["precision"], row["stage"]) for row in rows]
    assert named == [(precision, stage) for precision in ("fp32", "bf16") for stage in ("frozen", "unfrozen")]
    for row in rows:
        if row["precision"] == "bf16" and "Diverged" in (row["reason"] or "") and has_amx():
            continue  # a fault of oneDNN at this size, see `precision`
        assert row["reason"] is None and row["peak_memory_gb"] is None  # torch counts memory on GPUs only
        assert all(math.isfinite(row[name]) and row[name] > 0 for name in NUMBERS)
        seconds_per_image = 1 / row["step_images_per_second"]
        assert row["tflops"] == pytest.approx(row["gflops_per_image"] / 1000 / seconds_per_image)
        assert row["share_of_peak"] == pytest.approx(row["tflops"] / result["peak_tflops"][row["precision"]])
    frozen, unfrozen = (row["gflops_per_image"] for row in rows[:2])
    assert 2.5 * frozen < unfrozen < 3 * frozen  # the backbone's backward pass is twice its forward one, or a bit less


@pytest.mark.slow
def test_what_cannot_run_is_a_row_with_the_reason(results):
    result, table = results
    rows = [row for row in result["rows"] if row["arch"] == "test_convnext"]
    assert len(rows) == 4
    for row in rows:
        assert "Kernel size can't be greater than actual input size" in row["reason"]
        assert row["step_images_per_second"] is None
        assert f"- test_convnext, {row['precision']}, {row['stage']}: {row['reason']}" in table


@pytest.mark.slow
def test_trials_that_share_a_gpu_are_counted_and_compared_with_one_at_a_time(tmp_path):
    words = ["--device", "cpu", "--out", str(tmp_path), "--arch", "test_resnet", *SMALL, "--at-once", "2,1"]
    done = run_here(gpu.main, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    result, table = json.loads((tmp_path / "gpu_at_once.json").read_text()), (tmp_path / "gpu_at_once.md").read_text()
    alone, two = result["rows"]
    assert (alone["at_once"], two["at_once"], alone["reason"], two["reason"]) == (1, 2, None, None)
    assert alone["times_alone"] == 1 and two["times_alone"] == two["trials_per_hour"] / alone["trials_per_hour"]
    assert min(row[name] for row in (alone, two) for name in ("trials_per_hour", "images_per_second")) > 0
    assert "in small" in table and "MPS: off" in table
    for text in (json.dumps(result), table):
        assert not any(str(folder) in text for folder in (tmp_path, ROOT, Path.home()))
    failed = two | dict.fromkeys(gpu_at_once.COLUMNS) | {"reason": "OutOfMemoryError: CUDA out of memory"}
    assert "- test_resnet, fp32, 2: OutOfMemoryError" in gpu_at_once.markdown(result | {"rows": [alone, failed]})


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_it_says_how_to_run_on_a_cpu(tmp_path):
    done = run_here(gpu.main, cwd=tmp_path)
    assert done.returncode == 2 and "there is no CUDA GPU; --device cpu --out DIR" in done.stderr
    assert not list(tmp_path.iterdir())
