"""The model card: what it says is so, names in it are text, and its code runs as it stands."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import markdown_it
import numpy as np
import pytest
import yaml
from PIL import Image
from run_tables import NUM_VALID, write_run
from tiny_run import make_run

from search import export
from search.exporting.model_card import MAX_LABELS, model_card, text
from search.options.search_options import SearchOptions
from search.predict import Predictor
from search.runs.command import CommandRecord
from search.runs.run_record import load
from search.runs.statistics import wilson_interval
from trainables.batches import augmentation, warp_cpu
from trainables.inference.model_folder import ModelFolder
from trainables.inference.predictor import PresizedFiles
from trainables.recipe import Recipe
from trainables.training.checkpoint import Preprocessing

pytestmark = [pytest.mark.usefixtures("cache"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]

ROOT = Path(__file__).resolve().parents[2]
METRICS = {"error_rate": 0.05, "tta_error_rate": 0.025, "valid_loss": 0.3}
OPTIONS = SearchOptions(space="pets")
COMMAND = CommandRecord(data="/home/me/secret/my pets", split_seed=3, arguments=OPTIONS, asked=OPTIONS)
NASTY = (
    "<script>alert(1)</script>",
    'a"b',
    "a|b",
    "`c` *d* _e_ [f](g) ~~h~~",
    "https://i.example",
    "two\nlines",
    "&lt;",
)


def folder(*, labels=("cat", "dog"), method="crop", **settings) -> ModelFolder:
    recipe = Recipe.from_dict({"arch": "test_resnet.r160_in1k", "presize": 160, "image_size": 128} | settings)
    preprocessing = Preprocessing(
        presize=160, image_size=128, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3), resize_method=method
    )
    return ModelFolder(path=Path("unused"), recipe=recipe, labels=tuple(labels), preprocessing=preprocessing)


def card(
    model: ModelFolder | None = None, *, metrics=METRICS, command=COMMAND, run=None, formats=("safetensors",)
) -> str:
    return model_card(model or folder(), metrics, command, run, formats)


def front_matter(found: str) -> dict:
    return yaml.safe_load(found.split("---\n")[1])


def html_of(found: str) -> str:
    return markdown_it.MarkdownIt("commonmark").enable("table").render(found.split("---\n", 2)[2])


# --- What it says -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    return load(write_run(tmp_path_factory.mktemp("run") / "pets"))


def test_it_says_on_what_it_was_trained_and_how_well_it_does(tables):
    found = card(run=tables, command=replace(tables.command, data=COMMAND.data, split_seed=COMMAND.split_seed))
    assert f"the best of {len(tables.completed)} completed trials (10 started): 5.0 % wrong" in found
    low, high = wilson_interval(0.05, NUM_VALID)
    assert f"| 95 % interval (Wilson) | {100 * low:.2f} % to {100 * high:.2f} % |" in found
    assert "| validation error | 5.00 % |" in found and "| with test-time augmentation | 2.50 % |" in found
    assert f"chose this model among {len(tables.completed)} completed trials of a search" in found
    assert "optimistic" in found and "## Limits" in found
    for row in ("| data set | my pets |", "| classes | 2 |", "| training images | 80 |", "| validation images | 20 |"):
        assert row in found
    assert "groups that the split" not in found
    grouped = replace(COMMAND, arguments=replace(OPTIONS, group="parent"))
    assert "| groups that the split keeps together | parent |" in card(run=tables, command=grouped)
    assert "secret" not in found  # where it was on whose machine is nobody's business
    assert "| ray | 2.60.0 |" in found and "| processor | AMD EPYC |" in found


def test_it_says_how_well_calibrated_its_probabilities_are_and_if_they_are_not(tables):
    found = card(
        run=tables,
        metrics=METRICS | {"temperature": 1.234567, "calibration_error_before": 0.0612, "calibration_error": 0.0178},
    )
    assert "| temperature, fitted on 20 validation images and included in the weights | 1.235 |" in found
    assert "before it (15 bins) | 6.12 % |" in found and "half of the images | 1.78 % |" in found
    assert "Its probabilities are calibrated on images like those of its validation" in found
    for metrics in (METRICS, METRICS | {"temperature": float("nan")}):
        assert "Its probabilities are not calibrated" in card(metrics=metrics)
        assert "temperature" not in card(metrics=metrics)


def test_a_probe_is_not_said_to_be_fine_tuned(tmp_path):
    probed = load(write_run(tmp_path / "run", probes=(0.1, 0.15, 0.3)))
    found = card(folder(head_init="probe", epochs=0, freeze_epochs=0), metrics=METRICS | {"number": -2}, run=probed)
    assert "a probe: the frozen features of pretrained weights with a trained head, probe 2 of 3 probes and 7" in found
    assert "fine-tuned from" not in found


def test_it_says_how_images_are_read_and_with_what_recipe():
    found = card(folder(lr_max=0.0123))
    assert (
        "its shorter side is resized to 160 px and the centre square taken, and the square is resized to 128 px"
        in found
    )
    assert "mean (0.4, 0.5, 0.6) and standard deviation (0.2, 0.25, 0.3)" in found
    assert re.search(
        r"^\| lr\\?_max \| 0.0123 \| peak learning rate of the head once unfrozen \|$", found, re.MULTILINE
    )
    assert "mirroring" in card(folder(method="pad")) and "squeezed to a square of 160" in card(folder(method="squish"))


@pytest.mark.parametrize("tta", [{}, {"tta_error_rate": None}, {"tta_error_rate": float("nan")}])
def test_what_is_not_known_is_left_out(tta):
    found = card(metrics={"error_rate": 0.05} | tta)
    missing = ("Wilson", "with test-time", "validation loss", "| training images", "completed trial", "| nan", "| None")
    for words in missing:
        assert words not in found


def test_a_model_that_is_a_mean_of_several_says_so():
    refit = {"train_images": 100, "error_rate": 0.0}
    for known, said in ({}, False), ({"averaged": 3}, True):
        found = card(metrics={"error_rate": 0.05, "refit": refit | known})
        assert "trained again with them" in found.replace("\n", " ")
        assert (" averaged (arXiv:2203.05482), this one among them | 3 |" in found) is said


def test_an_older_run_without_the_number_of_images_has_no_interval(tmp_path):
    path = write_run(tmp_path / "run")
    epochs = path / "epochs.csv"
    epochs.write_text(epochs.read_text().replace("valid_images", "something"))
    found = card(run=load(path))
    assert "Wilson" not in found and "validation error" in found and "completed trials" in found


def test_the_front_matter_is_yaml_and_names_timm_only_where_timm_loads_it():
    fields = front_matter(card())
    assert fields["library_name"] == "timm" and fields["pipeline_tag"] == "image-classification"
    assert "image-classification" in fields["tags"] and fields["metrics"] == ["accuracy"]
    found = card(folder(head="mlp"))
    assert front_matter(found)["library_name"] != "timm" and "timm.create_model" not in found


def test_formats_that_were_not_written_are_not_told():
    assert "onnxruntime" not in card() and "torch.export" not in card()
    assert "torch.export" not in card(formats=("safetensors", "onnx"))
    assert "onnxruntime" not in card(formats=("safetensors", "pt2"))


# --- Names are text ---------------------------------------------------------------------------------------------------


def test_names_are_shown_as_they_are_and_nothing_else():
    html = html_of(card(folder(labels=NASTY), command=replace(COMMAND, data="/x/<img src=y>|*z*")))
    cells = re.findall(r"<tr>\n<td>\d+</td>\n<td>(.*)</td>\n</tr>", html)
    shown = {"<": "&lt;", ">": "&gt;", '"': "&quot;"}
    expected = [" ".join(label.split()).replace("&", "&amp;") for label in NASTY]
    for sign, entity in shown.items():
        expected = [label.replace(sign, entity) for label in expected]
    assert cells == expected
    assert "<td>&lt;img src=y&gt;|*z*</td>" in html
    for tag in ("<script", "<img", "<em", "<strong", "<a ", "<s>"):
        assert tag not in html


def test_names_that_a_terminal_or_a_file_cannot_hold_are_escaped():
    card(folder(labels=("a\x1bb", "c\udcffd"))).encode("utf-8")
    assert text("a\x1bb") == "a\\\\x1bb"
    assert text("a_b *c* _d_ <e> `f` # g") == r"a_b \*c\* \_d\_ &lt;e&gt; &#96;f&#96; \# g"
    assert "://" not in text("http://x") and "www." not in text("www.x.y")  # hubs make links of them


def test_of_a_great_many_classes_the_first_are_shown():
    found = card(folder(labels=[f"class{i}" for i in range(MAX_LABELS + 5)]))
    assert f"class{MAX_LABELS - 1} " in found and f"class{MAX_LABELS} " not in found and "and 5 more" in found


# --- Its code runs ----------------------------------------------------------------------------------------------------


def code_of(found: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", found, re.DOTALL)


def in_folder(command: list[str], path: Path) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    child = subprocess.run(command, capture_output=True, text=True, cwd=path, env=environment)
    assert child.returncode == 0, child.stderr
    return child.stdout


def plain_photo(path: Path, colour: tuple[int, int, int]) -> Path:
    """Of one colour, so that any way to resize it gives the same pixels."""
    Image.new("RGB", (70, 50), colour).save(path)
    return path


@pytest.mark.slow
def test_the_code_for_this_project_and_for_timm_labels_a_photo(tmp_path, data, monkeypatch, capsys):
    run, out = make_run(tmp_path / "run", data), tmp_path / "out"
    export.export(run, out, check=False)
    plain_photo(out / "photo.jpg", (220, 60, 40))
    label = Predictor(out).predict([out / "photo.jpg"])[0].labels[0]
    found = (out / "README.md").read_text()
    (shell,) = code_of(found, "sh")
    assert label in in_folder(["bash", "-c", f'python() {{ "{sys.executable}" "$@"; }}; {shell}'], out)
    monkeypatch.chdir(out)
    capsys.readouterr()
    for code in code_of(found, "python"):  # for this project and for timm alone, each from nothing
        exec(code, {})
        assert capsys.readouterr().out.strip() == label
    assert len(code_of(found, "python")) == 2


@pytest.mark.parametrize("method", ["crop", "squish", "pad"])
def test_the_code_that_reads_a_photo_sees_what_training_saw(tmp_path, monkeypatch, method):
    rng = np.random.default_rng(0)
    small = rng.integers(0, 255, (5, 7, 3), dtype=np.uint8)  # no two parts alike, and smooth once enlarged
    Image.fromarray(small).resize((350, 250), Image.Resampling.BICUBIC).save(tmp_path / "photo.jpg", quality=95)
    (tmp_path / "labels.json").write_text("[]")
    model = folder(method=method)
    read = next(code for code in code_of(card(model, formats=("onnx",)), "python") if "ImageOps" in code)
    monkeypatch.chdir(tmp_path)
    exec(read, names := {})
    files = PresizedFiles([tmp_path / "photo.jpg"], model.preprocessing)
    expected = warp_cpu.apply(files[0], augmentation.centre(1, method)[0], model.preprocessing.image_size)
    assert names["images"].shape == (1, 3, 128, 128) and names["images"].dtype == np.float32
    difference = np.abs(255 * names["images"][0].transpose(1, 2, 0) - expected)
    assert difference.mean() < 1 and difference.max() < 12


@pytest.mark.slow
def test_the_code_for_onnx_and_pt2_labels_a_photo_without_this_project(tmp_path, data):
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package, reason="needs the extra onnx")
    run, out = make_run(tmp_path / "run", data, head="mlp", hidden=16), tmp_path / "out"
    export.export(run, out, formats=("safetensors", "onnx", "pt2"), check=False)
    plain_photo(out / "photo.jpg", (220, 60, 40))
    expected = Predictor(out, device="cpu").predict([out / "photo.jpg"])[0]
    _, *code = code_of((out / "README.md").read_text(), "python")  # the first is for this project
    assert len(code) == 3  # read, ONNX Runtime, torch
    alone = "import sys; sys.modules |= dict.fromkeys(('search', 'trainables', 'timm'))\n"
    show = "\nprint(*logits[0].tolist())\nprint(*model(torch.from_numpy(images))[0].tolist())"
    said = in_folder([sys.executable, "-c", alone + "\n".join(code) + show], out).splitlines()
    assert said[:2] == [expected.labels[0]] * 2
    labels = json.loads((out / "labels.json").read_text())
    for line in said[2:]:
        shares = np.exp([float(number) for number in line.split()])
        found = [shares[labels.index(label)] / shares.sum() for label in expected.labels]
        np.testing.assert_allclose(found, expected.probabilities, atol=1e-4)
