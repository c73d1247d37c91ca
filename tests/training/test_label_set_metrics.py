"""The metrics of images with several labels, beside scikit-learn's, and their thresholds."""

import numpy as np
import pytest
from sklearn import metrics as theirs

from trainables.training.label_set_metrics import (
    above_thresholds,
    best_thresholds,
    class_f1,
    label_set_losses,
    label_set_metrics,
)


def drawn(num_images: int, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities that tell more than nothing, rounded so that some are equal, and label sets of rare classes."""
    rng = np.random.default_rng(num_images)
    truth = rng.random((num_images, num_classes)) < 0.6 ** np.arange(1, num_classes + 1)
    scores = 1 / (1 + np.exp(-rng.normal(1.5 * truth - 2, 1)))
    return scores.round(2).astype(np.float32), truth


@pytest.mark.parametrize(("num_images", "num_classes"), [(400, 5), (60, 3)])
def test_metrics_are_those_of_scikit_learn(num_images, num_classes):
    probabilities, truth = drawn(num_images, num_classes)
    thresholds = best_thresholds(probabilities, truth)
    found, predicted = label_set_metrics(probabilities, truth, thresholds), above_thresholds(probabilities, thresholds)
    assert found["error_rate"] == pytest.approx(1 - theirs.accuracy_score(truth, predicted))
    assert found["macro_f1"] == pytest.approx(theirs.f1_score(truth, predicted, average="macro"))
    assert found["auroc"] == pytest.approx(theirs.roc_auc_score(truth, probabilities))
    assert found["map"] == pytest.approx(theirs.average_precision_score(truth, probabilities))
    losses = sum(theirs.log_loss(own, p) for own, p in zip(truth.T, probabilities.astype(float).T, strict=True))
    assert label_set_losses(probabilities, truth).mean() == pytest.approx(losses, rel=1e-5)


def test_no_threshold_gives_a_class_a_larger_f1():
    probabilities, truth = drawn(300, 4)
    best = class_f1(above_thresholds(probabilities, best_thresholds(probabilities, truth)), truth)
    for threshold in np.linspace(0, 1, 201):
        assert (class_f1(above_thresholds(probabilities, (threshold,) * 4), truth) <= best + 1e-12).all()


def test_of_equally_good_thresholds_the_nearest_to_one_half_is_taken_midway_between_two_images():
    probabilities = np.array([[0.9], [0.8], [0.3], [0.1]], dtype=np.float32)
    assert best_thresholds(probabilities, np.array([[1], [1], [0], [0]], bool)) == pytest.approx((0.55,))
    assert best_thresholds(probabilities, np.ones((4, 1), bool)) == pytest.approx((0.05,))
    assert best_thresholds(probabilities, np.zeros((4, 1), bool)) == (0.5,)


def test_a_threshold_tells_neighbouring_numbers_apart():
    low = np.float32(0.3)
    high = np.nextafter(low, np.float32(1))
    probabilities, truth = np.array([[high], [low]]), np.array([[True], [False]])
    assert (above_thresholds(probabilities, best_thresholds(probabilities, truth)) == truth).all()


def test_classes_without_images_count_for_nothing():
    probabilities, truth = drawn(200, 3)
    wider = np.hstack([probabilities, np.full((200, 1), 0.1, np.float32)]), np.hstack([truth, np.zeros((200, 1), bool)])
    ours = label_set_metrics(probabilities, truth, best_thresholds(probabilities, truth))
    assert label_set_metrics(*wider, best_thresholds(*wider)) == pytest.approx(ours)


def test_without_any_label_there_is_nothing_to_measure_but_exact_matches():
    found = label_set_metrics(np.full((5, 2), 0.2), np.zeros((5, 2), bool), (0.5, 0.5))
    assert found["error_rate"] == 0
    assert all(np.isnan(found[name]) for name in ("macro_f1", "auroc", "map"))
