"""The commands on a model of images with several labels: predictions, exports, reports."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from several_labels import draw_lights
from sklearn.metrics import f1_score
from tiny_run import make_run

from search import export, predict
from search.exporting.verification import check_export, num_wrong
from search.reporting import test_set as held_out_test
from search.reporting.error_analysis import _of_classes
from search.runs.trained_model import Predictor
from trainables import interpret
from trainables.data.label_sets import multi_hot
from trainables.inference.model_folder import read_json
from trainables.inference.predictor import Prediction

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module")
def lights(tmp_path_factory):
    return draw_lights(tmp_path_factory.mktemp("lights"), each=10)


@pytest.fixture(scope="module")
def run(tmp_path_factory, cache, lights) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "tiny", lights.root / "labels.csv")


def labelled(run: Path, files: list[Path]) -> list[Prediction]:
    return Predictor(run, device="cpu").predict(files)


# --- Predictions ------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(lights) -> list[Path]:
    return [lights.root / path for path in lights.paths[::7]]


def test_predict_prints_all_labels_above_their_thresholds(run, files, capsys):
    assert predict.main([str(run), *map(str, files), "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    expected = labelled(run, files)
    assert [tuple(row["labels"]) for row in rows] == [one.chosen for one in expected]
    assert {len(one.chosen) for one in expected} >= {0, 1, 2}
    assert predict.main([str(run), *map(str, files)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + sum(max(1, len(one.chosen)) for one in expected)
    dark = next(i for i, one in enumerate(expected) if not one.chosen)
    assert next(line for line in lines if str(files[dark]) in line).split()[1:] == ["-"]


def test_a_row_of_its_csv_is_a_row_of_a_table_of_labels(run, files, capsys):
    assert predict.main([str(run), *map(str, files), "--csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    for row, one in zip(rows, labelled(run, files), strict=True):
        assert row["label"] == ";".join(one.chosen)
        shares = [float(share) for share in row["probability"].split(";") if share]
        assert shares == pytest.approx(
            [dict(zip(one.labels, one.probabilities, strict=True))[n] for n in one.chosen], abs=1e-5
        )


def test_with_top_it_prints_so_many_labels_whatever_their_thresholds(run, files, capsys):
    assert predict.main([str(run), *map(str, files), "--csv", "--top", "2"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["rank"] for row in rows] == ["1", "2"] * len(files)
    assert rows[0]["label"] == labelled(run, files)[0].labels[0]


# --- Exports ----------------------------------------------------------------------------------------------------------


def test_every_format_answers_as_the_training_validated(run, lights, tmp_path, capsys, monkeypatch):
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package, reason="needs the extra onnx")
    out, formats = tmp_path / "out", ("safetensors", "onnx", "pt2")
    export.export(run, out, formats=formats, check=False)
    assert read_json(out / "preprocessing.json") == read_json(run / "best" / "preprocessing.json")
    found = check_export(out, run / "best", lights.root / "labels.csv", split_seed=3, formats=formats)
    wrong = round(found.num_images * read_json(run / "best" / "metrics.json")["error_rate"])
    assert {result.name: result.num_wrong for result in found.results} == dict.fromkeys(
        ("safetensors", "timm", "onnx", "pt2"), wrong
    )
    card = (out / "README.md").read_text()
    assert (
        "which is not to have exactly the labels that they have" in card and "An image may have several labels" in card
    )

    photo = lights.root / lights.paths[-1]  # all lights are on
    (out / "photo.jpg").write_bytes(photo.read_bytes())
    monkeypatch.chdir(out)
    capsys.readouterr()
    code = [part.split("```")[0] for part in card.split("```python\n")[1:]]
    assert len(code) == 5  # this project, timm, reading an image, ONNX Runtime, torch
    for part in (code[0], code[1], code[2] + code[3], code[2] + code[4]):
        exec(part, {})
    said = [set(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert said == [set(labelled(run, [photo])[0].chosen)] * 4


def test_an_image_is_wrong_unless_all_of_its_labels_are_right():
    logits, truth = np.array([[2.0, -2.0], [2.0, -2.0], [0.0, 0.0]]), np.array([[1, 0], [1, 1], [1, 0]], bool)
    assert num_wrong(logits, truth, (0.6, 0.5)) == 2
    assert num_wrong(logits, truth, (0.4, 0.5)) == 1
    assert num_wrong(logits, np.array([0, 1, 1]), None) == 2


# --- What it gets wrong -----------------------------------------------------------------------------------------------


def test_interpret_has_the_f1_of_each_label_instead_of_a_confusion_matrix(run, lights, tmp_path, capsys):
    out = tmp_path / "out"
    assert (
        interpret.main(
            ["--model", str(run), "--data", str(lights.root / "labels.csv"), "--split", "all", "--out", str(out)]
        )
        == 0
    )
    said = capsys.readouterr().out
    assert "there is no confusion matrix" in said and "labels, worst F1 first" in said
    written = ["class_scores.csv", "heat_maps.json", "top_losses.csv", "top_losses.png"]
    assert sorted(file.name for file in out.iterdir()) == written
    classes, counts, _, scores = _of_classes(out)
    assert counts is None and sorted(classes) == list(lights.classes)

    found = labelled(run, [lights.root / path for path in lights.paths])
    place = {name: label for label, name in enumerate(lights.classes)}
    predicted = multi_hot([[place[name] for name in one.chosen] for one in found], 3)
    expected = f1_score(multi_hot(lights.label_sets, 3), predicted, average=None)
    assert {score.name: score.f1 for score in scores} == pytest.approx(dict(zip(lights.classes, expected, strict=True)))
    losses = list(csv.DictReader((out / "top_losses.csv").open()))
    assert [float(row["loss"]) for row in losses] == sorted((float(row["loss"]) for row in losses), reverse=True)
    own = {lights.paths[i]: ";".join(lights.classes[label] for label in lights.label_sets[i]) for i in range(80)}
    assert all(row["actual"] == own[row["path"]] for row in losses)


def test_held_out_images_are_judged_at_the_models_thresholds():
    rng = np.random.default_rng(0)
    truth = rng.random((200, 3)) < 0.4
    answers = np.clip(0.35 * truth + rng.random((200, 3)) * 0.5, 0, 1)
    right = held_out_test.are_right(answers, truth, (0.4, 0.45, 0.5))
    assert right.tolist() == ((answers > (0.4, 0.45, 0.5)) == truth).all(1).tolist()
    found = held_out_test.other_metrics(answers, truth, "macro_f1", (0.4, 0.45, 0.5))
    assert found["macro_f1"] == pytest.approx(f1_score(truth, answers > (0.4, 0.45, 0.5), average="macro"))
    low, high = found["interval"]
    assert low < found["macro_f1"] < high and set(found) >= {"map", "auroc", "log_loss"} and "error_rate" not in found
