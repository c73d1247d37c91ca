"""ONNX and torch.export: the model that was trained, for any batch size, with its preprocessing and labels inside."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from run_tables import write_run
from tiny_run import draw_images, make_run, write_json

from search import export, export_formats
from search.model_card import text
from search.model_folder import open_run
from search.run_record import load
from trainables.checkpoint import Preprocessing
from trainables.model import build
from trainables.model_folder import ModelFolder
from trainables.predictor import load_model
from trainables.recipe import Recipe

onnx = pytest.importorskip("onnx", reason="needs the extra onnx")
pytest.importorskip("onnxruntime", reason="needs the extra onnx")
pytestmark = [pytest.mark.usefixtures("cache"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]

ROOT = Path(__file__).resolve().parents[1]
ALL = "safetensors,onnx,pt2"
LABELS = ("<script>alert(1)</script>", 'a"b', "a|b")
TINY = [f"test_{family}.r160_in1k" for family in ("resnet", "efficientnet", "convnext", "vit")]
REAL = ["resnet18", "tf_efficientnet_lite0", "convnext_atto", "vit_tiny_patch16_224"]


def model_folder(path: Path, arch: str, head: str, side: int) -> ModelFolder:
    recipe = Recipe.from_dict({"arch": arch, "head": head, "pretrained": False, "image_size": side, "hidden": 16})
    preprocessing = Preprocessing(
        presize=side, image_size=side, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3), resize_method="crop"
    )
    return ModelFolder(path=path, recipe=recipe, labels=LABELS, preprocessing=preprocessing)


@pytest.mark.parametrize("head", ["linear", "mlp"])
@pytest.mark.parametrize("arch", [*TINY, *REAL])
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


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_the_exported_winner_reproduces_its_table_row_in_every_format(tmp_path, data, capsys, head):
    run = make_run(tmp_path / "run", data, head=head, hidden=16)
    assert export.main([str(run), "--out", str(tmp_path / "out"), "--format", ALL]) == 0
    said = capsys.readouterr().out
    wrong = round(12 * json.loads((run / "best/metrics.json").read_text())["error_rate"])
    assert f"check passed: of 12 images, the table has {wrong} wrong" in said
    checked = re.findall(r"^  (\w+) +(\d+) wrong .* logit (\S+)$", said, re.MULTILINE)
    ways = ["safetensors", "timm", "onnx", "pt2"] if head == "linear" else ["safetensors", "onnx", "pt2"]
    assert [(name, int(number)) for name, number, _ in checked] == [(name, wrong) for name in ways]
    assert all(float(difference) < 1e-4 for *_, difference in checked)
    written = {file.name for file in (tmp_path / "out").iterdir()}
    assert written == set(export.FILES)


def test_the_labels_travel_in_both_files(tmp_path):
    folder = model_folder(tmp_path, TINY[0], "linear", side=32)
    export_formats.write_formats(folder, build(folder.recipe, 3).model, ("onnx", "pt2"), tmp_path)
    properties = {entry.key: entry.value for entry in onnx.load(tmp_path / "model.onnx").metadata_props}
    assert json.loads(properties["labels"]) == list(LABELS)
    extra = {"labels.json": ""}
    torch.export.load(tmp_path / "model.pt2", extra_files=extra)
    assert json.loads(extra["labels.json"]) == list(LABELS)


def test_a_spoilt_format_is_not_exported(tmp_path, data, monkeypatch, capsys):
    run = make_run(tmp_path / "run", data, epochs=1)
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


def test_what_is_asked_for_wrongly_is_said_before_any_work(tmp_path, data):
    run = make_run(tmp_path / "run", data, epochs=1)
    with pytest.raises(ValueError, match=r"--format tflite is unknown. Known: safetensors, onnx, pt2"):
        export.main([str(run), "--out", str(tmp_path / "out"), "--format", "onnx,tflite"])
    code = "import sys; sys.modules['onnxruntime'] = None; from search import cli, export; cli.run_cli(export.main)"
    command = [sys.executable, "-c", code, run, "--out", tmp_path / "out", "--format", "onnx"]
    child = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=ROOT)
    assert child.returncode == 2 and not child.stdout
    assert child.stderr == "error: --format onnx needs onnxruntime: pip install onnx onnxruntime onnxscript\n"


def test_another_export_with_fewer_formats_is_replaced_by_force(tmp_path, data):
    run, out = make_run(tmp_path / "run", data, epochs=1), tmp_path / "out"
    assert export.main([str(run), "--out", str(out), "--format", ALL, "--no-check"]) == 0
    assert export.main([str(run), "--out", str(out), "--no-check", "--force"]) == 0
    assert not (out / "model.onnx").exists() and (out / "model.safetensors").exists()


# --- Which trial ------------------------------------------------------------------------------------------------------


@pytest.fixture
def searched(tmp_path, data) -> Path:
    """Tables of ten trials, with a real model as their winner."""
    folder = write_run(tmp_path / "run")
    best = load(folder).best
    for name in ("best", "interpretation"):
        (folder / name).rename(tmp_path / name)
    command = json.loads((folder / "command.json").read_text())
    make_run(folder, data, epochs=1)
    write_json(folder / "command.json", command | {"data": str(data), "split_seed": 3})
    metrics = json.loads((folder / "best/metrics.json").read_text())
    write_json(folder / "best/metrics.json", metrics | {"number": int(best.name), "trial_id": best["trial_id"]})
    return folder


def test_the_best_trial_can_be_named_by_number_or_id(searched, tmp_path):
    best = load(searched).best
    for i, name in enumerate((str(best.name), best["trial_id"])):
        assert export.main([str(searched), "--trial", name, "--no-check", "--out", str(tmp_path / f"out{i}")]) == 0


def test_another_trial_has_no_weights_and_the_command_that_trains_it_again_is_told(searched, tmp_path):
    best, row = load(searched).best.name, load(searched).trials.loc[3]
    with pytest.raises(ValueError, match=f"keeps the weights of its best trial only, which is {best}") as error:
        export.main([str(searched), "--trial", "3", "--out", str(tmp_path / "out")])
    again = str(error.value).partition("again with: ")[2]
    assert again.startswith("python -m search.run --space pets ") and "--trials 1" in again
    assert f"--set arch={row['arch']}" in again and f"--set lr_max={row['lr_max']}" in again
    with pytest.raises(ValueError, match=r"no such trial in .* Its trials: 0 to 9"):
        export.main([str(searched), "--trial", "12", "--out", str(tmp_path / "out")])


# --- The model card ---------------------------------------------------------------------------------------------------


def test_the_card_says_on_what_and_how_well_and_its_code_runs(searched, tmp_path, data):
    out = tmp_path / "out"
    assert export.main([str(searched), "--out", str(out), "--format", ALL, "--no-check"]) == 0
    card, record = (out / "README.md").read_text(), load(searched)
    error = json.loads((out / "metrics.json").read_text())["error_rate"]
    assert f"| validation error | {100 * error:.2f} % |" in card and "95 % interval (Wilson)" in card
    assert "| training images | 80 |" in card and f"| data set | {data.name} |" in card
    assert f"the best of {len(record.completed)} completed trials" in card
    assert "| ray | 2.60.0 |" in card and "AMD EPYC" in card
    assert str(data.parent) not in card  # whose machine it was is nobody's business
    photo = next(data.rglob("*.jpg"))
    (out / "photo.jpg").write_bytes(photo.read_bytes())
    code = "\n".join(re.findall(r"```python\n(.*?)```", card, re.DOTALL))
    child = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=out,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert child.returncode == 0, child.stderr
    ours, of_onnx, of_program = child.stdout.split()
    assert of_onnx == of_program and ours in json.loads((out / "labels.json").read_text())


def test_names_in_a_card_are_text(tmp_path):
    data = draw_images(tmp_path / "data", each=6)
    for old, new in (("robin", "<b>a|b"), ("wren", 'a"b`*_[x]')):
        (data / old).rename(data / new)
    run = make_run(tmp_path / "run", data, epochs=1)
    export.export(run, tmp_path / "out", check=False)
    card = (tmp_path / "out/README.md").read_text()
    assert "<b>" not in card and "&lt;b&gt;a&#124;b" in card
    assert text('a"b`*_[x]') in card
    assert text("a_b *c* _d_ <e> `f` # g") == r"a_b \*c\* \_d\_ &lt;e&gt; &#96;f&#96; \# g"


def test_the_cards_front_matter_is_yaml(searched, tmp_path):
    import yaml

    export.export(searched, tmp_path / "out", check=False)
    front = (tmp_path / "out/README.md").read_text().split("---")[1]
    fields = yaml.safe_load(front)
    assert fields["library_name"] == "timm" and fields["pipeline_tag"] == "image-classification"


def test_timm_and_this_project_read_the_same_export(searched, tmp_path):
    export.export(searched, tmp_path / "out", check=False)
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(model(images), load_model(open_run(searched)).eval()(images))
