"""Export as a user meets it: timm gets the model that was trained, nothing unchecked is left behind, nothing lost."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from in_process import run_here
from tiny_run import draw_images, make_run, write_json

from search import export
from search.exporting import verification
from search.exporting.verification import Check, Differs, LoaderResult, check_export
from search.predict import Predictor, find_files
from search.runs.trained_model import open_model, open_run
from trainables.inference.predictor import load_model

pytestmark = pytest.mark.usefixtures("cache")

FILES = {"model.safetensors", "config.json", "preprocessing.json", "recipe.json", "labels.json", "metrics.json"}
FILES |= {"README.md", "split.json"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "tiny", data)


@pytest.fixture
def run(tmp_path, trained) -> Path:
    """A run of one's own, to be spoilt."""
    return shutil.copytree(trained, tmp_path / "run")


@pytest.mark.slow
def test_timm_loads_the_model_that_was_trained_and_the_error_is_the_tables(tmp_path, trained, capsys):
    out = tmp_path / "new" / "my export"
    assert export.main([str(trained), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    metrics = json.loads((trained / "best/metrics.json").read_text())
    wrong = round(12 * metrics["error_rate"])
    assert "\ncheck passed\n" in said
    for way in ("safetensors", "timm"):
        [off] = re.findall(rf"^  {way} +{wrong} of 12 wrong .* {wrong} of 12 wrong \S+ %\) +(\S+)$", said, re.MULTILINE)
        assert float(off) < 1e-5
    assert f"next: python -m search.predict '{out}' IMAGE..." in said
    assert {file.name for file in out.iterdir()} == FILES
    assert [file.name for file in out.parent.iterdir()] == [out.name]  # nothing temporary beside it
    for name in ("recipe.json", "labels.json", "metrics.json"):
        assert (out / name).read_bytes() == (trained / "best" / name).read_bytes()

    inputs = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = load_model(open_run(trained)).eval()(inputs) / open_run(trained).temperature
    np.save(tmp_path / "inputs.npy", inputs.numpy())
    code = (
        "import sys, timm, torch, numpy as np\n"
        "model = timm.create_model('local-dir:' + sys.argv[1], pretrained=True).eval()\n"
        "print(*timm.data.resolve_data_config(model=model)['input_size'], *model.pretrained_cfg['label_names'])\n"
        "outputs = model(torch.from_numpy(np.load(sys.argv[2] + '/inputs.npy')))\n"
        "np.save(sys.argv[2] + '/outputs.npy', outputs.detach().numpy())"
    )
    child = subprocess.run([sys.executable, "-c", code, out, tmp_path], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert child.stdout.split() == ["3", "32", "32", "blue_tit", "robin", "wren"]
    np.testing.assert_allclose(np.load(tmp_path / "outputs.npy"), expected.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("no_new_process")
def test_an_mlp_head_is_exported_for_our_own_predictor_and_timm_refuses_it(tmp_path, data, capsys):
    run = make_run(tmp_path / "run", data, head="mlp", hidden=16)
    out = tmp_path / "out"
    assert export.main([str(run), "--out", str(out)]) == 0
    assert "check passed" in capsys.readouterr().out
    images = find_files(str(data))[::7]
    for found, expected in zip(Predictor(out).predict(images), Predictor(run).predict(images), strict=True):
        assert found.labels == expected.labels
        assert found.probabilities == pytest.approx(expected.probabilities, rel=1e-4)
    assert "search.predict.Predictor" in json.loads((out / "config.json").read_text())["note"]
    with pytest.raises(RuntimeError, match="state_dict"):  # rather than a network with a random head
        timm.create_model(f"local-dir:{out}", pretrained=True)


def test_timm_loads_another_pooling_alike(tmp_path, data):
    run = make_run(tmp_path / "run", data, epochs=1, concat_pool=True)
    out = tmp_path / "out"
    out.mkdir()
    export.write(open_run(run), out)
    found = check_export(out, run / "best", data, split_seed=3)
    error_rate = json.loads((run / "best/metrics.json").read_text())["error_rate"]
    assert [result.name for result in found.results] == ["safetensors", "timm"]
    for result in found.results:
        assert result.num_wrong == pytest.approx(error_rate * found.num_images)
        assert result.difference < 1e-5


@pytest.mark.usefixtures("no_new_process")
@pytest.mark.parametrize(("method", "crop_mode"), [("squish", "squash"), ("pad", "border")])
def test_another_resize_method_travels_with_the_export(tmp_path, data, capsys, method, crop_mode):
    run = make_run(tmp_path / "run", data, resize_method=method, epochs=1)
    export.export(run, tmp_path / "out")
    assert "check passed" in capsys.readouterr().out  # read as in training, the errors are the table's
    assert json.loads((tmp_path / "out/preprocessing.json").read_text())["resize_method"] == method
    assert json.loads((tmp_path / "out/config.json").read_text())["pretrained_cfg"]["crop_mode"] == crop_mode


def test_the_statistics_of_the_pretrained_weights_travel_with_the_export(tmp_path, data, capsys):
    weights = tmp_path / "weights"
    weights.mkdir()
    arch = "tf_efficientnet_lite0"
    state = timm.create_model(arch, pretrained=False).state_dict()
    safetensors.torch.save_file(state, weights / f"{arch}.safetensors")
    run = make_run(tmp_path / "run", data, arch=arch, pretrained=True, weights=weights, epochs=1)
    out = tmp_path / "out"
    assert export.main([str(run), "--out", str(out), "--no-check"]) == 0
    assert "check" not in capsys.readouterr().out
    shutil.rmtree(weights)
    stored = open_model(out).preprocessing
    assert (stored.mean, stored.std) == ((0.498,) * 3, (0.502,) * 3)  # timm's own are 0.5 for these weights
    assert Predictor(out, device="cpu").mean.flatten().tolist() == pytest.approx([255 * 0.498] * 3)
    config = timm.create_model(f"local-dir:{out}", pretrained=True).pretrained_cfg
    assert (tuple(config["mean"]), tuple(config["std"])) == ((0.498,) * 3, (0.502,) * 3)


# --- The check --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_new_process")
def test_a_model_that_is_not_the_tables_is_not_exported(tmp_path, run, capsys):
    file = run / "best/metrics.json"
    metrics = json.loads(file.read_text())
    write_json(file, metrics | {"error_rate": metrics["error_rate"] + 0.25})
    out = tmp_path / "exports" / "out"
    assert export.main([str(run), "--out", str(out)]) == 1
    error = capsys.readouterr().err
    assert (
        error.startswith("error: the exported model (safetensors) differs from the run's table:")
        and "--no-check" in error
    )
    assert not list(out.parent.iterdir())
    assert export.main([str(run), "--out", str(out), "--no-check"]) == 0
    assert {file.name for file in out.iterdir()} == FILES


@pytest.mark.usefixtures("no_new_process")
def test_without_the_images_the_export_is_made_and_the_missing_check_said(tmp_path, run, capsys):
    command = json.loads((run / "command.json").read_text())
    write_json(run / "command.json", command | {"data": str(tmp_path / "gone")})
    assert export.main([str(run), "--out", str(tmp_path / "out")]) == 0
    out, error = capsys.readouterr()
    assert f"warning: not checked against the table: the run's images, {tmp_path / 'gone'}, are not here" in error
    assert "check passed" not in out and (tmp_path / "out/model.safetensors").is_file()


def test_images_of_other_classes_are_no_check(tmp_path, run):
    out, other = tmp_path / "out", draw_images(tmp_path / "other", each=4)
    (other / "wren").rename(other / "kiwi")
    out.mkdir()
    export.write(open_run(run), out)
    with pytest.raises(verification.DataError, match="classes now, other than the run's"):
        check_export(out, run / "best", other, split_seed=3)


def check(
    num_wrong: int, difference=0.0, *, loader: str = "safetensors", on_gpu=False, fp32=None, probability=0.0
) -> Check:
    result = LoaderResult(loader, num_wrong, difference, largest=10.0, probability_difference=probability)
    return Check(200, (result,), on_gpu=on_gpu, fp32_wrong=fp32)


@pytest.mark.parametrize(
    ("error_rate", "found", "passes"),
    [
        (0.05, check(10), True),
        (0.05, check(11), True),  # one image may be on the edge
        (0.05, check(8), False),
        (0.05, check(12, on_gpu=True), True),  # trained on CPUs, checked on a GPU
        (0.05, check(13, on_gpu=True), False),
        (0.05, check(12, loader="onnx"), False),
        (0.05, check(14, loader="onnx", fp32=13), True),  # fp32, where training validated in bf16
        (0.05, check(10, loader="onnx", fp32=13), False),
        (0.05, check(12, loader="timm", fp32=12), True),
        (0.05, check(10, loader="timm", fp32=12), False),
        (0.05, check(12, loader="checkpoint", fp32=12), False),  # it validated in bf16 as this does
        (0.05, check(10, 0.09), True),
        (0.05, check(10, 0.5), False),  # the same errors by chance, but another model
        (0.05, check(10, float("nan")), False),
        (0.05, check(10, probability=0.2), False),  # as without the temperature
        (float("nan"), check(10), False),
    ],
)
def test_one_image_may_differ_and_one_percent_where_rounding_is_another(run, monkeypatch, error_rate, found, passes):
    monkeypatch.setattr(verification, "in_new_process", lambda *_: found)
    if passes:
        verification.check_against_table(Path("unused"), run, run / "best", {"error_rate": error_rate})
    else:
        with pytest.raises(Differs):
            verification.check_against_table(Path("unused"), run, run / "best", {"error_rate": error_rate})


# --- What is refused --------------------------------------------------------------------------------------------------


def test_a_taken_folder_is_kept_and_force_replaces_an_earlier_export_only(tmp_path, run):
    out = tmp_path / "out"
    out.mkdir()  # an empty one is fine
    assert export.main([str(run), "--out", str(out), "--no-check"]) == 0
    with pytest.raises(ValueError, match=r"is not empty. Give another folder, or --force"):
        export.main([str(run), "--out", str(out), "--no-check"])
    (out / "labels.json").write_text("old")
    assert export.main([str(run), "--out", str(out), "--no-check", "--force"]) == 0
    assert json.loads((out / "labels.json").read_text()) == ["blue_tit", "robin", "wren"]
    (out / "thesis.txt").touch()
    with pytest.raises(ValueError, match=r"files that no export writes \(thesis.txt\); --force will not"):
        export.main([str(run), "--out", str(out), "--no-check", "--force"])
    with pytest.raises(ValueError, match="is a file"):
        export.main([str(run), "--out", str(out / "thesis.txt")])
    assert {file.name for file in out.iterdir()} == FILES | {"thesis.txt"}


def test_somebodys_own_readme_is_no_earlier_export(tmp_path, run):
    out = tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_text("mine")
    with pytest.raises(ValueError, match=r"is not an earlier export: it has no model.safetensors"):
        export.main([str(run), "--out", str(out), "--no-check", "--force"])
    assert (out / "README.md").read_text() == "mine"


def test_a_checkpoint_that_is_replaced_during_the_check_is_told_as_that(tmp_path, run, monkeypatch):
    def another_completes(*_):
        metrics = json.loads((run / "best/metrics.json").read_text())
        write_json(run / "best/metrics.json", metrics | {"trial_id": "better"})
        raise Differs("its logits differ")

    monkeypatch.setattr(export, "check_against_table", another_completes)
    with pytest.raises(ValueError, match=r"A better trial of .* completed during the export"):
        export.main([str(run), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_what_is_no_run_is_one_paragraph_and_exit_code_2(tmp_path):
    child = run_here(export.main, tmp_path, "--out", tmp_path / "out")
    assert child.returncode == 2
    assert child.stderr.startswith(f"error: {tmp_path} is no run: it has no command.json.")
    assert child.stderr.count("\n") == 1 and not child.stdout


def test_a_run_without_a_completed_trial_says_so(tmp_path, run):
    shutil.rmtree(run / "best")
    with pytest.raises(ValueError, match=r"no best model yet: no trial has completed.*--resume --name run"):
        export.main([str(run), "--out", str(tmp_path / "out")])
    with pytest.raises(ValueError, match="does not exist"):
        export.main([str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_no_traceback(tmp_path, run):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"out cannot be written: .*Not a directory"):
        export.main([str(run), "--out", str(tmp_path / "file" / "out"), "--no-check"])
