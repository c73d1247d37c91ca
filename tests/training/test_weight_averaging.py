"""WiSE-FT and model soups: which means of weights a training ends with."""

import itertools
from pathlib import Path

import pytest
import safetensors.torch
import torch
from weights import draw_weights

from trainables.network.calibration import fit_temperature
from trainables.recipe import WISE_ALPHAS, Recipe
from trainables.training.checkpoint import WEIGHTS_FILE
from trainables.training.fine_tune import FineTune
from trainables.training.weight_averaging import Weights, between, mean, stir_in, weights_of

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {"arch": "test_resnet", "presize": 48, "image_size": 32, "batch_size": 4, "freeze_epochs": 0, "epochs": 2}
SMALL |= {"tta_views": 0, "precision": "fp32"}
RECIPE = Recipe(**SMALL, pretrained=False, lr_max=1e-2, lr_ratio=1)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Path:
    return draw_weights(tmp_path_factory.mktemp("weights"), "test_resnet")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch, colour_images) -> None:
    """Of features."""
    monkeypatch.setenv("FINETUNE_SEARCH_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def learned(colour_images) -> bytes:
    """The weights of a training that has not seen the images for validation."""
    training = FineTune(RECIPE, colour_images)
    for _ in range(RECIPE.total_epochs):
        training.run_epoch()
    return training.state()[WEIGHTS_FILE]


@pytest.fixture
def on_all_images(colour_images, learned) -> FineTune:
    """A training on all images that has ended, near the first one's weights."""
    training = FineTune(RECIPE, colour_images, all_images=True, temperature=0.7)
    near = {name: value * 1.01 if value.is_floating_point() else value for name, value in weights(learned).items()}
    training.network.model.load_state_dict(near)
    training.epochs_done = RECIPE.total_epochs
    return training


def weights(content: bytes) -> dict[str, torch.Tensor]:
    return safetensors.torch.load(content)


def changed(content: bytes, **values: torch.Tensor) -> bytes:
    """The weights with other values by the ends of their names."""
    known = weights(content)
    replaced = {name: value for name in known for end, value in values.items() if name.endswith(end.replace("_", "."))}
    assert len(replaced) == len(values)
    return safetensors.torch.save(known | replaced)


# --- WiSE-FT: between the start and the end ---------------------------------------------------------------------------


def trained(images, weights: Path, stop_after: int | None = None, **settings) -> tuple[FineTune, list[dict]]:
    """A training from the probe's head, at a rate that is far too high by default, and its results."""
    recipe = Recipe(**SMALL | {"head_init": "probe", "lr_max": 0.1, "lr_ratio": 1, "wise_ft": True} | settings)
    training = FineTune(recipe, images, weights=weights)
    return training, [training.run_epoch() for _ in range(stop_after or 1 + recipe.total_epochs)]


def at(training: FineTune, start: Weights, end: Weights, alpha: float) -> float:
    """The calibrated validation loss there."""
    training.network.model.load_state_dict(between(start, end, alpha))
    return training.calibrated_loss(training.valid_logits())[0]


def test_a_training_that_went_wrong_ends_near_its_start(colour_images, pretrained):
    _, plain = trained(colour_images, pretrained, wise_ft=False)
    training, pulled = trained(colour_images, pretrained)
    assert [result["train_loss"] for result in plain] == [result["train_loss"] for result in pulled]
    assert "wise_alpha" not in plain[-1] and "wise_alpha" not in pulled[-2]
    assert pulled[-1]["wise_alpha"] in WISE_ALPHAS
    assert pulled[-1]["error_rate"] < plain[-1]["error_rate"]
    assert pulled[-1]["error_rate"] == training.evaluate()["error_rate"]


def test_it_ends_where_the_validation_loss_stops_falling(colour_images, pretrained):
    end, _ = trained(colour_images, pretrained, wise_ft=False)
    begun, _ = trained(colour_images, pretrained, stop_after=1)
    start, final = weights_of(begun), weights_of(end)
    losses = [at(end, start, final, alpha) for alpha in (1.0, *WISE_ALPHAS)]
    falling = next((i for i, pair in enumerate(itertools.pairwise(losses)) if pair[1] >= pair[0]), len(WISE_ALPHAS))
    training, results = trained(colour_images, pretrained)
    assert results[-1]["wise_alpha"] == (1.0, *WISE_ALPHAS)[falling] < 1
    expected = between(start, final, results[-1]["wise_alpha"])
    for name, value in weights_of(training).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7)


def test_a_training_that_goes_well_stays_at_its_end(colour_images, pretrained):
    (training, results), (plain, _) = (
        trained(colour_images, pretrained, lr_max=1e-4, head_softening=0.9, wise_ft=wise) for wise in (True, False)
    )
    assert results[-1]["wise_alpha"] == 1
    assert all(torch.equal(value, weights_of(plain)[name]) for name, value in weights_of(training).items())


def test_a_resumed_training_ends_at_the_same_weights(colour_images, pretrained):
    whole, results = trained(colour_images, pretrained)
    half, _ = trained(colour_images, pretrained, stop_after=2)
    resumed = FineTune(half.recipe, colour_images, weights=pretrained, load_pretrained=False)
    resumed.load_state(half.state())
    assert resumed.run_epoch()["wise_alpha"] == results[-1]["wise_alpha"]
    assert all(torch.equal(value, weights_of(whole)[name]) for name, value in weights_of(resumed).items())


def test_on_all_images_the_winners_share_of_the_way_counts(colour_images, pretrained):
    recipe = Recipe(**SMALL | {"head_init": "probe", "lr_max": 1e-4, "wise_ft": True})
    ends = {}
    for alpha in (0.0, 0.5, 1.0):
        training = FineTune(recipe, colour_images, weights=pretrained, all_images=True, wise_alpha=alpha)
        results = [training.run_epoch() for _ in range(3)]
        assert results[-1]["wise_alpha"] == alpha
        ends[alpha] = weights_of(training)
    for name, value in ends[0.5].items():
        torch.testing.assert_close(value, between(ends[0.0], ends[1.0], 0.5)[name], rtol=1e-5, atol=1e-7)


# --- Soups: the mean of several trainings -----------------------------------------------------------------------------


def test_fractions_are_averaged_and_counters_are_the_last_models():
    found = mean([{"a": torch.tensor(1.0), "n": torch.tensor(3)}, {"a": torch.tensor(4.0), "n": torch.tensor(8)}])
    assert (found["a"].item(), found["n"].item()) == (2.5, 8)


def test_the_network_becomes_the_mean_of_all_models_that_do_not_raise_the_validation_loss(on_all_images, learned):
    own = weights_of(on_all_images)
    head = weights(learned)["fc.weight"]
    opposite = changed(learned, fc_weight=-3 * head)  # which takes all labels for others
    sharper = changed(learned, fc_weight=1.2 * head)  # only the temperature sees that
    metrics = stir_in(on_all_images, [learned, opposite, sharper])
    assert metrics["averaged"] == 3
    expected = mean([own, weights(learned), weights(sharper)])
    for name, value in on_all_images.network.model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7)
    assert metrics["error_rate"] == on_all_images.evaluate()["error_rate"]


def test_the_temperature_is_that_of_the_models_that_have_not_seen_the_validation_images(on_all_images, learned):
    stir_in(on_all_images, [learned])
    on_all_images.network.model.load_state_dict(weights(learned))
    logits, labels = on_all_images.valid_logits(), on_all_images.inputs.labels[on_all_images.valid_indices]
    assert on_all_images.temperature == fit_temperature(logits.numpy(), labels.numpy()) != 0.7


def test_models_of_other_shapes_are_left_out(on_all_images, learned):
    own = weights_of(on_all_images)
    wider = changed(learned, fc_weight=torch.ones(7, 3))
    assert stir_in(on_all_images, [wider, b"\x02\x00\x00\x00\x00\x00\x00\x00{}"])["averaged"] == 1
    assert on_all_images.temperature == 0.7
    assert all(torch.equal(value, own[name]) for name, value in on_all_images.network.model.state_dict().items())
