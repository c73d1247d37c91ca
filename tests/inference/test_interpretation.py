"""Where a model errs: numbers against hand counts and fastai's, files that can be looked at, messages that help."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from in_process import run_here
from PIL import Image
from tiny_run import draw_images, make_run

from search import export
from trainables import interpret as command
from trainables.data.held_out_images import set_aside
from trainables.data.layouts import find_images
from trainables.data.presize import presize
from trainables.inference import interpretation
from trainables.inference.interpretation import Interpretation, centre_views, interpret
from trainables.inference.model_folder import read_model
from trainables.inference.predictor import Predictor
from trainables.network.calibration import Calibration, expected_calibration_error, softmax

pytestmark = pytest.mark.usefixtures("cache")

ROOT = Path(__file__).resolve().parents[2]
CLASSES = ("cat", "dog", "emu")
FILES = (
    "calibration.json",
    "classes.csv",
    "confusion_matrix.csv",
    "confusion_matrix.png",
    "heat_maps.json",
    "top_losses.csv",
)
FILES += ("top_losses.png",)


@pytest.fixture(scope="module")
def run(tmp_path_factory, data) -> Path:
    """Trained so little that it errs."""
    return make_run(tmp_path_factory.mktemp("runs") / "tiny", data, epochs=1, bn_momentum=0.1, lr_max=0.003)


@pytest.fixture(scope="module")
def images(data):
    return presize(find_images(data), 40)


@pytest.fixture(scope="module")
def everything(run, images) -> Interpretation:
    return interpret(read_model(run / "best"), images, range(len(images)), device="cpu")


def said(classes, actual, predicted, *, sure=0.6) -> Interpretation:
    """Images of the classes `actual`, each taken for `predicted` with the probability `sure`."""
    n, rest = len(classes), (1 - sure) / (len(classes) - 1)
    probabilities = np.full((len(actual), n), rest, np.float32)
    probabilities[np.arange(len(actual)), predicted] = sure
    paths = tuple(f"{i}.jpg" for i in range(len(actual)))
    return Interpretation(tuple(classes), probabilities, np.asarray(actual), np.arange(len(actual)), paths)


def at_random(seed: int, *, n: int = 300, classes: int = 7) -> Interpretation:
    rng = np.random.default_rng(seed)
    probabilities = rng.dirichlet(np.full(classes, 0.5), n).astype(np.float32)
    names = tuple(f"class_{i:02}" for i in range(classes))  # sorted: fastai sorts them
    paths = tuple(f"{i}.jpg" for i in range(n))
    return Interpretation(names, probabilities, rng.integers(0, classes, n), np.arange(n), paths)


# --- Numbers ----------------------------------------------------------------------------------------------------------


def test_the_matrix_counts_actual_classes_in_rows_and_predicted_ones_in_columns():
    found = said(CLASSES, [0, 0, 0, 0, 1, 1], [0, 1, 1, 2, 1, 0])
    assert found.confusion_matrix().tolist() == [[1, 2, 1], [1, 1, 0], [0, 0, 0]]
    assert found.wrong.tolist() == [False, True, True, True, False, True]
    assert found.error_rate == pytest.approx(4 / 6)


def test_the_most_confused_pairs_come_first_and_ties_in_the_order_of_the_classes():
    found = said(CLASSES, [2, 2, 1, 1, 0, 1, 1, 0], [0, 0, 0, 0, 1, 2, 1, 0])
    assert found.most_confused() == [("dog", "cat", 2), ("emu", "cat", 2), ("cat", "dog", 1), ("dog", "emu", 1)]
    assert found.most_confused(min_count=2) == [("dog", "cat", 2), ("emu", "cat", 2)]
    assert found.most_confused(min_count=3) == []
    with pytest.raises(ValueError, match=r"min_count is 0; expected 1 or more"):
        found.most_confused(0)


def test_losses_are_cross_entropy_and_finite_even_where_the_model_is_sure_and_wrong():
    probabilities = np.array([[1, 0], [0.25, 0.75], [1, 0], [1 + 1e-7, 0]], np.float32)
    found = Interpretation(("a", "b"), probabilities, np.array([0, 1, 1, 0]), np.arange(4), tuple("wxyz"))
    assert found.losses.dtype == np.float64
    assert found.losses == pytest.approx([0, -np.log(0.75), 103.2789, 0], abs=1e-4)
    assert found.losses.min() == 0 and not np.signbit(found.losses).any()


def test_top_losses_are_largest_first_ties_in_their_order_and_no_more_than_there_are():
    shares = np.array([0.5, 0.1, 0.9, 0.1], np.float32)
    found = Interpretation(("a", "b"), np.stack([shares, 1 - shares], 1), np.zeros(4, int), np.arange(4), tuple("wxyz"))
    assert found.top_losses(3).tolist() == [1, 3, 0]
    assert found.top_losses().tolist() == found.top_losses(99).tolist() == [1, 3, 0, 2]
    with pytest.raises(ValueError, match=r"k is 0; expected 1 or more"):
        found.top_losses(0)


# --- A real model -----------------------------------------------------------------------------------------------------


def test_error_rate_and_mean_loss_on_the_validation_split_are_those_of_the_run(run, images):
    valid = images.split(seed=3)[1]
    found = interpret(read_model(run / "best"), images, valid, device="cpu")
    metrics = json.loads((run / "best/metrics.json").read_text())
    assert found.error_rate == pytest.approx(metrics["error_rate"])
    logits = found.temperature * np.log(found.probabilities)  # but for a constant
    actual = softmax(logits)[np.arange(len(valid)), found.labels]
    assert -np.log(actual).mean() == pytest.approx(metrics["valid_loss"], rel=1e-5)
    assert found.temperature == metrics["temperature"] != 1
    assert found.losses.mean() < metrics["valid_loss"]
    assert found.paths == tuple(images.paths[i] for i in valid)
    assert found.indices.tolist() == valid.tolist()


def test_the_matrix_of_a_model_is_a_count_of_its_predictions(run, data, images, everything):
    assert 0 < everything.error_rate < 1  # or this test would prove little
    counts = {}
    answers = Predictor(read_model(run / "best"), device="cpu").predict(data / path for path in images.paths)
    for path, answer in zip(images.paths, answers, strict=True):
        pair = path.split("/")[0], answer.labels[0]
        counts[pair] = counts.get(pair, 0) + 1
    matrix = everything.confusion_matrix()
    named = {(a, p): matrix[i, j] for i, a in enumerate(images.classes) for j, p in enumerate(images.classes)}
    assert {pair: count for pair, count in named.items() if count} == counts
    assert matrix.sum() == len(images)


def test_test_time_augmentation_is_the_predictors(run, images):
    folder = read_model(run / "best")
    found = interpret(folder, images, [0, 25, 50], tta=2, device="cpu")
    expected = next(Predictor(folder, device="cpu", tta=2).probabilities([images[i] for i in (0, 25, 50)]))
    assert np.array_equal(found.probabilities, expected.numpy())


def test_the_views_are_what_the_network_sees(run, images):
    folder = read_model(run / "best")
    views = centre_views(images, np.array([4, 1]), folder.preprocessing)
    batch = next(Predictor(folder, device="cpu").batches([images[4], images[1]]))
    assert np.array_equal(np.stack(views), batch.permute(0, 2, 3, 1).numpy())


def test_classes_are_matched_by_name_where_the_data_has_fewer(tmp_path, run, data, images, everything):
    for name in ("robin", "wren"):
        shutil.copytree(data / name, tmp_path / name)
    fewer = presize(find_images(tmp_path), 40)
    assert fewer.classes == ("robin", "wren")
    found = interpret(read_model(run / "best"), fewer, range(len(fewer)), device="cpu")
    assert found.classes == images.classes
    assert np.array_equal(found.confusion_matrix()[1:], everything.confusion_matrix()[1:])
    assert not found.confusion_matrix()[0].any()


# --- Errors -----------------------------------------------------------------------------------------------------------


def test_a_class_that_the_model_does_not_know_is_named(tmp_path, run, data):
    shutil.copytree(data, tmp_path, dirs_exist_ok=True)
    (tmp_path / "wren").rename(tmp_path / "Wren")
    other = presize(find_images(tmp_path), 40)
    with pytest.raises(ValueError, match=r"not know 1 class \('Wren'\) of the data set.* lacks 1 class \('wren'\)"):
        interpret(read_model(run / "best"), other, [0])


def test_images_of_another_size_and_no_images_are_refused(run, data, images):
    folder = read_model(run / "best")
    with pytest.raises(ValueError, match=r"presized to 48 px, the model expects 40 px"):
        interpret(folder, presize(find_images(data), 48), [0])
    with pytest.raises(ValueError, match=r"no images to predict"):
        interpret(folder, images, [])


def test_a_diverged_model_is_refused(tmp_path, run, images):
    import safetensors.torch

    shutil.copytree(run / "best", tmp_path / "best")
    weights = safetensors.torch.load_file(run / "best/model.safetensors")
    broken = {name: value * float("nan") if value.is_floating_point() else value for name, value in weights.items()}
    safetensors.torch.save_file(broken, tmp_path / "best/model.safetensors")
    with pytest.raises(ValueError, match=r"probabilities that are not finite for 2 images"):
        interpret(read_model(tmp_path / "best"), images, [0, 1], device="cpu")


# --- Files ------------------------------------------------------------------------------------------------------------


def pixels(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def has_colour(picture: np.ndarray, colour: str) -> bool:
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return bool((np.abs(picture.astype(int) - wanted).max(axis=2) <= 8).any())


@pytest.mark.slow
@pytest.mark.parametrize("classes", [2, 37, 41, 300])
def test_a_matrix_of_any_size_is_drawn(tmp_path, classes):
    rng = np.random.default_rng(classes)
    labels = np.arange(2 * classes) % classes
    answers = np.where(rng.random(len(labels)) < 0.8, labels, rng.integers(0, classes, len(labels)))
    names = ["$a_b$", "\u72ac", *(f"Old_breed_of_terrier_{i}" for i in range(classes - 2))]
    interpretation.save_confusion_picture(tmp_path / "matrix.png", said(names, labels, answers))
    height, width, _ = pixels(tmp_path / "matrix.png").shape
    assert 400 < height < 3000 and 400 < width < 3000
    assert height > 1400 or classes == 2 or classes == 41
    assert pixels(tmp_path / "matrix.png").std() > 10


def test_right_is_blue_and_wrong_red_and_classes_that_do_not_occur_are_not_drawn(tmp_path):
    hundred = [f"class_{i}" for i in range(100)]
    all_right = said(hundred, [3, 7, 7], [3, 7, 7], sure=0.9)
    interpretation.save_confusion_picture(tmp_path / "right.png", all_right)
    right = pixels(tmp_path / "right.png").astype(int)
    assert right.shape[0] < 1000
    all_wrong = said(hundred, [3, 7, 7], [7, 3, 3], sure=0.9)
    interpretation.save_confusion_picture(tmp_path / "wrong.png", all_wrong)
    wrong = pixels(tmp_path / "wrong.png").astype(int)
    assert (right[..., 2] - right[..., 0] > 60).mean() > 0.1 and not (right[..., 0] - right[..., 2] > 60).any()
    assert (wrong[..., 0] - wrong[..., 2] > 60).mean() > 0.1 and not (wrong[..., 2] - wrong[..., 0] > 60).any()


def test_the_command_writes_all_files_and_prints_what_they_say(tmp_path, run, data, images):
    child = run_here(command.main, "--model", run / "best", "--data", data, "--out", tmp_path / "a/b")
    assert child.returncode == 0, child.stderr
    out = tmp_path / "a/b"
    assert sorted(file.name for file in out.iterdir()) == sorted(FILES)
    valid = images.split(seed=3)[1]
    expected = interpret(read_model(run / "best"), images, valid)
    assert f"{len(valid)} images of {data.resolve()} (valid, split seed 3), 3 classes" in child.stdout
    assert f"error rate {100 * expected.error_rate:.1f} % ({expected.wrong.sum()} wrong)" in child.stdout
    metrics = json.loads((run / "best/metrics.json").read_text())
    actual, predicted, count = expected.most_confused()[0]
    assert f"{actual} {predicted} {count}" in [" ".join(line.split()) for line in child.stdout.splitlines()]

    judged = Calibration.from_dict(json.loads((out / "calibration.json").read_text()))
    assert judged.images == len(valid) and judged.answered[0].wrong <= expected.wrong.sum()
    assert judged.error == pytest.approx(metrics["calibration_error"], abs=1e-4)  # cross-fitted, as in training
    assert f"expected calibration error {100 * judged.error:.1f} %" in child.stdout
    answered = f"{judged.answered[0].images / len(valid):.1%}".replace("%", " %")
    assert f"0.5 {answered}" in " ".join(child.stdout.split())

    with (out / "confusion_matrix.csv").open(newline="") as file:
        head, *rows = csv.reader(file)
    assert head == ["actual", *images.classes] and [row[0] for row in rows] == list(images.classes)
    assert [[int(count) for count in row[1:]] for row in rows] == expected.confusion_matrix().tolist()

    with (out / "classes.csv").open(newline="") as file:
        by_class = list(csv.DictReader(file))
    assert sorted(row["class"] for row in by_class) == list(images.classes)
    assert [int(row["train_images"]) for row in by_class] == [16, 16, 16] and sum(int(row["wrong"]) for row in by_class)
    assert {int(row["images"]) for row in by_class} == {4}
    assert float(by_class[0]["error_rate"]) == max(float(row["error_rate"]) for row in by_class)
    assert f"{by_class[0]['wrong']} of 4 wrong" in child.stdout

    with (out / "top_losses.csv").open(newline="") as file:
        losses = list(csv.DictReader(file))
    order = expected.top_losses()
    assert [row["path"] for row in losses] == [expected.paths[i] for i in order]
    assert [float(row["loss"]) for row in losses] == pytest.approx(expected.losses[order].tolist(), abs=1e-5)
    assert [row["predicted"] != row["actual"] for row in losses] == expected.wrong[order].tolist()
    assert float(losses[0]["probability"]) == pytest.approx(expected.probabilities[order[0]].max(), abs=1e-5)

    assert pixels(out / "confusion_matrix.png").std() > 10
    picture = pixels(out / "top_losses.png")
    assert picture.shape[1] > 6 * 224 and picture.shape[0] > 2 * 224
    assert has_colour(picture, interpretation.WRONG) == bool(expected.wrong[order[:12]].any())
    assert has_colour(picture, interpretation.RIGHT) == bool((~expected.wrong[order[:12]]).any())


def test_options_choose_the_images(tmp_path, run, data, images, capsys):
    arguments = ["--data", str(data), "--out", str(tmp_path / "out"), "--top", "2"]

    def said_first(*options: str) -> str:
        assert command.main([*arguments, *options]) == 0
        return "\n".join(capsys.readouterr().out.splitlines()[:2])

    text = said_first("--model", str(run))  # a run's folder stands for its best model
    assert "12 images" in text and "(valid, split seed 3)" in text and "trained on" not in text
    text = said_first("--model", str(run / "best"), "--split", "train")
    assert "48 images" in text and "(train, split seed 3)" in text
    assert "the model was trained on these images: expect more errors on others" in text
    found = interpret(read_model(run / "best"), images, images.split(seed=3)[0])
    judged = Calibration.from_dict(json.loads((tmp_path / "out/calibration.json").read_text()))
    error = expected_calibration_error(found.probabilities, found.labels)
    assert judged.error == pytest.approx(error)  # its temperature has not seen them
    text = said_first("--model", str(run / "best"), "--split", "all", "--tta", "1")
    assert "60 images" in text and "(all)" in text
    assert "the model was trained on some of these images: expect more errors on others" in text
    assert pixels(tmp_path / "out/top_losses.png").shape[1] < 3 * 224  # two images
    assert len((tmp_path / "out/top_losses.csv").read_text().splitlines()) == 1 + 60


# --- Which images validated a model -----------------------------------------------------------------------------------


def labelled(model: Path, data: Path, out: Path, *options: str) -> set[str]:
    assert command.main(["--model", str(model), "--data", str(data), "--out", str(out), *options]) == 0
    with (out / "top_losses.csv").open(newline="") as file:
        return {row["path"] for row in csv.DictReader(file)}


@pytest.mark.parametrize("own_split", [False, True])
def test_an_export_labels_the_images_that_validated_it_wherever_they_lie_now(tmp_path, cache, own_split, capsys):
    data = tmp_path / "data"
    for part, each in {"train": 16, "val": 8}.items() if own_split else {"": 24}.items():
        draw_images(data / part, each=each)
    run = make_run(tmp_path / "run", data, epochs=1, test_share=0.25)
    export.export(run, tmp_path / "exported", check=False)
    known, test = set_aside(find_images(data), 0.25, 3)
    trained, validated = ({known.paths[i] for i in part} for part in presize(known, 40).split(seed=3))
    data.rename(tmp_path / "elsewhere")
    shutil.rmtree(run)
    where = tmp_path / "exported", tmp_path / "elsewhere", tmp_path / "out"
    assert labelled(*where) == validated and len(validated) in (11, 18)
    metrics = json.loads((tmp_path / "exported/metrics.json").read_text())
    assert f"error rate {100 * metrics['error_rate']:.1f} %" in capsys.readouterr().out
    assert labelled(*where, "--split", "train") == trained
    assert labelled(*where, "--split", "test") == set(test.paths) and len(test.paths) == 18
    assert labelled(*where, "--split", "all") == trained | validated | set(test.paths)


def test_a_model_that_does_not_tell_its_split_has_no_valid_images(tmp_path, run, data, capsys):
    model = shutil.copytree(run / "best", tmp_path / "exported")
    (model / "split.json").unlink()
    for split in ("valid", "train", "test"):
        with pytest.raises(ValueError, match=r"does not record which images validated it: .* --split all predicts all"):
            labelled(model, data, tmp_path / "out", "--split", split)
    assert len(labelled(model, data, tmp_path / "out", "--split", "all")) == 60
    assert "the model may have been trained on some of these images" in capsys.readouterr().out
    (model / "split.json").write_text('{"seed": 3}')
    with pytest.raises(ValueError, match=r"split.json is damaged"):
        labelled(model, data, tmp_path / "out")


def test_images_that_are_not_those_of_the_training_are_not_called_valid(tmp_path, run, data, capsys):
    changed = shutil.copytree(data, tmp_path / "changed")
    assert len(labelled(run, changed, tmp_path / "out")) == 12
    shutil.copy(changed / "wren/0.jpg", changed / "wren/new.jpg")
    for split in ("valid", "train"):
        with pytest.raises(ValueError, match=r"changed are not those that .* validated on: some are new, gone, ch"):
            labelled(run, changed, tmp_path / "out", "--split", split)
    capsys.readouterr()
    assert len(labelled(run, changed, tmp_path / "out", "--split", "all")) == 61
    assert "the model may have been trained on some of these images" in capsys.readouterr().out
    for name in ("new.jpg", "0.jpg"):
        (changed / "wren" / name).unlink()
    with pytest.raises(ValueError, match=r"are not those that .* validated on"):
        labelled(run, changed, tmp_path / "out")


def test_an_image_that_can_no_longer_be_read_does_not_shift_the_split_unseen(tmp_path, cache):
    data = draw_images(tmp_path / "data", each=34)
    run = make_run(tmp_path / "run", data, epochs=1)
    file = data / "robin/5.jpg"
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(ValueError, match=r"readable images in .* \(all but 1\) are not those that were readable when"):
        labelled(run, data, tmp_path / "out")


def test_help_is_quick_and_teaches():
    code = (
        "import sys; from trainables import interpret as command\n"
        "try: command.main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'ray', 'matplotlib', 'search'} & set(sys.modules)"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert child.returncode == 0, child.stderr
    assert "python -m trainables.interpret --model exported --data ~/my_images" in child.stdout
    assert "confusion_matrix.png" in child.stdout


def test_bad_input_is_one_paragraph_and_exit_code_2(tmp_path):
    child = run_here(command.main, "--model", tmp_path / "nowhere", "--data", ".")
    assert child.returncode == 2
    assert child.stderr == (
        f"error: There is no folder {tmp_path / 'nowhere'}. Expected an exported model, or best/ of a run.\n"
    )
    assert not child.stdout


def test_what_cannot_be_done_is_said_before_anything_is_labelled(tmp_path, run, data, monkeypatch):
    monkeypatch.setattr(interpretation, "interpret", None)
    given = ["--model", str(run / "best"), "--data", str(data), "--out", str(tmp_path / "out")]
    for option, value, message in (
        ("--top", "0", "--top is 0; expected 1 to 200"),
        ("--tta", "-1", "--tta is -1; expected 0 to"),
        ("--split", "test", "no share was held out"),
        ("--out", str(run / "command.json"), "cannot be written"),
        ("--data", str(tmp_path), "no images"),
        ("--model", str(data), "is incomplete: model.safetensors is missing"),
    ):
        with pytest.raises(ValueError, match=message):
            command.main([*given, option, value])


# --- fastai's own -----------------------------------------------------------------------------------------------------


def fastai_interpretation(found: Interpretation):
    """fastai's object for the same predictions; of a learner it asks only for what `get_preds` returns."""
    import torch
    from fastai.data.transforms import CategoryMap
    from fastai.interpret import ClassificationInterpretation
    from fastai.losses import CrossEntropyLossFlat

    probabilities, labels = torch.as_tensor(found.probabilities), torch.as_tensor(found.labels)

    class Learner:
        def get_preds(self, **_):
            return probabilities, labels, CrossEntropyLossFlat().decodes(probabilities)

    images = SimpleNamespace(vocab=CategoryMap(list(found.classes)), items=list(found.paths))
    losses = CrossEntropyLossFlat(reduction="none")(probabilities.double().log(), labels)  # softmax(log p) is p
    return ClassificationInterpretation(Learner(), images, losses)


@pytest.mark.oracle
@pytest.mark.parametrize("seed", range(6))
def test_matrix_and_confused_pairs_are_fastais(seed):
    pytest.importorskip("fastai")
    found = at_random(seed, classes=2 + 3 * seed)
    theirs = fastai_interpretation(found)
    assert np.array_equal(found.confusion_matrix(), theirs.confusion_matrix())
    for least in (1, 2, 5):
        assert found.most_confused(least) == theirs.most_confused(min_val=least)  # ties included


@pytest.mark.oracle
@pytest.mark.parametrize("seed", range(6))
def test_losses_and_their_order_are_fastais(seed):
    pytest.importorskip("fastai")
    found = at_random(seed)
    theirs = fastai_interpretation(found)
    losses, order = theirs.top_losses(9)
    assert found.losses[found.top_losses(9)] == pytest.approx(losses.numpy(), rel=1e-6)
    assert found.top_losses(9).tolist() == order.tolist()
    paths = theirs.top_losses(9, items=True)[2]
    assert [found.paths[i] for i in found.top_losses(9)] == list(paths)
    assert len(theirs.top_losses()[1]) == len(found.top_losses())
