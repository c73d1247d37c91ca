"""Confident learning: which labels are wrong, by probabilities of a model that has not seen the images.

Northcutt, Jiang and Chuang 2021, "Confident Learning: Estimating Uncertainty in Dataset Labels"
(https://arxiv.org/abs/1911.00068). The confident joint says how many labels are wrong; which ones, the probability of
the label, lowest first, as in cleanlab's `find_label_issues(filter_by="low_self_confidence")`: more of these labels are
wrong than of the images off the joint's diagonal themselves, or of those that cleanlab gives by default, see
`bench/suspects.py`. Imports no torch.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Probabilities = npt.NDArray[np.float32]
"""(images, classes)"""
Indices = npt.NDArray[np.int64]
ROUNDING = 1e-6
"""By so much a probability may miss its threshold."""


@dataclass(frozen=True, eq=False)
class LabelIssues:
    """Images whose label is probably wrong, the most suspicious first; arrays of one length."""

    indices: Indices
    suggested: Indices
    """The class that they probably are of."""
    scores: Probabilities
    """The probabilities of their labels."""


def find_label_issues(probabilities: Probabilities, labels: Indices) -> LabelIssues:
    """Of the images (n,) whose label is not the most probable class, those with the least probable labels, as many as
    `count_label_issues` says. Raises `ValueError` for probabilities and labels that do not fit each other, or that are
    not finite."""
    _check(probabilities, labels)
    predicted, scores = probabilities.argmax(axis=1), probabilities[np.arange(len(labels)), labels]
    doubted = np.flatnonzero(predicted != labels)
    order = doubted[np.argsort(scores[doubted], kind="stable")]
    order = order[: count_label_issues(probabilities, labels)]
    return LabelIssues(order, predicted[order], scores[order])


def count_label_issues(probabilities: Probabilities, labels: Indices) -> int:
    """The images that count off the diagonal of the confident joint, and whose label is not the most probable class.

    An image counts as of a class whose probability is at least the threshold of that class; among several such classes
    the most probable one of all counts.
    """
    confident = probabilities >= thresholds(probabilities, labels) - ROUNDING
    predicted, counts = probabilities.argmax(axis=1), confident.sum(axis=1)
    true = np.where(counts > 1, predicted, confident.argmax(axis=1))
    return int(((counts > 0) & (true != labels) & (predicted != labels)).sum())


def thresholds(probabilities: Probabilities, labels: Indices) -> Probabilities:
    """(classes,) the mean probability of each class over the images with that label; above 1 for a class without."""
    num_classes = probabilities.shape[1]
    own = probabilities[np.arange(len(labels)), labels]
    counts = np.bincount(labels, minlength=num_classes)
    means = np.bincount(labels, own, num_classes) / np.maximum(counts, 1)
    return np.where(counts, means, 2.0).astype(np.float32)


def _check(probabilities: Probabilities, labels: Indices) -> None:
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1] or probabilities.shape[1] < 2:
        raise ValueError(
            f"probabilities have the shape {probabilities.shape} and labels {labels.shape}, expected (images, classes) "
            "and (images,), with two classes or more"
        )
    if len(labels) and not 0 <= labels.min() <= labels.max() < probabilities.shape[1]:
        raise ValueError(
            f"labels are from {labels.min()} to {labels.max()}, expected 0 to {probabilities.shape[1] - 1}"
        )
    if wrong := int((~np.isfinite(probabilities)).any(axis=1).sum()):
        raise ValueError(f"{wrong} images have probabilities that are not finite, expected numbers from 0 to 1")
