"""The errors of each class with their uncertainty, and the classes that a model never predicts. Imports no torch."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.int64]
CLASSES_FILE, SCORES_FILE = "classes.csv", "class_scores.csv"
"""The second one where an image may have several labels."""


@dataclass(frozen=True, kw_only=True)
class ClassErrors:
    """What a model makes of the images of one class."""

    name: str
    train_images: int | None
    """Those that trained it, where that is known."""
    images: int
    """Predicted ones; 1 or more."""
    wrong: int
    interval: tuple[float, float]
    """The 95 % interval of the error rate (Wilson 1927)."""
    confused_with: str
    """The most frequent wrong class, empty without errors."""
    confused: int
    """Images of that."""

    @property
    def error_rate(self) -> float:
        return self.wrong / self.images


def class_errors(classes: Sequence[str], counts: Counts, train_images: Counts | None = None) -> list[ClassErrors]:
    """The classes that have images, largest error rate first, ties by wrong images and in their order.

    `counts` (classes, classes) is a confusion matrix: rows are the actual classes. `train_images` (classes,) counts
    those that trained the model.
    """
    from scipy.stats import binomtest  # slow to import

    totals, confusions = counts.sum(axis=1), counts - np.diag(counts.diagonal())
    wrong, favourite = confusions.sum(axis=1), confusions.argmax(axis=1)
    intervals: dict[tuple[int, int], tuple[float, float]] = {}
    found = []
    for i in map(int, np.flatnonzero(totals)):
        case = int(wrong[i]), int(totals[i])
        if case not in intervals:  # many classes have the same
            ends = binomtest(*case).proportion_ci(method="wilson")
            intervals[case] = float(ends.low), float(ends.high)
        errors = ClassErrors(
            name=classes[i],
            train_images=None if train_images is None else int(train_images[i]),
            images=case[1],
            wrong=case[0],
            interval=intervals[case],
            confused_with=classes[favourite[i]] if wrong[i] else "",
            confused=int(confusions[i, favourite[i]]),
        )
        found.append(errors)
    return sorted(found, key=lambda errors: (-errors.error_rate, -errors.wrong))


def never_predicted(classes: Sequence[str], counts: Counts) -> list[str]:
    """The classes that have images, of which none nor any other is predicted as one of them."""
    never = (counts.sum(axis=1) > 0) & (counts.sum(axis=0) == 0)
    return [name for name, missing in zip(classes, never, strict=True) if missing]


def save_class_errors(path: Path, found: Sequence[ClassErrors]) -> None:
    """One row per class."""
    head = ("class", "train_images", "images", "wrong", "error_rate", "low", "high", "confused_with", "confused_images")
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(head)
        for each in found:
            shares = (f"{share:.6f}" for share in (each.error_rate, *each.interval))
            known = "" if each.train_images is None else each.train_images
            writer.writerow((each.name, known, each.images, each.wrong, *shares, each.confused_with, each.confused))
