"""The metrics that a search can minimise, beside scikit-learn's."""

import numpy as np
import pytest
from sklearn import metrics as theirs

from trainables.training.metrics import (
    METRICS,
    SEVERAL_LABELS,
    auroc,
    column,
    more_metrics,
    suitable_metric,
    to_minimise,
)


def drawn(num_images: int, num_classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits that are right more often than not, and labels of imbalanced classes."""
    rng = np.random.default_rng(seed)
    shares = 0.6 ** np.arange(num_classes)
    drawn_labels = rng.choice(num_classes, num_images - num_classes, p=shares / shares.sum())
    labels = np.concatenate([np.arange(num_classes), drawn_labels])
    return rng.normal(size=(num_images, num_classes)) + 1.5 * np.eye(num_classes)[labels], labels


def softmax(logits: np.ndarray) -> np.ndarray:
    return np.exp(logits) / np.exp(logits).sum(1, keepdims=True)


@pytest.mark.parametrize(("num_images", "num_classes"), [(400, 7), (90, 2), (2000, 12)])
def test_metrics_are_those_of_scikit_learn(num_images, num_classes):
    logits, labels = drawn(num_images, num_classes)
    assert len(set(labels)) == num_classes
    found, predicted, every = more_metrics(logits, labels), logits.argmax(1), np.arange(num_classes)
    assert found["balanced_error"] == pytest.approx(1 - theirs.balanced_accuracy_score(labels, predicted))
    assert found["macro_f1"] == pytest.approx(theirs.f1_score(labels, predicted, average="macro"))
    probabilities = softmax(logits)
    scores = probabilities[:, 1] if num_classes == 2 else probabilities
    area = theirs.roc_auc_score(labels, scores, multi_class="ovr", labels=None if num_classes == 2 else every)
    assert found["auroc"] == pytest.approx(area)
    if num_classes > 5:
        right = theirs.top_k_accuracy_score(labels, logits, k=5, labels=every)
        assert found["top5_error"] == pytest.approx(1 - right)


def test_classes_without_images_count_for_nothing():
    logits, labels = drawn(200, 4)
    wider = np.concatenate([logits, np.full((200, 2), -50.0)], axis=1)
    ours, same = more_metrics(logits, labels), more_metrics(wider, labels)
    assert {name: same[name] for name in ("balanced_error", "macro_f1", "auroc")} == pytest.approx(
        {name: ours[name] for name in ("balanced_error", "macro_f1", "auroc")}
    )


def test_a_model_that_never_predicts_a_small_class_has_a_small_error_rate_and_a_large_balanced_one():
    labels = np.array([0] * 95 + [1] * 5)
    found = more_metrics(np.tile([1.0, 0.0], (100, 1)), labels)
    assert found["balanced_error"] == 0.5
    assert found["macro_f1"] == pytest.approx(theirs.f1_score(labels, np.zeros(100), average="macro"))
    assert found["auroc"] == 0.5


def test_with_images_of_one_class_alone_the_auroc_is_not_defined():
    assert np.isnan(auroc(np.random.default_rng(0).normal(size=(5, 3)), np.full(5, 1)))


def test_every_metric_becomes_less_as_a_model_gets_better():
    logits, labels = drawn(300, 8)
    before, after = (
        more_metrics(values, labels) | {"error_rate": (values.argmax(1) != labels).mean(), "valid_loss": loss}
        for values, loss in ((logits, 1.0), (logits + 2 * np.eye(8)[labels], 0.5))
    )
    for metric in set(METRICS) - set(SEVERAL_LABELS):
        assert to_minimise(metric, after) < to_minimise(metric, before), metric
        assert column(metric) in before


def test_imbalanced_classes_are_judged_class_by_class():
    assert suitable_metric(np.array([100, 100, 290])) == "error_rate"
    assert suitable_metric(np.array([100, 100, 301])) == "balanced_error"
    assert suitable_metric(np.array([950, 50])) == "balanced_error"
    assert suitable_metric(np.array([50, 150])) == "error_rate"
