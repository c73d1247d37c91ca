"""bench/probe_rank.py: its ranks, what a screen would keep, and that it runs from images to the table."""

import json
import sys

import pytest
from in_process import run_here
from searches import ROOT

sys.path.insert(0, str(ROOT / "bench"))

import probe_rank

from trainables.data.layouts import find_images

PROBES = {"a": (0.5, 0.4), "b": (0.3, 0.35), "c": (0.2, 0.3), "d": (0.6, 0.1)}


def runs_of(tuned: dict[str, tuple[float, float]], seed: int = 0) -> list[dict]:
    """Two sizes of each architecture."""
    return [
        {
            "seed": seed,
            "arch": arch,
            "image_size": size,
            "probe_error": probe,
            "probe_loss": probe,
            "tuned_error": error,
        }
        for arch in PROBES
        for size, probe, error in zip((64, 96), PROBES[arch], tuned[arch], strict=True)
    ]


def test_tau_is_1_for_the_same_order_and_minus_1_for_the_opposite_one():
    assert probe_rank.tau_of(runs_of({arch: (x / 2, y / 2) for arch, (x, y) in PROBES.items()})) > 0.9
    assert probe_rank.tau_of(runs_of({arch: (1 - x, 1 - y) for arch, (x, y) in PROBES.items()})) < -0.9


def test_an_architecture_is_ranked_by_its_best_probe():
    assert probe_rank.kept_archs(runs_of(PROBES), 3) == ["d", "c", "b"]


def test_the_table_says_how_often_what_is_kept_holds_the_best_pair():
    good = runs_of({"a": (0.4, 0.4), "b": (0.4, 0.4), "c": (0.4, 0.4), "d": (0.4, 0.1)})
    poor = runs_of({"a": (0.2, 0.4), "b": (0.4, 0.4), "c": (0.3, 0.4), "d": (0.4, 0.4)}, seed=1)
    found = probe_rank.summarise([*good, *poor])
    assert (found["third"], found["kept"], found["seeds"], found["pairs"]) == (2, 3, 2, 8)
    assert found["third_holds_best"] == found["kept_holds_best"] == 0.5
    assert found["third_costs"] == pytest.approx(0.05)
    assert probe_rank.summarise(good)["tau_sem"] is None


def test_a_part_of_the_images_keeps_the_shares_of_the_classes(colour_folder):
    part = probe_rank.subset(find_images(colour_folder), 18, seed=0)
    assert [part.labels.count(label) for label in range(3)] == [6, 6, 6]
    assert len(probe_rank.subset(part, None, seed=0).paths) == len(probe_rank.subset(part, 40, seed=0).paths) == 18


def test_the_benchmark_writes_its_results(colour_folder, tmp_path, monkeypatch):
    class Training:
        """Its probe is better at a larger size; an epoch takes a tenth off."""

        def __init__(self, recipe, images, **options):
            self.recipe, self.epoch = recipe, -1

        def run_epoch(self):
            self.epoch += 1
            error = (0.9 - self.recipe["image_size"] / 100) * 0.9**self.epoch
            row = {"epoch": self.epoch, "stage": "probe" if self.epoch == 0 else "unfrozen"}
            row |= {"error_rate": error, "valid_loss": 1.0, "train_seconds": 1.0, "valid_seconds": 0.5}
            return row | {"train_images": 29, "valid_images": 7}

        def close(self):
            pass

    class Settings(dict):
        total_epochs = 2

    monkeypatch.setattr(probe_rank, "FineTune", Training)
    monkeypatch.setattr(probe_rank, "Recipe", lambda **settings: Settings(settings))
    words = ["--data", colour_folder, "--archs", "test_resnet,test_vit", "--sizes", "32,48", "--presize", "48"]
    done = run_here(probe_rank.main, *words, "--epochs", "2", "--out", tmp_path, cwd=tmp_path)
    assert done.returncode in (0, None), done.stderr[-3000:]
    result = json.loads((tmp_path / "probe_rank.json").read_text())
    assert result["tau_mean"] == pytest.approx(1) and result["third_holds_best"] == 1
    assert {"hardware", "versions", "command", "settings", "runs"} < set(result)
    table = (tmp_path / "probe_rank.md").read_text()
    assert "| test_resnet | 48 | 42.0 | 34.0 | 1.5 | 3.0 |" in table
    assert str(tmp_path) not in table + json.dumps(result)
