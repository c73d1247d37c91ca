"""Metrics of images with several labels, and the probabilities from which on a class counts as a label of an image.

Imports no torch.
"""

import numpy as np
import numpy.typing as npt

from trainables.training.metrics import Floats, mean_area

Truth = npt.NDArray[np.bool_]
"""(images, classes) whether an image is of a class."""
Probabilities = npt.NDArray[np.floating]
"""(images, classes), each class by itself."""
Thresholds = tuple[float, ...]
"""A class is predicted where its probability is larger than its one of these, float32 each."""
EVEN = 0.5
TINY = 1e-12
"""Smaller probabilities count as this in a log loss."""


def above_thresholds(probabilities: Probabilities, thresholds: Thresholds) -> Truth:
    """The classes of each image."""
    found: Truth = probabilities.astype(np.float32) > np.asarray(thresholds, dtype=np.float32)
    return found


def best_thresholds(probabilities: Probabilities, truth: Truth) -> Thresholds:
    """The thresholds with the largest F1 of each class. Of several, the nearest to 1/2, which is also that of a class
    without an image. Each lies midway between two probabilities, so that rounding changes no image.

    Chosen and measured on the same images, F1 is a little too good, the more so the fewer images a class has (Lipton et
    al. 2014, "Optimal Thresholding of Classifiers to Maximize F1 Measure").
    """
    columns = zip(probabilities.astype(np.float32).T, truth.T, strict=True)
    return tuple(_best_threshold(scores, own) for scores, own in columns)


def _best_threshold(scores: npt.NDArray[np.float32], own: npt.NDArray[np.bool_]) -> float:
    if not own.any():
        return EVEN
    order = np.argsort(-scores, kind="stable")
    above, below = scores[order], np.append(scores[order][1:], np.float32(0))
    f1 = 2 * np.cumsum(own[order]) / (np.arange(1, len(own) + 1) + own.sum())
    f1[above == below] = 0  # no threshold tells these two apart
    middles = ((above.astype(np.float64) + below) / 2).astype(np.float32)
    middles = np.where(middles < above, middles, below)
    best = np.flatnonzero(f1 == f1.max())
    return float(middles[best[np.abs(middles[best] - EVEN).argmin()]])


def label_set_metrics(probabilities: Probabilities, truth: Truth, thresholds: Thresholds) -> dict[str, float]:
    """The metrics that images with several labels have: `error_rate` is the share of images whose predicted labels are
    not exactly the true ones; `macro_f1`, `auroc` and `map` (mean average precision) are means over the classes.

    Classes without an image count for nothing.
    """
    found, present = above_thresholds(probabilities, thresholds), truth.any(0)
    return {
        "error_rate": float((found != truth).any(1).mean()),
        "macro_f1": float(class_f1(found, truth)[present].mean()) if present.any() else float("nan"),
        "auroc": mean_area(probabilities, truth),
        "map": mean_average_precision(probabilities, truth),
    }


def class_f1(found: Truth, truth: Truth) -> Floats:
    """(classes,) F1 of predicted labels; 0 where a class has neither images nor predictions."""
    f1: Floats = 2 * (found & truth).sum(0) / np.maximum(found.sum(0) + truth.sum(0), 1)
    return f1


def mean_average_precision(probabilities: Probabilities, truth: Truth) -> float:
    """The mean over the classes with images of their average precision: that at the threshold of each image, weighted
    by what it adds to the recall, as scikit-learn's `average_precision_score`; NaN without such a class."""
    own = [_average_precision(p, t) for p, t in zip(probabilities.T, truth.T, strict=True) if t.any()]
    return float(np.mean(own)) if own else float("nan")


def _average_precision(scores: npt.NDArray[np.floating], own: npt.NDArray[np.bool_]) -> float:
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.diff(scores[order]) != 0, True)  # of equal scores
    hits, count = np.cumsum(own[order])[last], np.arange(1, len(own) + 1)[last]
    return float((np.diff(hits, prepend=0) * hits / count).sum() / own.sum())


def label_set_losses(probabilities: Probabilities, truth: Truth) -> Floats:
    """(images,) the binary cross-entropy of each image in nats, summed over the classes."""
    true = np.where(truth, probabilities, 1 - probabilities.astype(np.float64))
    losses: Floats = -np.log(np.maximum(true, TINY)).sum(1)
    return losses
