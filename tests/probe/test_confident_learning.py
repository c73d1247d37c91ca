"""Confident learning finds wrong labels, exactly where cleanlab does."""

import numpy as np
import pytest

from trainables.probe.confident_learning import count_label_issues, find_label_issues, thresholds


def drawn(n: int, classes: int, *, flipped: int, sharpness: float = 4.0, seed: int = 0):
    """Probabilities of a fair model, labels, and which of these are wrong."""
    rng = np.random.default_rng(seed)
    true = rng.integers(0, classes, n)
    logits = rng.normal(size=(n, classes)) + sharpness * np.eye(classes)[true]
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels, wrong = true.copy(), rng.permutation(n)[:flipped]
    labels[wrong] = (true[wrong] + rng.integers(1, classes, flipped)) % classes
    return probabilities.astype(np.float32), labels, wrong


def test_as_many_labels_are_wrong_as_another_class_claims_and_the_least_probable_ones_are_those():
    probabilities = np.array(
        [[0.9, 0.1], [0.7, 0.3], [0.1, 0.9], [0.45, 0.55], [0.2, 0.8], [0.3, 0.7], [0.6, 0.4]], dtype=np.float32
    )
    labels = np.array([0, 0, 0, 0, 1, 1, 1])
    assert thresholds(probabilities, labels).tolist() == pytest.approx([0.5375, 1.9 / 3])
    found = find_label_issues(probabilities, labels)
    # Of image 3 the class 1 is more probable, but not as much as of the images that are labelled 1.
    assert count_label_issues(probabilities, labels) == 2
    assert found.indices.tolist() == [2, 6] and found.suggested.tolist() == [1, 0]
    assert found.scores.tolist() == pytest.approx([0.1, 0.4])


@pytest.mark.parametrize("classes", [2, 5, 40])
def test_flipped_labels_are_found_and_the_true_ones_suggested(classes):
    probabilities, labels, wrong = drawn(2000, classes, flipped=100, sharpness=7)
    true = probabilities.argmax(axis=1)
    found = find_label_issues(probabilities, labels)
    first = found.indices[:100]
    assert np.isin(first, wrong).mean() > 0.95
    assert (found.suggested[:100] == true[first]).all()
    assert (np.diff(found.scores) >= 0).all() and found.scores.max() < 0.5


def test_labels_that_are_right_leave_no_suspects():
    probabilities, labels, _ = drawn(500, 5, flipped=0, sharpness=30)
    assert len(find_label_issues(probabilities, labels).indices) == 0


def test_a_class_without_images_is_never_suggested():
    probabilities, labels, _ = drawn(300, 4, flipped=30)
    probabilities = np.insert(probabilities, 2, 0.3, axis=1)
    assert 2 not in find_label_issues(probabilities, labels + (labels > 1)).suggested


@pytest.mark.oracle
@pytest.mark.parametrize("sharpness", [1.0, 3.0, 6.0])
@pytest.mark.parametrize("classes", [2, 7, 60])
def test_they_are_cleanlabs_in_the_same_order(classes, sharpness):
    from cleanlab.count import get_confident_thresholds, num_label_issues
    from cleanlab.filter import find_label_issues as find

    probabilities, labels, _ = drawn(1500, classes, flipped=150, sharpness=sharpness, seed=classes)
    how = {"filter_by": "low_self_confidence", "return_indices_ranked_by": "self_confidence", "n_jobs": 1}
    expected = find(labels, probabilities, **how)
    assert thresholds(probabilities, labels) == pytest.approx(get_confident_thresholds(labels, probabilities), rel=1e-5)
    assert count_label_issues(probabilities, labels) == num_label_issues(labels, probabilities) > 20
    # cleanlab's have some whose label is the most probable class after all, in place of our last ones.
    expected = expected[probabilities[expected].argmax(axis=1) != labels[expected]]
    assert find_label_issues(probabilities, labels).indices[: len(expected)].tolist() == expected.tolist()


def test_what_does_not_fit_is_refused_in_words():
    probabilities, labels, _ = drawn(20, 3, flipped=0)
    with pytest.raises(ValueError, match=r"shape \(20, 3\) and labels \(19,\), expected"):
        find_label_issues(probabilities, labels[:-1])
    with pytest.raises(ValueError, match="labels are from 0 to 3, expected 0 to 2"):
        find_label_issues(probabilities, np.append(labels[:-1], 3))
    probabilities[4, 1] = np.nan
    with pytest.raises(ValueError, match="1 images have probabilities that are not finite"):
        find_label_issues(probabilities, labels)
