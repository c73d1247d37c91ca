"""Prediction as a user meets it: the pixels that validation saw, files of all kinds, and messages that help."""

import csv
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from in_process import run_here
from PIL import Image
from tiny_run import SETTINGS, make_run, write_json

from search import predict
from search.predict import Prediction, Predictor, find_files
from search.runs.trained_model import open_model
from trainables.batches import augmentation
from trainables.data.layouts import find_images
from trainables.data.presize import presize
from trainables.inference.predictor import PresizedFiles
from trainables.recipe import Recipe
from trainables.system.text import printable
from trainables.training.fine_tune import FineTune

pytestmark = pytest.mark.usefixtures("cache")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory, data) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "tiny", data)


@pytest.fixture(scope="module")
def predictor(run) -> Predictor:
    return Predictor(run, device="cpu", num_threads=2)


# --- The same as validation -------------------------------------------------------------------------------------------


def test_the_network_sees_the_pixels_that_validation_sees(run, data, predictor):
    folder = find_images(data)
    images = presize(folder, 40)
    training = FineTune(Recipe.from_dict(json.loads((run / "best/recipe.json").read_text())), images, split_seed=3)
    files = PresizedFiles([data / path for path in folder.paths], predictor.preprocessing)
    seen, plans = [], [(np.arange(len(images)), augmentation.centre(len(images)))]
    predictor.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        logits = torch.cat(list(predictor.logits(files)))
    finally:
        predictor.model._forward_pre_hooks.clear()
    expected = next(training.inputs.batches(plans, 32))
    training.close()
    assert torch.equal(torch.cat(seen), expected)
    assert logits.shape == (len(images), 3)


def test_images_of_twelve_bits_have_the_shades_that_validation_sees(tmp_path):
    for name, value in (("dark", 16), ("light", 4095)):
        (tmp_path / name).mkdir()
        for n in (1, 2):
            Image.fromarray(np.full((40, 40), value, np.uint16)).save(tmp_path / name / f"{n}.png")
    folder = find_images(tmp_path)
    images = presize(folder, 40)
    training = FineTune(Recipe.from_dict(SETTINGS), images)
    training.close()
    files = PresizedFiles([tmp_path / path for path in folder.paths], training.preprocessing)
    assert [files[i].max() for i in range(4)] == [images[i].max() for i in range(4)] == [1, 1, 255, 255]


def test_labelling_the_validation_files_gives_the_error_of_the_run(run, data, predictor):
    folder = find_images(data)
    valid = presize(folder, 40).split(seed=3)[1]
    found = predictor.predict([data / folder.paths[i] for i in valid])
    truth = [folder.classes[folder.labels[i]] for i in valid]
    error = np.mean([one.labels[0] != label for one, label in zip(found, truth, strict=True)])
    assert error == pytest.approx(json.loads((run / "best/metrics.json").read_text())["error_rate"])
    assert error < 0.5  # it has learned something, or this test would prove little


def test_predictions_come_in_order_whatever_the_batch_size_best_label_first(run, data, predictor):
    paths = [str(path) for path in find_files(str(data))]
    found = predictor.predict(paths)
    assert [str(one.path) for one in found] == paths
    for one in found:
        assert sorted(one.labels) == ["blue_tit", "robin", "wren"]
        assert list(one.probabilities) == sorted(one.probabilities, reverse=True)
        assert sum(one.probabilities) == pytest.approx(1, abs=1e-5)
    in_small_batches = Predictor(run, device="cpu", batch_size=7).predict(paths, top=2)
    assert [one.labels for one in in_small_batches] == [one.labels[:2] for one in found]
    assert [one.probabilities[0] for one in in_small_batches] == pytest.approx([one.probabilities[0] for one in found])
    assert predictor.predict([]) == []


def test_an_export_predicts_with_its_own_statistics(tmp_path, run):
    exported = tmp_path / "exported"
    exported.mkdir()
    for file in (run / "best").iterdir():
        (exported / file.name).write_bytes(file.read_bytes())
    stored = {"presize": 48, "resize_method": "crop", "image_size": 24, "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    write_json(exported / "preprocessing.json", stored)
    predictor = Predictor(exported, device="cpu")
    assert predictor.mean.flatten().tolist() == pytest.approx([25.5, 51, 76.5])
    assert predictor.std.flatten().tolist() == pytest.approx([102, 127.5, 153])
    assert (predictor.preprocessing.presize, predictor.preprocessing.image_size) == (48, 24)


def test_test_time_augmentation_averages_augmented_views_and_the_centre_view(run, data):
    paths = sorted(data.rglob("*.jpg"))[::7]
    plain, averaged = (Predictor(run, device="cpu", tta=tta).predict(paths, top=3) for tta in (0, 3))
    assert [set(p.labels) for p in averaged] == [set(p.labels) for p in plain]
    assert [p.probabilities for p in averaged] != [p.probabilities for p in plain]
    for prediction in averaged:
        assert sum(prediction.probabilities) == pytest.approx(1, abs=1e-5)
    again = Predictor(run, device="cpu", tta=3).predict(paths, top=3)
    assert again == averaged


def test_test_time_augmentation_reads_each_file_once_and_reports_what_it_cannot_read(run, data, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    paths = [data / "robin/1.jpg", broken, data / "wren/2.jpg"]
    predictions = Predictor(run, device="cpu", tta=2, batch_size=2).predict(paths)
    assert [bool(p.problem) for p in predictions] == [False, True, False]
    assert [p.path for p in predictions] == paths


def test_loading_a_model_leaves_the_callers_random_numbers_alone(run):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    Predictor(run, device="cpu")
    assert torch.equal(torch.rand(3), expected)


def test_best_inside_a_run_may_be_named_too(run):
    assert open_model(run / "best") == open_model(run)


# --- Kinds of files ---------------------------------------------------------------------------------------------------


def test_rotated_grayscale_and_cmyk_files_are_labelled_like_plain_ones(tmp_path, data, predictor):
    for plain in sorted(data.glob("*/1.jpg")):
        image = Image.open(plain)
        exif = Image.Exif()
        exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
        image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.jpg", quality=98, exif=exif)
        image.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=98)
        image.convert("L").save(tmp_path / "gray.png")
        image.convert("L").convert("RGB").save(tmp_path / "gray_as_rgb.png")
        names = ("turned.jpg", "cmyk.jpg", "gray.png", "gray_as_rgb.png")
        expected, turned, cmyk, gray, gray_as_rgb = predictor.predict([plain, *(tmp_path / name for name in names)])
        for found in (turned, cmyk):
            assert found.labels[0] == expected.labels[0]
            assert found.probabilities == pytest.approx(expected.probabilities, abs=0.05)
        assert gray.labels == gray_as_rgb.labels
        assert gray.probabilities == pytest.approx(gray_as_rgb.probabilities, abs=1e-6)  # rounded by place in a batch


@pytest.fixture
def damaged(tmp_path, data) -> dict[str, Path]:
    whole = (data / "robin/0.jpg").read_bytes()
    files = {"text.jpg": b"no image", "half.jpg": whole[: len(whole) // 2], "good.jpg": whole}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    return {name: tmp_path / name for name in (*files, "missing.jpg")}


def test_unreadable_files_are_reported_and_the_others_labelled(run, damaged, predictor, capsys):
    found = predictor.predict(damaged.values())
    assert [bool(one.problem) for one in found] == [True, True, False, True]
    assert found[0] == Prediction(damaged["text.jpg"], problem=found[0].problem)
    assert found[2].labels == predictor.predict([damaged["good.jpg"]])[0].labels

    assert predict.main([str(run), *map(str, damaged.values())]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2 and "good.jpg" in out
    assert f"skipped {damaged['text.jpg']}: UnidentifiedImageError" in err
    assert f"skipped {damaged['missing.jpg']}: FileNotFoundError" in err
    assert "3 of 4 images could not be read" in err


def test_exit_code_1_if_no_image_could_be_read(run, damaged, tmp_path, capsys):
    assert predict.main([str(run), str(damaged["text.jpg"])]) == 1
    empty = tmp_path / "empty"
    empty.mkdir()
    assert predict.main([str(run), str(empty), str(tmp_path / "*.webp")]) == 1
    assert f"skipped {empty}: it contains no images" in capsys.readouterr().err


def test_a_lone_path_is_one_image_and_what_is_no_path_is_refused(data, predictor):
    path = data / "robin/1.jpg"
    expected = predictor.predict([path])
    assert len(expected) == 1 and expected[0].labels
    assert predictor.predict(str(path)) == predictor.predict(path) == list(predictor.predict_each(path)) == expected
    with Image.open(path) as image:
        for wrong in (7, None, b"cat.jpg", image, np.asarray(image), [np.asarray(image)], [path, 7]):
            with pytest.raises(ValueError, match=r"the path of an image file or several paths, .* is not a path"):
                predictor.predict(wrong)


def test_folders_with_signs_of_patterns_in_their_names_are_taken_at_their_word(tmp_path, monkeypatch, run, capsys):
    for folder in ("holiday [2024]", "a*b", "what?", "axb"):
        for name in ("1.jpg", "deep [x]/2.jpg", "deep [x]/y.png"):
            (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / name).touch()
    monkeypatch.chdir(tmp_path)
    for folder in ("holiday [2024]", "a*b", "what?", tmp_path / "holiday [2024]"):
        one, two, three = (Path(folder, name) for name in ("1.jpg", "deep [x]/2.jpg", "deep [x]/y.png"))
        assert find_files(str(folder)) == [one, two, three]
        assert find_files(f"{folder}/*.jpg") == [one]
        assert find_files(f"{folder}/deep [x]/*") == [two, three]
        assert find_files(f"{folder}/**/*.png") == [three]
    assert find_files("a*/1.jpg") == [Path("a*b/1.jpg"), Path("axb/1.jpg")]
    assert find_files("what?/../*xb/?.jpg") == [Path("what?/../axb/1.jpg")]
    assert predict.main([str(run), "holiday [2024]/*.webp", "h[0-9]*"]) == 1
    error = capsys.readouterr().err
    assert "skipped holiday [2024]/*.webp: no file matches this pattern" in error
    assert "skipped h[0-9]*: no file matches this pattern" in error


def test_files_folders_and_patterns_are_found(tmp_path, monkeypatch):
    for name in ("a/1.jpg", "a/deep/2.PNG", "a/.hidden.jpg", "a/.git/3.jpg", "a/notes.txt", "b[1].jpg", "c.dat"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    assert find_files("a") == [Path("a/1.jpg"), Path("a/deep/2.PNG")]
    assert find_files("*/*.jpg") == [Path("a/1.jpg")]
    assert find_files(str(tmp_path / "**/*.PNG")) == [tmp_path / "a/deep/2.PNG"]
    assert find_files("?") == [Path("a/1.jpg"), Path("a/deep/2.PNG")]
    assert find_files("b[1].jpg") == [Path("b[1].jpg")]  # exists as it is written
    assert find_files("c.dat") == [Path("c.dat")]
    assert find_files("*.webp") == []


# --- What is printed --------------------------------------------------------------------------------------------------


def test_the_table_has_path_label_and_probability(run, data, predictor, capsys):
    paths = [str(data / "robin/1.jpg"), str(data / "wren/10.jpg")]
    assert predict.main([str(run), *paths, "--top", "9"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["image", "label", "probability"]
    assert len(lines) == 2 * 3
    best = predictor.predict(paths)[0]
    assert lines[0].split() == [paths[0], best.labels[0], f"{100 * best.probabilities[0]:.1f}", "%"]
    assert lines[1].split()[0] == best.labels[1]


def test_csv_is_utf8_whatever_the_terminal_knows(run, data, tmp_path, monkeypatch):
    image = shutil.copy(next(data.rglob("*.jpg")), tmp_path / "Öland – 1.jpg")
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", out)
    assert predict.main([str(run), str(image), "--csv"]) == 0
    out.flush()
    assert out.buffer.getvalue().decode("utf-8").splitlines()[1].startswith(f"{image},1,")


def test_json_and_csv_hold_the_same_for_programs(run, data, capsys):
    paths = [str(data / "robin/1.jpg"), str(data / "wren/10.jpg")]
    assert predict.main([str(run), *paths, "--top", "2", "--json"]) == 0
    objects = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["path"] for one in objects] == paths
    assert predict.main([str(run), *paths, "--top", "2", "--csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["label"] for row in rows] == [label for one in objects for label in one["labels"]]
    assert [row["rank"] for row in rows] == ["1", "2", "1", "2"]
    assert float(rows[0]["probability"]) == pytest.approx(objects[0]["probabilities"][0], abs=1e-6)


@pytest.fixture
def doubtful(run, data, predictor) -> tuple[list[str], list[Prediction], float]:
    """Some images, what is predicted for them, and a threshold between their probabilities."""
    paths = [str(path) for path in sorted(data.rglob("*.jpg"))[::6]]
    found = predictor.predict(paths)
    sure = sorted(one.probabilities[0] for one in found)
    return paths, found, (sure[3] + sure[4]) / 2


def test_below_the_threshold_of_abstain_images_are_unsure_and_their_share_is_told(run, doubtful, capsys):
    paths, found, threshold = doubtful
    assert predict.main([str(run), *paths, "--abstain", str(threshold)]) == 0
    out, err = capsys.readouterr()
    for line, one in zip(out.splitlines()[1:], found, strict=True):
        label = one.labels[0] if one.probabilities[0] >= threshold else f"unsure ({one.labels[0]})"
        assert " ".join(line.split()).startswith(f"{one.path} {label} {100 * one.probabilities[0]:.1f} %")
    assert out.count("unsure (") == 4
    assert f"unsure: 4 of 10 images (40.0 %), whose highest probability is below {threshold:g}" in err
    assert "not calibrated" not in err


def test_programs_get_unsure_as_the_label_and_the_guess_beside_it(run, doubtful, capsys):
    paths, found, threshold = doubtful
    words = [str(run), *paths, "--abstain", str(threshold), "--top", "2"]
    answers = [one.labels[0] if one.probabilities[0] >= threshold else "unsure" for one in found]
    assert predict.main([*words, "--csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["label"] for row in rows] == [
        name for a, one in zip(answers, found, strict=True) for name in (a, one.labels[1])
    ]
    assert [row["guess"] for row in rows] == [name for one in found for name in one.labels[:2]]
    assert predict.main([*words, "--json"]) == 0
    objects = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["label"] for one in objects] == answers
    assert [one["labels"] for one in objects] == [list(one.labels[:2]) for one in found]


@pytest.mark.parametrize("wrong", ["0", "-1", "1.5", "90", "nan", "often"])
def test_a_threshold_is_a_probability(run, wrong, capsys):
    with pytest.raises(SystemExit):
        predict.main([str(run), "cat.jpg", f"--abstain={wrong}"])
    assert f"{wrong!r} is not a probability above 0 and up to 1, such as 0.9" in capsys.readouterr().err


def test_a_model_of_an_earlier_version_opens_and_is_said_not_to_be_calibrated(run, data, tmp_path, predictor, capsys):
    old = copy_of_run(run, tmp_path / "old")
    weights = safetensors.torch.load_file(run / "best/model.safetensors")
    safetensors.torch.save_file(weights, old / "best/model.safetensors")  # without the temperature
    metrics = json.loads((run / "best/metrics.json").read_text())
    assert predictor.temperature == metrics.pop("temperature") != 1
    write_json(old / "best/metrics.json", metrics)
    photo = data / "robin/1.jpg"
    [plain], [calibrated] = Predictor(old, device="cpu").predict(photo), predictor.predict(photo)
    assert plain.labels == calibrated.labels
    raised = np.power(plain.probabilities, 1 / predictor.temperature)
    assert calibrated.probabilities == pytest.approx(raised / raised.sum(), rel=1e-4)
    assert predict.main([str(old), str(photo), "--abstain", "0.5"]) == 0
    assert "its probabilities are not calibrated" in capsys.readouterr().err


def test_control_characters_in_names_do_not_reach_the_terminal():
    assert printable("é\x1b[31m\n\udce9") == "é\\x1b[31m\\n\\udce9"


@pytest.mark.slow
def test_the_command_labels_without_ray_and_help_needs_no_torch(run, data):
    code = (
        "import sys; from search import predict, export\n"
        "assert not {'torch', 'ray', 'cv2'} & set(sys.modules)\n"
        "try: predict.main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'ray', 'cv2'} & set(sys.modules)\n"
        f"assert predict.main([{str(run)!r}, {str(data / 'robin/1.jpg')!r}]) == 0\n"
        "assert 'torch' in sys.modules and 'ray' not in sys.modules"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert child.returncode == 0, child.stderr
    assert "examples:" in child.stdout and "robin/1.jpg" in child.stdout


# --- Errors -----------------------------------------------------------------------------------------------------------


def test_a_wrong_folder_is_one_paragraph_and_exit_code_2(tmp_path):
    child = run_here(predict.main, tmp_path / "nowhere", "cat.jpg")
    assert child.returncode == 2
    assert child.stderr.startswith(f"error: There is no folder {tmp_path / 'nowhere'}.")
    assert child.stderr.count("\n") == 1 and not child.stdout


def copy_of_run(run: Path, to: Path) -> Path:
    (to / "best").mkdir(parents=True)
    for file in (*run.glob("*.json"), *run.glob("best/*")):
        (to / file.relative_to(run)).write_bytes(file.read_bytes())
    return to


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("best/model.safetensors", None, r"best is incomplete: model.safetensors is missing"),
        ("best/model.safetensors", b"torn", r"model.safetensors does not match the recipe.json next to it"),
        ("best/labels.json", b'["a", "b"]', r"does not match the recipe.json next to it: .*size mismatch"),
        ("best/labels.json", None, r"best is incomplete: labels.json is missing"),
        ("best/recipe.json", b"{", r"recipe.json cannot be read"),
        ("best/recipe.json", b"[]", r"recipe.json is damaged: it contains a list, expected a dict"),
        ("best/recipe.json", b'{"depth": 3}', r"recipe.json: .*depth"),
        ("best/preprocessing.json", b'{"presize": 40}', r"preprocessing.json is damaged"),
    ],
)
def test_a_damaged_model_is_refused_with_the_file_at_fault(tmp_path, run, file, content, message):
    damaged = copy_of_run(run, tmp_path / "run")
    (damaged / file).unlink()
    if content is not None:
        (damaged / file).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        Predictor(damaged, device="cpu")


def test_folders_without_a_model_are_told_apart(tmp_path):
    with pytest.raises(ValueError, match=r"neither an exported model .* nor a run"):
        open_model(tmp_path)
    write_json(tmp_path / "command.json", {})
    with pytest.raises(ValueError, match=r"no best model yet: no trial has completed.*--resume --name"):
        open_model(tmp_path)


def test_a_device_that_is_not_there_is_refused(run):
    with pytest.raises(ValueError, match=r"device 'abacus' cannot be used here"):
        Predictor(run, device="abacus")
