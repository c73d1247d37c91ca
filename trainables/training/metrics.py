"""What a search can minimise: metrics of the validation images. Imports no torch: the driver knows their names."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]

METRICS = ("error_rate", "balanced_error", "macro_f1", "auroc", "log_loss", "top5_error", "map")
HIGHER_IS_BETTER = ("macro_f1", "auroc", "map")
"""Of these, a search minimises the distance to 1."""
CLASS_METRICS = ("balanced_error", "macro_f1")
"""Those to which a class of few images counts as much as one of many."""
IMBALANCED = 3.0
"""Largest / median class from which on the error rate mostly measures the large classes."""
ONE_LABEL, SEVERAL_LABELS = ("balanced_error", "top5_error"), ("map",)
"""The metrics that only images with one label have, and those that only images with several labels have."""
MORE_METRICS = ("balanced_error", "macro_f1", "auroc", "top5_error", "map")
"""What `more_metrics` and `label_set_metrics` compute besides the error rate, each those that it has."""


def column(metric: str) -> str:
    """The name of a metric in results and tables."""
    return "valid_loss" if metric == "log_loss" else metric


def to_minimise(metric: str, values: Mapping[str, float]) -> float:
    """What a search with this metric minimises, from all metrics of an epoch."""
    value = values[column(metric)]
    return 1 - value if metric in HIGHER_IS_BETTER else value


def suitable_metric(counts: npt.NDArray[np.int64]) -> str:
    """The metric for classes with so many images: balanced where they are imbalanced.

    >>> suitable_metric(np.array([50, 60, 70])), suitable_metric(np.array([10, 20, 70]))
    ('error_rate', 'balanced_error')
    """
    return "balanced_error" if counts.max() > IMBALANCED * median_class(counts) else "error_rate"


def median_class(counts: npt.NDArray[np.int64]) -> int:
    """The number of images of the median class; of two classes, that of the smaller one."""
    return int(np.sort(counts)[(len(counts) - 1) // 2])


def more_metrics(logits: npt.NDArray[np.floating], labels: Labels) -> dict[str, float]:
    """The metrics of `MORE_METRICS` of logits or probabilities (images, classes) and labels (images,).

    Classes without an image count for nothing.

    >>> logits = np.array([[2.0, 0.0], [1.0, 0.0], [1.5, 0.0], [0.0, 1.0]])
    >>> found = more_metrics(logits, np.array([0, 0, 1, 1]))
    >>> {name: round(value, 3) for name, value in found.items()}
    {'balanced_error': 0.25, 'macro_f1': 0.733, 'auroc': 0.75, 'top5_error': 0.0}
    """
    predicted, num_classes = logits.argmax(1), logits.shape[1]
    right = np.bincount(labels[predicted == labels], minlength=num_classes)
    actual, guessed = (np.bincount(values, minlength=num_classes) for values in (labels, predicted))
    present = actual > 0
    return {
        "balanced_error": balanced_error(logits, labels),
        "macro_f1": float((2 * right[present] / (actual + guessed)[present]).mean()),
        "auroc": auroc(logits, labels),
        "top5_error": top_error(logits, labels, 5),
    }


def balanced_error(logits: npt.NDArray[np.floating], labels: Labels) -> float:
    """The mean of the error rates of the classes that have images. Images with logits that are NaN do not count."""
    known = ~np.isnan(logits).any(1)
    logits, labels = logits[known], labels[known]
    wrong, counts = np.bincount(labels, logits.argmax(1) != labels), np.bincount(labels)
    return float((wrong[counts > 0] / counts[counts > 0]).mean())


def auroc(logits: npt.NDArray[np.floating], labels: Labels) -> float:
    """The area under the ROC curve of each class's probability against all others', averaged over the classes; NaN
    where all images are of one class. (Hanley and McNeil 1982; equal probabilities count half.)"""
    from scipy.special import softmax

    return mean_area(softmax(logits.astype(np.float64), axis=1), labels[:, None] == np.arange(logits.shape[1]))


def mean_area(scores: npt.NDArray[np.floating], truth: npt.NDArray[np.bool_]) -> float:
    """The mean over the classes of the area under the ROC curve of scores (images, classes), where `truth` says which
    images are of a class; those of all images and of none do not count."""
    actual = truth.sum(0).astype(float)
    known = np.flatnonzero((actual > 0) & (actual < len(truth)))
    if not len(known):
        return float("nan")
    ranks, positives = np.apply_along_axis(_ranks, 0, scores[:, known]), actual[known]
    sums = (ranks * truth[:, known]).sum(0) - positives * (positives + 1) / 2
    return float((sums / (positives * (len(truth) - positives))).mean())


def _ranks(scores: npt.NDArray[np.floating]) -> Floats:
    """From 1; equal scores have their mean rank. That is `scipy.stats.rankdata`, whose import takes half a second of
    each worker's start."""
    ordered = np.sort(scores)
    below, up_to = np.searchsorted(ordered, scores, "left"), np.searchsorted(ordered, scores, "right")
    ranks: Floats = (below + up_to + 1) / 2
    return ranks


def top_error(logits: npt.NDArray[np.floating], labels: Labels, count: int) -> float:
    """The share of images whose class is not among the `count` most likely ones; a tie counts as wrong only where too
    many others are more likely."""
    own = np.take_along_axis(logits, labels[:, None], axis=1)
    return float(((logits > own).sum(1) >= count).mean())
