"""Temperature, calibration error and abstaining: against known truths, other optimizers, loops, and chance."""

import math
from dataclasses import asdict

import numpy as np
import pytest
import timm
import torch

from trainables.network import calibration
from trainables.network.calibration import (
    HIGHEST,
    LOWEST,
    Calibration,
    calibration_metrics,
    calibration_of,
    coverage,
    cross_fitted,
    expected_calibration_error,
    fit_temperature,
    reliability,
    softmax,
)
from trainables.network.model import divide_logits


def drawn(n: int, *, temperature: float = 1.0, classes: int = 5, spread: float = 2.0, seed: int = 0):
    """Logits whose probabilities are right at this temperature, and labels drawn from these."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, spread, (n, classes)).astype(np.float32)
    shares = softmax(logits, temperature).cumsum(axis=1)
    return logits, (rng.random((n, 1)) > shares).sum(axis=1)


def cross_entropy(logits, labels, temperature: float) -> float:
    return float(-np.log(softmax(logits, temperature)[np.arange(len(labels)), labels]).sum())


# --- The temperature --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
def test_the_temperature_that_makes_the_probabilities_right_is_found(temperature):
    logits, labels = drawn(4000, temperature=temperature)
    assert fit_temperature(logits, labels) == pytest.approx(temperature, rel=0.06)


def test_no_other_temperature_has_a_lower_cross_entropy():
    logits, labels = drawn(400, temperature=1.7)
    found = fit_temperature(logits, labels)
    penalty = lambda t: calibration.PRIOR * (1 / t - 1 + math.log(t))  # noqa: E731
    lowest = cross_entropy(logits, labels, found) + penalty(found)
    assert all(
        cross_entropy(logits, labels, other) + penalty(other) > lowest for other in (0.99 * found, 1.01 * found, 1)
    )
    plain = min(np.geomspace(0.5, 5, 2000), key=lambda t: cross_entropy(logits, labels, t))
    assert found == pytest.approx(plain, rel=0.01)  # the penalty weighs little


def test_with_few_images_or_without_mistakes_it_stays_sensible():
    assert fit_temperature(np.empty((0, 3), np.float32), np.empty(0, int)) == pytest.approx(1)
    right = np.array([0, 1, 2] * 4)
    logits = (5 * np.eye(3, dtype=np.float32))[right]
    assert 0.5 < fit_temperature(logits, right) < 1  # the cross-entropy alone is lowest at 0
    assert 1 < fit_temperature(logits[:1], right[:1] + 1) < 10  # one image, labelled wrongly
    assert LOWEST <= fit_temperature(1e-4 * logits, right) <= 1  # a model that is unsure, and always right
    assert fit_temperature(1e6 * logits, (right + 1) % 3) == HIGHEST


def test_it_depends_on_differences_of_logits_alone():
    logits, labels = drawn(100, temperature=2)
    shifted = logits + np.arange(100, dtype=np.float32)[:, None]
    assert fit_temperature(shifted, labels) == pytest.approx(fit_temperature(logits, labels), rel=1e-4)


def test_of_a_great_many_images_a_part_is_enough(monkeypatch):
    logits, labels = drawn(3001, temperature=2)
    monkeypatch.setattr(calibration, "MAX_FITTED", 1000)
    assert fit_temperature(logits, labels) == fit_temperature(logits[::4], labels[::4])


def test_an_images_own_label_does_not_change_its_probabilities():
    logits, labels = drawn(60, temperature=3)
    before, others = cross_fitted(logits, labels), labels.copy()
    others[7] = (others[7] + 1) % 5
    changed = (cross_fitted(logits, others) != before).any(axis=1)
    assert not changed[7] and changed.sum() == 30
    assert before.sum(axis=1) == pytest.approx(1)


def test_one_image_is_judged_without_a_temperature():
    logits, labels = drawn(1)
    assert cross_fitted(logits, labels) == pytest.approx(softmax(logits), rel=1e-5)


def test_a_model_that_is_too_sure_is_told_before_and_calibrated_after():
    logits, labels = drawn(5000, temperature=3)
    found = calibration_metrics(logits, labels)
    assert found["calibration_error_before"] > 0.2
    assert found["calibration_error"] < 0.03
    assert found["temperature"] == fit_temperature(logits, labels)


@pytest.mark.parametrize("arch", ["test_resnet", "test_convnext", "levit_128s"])  # the last one averages two heads
def test_weights_that_include_a_temperature_give_divided_logits(arch):
    model = timm.create_model(arch, num_classes=3).eval()
    side = 224 if arch == "levit_128s" else 64
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        before = model(images)
    divide_logits(model, 2.5)
    with torch.inference_mode():
        torch.testing.assert_close(model(images), before / 2.5)


# --- How good probabilities are ---------------------------------------------------------------------------------------


def test_the_calibration_error_is_a_mean_over_bins_by_hand():
    """Two images at 0.9, one of them right; three at 0.5, all right: 2/5 * |0.5 - 0.9| + 3/5 * |1 - 0.5|."""
    sure, unsure = [0.9, 0.1], [0.5, 0.5]
    shares, labels = np.array([sure, sure, unsure, unsure, unsure]), np.array([0, 1, 0, 0, 0])
    assert expected_calibration_error(shares, labels) == pytest.approx(0.4 * 0.4 + 0.6 * 0.5)
    first, second = reliability(shares, labels)
    assert (first.images, first.confidence, first.accuracy) == (3, 0.5, 1)
    assert (second.images, second.accuracy) == (2, 0.5) and second.confidence == pytest.approx(0.9)
    assert second.low < 0.9 <= second.high == pytest.approx(14 / 15)
    assert second.deviation == pytest.approx(math.sqrt(2 * 0.9 * 0.1) / 2)


def test_bins_are_those_of_the_definition_with_their_upper_edge():
    logits, labels = drawn(700, temperature=2)
    shares = softmax(logits)
    confidence, right = shares.max(axis=1), shares.argmax(axis=1) == labels
    expected = 0.0
    for place in range(10):
        mine = (confidence > place / 10) & (confidence <= (place + 1) / 10)
        if mine.any():
            expected += mine.mean() * abs(right[mine].mean() - confidence[mine].mean())
    assert expected_calibration_error(shares, labels, bins=10) == pytest.approx(expected)
    [edge] = reliability(np.array([[1.0, 0.0]], np.float32), np.array([0]))
    assert (edge.low, edge.high) == (14 / 15, 1.0) and edge.deviation == 0


def test_right_probabilities_show_the_error_that_chance_makes():
    found = [calibration_of(softmax(logits), labels) for logits, labels in (drawn(500, seed=s) for s in range(40))]
    measured, told = np.mean([judged.error for judged in found]), np.mean([judged.error_by_chance for judged in found])
    assert measured == pytest.approx(told, rel=0.15)


def test_who_abstains_below_a_threshold_answers_less_and_better():
    shares = np.array([[0.95, 0.05], [0.9, 0.1], [0.7, 0.3], [0.6, 0.4]])
    labels = np.array([0, 0, 1, 0])
    found = coverage(shares, labels, (0.5, 0.65, 0.9, 0.99))
    assert [(row.threshold, row.images, row.wrong) for row in found] == [
        (0.5, 4, 1), (0.65, 3, 1), (0.9, 2, 0), (0.99, 0, 0),
    ]  # fmt: skip


def test_a_calibration_can_be_written_and_read():
    logits, labels = drawn(50)
    judged = calibration_of(softmax(logits), labels)
    assert Calibration.from_dict(asdict(judged)) == judged and judged.images == 50
    with pytest.raises((KeyError, TypeError)):
        Calibration.from_dict({"bins": [{"low": 0}]})
