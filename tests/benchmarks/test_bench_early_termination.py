"""bench/learning_curves.py --data, bench/curve_prior.py and bench/early_termination.py: curves, prior and replay."""

import argparse
import csv
import gzip
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from in_process import run_here
from PIL import Image
from weights import draw_weights

BENCH = Path(__file__).resolve().parents[2] / "bench"
sys.path.insert(0, str(BENCH))

import curve_prior  # noqa: E402
import early_termination  # noqa: E402
import image_curves  # noqa: E402
import learning_curves  # noqa: E402

ARCH = "test_resnet"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three classes of twelve plain images."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for label, name in enumerate("abc"):
        (root / name).mkdir()
        for number in range(12):
            pixels = rng.integers(0, 90, (40, 40, 3)) + 150 * np.eye(3, dtype=int)[label]
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{number}.png")
    return root


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", default=0)
    image_curves.add_arguments(parser)
    return parser.parse_args(words)


def written(file: Path, rows: list[dict]) -> Path:
    learning_curves.write_table(file, rows, image_curves.COLUMNS)
    return file


def drawn_rows(seed: int, count: int = 30) -> list[dict]:
    """Curves that fall to an error which the first epoch already tells, but for chance."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        end, epochs = float(rng.uniform(0.05, 0.6)), int(rng.integers(3, 9))
        config = {"number": number, "seed": 0, "arch": "mobilenetv2_100", "epochs": epochs, "head_init": "zeros"}
        config |= {"freeze_epochs": 0, "lr_max": 1e-3, "lr_ratio": 3.0, "train_bn": "never", "mixup_alpha": 0.0}
        for epoch in range(1, epochs + 1):
            error = end + 0.3 * (1 - epoch / epochs) + 0.01 * float(rng.uniform())
            told = {"epoch": epoch, "stage": "unfrozen", "progress": 100 * epoch // epochs, "error_rate": error}
            counts = {"train_images": 400, "valid_images": 1000, "test_images": 1000, "classes": 10}
            rows.append(config | {"smoothing": 0.0} | told | counts | {"valid_loss": 3 * error, "seconds": 1.0})
        rows[-1]["test_error_rate"] = end
    return rows


@pytest.fixture(scope="module")
def tables(tmp_path_factory) -> list[Path]:
    root = tmp_path_factory.mktemp("tables")
    return [written(root / f"learning_curves_{name}.csv.gz", drawn_rows(seed)) for seed, name in enumerate("abc")]


def test_the_curves_of_a_folder_have_every_epoch_and_the_error_on_test_images(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_SEARCH_CACHE", str(tmp_path / "cache"))
    weights = draw_weights(tmp_path / "weights", ARCH)
    words = ["--weights", str(weights), "--archs", ARCH, "--epochs", "1..2", "--configs", "1"]
    args = parsed("--data", str(folder), *words, "--image-size", "32", "--presize", "40")
    (config,) = image_curves.configurations(args)
    number, _, epochs, failure = image_curves.train((7, config, "cpu", image_curves.options(args)))
    assert (number, failure) == (7, "")
    assert [(epoch["epoch"], epoch["stage"]) for epoch in epochs] == [(0, "probe"), (1, "unfrozen"), (2, "unfrozen")]
    assert {tuple(epoch[name] for name in image_curves.COUNTS) for epoch in epochs} == {(15, 7, 14, 3)}
    assert ["test_error_rate" in epoch for epoch in epochs] == [False, False, True]
    file = written(
        tmp_path / "learning_curves_plain.csv.gz", learning_curves.table([(number, config, epochs, failure)])
    )
    with gzip.open(file, "rt") as text:
        assert [row["progress"] for row in csv.DictReader(text)] == ["0", "50", "100"]


def test_of_a_folder_some_classes_and_images_are_taken_and_no_part_shares_an_image(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_SEARCH_CACHE", str(tmp_path))
    images, valid, test = image_curves._images(str(folder), 40, 2, 20, 0)
    assert (len(images), len(images.classes)) == (20, 2)
    train = images.split()[0]
    assert sorted([*train, *valid, *test]) == list(range(20))
    assert len(set(images.labels[test])) == len(set(images.labels[valid])) == 2


def test_more_configurations_begin_with_those_of_before(tmp_path):
    def configs(*words):
        return image_curves.configurations(parsed("--data", str(tmp_path), *words))

    few, many = configs("--configs", "4"), configs("--configs", "9")
    assert many[:4] == few and len({str(config) for config in many}) == 9
    assert {config["head_init"] for config in many} == {"probe", "zeros"}
    twice = configs("--configs", "9", "--repeat-share", "1/3")
    assert [config["seed"] for config in twice].count(1) == 3 and len(twice) == 12


def test_replays_compare_all_schedulers_on_the_same_trials(tables, tmp_path):
    words = ["--tables", *map(str, tables), "--seeds", "2", "--trials", "20", "--jobs", "1", "--out", str(tmp_path)]
    done = run_here(early_termination.main, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "early_termination.json").read_text())
    for methods in (result["sets"][name]["1"] for name in "abc"):
        assert methods["none"]["epochs_saved"] == methods["none"]["best_stopped"] == 0
        assert methods["forecast"]["epochs_saved"] > 0.2 > methods["rungs"]["epochs_saved"]
    assert all(0 <= row["came_true"] <= 1 for rows in result["reliability"].values() for row in rows)
    assert "| a | 1 | forecast |" in (tmp_path / "early_termination.md").read_text()


def test_a_prior_of_tables_forecasts_the_curves_of_another(tables):
    known = curve_prior.read(tables)
    assert list(known) == ["a", "b", "c"]
    left_out = known.pop("c")
    prior = curve_prior.fit(known)
    level = curve_prior.Level.of(left_out[0])
    missed = []
    for curve in left_out:
        forecast = curve_prior.rows(curve, level)[0] @ prior.mean + curve.log(curve.epochs[0][2])
        missed.append(forecast - curve.log(curve.final_metric))
    assert np.std(missed) < 0.5 * np.std([curve.log(curve.final_metric) for curve in left_out])


def test_the_published_prior_is_that_of_the_published_tables(tmp_path):
    """Whoever adds a table makes the prior anew."""
    files = sorted((BENCH.parent / "results" / "bench").glob("learning_curves*.csv.gz"))
    saved = json.loads(curve_prior.PRIOR_FILE.read_text())
    assert all(
        f"{name} ({len(curves)} trainings)" in saved["origin"] for name, curves in curve_prior.read(files).items()
    )
