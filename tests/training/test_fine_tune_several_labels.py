"""Trainings on images with several labels: what they reach, and what holds for them as for all trainings."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from several_labels import draw_animals, draw_lights
from sklearn import metrics as theirs
from weights import draw_weights

from trainables.data.label_sets import multi_hot
from trainables.data.presize import presize
from trainables.data.presized_images import PresizedImages
from trainables.inference.model_folder import read_model
from trainables.inference.predictor import Predictor
from trainables.recipe import Recipe
from trainables.training.checkpoint import PREPROCESSING_FILE, write
from trainables.training.fine_tune import FineTune

pytestmark = pytest.mark.usefixtures("one_thread", "search_cache")

SMALL = {"arch": "test_resnet", "pretrained": False, "presize": 32, "image_size": 32, "batch_size": 8, "hidden": 16}
SMALL |= {"freeze_epochs": 0, "epochs": 1, "lr_max": 1e-2, "lr_ratio": 1, "bn_momentum": 0.5, "precision": "fp32"}
PROBE = {"pretrained": True, "head_init": "probe", "epochs": 0}
HARD = {"head": "mlp", "mixup_alpha": 0.4, "smoothing": 0.1, "class_weights": "inverse", "sampler": "balanced"}


@pytest.fixture(scope="module")
def lights(tmp_path_factory, search_cache) -> PresizedImages:
    return presize(draw_lights(tmp_path_factory.mktemp("lights")), 32)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return draw_weights(tmp_path_factory.mktemp("weights"), "test_resnet")


def trained(images: PresizedImages, weights: Path | None = None, **settings) -> tuple[FineTune, dict]:
    training = FineTune(Recipe(**SMALL | settings), images, weights=weights)
    metrics = {}
    while training.epochs_done < training.recipe.total_epochs:
        metrics = training.run_epoch()
    return training, metrics


def saved(training: FineTune, folder: Path) -> Path:
    """The model's folder."""
    write(folder, training.state())
    (folder / "recipe.json").write_text(json.dumps(training.recipe.to_dict()))
    (folder / "labels.json").write_text(json.dumps(training.images.classes))
    return folder


# --- What they reach --------------------------------------------------------------------------------------------------


def test_a_training_tells_the_labels_of_animals_that_it_has_not_seen(tmp_path):
    """Macro F1 at the thresholds that its validation images chose: three muzzles, four coats, and night."""
    animals = draw_animals(tmp_path / "animals", each=24)
    new = np.arange(len(animals.paths)) % 6 == 0
    images = presize(animals.only(np.flatnonzero(~new)), 112)
    settings = {"arch": "tf_efficientnet_lite0", "pretrained": True, "presize": 112, "image_size": 112, "tta_views": 0}
    training, metrics = trained(images, **settings, epochs=2, batch_size=16, lr_max=3e-3, lr_ratio=100, bn_momentum=0.1)
    assert metrics["macro_f1"] >= 0.8

    unseen = animals.only(np.flatnonzero(new))
    found = Predictor(read_model(saved(training, tmp_path / "model"))).predict(unseen.root / p for p in unseen.paths)
    label_of = {name: label for label, name in enumerate(animals.classes)}
    predicted = multi_hot([[label_of[name] for name in one.chosen] for one in found], animals.num_classes)
    truth = multi_hot(unseen.label_sets, animals.num_classes)
    assert theirs.f1_score(truth, predicted, average="macro") >= 0.8


@pytest.mark.parametrize("settings", [PROBE, PROBE | {"head": "mlp"}, PROBE | {"probe_views": 1}], ids=str)
def test_a_probe_tells_lights_apart_and_some_are_off(lights, weights, settings):
    _, metrics = trained(lights, weights, **settings)
    assert metrics["stage"] == "probe"
    assert metrics["macro_f1"] > 0.85 and metrics["map"] > 0.85 and metrics["auroc"] > 0.85
    assert metrics["error_rate"] < 0.4 and metrics["accuracy"] == 1 - metrics["error_rate"]
    assert 0 <= metrics["expected_error_rate"] < 0.5
    assert "balanced_error" not in metrics and "top5_error" not in metrics


@pytest.mark.parametrize("settings", [{}, HARD], ids=["plain", "hard"])
def test_a_training_from_scratch_learns_lights(lights, settings):
    training, metrics = trained(lights, **settings, epochs=16)
    assert metrics["auroc"] > 0.9
    assert np.isfinite([metrics["train_loss"], metrics["tta_error_rate"]]).all()
    assert training.preprocessing.thresholds == training.thresholds and len(training.thresholds) == 3


# --- What holds for all trainings -------------------------------------------------------------------------------------


def test_before_it_learns_every_label_is_as_likely_as_not(lights):
    training = FineTune(Recipe(**SMALL), lights)
    assert training.evaluate()["valid_loss"] == pytest.approx(3 * np.log(2), rel=0.02)


def test_it_continues_exactly_from_an_epoch_with_its_thresholds(lights):
    whole = FineTune(Recipe(**SMALL | {"epochs": 2}), lights)
    whole.run_epoch()
    state, again = whole.state(), FineTune(Recipe(**SMALL | {"epochs": 2}), lights)
    again.load_state(state)
    assert again.thresholds == whole.thresholds and again.state()[PREPROCESSING_FILE] == state[PREPROCESSING_FILE]
    rest, repeated = whole.run_epoch(), again.run_epoch()
    for name in ("train_loss", "valid_loss", "macro_f1", "map", "error_rate", "tta_error_rate"):
        assert rest[name] == repeated[name], name


def test_a_batch_in_parts_gives_the_same_losses(lights):
    recipe = Recipe(**SMALL | {"train_bn": "never", "mixup_alpha": 0.3})
    whole, parts = (FineTune(recipe, lights, batch_parts=number).run_epoch() for number in (1, 2))
    assert parts["train_loss"] == pytest.approx(whole["train_loss"], rel=1e-4)


def test_on_all_images_it_keeps_the_thresholds_that_it_is_given(lights):
    training = FineTune(Recipe(**SMALL), lights, all_images=True, thresholds=(0.2, 0.3, 0.4))
    training.run_epoch()
    assert training.preprocessing.thresholds == (0.2, 0.3, 0.4)


def test_predictions_are_those_of_the_validation(lights, tmp_path):
    training, metrics = trained(lights, epochs=3)
    predictor = Predictor(read_model(saved(training, tmp_path)), batch_size=5)
    files = [lights.root / lights.paths[i] for i in training.valid_indices]
    found = predictor.predict(files, top=1)
    exact = [
        set(one.chosen) == set(lights.label_names(i).split("; ")) - {""}
        for one, i in zip(found, training.valid_indices, strict=True)
    ]
    assert 1 - np.mean(exact) == pytest.approx(metrics["error_rate"])
    assert all(len(one.labels) == len(one.probabilities) == 1 for one in found)
    [one] = predictor.predict(files[0])
    logits = torch.cat(list(predictor.logits([lights[int(training.valid_indices[0])]])))
    expected = dict(zip(lights.classes, logits.sigmoid()[0].tolist(), strict=True))
    assert dict(zip(one.labels, one.probabilities, strict=True)) == pytest.approx(expected, abs=1e-5)
    averaged = Predictor(read_model(tmp_path), tta=2).predict(files[0])[0]
    assert averaged.probabilities != one.probabilities and all(0 < p < 1 for p in averaged.probabilities)


def test_models_of_one_label_have_no_thresholds(colour_images, tmp_path):
    training, _ = trained(colour_images, presize=48)
    assert "thresholds" not in json.loads(training.state()[PREPROCESSING_FILE])
    found = read_model(saved(training, tmp_path))
    assert found.preprocessing.thresholds is None
    [one] = Predictor(found).predict(colour_images.root / colour_images.paths[0])
    assert one.chosen == one.labels[:1] and sum(one.probabilities) == pytest.approx(1, abs=1e-5)
