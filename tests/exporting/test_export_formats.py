"""ONNX and torch.export: the model that was trained, for any batch size, with its preprocessing and labels inside."""

import json
import pickle
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from run_tables import write_run
from tiny_run import make_run, write_json

from search import export
from search.exporting import export_formats, verification
from search.options.arguments import parse_arguments
from search.options.preparation import searched_space
from search.runs.run_record import load
from search.runs.trained_model import Predictor, open_run
from trainables.inference.model_folder import ModelFolder
from trainables.inference.predictor import PresizedFiles, load_model
from trainables.network.calibration import softmax
from trainables.network.model import build
from trainables.recipe import Recipe
from trainables.training.checkpoint import Preprocessing

onnx = pytest.importorskip("onnx", reason="needs the extra onnx")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra onnx")
pytestmark = [pytest.mark.usefixtures("cache"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]

ROOT = Path(__file__).resolve().parents[2]
ALL = "safetensors,onnx,pt2"
LABELS = ("<script>alert(1)</script>", 'a"b', "a|b")
TINY = [f"test_{family}.r160_in1k" for family in ("resnet", "efficientnet", "convnext", "vit")]
REAL = ["resnet18", "tf_efficientnet_lite0", "convnext_atto", "vit_tiny_patch16_224"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data) -> Path:
    """A run of one epoch."""
    return make_run(tmp_path_factory.mktemp("runs") / "tiny", data, epochs=1)


@pytest.fixture
def run(tmp_path, trained) -> Path:
    """The same, to be spoilt."""
    return shutil.copytree(trained, tmp_path / "run")


def model_folder(path: Path, arch: str, head: str, side: int) -> ModelFolder:
    recipe = Recipe.from_dict({"arch": arch, "head": head, "pretrained": False, "image_size": side, "hidden": 16})
    preprocessing = Preprocessing(
        presize=side, image_size=side, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3), resize_method="crop"
    )
    return ModelFolder(path=path, recipe=recipe, labels=LABELS, preprocessing=preprocessing)


@pytest.mark.parametrize(
    ("arch", "head"),
    [
        (TINY[0], "linear"),
        *(
            pytest.param(arch, head, marks=pytest.mark.slow)
            for arch, head in zip(TINY[1:], ["mlp", "linear", "mlp"], strict=True)
        ),
    ],
)
def test_both_formats_give_the_models_logits_for_any_batch_size(tmp_path, arch, head):
    folder = model_folder(tmp_path, arch, head, side=64)
    model = build(folder.recipe, len(LABELS)).model.eval()
    for module in model.modules():  # batch norms as after a training, not the identity
        if isinstance(module, (torch.nn.BatchNorm2d, torch.nn.BatchNorm1d)):
            torch.nn.init.uniform_(module.running_mean, -0.1, 0.1)
            torch.nn.init.uniform_(module.running_var, 0.8, 1.2)
    export_formats.write_formats(folder, model, ("safetensors", "onnx", "pt2"), tmp_path)
    rng = np.random.default_rng(0)
    for name, opener in export_formats.OPENERS.items():
        run = opener(tmp_path / export_formats.FILES[name])
        for batch_size in (1, 5):
            images = rng.random((batch_size, 3, 64, 64), dtype=np.float32)
            mean, std = (
                np.array(values, np.float32).reshape(3, 1, 1) for values in ((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
            )
            with torch.inference_mode():
                expected = model(torch.from_numpy((images - mean) / std)).numpy()
            scale = np.abs(expected).max()
            np.testing.assert_allclose(run(images), expected, atol=1e-4 * scale, rtol=0)
            assert run(images).dtype == np.float32


@pytest.mark.slow
@pytest.mark.parametrize("head", ["linear", "mlp"])
@pytest.mark.parametrize("arch", REAL)
def test_a_trained_model_is_the_same_by_every_way_to_load_it(tmp_path, data, arch, head):
    settings = {"arch": arch, "head": head, "hidden": 16, "epochs": 1, "presize": 64, "image_size": 64}
    run, out, formats = (
        make_run(tmp_path / "run", data, **settings),
        tmp_path / "out",
        export_formats.parse_formats(ALL),
    )
    out.mkdir()
    export.write(open_run(run), out, formats)
    found = verification.check_export(out, run / "best", data, split_seed=3, formats=formats)
    wrong = round(found.num_images * json.loads((run / "best/metrics.json").read_text())["error_rate"])
    ways = ["safetensors", "timm", "onnx", "pt2"] if head == "linear" else ["safetensors", "onnx", "pt2"]
    assert {result.name: result.num_wrong for result in found.results} == dict.fromkeys(ways, wrong)
    assert all(result.difference <= 1e-4 * max(1, result.largest) for result in found.results)


@pytest.mark.parametrize("head", ["linear", pytest.param("mlp", marks=pytest.mark.slow)])
def test_every_format_gives_the_calibrated_probabilities_of_the_run(tmp_path, data, head):
    """Without this project: the softmax of the logits, and no temperature."""
    run, out = make_run(tmp_path / "run", data, head=head, hidden=16, epochs=1), tmp_path / "out"
    out.mkdir()
    formats = ("safetensors", "onnx", "pt2")
    export.write(open_run(run), out, formats)
    predictor, labels = Predictor(run, device="cpu"), json.loads((out / "labels.json").read_text())
    assert abs(predictor.temperature - 1) > 0.05 and Predictor(out, device="cpu").temperature == 1
    photos = sorted(data.rglob("*.jpg"))[::9]
    expected = [dict(zip(found.labels, found.probabilities, strict=True)) for found in predictor.predict(photos)]
    rows = [[shares[label] for label in labels] for shares in expected]
    found = verification.load_all(out, Predictor(out, device="cpu"), formats)
    assert len(found) == (4 if head == "linear" else 3)
    [batch] = predictor.batches(PresizedFiles(photos, predictor.preprocessing))
    for name, logits in found.items():
        np.testing.assert_allclose(softmax(logits(batch)), rows, atol=1e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_the_exported_winner_reproduces_its_table_row_in_every_format(request, tmp_path, data, capsys, head):
    if head == "mlp":  # once is enough for the process that checks it
        request.getfixturevalue("no_new_process")
    run = make_run(tmp_path / "run", data, head=head, hidden=16)
    assert export.main([str(run), "--out", str(tmp_path / "out"), "--format", ALL]) == 0
    said = capsys.readouterr().out
    wrong = round(12 * json.loads((run / "best/metrics.json").read_text())["error_rate"])
    assert said.splitlines()[-3] == "check passed"
    checked = re.findall(
        r"^  (\w+) +(\d+) of 12 wrong \(\S+ %\) +(\d+) of 12 wrong \(\S+ %\) +(\S+)$", said, re.MULTILINE
    )
    ways = ["safetensors", "timm", "onnx", "pt2"] if head == "linear" else ["safetensors", "onnx", "pt2"]
    assert [(name, int(number), int(table)) for name, number, table, _ in checked] == [(w, wrong, wrong) for w in ways]
    assert all(float(difference) < 1e-4 for *_, difference in checked)
    assert "checkpoint in fp32" not in said  # this training validated in it
    written = {file.name for file in (tmp_path / "out").iterdir()}
    assert written == set(export.FILES)


def test_labels_and_preprocessing_travel_in_both_files(tmp_path):
    folder = model_folder(tmp_path, TINY[0], "linear", side=32)
    export_formats.write_formats(folder, build(folder.recipe, 3).model, ("onnx", "pt2"), tmp_path)
    stored = onnx.load(tmp_path / "model.onnx")
    properties = {entry.key: entry.value for entry in stored.metadata_props}
    extra = {"labels.json": "", "preprocessing.json": ""}
    torch.export.load(tmp_path / "model.pt2", extra_files=extra)
    for labels, preprocessing in (properties["labels"], properties["preprocessing"]), extra.values():
        assert json.loads(labels) == list(LABELS)
        assert json.loads(preprocessing)["mean"] == [0.4, 0.5, 0.6]
        assert json.loads(preprocessing)["input"].startswith("RGB pixels in 0..1")
    assert [(entry.domain, entry.version) for entry in stored.opset_import] == [("", export_formats.OPSET)]
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (given,), (found,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.type, given.shape) == ("images", "tensor(float)", ["batch", 3, 32, 32])
    assert (found.name, found.type, found.shape) == ("logits", "tensor(float)", ["batch", 3])


def test_an_architecture_that_cannot_be_exported_is_named(tmp_path):
    class DependsOnPixels(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images if images.sum() > 0 else -images

    folder = model_folder(tmp_path, TINY[0], "linear", side=32)
    with pytest.raises(ValueError, match=r"test_resnet.r160_in1k cannot be exported as pt2: .* Remove it from --for"):
        export_formats.write_formats(folder, DependsOnPixels(), ("safetensors", "pt2"), tmp_path)


@pytest.mark.usefixtures("no_new_process")
def test_a_spoilt_format_is_not_exported(tmp_path, run, monkeypatch, capsys):
    honest = export_formats.write_formats

    def spoil(folder, model, formats, out):
        other = load_model(folder).eval()
        with torch.no_grad():
            other.fc.bias += torch.tensor([5.0, 0.0, 0.0])
        honest(folder, other, formats, out)

    monkeypatch.setattr(export_formats, "write_formats", spoil)
    assert export.main([str(run), "--out", str(tmp_path / "out"), "--format", "onnx"]) == 1
    assert "Nothing was exported" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["onnx", "pt2"])
def test_a_damaged_file_is_told_as_one(tmp_path, run, data, name):
    export.write(open_run(run), tmp_path / "out")
    (tmp_path / "out" / export_formats.FILES[name]).write_bytes(b"spoilt")
    with pytest.raises(verification.Differs, match=rf"^model.{name} cannot be run: .* Nothing was exported") as error:
        verification.check_export(tmp_path / "out", run / "best", data, 3, formats=(name,))
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)  # it comes from another process


@pytest.mark.parametrize("batch_sizes", [{12}, {1}])
def test_a_file_that_takes_one_batch_size_only_is_found_out(tmp_path, run, data, monkeypatch, batch_sizes):
    export.write(open_run(run), tmp_path / "out", ("safetensors",))

    def opener(path):
        def model(images):
            if len(images) not in batch_sizes:
                raise RuntimeError(f"expected {batch_sizes} images")
            return np.zeros((len(images), 3), np.float32)

        return model

    monkeypatch.setattr(export_formats, "OPENERS", {"onnx": opener})
    with pytest.raises(verification.Differs, match=r"model.onnx cannot be run: expected"):
        verification.check_export(tmp_path / "out", run / "best", data, 3, formats=("onnx",))


def test_a_logit_that_is_no_number_is_found_out(tmp_path, run, data, monkeypatch):
    export.write(open_run(run), tmp_path / "out", ("safetensors",))
    nothing = lambda path: lambda images: np.full((len(images), 3), np.nan, np.float32)  # noqa: E731
    monkeypatch.setattr(export_formats, "OPENERS", {"onnx": nothing})
    found = verification.check_export(tmp_path / "out", run / "best", data, 3, formats=("onnx",))
    result = next(result for result in found.results if result.name == "onnx")
    assert np.isnan(result.difference)
    with pytest.raises(verification.Differs):
        verification.require_same(result, found, result.num_wrong / found.num_images, False, data)


@pytest.mark.slow
def test_a_training_that_validated_in_bf16_is_compared_in_fp32(tmp_path, data):
    run = make_run(tmp_path / "run", data, precision="bf16", epochs=1)
    export.write(open_run(run), tmp_path / "out", export_formats.parse_formats(ALL))
    found = verification.check_export(
        tmp_path / "out", run / "best", data, 3, formats=export_formats.parse_formats(ALL)
    )
    differences = {result.name: result.difference for result in found.results}
    assert list(differences) == ["checkpoint", "safetensors", "timm", "onnx", "pt2"]
    assert max(differences.values()) < 1e-4
    metrics = json.loads((run / "best/metrics.json").read_text())
    assert found.results[0].num_wrong == round(12 * metrics["error_rate"])  # the checkpoint in bf16 gives the table
    assert found.fp32_wrong == next(result.num_wrong for result in found.results if result.name == "onnx")
    assert re.search(
        rf"^  checkpoint in fp32 +{found.fp32_wrong} of 12 wrong",
        verification.outcome_table(found, 0.5, "in the run's table"),
        re.MULTILINE,
    )


def test_what_is_asked_for_wrongly_is_said_before_any_work(tmp_path, run):
    with pytest.raises(ValueError, match=r"--format tflite is unknown. Known: safetensors, onnx, pt2"):
        export.main([str(run), "--out", str(tmp_path / "out"), "--format", "onnx,tflite"])
    code = "import sys; sys.modules['onnxruntime'] = None; from search import export; export.run_cli(export.main)"
    command = [sys.executable, "-c", code, run, "--out", tmp_path / "out", "--format", "onnx"]
    child = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=ROOT)
    assert child.returncode == 2 and not child.stdout
    assert child.stderr == "error: --format onnx needs onnxruntime: pip install onnx onnxruntime onnxscript\n"


def test_another_export_with_fewer_formats_is_replaced_by_force(tmp_path, run):
    out = tmp_path / "out"
    assert export.main([str(run), "--out", str(out), "--format", ALL, "--no-check"]) == 0
    assert export.main([str(run), "--out", str(out), "--no-check", "--force"]) == 0
    assert not (out / "model.onnx").exists() and (out / "model.safetensors").exists()


# --- Which trial ------------------------------------------------------------------------------------------------------


@pytest.fixture
def searched(tmp_path, data, trained) -> Path:
    """Tables of ten trials, with a real model as their winner."""
    folder = write_run(tmp_path / "run")
    best = load(folder).best
    for name in ("best", "interpretation"):
        (folder / name).rename(tmp_path / name)
    command = json.loads((folder / "command.json").read_text())
    shutil.copytree(trained, folder, dirs_exist_ok=True)
    write_json(folder / "command.json", command | {"data": str(data), "split_seed": 3})
    metrics = json.loads((folder / "best/metrics.json").read_text())
    write_json(folder / "best/metrics.json", metrics | {"number": int(best.name), "trial_id": best["trial_id"]})
    return folder


def test_the_best_trial_can_be_named_by_number_or_id(searched, tmp_path):
    best = load(searched).best
    for i, name in enumerate((str(best.name), best["trial_id"])):
        assert export.main([str(searched), "--trial", name, "--no-check", "--out", str(tmp_path / f"out{i}")]) == 0


def test_a_probe_can_be_named_as_people_and_the_table_call_it(tmp_path, trained, capsys):
    folder = write_run(tmp_path / "run", probes=(0.1, 0.15, 0.3))
    shutil.rmtree(folder / "best")
    shutil.copytree(trained / "best", folder / "best")
    metrics = json.loads((folder / "best/metrics.json").read_text())
    write_json(folder / "best/metrics.json", metrics | {"number": -3, "trial_id": "p0"})
    for i, name in enumerate(("-3", "probe 3", "p0")):
        assert export.main([str(folder), "--trial", name, "--no-check", "--out", str(tmp_path / f"out{i}")]) == 0
        assert capsys.readouterr().out.startswith("exporting probe 3: ")
    with pytest.raises(
        ValueError, match=r"the weights of probe 2 \(completed, 15.00 % wrong\) were not kept: .* here probe 3"
    ) as error:
        export.main([str(folder), "--trial", "probe 2", "--out", str(tmp_path / "other")])
    assert "--set epochs=0 " in str(error.value) and "--set freeze_epochs=0" in str(error.value)
    with pytest.raises(ValueError, match=r"no such trial in .* Its trials: probe 1 to probe 3, 0 to 9 \(or by id"):
        export.main([str(folder), "--trial", "-4", "--out", str(tmp_path / "other")])


@pytest.fixture
def kept(searched, tmp_path, data) -> Path:
    """The same, with another model as a trial that is not the winner."""
    make_run(tmp_path / "other", data, epochs=1, lr_max=1e-5)
    row = load(searched).completed.iloc[1]
    model = searched / "models" / str(row["number"])
    model.parent.mkdir()
    (tmp_path / "other/best").rename(model)
    metrics = json.loads((model / "metrics.json").read_text())
    write_json(model / "metrics.json", metrics | {"number": int(row["number"]), "trial_id": row["trial_id"]})
    return model


@pytest.mark.usefixtures("no_new_process")
def test_a_kept_trial_that_is_not_the_winner_is_exported_and_passes_its_check(kept, searched, data, tmp_path, capsys):
    winner, out = load(searched).best.name, tmp_path / "out"
    assert export.main([str(searched), "--trial", kept.name, "--out", str(out)]) == 0
    assert "check passed" in capsys.readouterr().out
    images = sorted(data.rglob("*.jpg"))[::9]
    exported, its_own, winners = (
        [found.probabilities for found in Predictor(path).predict(images)] for path in (out, kept, searched / "best")
    )
    np.testing.assert_allclose(exported, its_own, rtol=1e-4)
    assert not np.allclose(exported, winners, rtol=1e-2)
    number = len(load(searched).completed)
    card = (out / "README.md").read_text()
    assert f"trial {kept.name} of {number} completed trials" in card and "the best of" not in card
    with pytest.raises(ValueError, match=rf"here {', '.join(map(str, sorted([int(kept.name), winner])))}\)"):
        export.main([str(searched), "--trial", "3", "--out", str(tmp_path / "other")])


def test_trial_0_that_was_kept_for_its_test_is_exported(kept, searched, tmp_path):
    kept_as = kept.rename(searched / "first")
    metrics = json.loads((searched / "first/metrics.json").read_text())
    write_json(searched / "first/metrics.json", metrics | {"number": 0, "trial_id": "t0"})
    assert load(searched).best.name != 0
    assert export.main([str(searched), "--trial", "0", "--no-check", "--out", str(tmp_path / "out")]) == 0
    exported, first = (safetensors.torch.load_file(path / "model.safetensors") for path in (tmp_path / "out", kept_as))
    assert all(torch.equal(exported[name], first[name]) for name in first if not name.startswith("fc."))


def test_another_trial_has_no_weights_and_the_command_that_trains_it_again_is_told(searched, tmp_path):
    best, row = load(searched).best.name, load(searched).trials.loc[3]
    with pytest.raises(ValueError, match=rf"of its best trials only \(--keep; here {best}\)") as error:
        export.main([str(searched), "--trial", "3", "--out", str(tmp_path / "out")])
    assert "trial 3 (stopped early, " in str(error.value)
    again = str(error.value).partition("again with: ")[2]
    command = shlex.split(again)
    assert command[:3] == ["python", "-m", "search.run"]
    arguments = parse_arguments(command[3:])
    assert (arguments.trials, arguments.seed) == (1, 6)
    space = searched_space(arguments)  # what search.run makes of it
    assert not set(space.dimensions) & set(load(searched).dimensions)
    assert {name: space.settings[name] for name in load(searched).dimensions} == {
        name: row[name] for name in load(searched).dimensions
    }
    with pytest.raises(ValueError, match=r"no such trial in .* Its trials: 0 to 9 \(or by id, such as t\d"):
        export.main([str(searched), "--trial", "12", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_data_with_spaces_and_pinned_settings_are_in_the_command(searched):
    command = json.loads((searched / "command.json").read_text())
    write_json(searched / "command.json", command | {"arguments": {"data": "/my photos", "weights": None}})
    space = json.loads((searched / "space.json").read_text())
    write_json(searched / "space.json", space | {"pinned": ["image_size"], "settings": {"image_size": 96}})
    record = load(searched)
    again = export.training_command(record, record.trials.loc[3])
    assert "--data '/my photos'" in again and "--weights" not in again and "--set image_size=96" in again


def test_a_run_without_tables_knows_its_best_trial_only(tmp_path, run):
    assert export.main([str(run), "--trial", "abc_00007", "--no-check", "--out", str(tmp_path / "out")]) == 0
    with pytest.raises(ValueError, match=r"--trial 6: there is no such trial in .* Its trials: abc_00007"):
        export.main([str(run), "--trial", "6", "--out", str(tmp_path / "other")])


def test_timm_and_this_project_read_the_same_export(searched, tmp_path):
    export.export(searched, tmp_path / "out", check=False)
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = load_model(open_run(searched)).eval()(images) / open_run(searched).temperature
        torch.testing.assert_close(model(images), expected)
