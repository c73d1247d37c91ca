"""Which images are like no other."""

import numpy as np
import pytest

from trainables.probe import outliers
from trainables.probe.outliers import far_from_all


def clusters(n: int = 600, d: int = 64, classes: int = 6, seed: int = 0) -> np.ndarray:
    """Features of images of some classes, float16 as they are cached."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(classes, d))
    return (2 + centres[np.arange(n) % classes] + 0.4 * rng.normal(size=(n, d))).clip(0).astype(np.float16)


@pytest.mark.parametrize("compared", [10_000, 300])
def test_what_is_far_from_all_classes_is_found_and_hardly_any_other(monkeypatch, compared):
    monkeypatch.setattr(outliers, "MAX_COMPARED", compared)
    monkeypatch.setattr(outliers, "BLOCK", 64)
    features = clusters()
    features[[17, 400]] = 3 * np.random.default_rng(1).normal(size=(2, 64)).clip(0)
    found, similarity = far_from_all(features)
    assert found[[17, 400]].all() and found.sum() <= 8  # of 600
    assert set(np.argsort(similarity)[:2]) == {17, 400} and similarity.max() <= 1


def test_similarities_are_the_mean_cosines_to_the_nearest():
    features = clusters(n=80).astype(np.float64)
    x = features / np.linalg.norm(features, axis=1, keepdims=True)
    cosines = x @ x.T
    np.fill_diagonal(cosines, -1)
    expected = np.sort(cosines, axis=1)[:, -outliers.NEIGHBOURS :].mean(axis=1)
    assert far_from_all(features)[1] == pytest.approx(expected, abs=1e-4)


def test_few_images_and_equal_ones_have_none():
    assert not far_from_all(clusters(n=outliers.MIN_IMAGES - 1))[0].any()
    assert not far_from_all(np.ones((100, 8)))[0].any()
