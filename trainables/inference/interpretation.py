"""Where a trained model errs: its confusion matrix and the images of the largest loss, as fastai's interpretation.

As a command: `python -m trainables.interpret --help`. Imports torch only once there is something to label.
"""

import csv
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from trainables.batches import augmentation, warp_cpu
from trainables.data.presize import PresizedImages
from trainables.inference.model_folder import ModelFolder
from trainables.inference.predictor import Predictor
from trainables.system.text import percent, printable, some
from trainables.training.checkpoint import Preprocessing

LEAST = float(np.finfo(np.float32).smallest_subnormal)  # a probability of 0 counts as this: a loss of 103.3
MOST_SHOWN = 200  # images in one picture
MOST_NUMBERED = 40  # classes in a matrix that is drawn with its counts
LEAST_SIDE = 224  # px; smaller images are enlarged, so that names of breeds fit above
LINES = 10  # of a table in the terminal
RIGHT, WRONG = "#1a7f37", "#c62828"


@dataclass(frozen=True, eq=False)
class Interpretation:
    """What a model says of n labelled images, beside what they are: fastai's `ClassificationInterpretation`."""

    classes: tuple[str, ...]
    """The model's; labels are indices into them, whatever the order in the data set."""
    probabilities: np.ndarray
    """(n, classes) float32."""
    labels: np.ndarray
    """(n,) int64: the actual classes."""
    indices: np.ndarray
    """(n,) int64: which images of the data set these are."""
    paths: tuple[str, ...]
    """Relative to the data set's folder."""

    @cached_property
    def losses(self) -> np.ndarray:
        """(n,) float64, nats: cross-entropy of the probabilities, always finite."""
        actual = self.probabilities[np.arange(len(self.labels)), self.labels].astype(np.float64)
        return np.abs(np.log(np.clip(actual, LEAST, 1.0)))

    @cached_property
    def predicted(self) -> np.ndarray:
        """(n,) int64: the most probable classes."""
        return self.probabilities.argmax(axis=1)

    @cached_property
    def wrong(self) -> np.ndarray:
        """(n,) bool."""
        return self.predicted != self.labels

    @property
    def error_rate(self) -> float:
        return float(self.wrong.mean())

    def confusion_matrix(self) -> np.ndarray:
        """(classes, classes) int64 counts of images; rows are the actual classes, columns the predicted ones."""
        n = len(self.classes)
        return np.bincount(self.labels * n + self.predicted, minlength=n * n).reshape(n, n)

    def most_confused(self, min_count: int = 1) -> list[tuple[str, str, int]]:
        """(actual, predicted, images) of wrong predictions, most images first, ties in the order of the classes.

        Pairs with fewer than `min_count` images are left out. Raises `ValueError` where it is below 1.
        """
        if min_count < 1:
            raise ValueError(f"min_count is {min_count}; expected 1 or more, the fewest images of a pair to be named.")
        counts = self.confusion_matrix()
        np.fill_diagonal(counts, 0)
        pairs = [(self.classes[i], self.classes[j], int(counts[i, j])) for i, j in np.argwhere(counts >= min_count)]
        return sorted(pairs, key=lambda pair: pair[2], reverse=True)

    def top_losses(self, k: int | None = None) -> np.ndarray:
        """(k,) int64: the images of the largest losses, largest first, ties in their order; all of them without `k`.

        Raises `ValueError` where `k` is below 1.
        """
        if k is not None and k < 1:
            raise ValueError(f"k is {k}; expected 1 or more, the number of images to name.")
        return np.argsort(-self.losses, kind="stable")[:k]


def interpret(
    folder: ModelFolder, images: PresizedImages, indices: Sequence[int], *, tta: int = 0, device: str | None = None
) -> Interpretation:
    """Labels the images `indices` as validation did in training; `tta` and `device` are the predictor's.

    Raises `ValueError` where the model does not know a class of the data set (names count, not their order), where the
    images are presized to another size than it wants, where `indices` are empty, and where it gives no numbers.
    """
    indices, wanted = np.asarray(indices, dtype=np.int64), folder.preprocessing.presize
    to_model = match_classes(images.classes, folder)
    if images.size != wanted:
        raise ValueError(f"The images are presized to {images.size} px; the model wants {wanted} px. Presize to that.")
    if not len(indices):
        raise ValueError("There are no images to label: indices are empty. Give one at least.")
    batches = Predictor(folder, device=device, tta=tta).probabilities([images[int(i)] for i in indices])  # no copies
    probabilities = np.concatenate([batch.cpu().numpy() for batch in batches])
    if bad := int((~np.isfinite(probabilities)).any(axis=1).sum()):
        raise ValueError(f"{folder.path} gives probabilities that are no numbers for {bad} images. Take another model.")
    paths = tuple(images.paths[index] for index in indices)
    return Interpretation(folder.labels, probabilities, to_model[images.labels[indices]], indices, paths)


def match_classes(classes: Sequence[str], folder: ModelFolder) -> np.ndarray:
    """(classes,) int64: the model's label of each class of a data set, by name.

    Raises `ValueError` where the model does not know one. That it knows more is no error.
    """
    of_name = {name: label for label, name in enumerate(folder.labels)}
    if unknown := [name for name in classes if name not in of_name]:
        missing = [name for name in folder.labels if name not in set(classes)]
        lacking = f", and the data set lacks {some(missing, 'class', 'classes')} of its own" if missing else ""
        raise ValueError(
            f"{folder.path} does not know {some(unknown, 'class', 'classes')} of the data set{lacking}. "
            "Names are compared letter by letter. Rename or remove them, or give data of the model's classes."
        )
    return np.array([of_name[name] for name in classes], dtype=np.int64)


def centre_views(images: PresizedImages, indices: np.ndarray, preprocessing: Preprocessing) -> list[np.ndarray]:
    """What the network sees of the images: uint8 (image_size, image_size, 3) RGB each."""
    centre = augmentation.centre(1, preprocessing.resize_method)[0]
    return [warp_cpu.apply(images[int(index)], centre, preprocessing.image_size) for index in indices]


# --- Files ------------------------------------------------------------------------------------------------------------


def save_confusion_csv(path: Path, found: Interpretation) -> None:
    """One row per actual class, one column per predicted class."""
    rows = zip(found.classes, found.confusion_matrix().tolist(), strict=True)
    _write_csv(path, [("actual", *found.classes), *((name, *counts) for name, counts in rows)])


def save_losses_csv(path: Path, found: Interpretation) -> None:
    """One row per image, largest loss first; `probability` is that of the predicted class, as in fastai."""
    numbers = [(f"{loss:.6f}", f"{row.max():.6f}") for loss, row in zip(found.losses, found.probabilities, strict=True)]
    rows = [(found.paths[i], *_names(found, i), *numbers[i]) for i in found.top_losses()]
    _write_csv(path, [("path", "predicted", "actual", "loss", "probability"), *rows])


def save_losses_picture(path: Path, found: Interpretation, images: PresizedImages, model: ModelFolder, k: int) -> None:
    """The k images of the largest loss as the PNG `path`: what each was taken for and is, loss and probability."""
    from trainables.inference.pictures import save_grid  # matplotlib is slow to import

    order, titles = found.top_losses(k), []
    for i in order:
        predicted, actual = map(printable, _names(found, i))
        numbers = f"loss {found.losses[i]:.2f}, probability {found.probabilities[i].max():.2f}"
        titles.append(f"predicted {predicted}\nactual {actual}\n{numbers}")
    views = centre_views(images, found.indices[order], model.preprocessing)
    times = math.ceil(LEAST_SIDE / len(views[0]))
    views = [view.repeat(times, axis=0).repeat(times, axis=1) for view in views]
    save_grid(path, views, titles, columns=6, colours=[WRONG if found.wrong[i] else RIGHT for i in order])


def save_confusion_picture(path: Path, found: Interpretation) -> None:
    """The confusion matrix as the PNG `path`: right is blue, wrong red, the darker the larger the share of the row.

    Only classes that occur are drawn, as actual or predicted.
    """
    from matplotlib.figure import Figure

    counts = found.confusion_matrix()
    occur = np.flatnonzero(counts.sum(axis=0) + counts.sum(axis=1))
    counts, names = counts[np.ix_(occur, occur)], [printable(found.classes[i]) for i in occur]
    numbered = len(names) <= MOST_NUMBERED
    cell = 0.32 if numbered else min(0.13, 20 / len(names))  # inches
    shown = range(0, len(names), math.ceil(0.13 / cell))  # every so many classes are named, so that the names fit
    side = max(2.5, cell * len(names))
    figure = Figure(figsize=(side + 3.2, side + 2.6), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.imshow(_colours(counts), interpolation="nearest", zorder=2)
    style = {"fontsize": 9 if numbered else 7, "parse_math": False}
    axes.set_xticks(shown, [names[i] for i in shown], rotation=90, **style)
    axes.set_yticks(shown, [names[i] for i in shown], **style)
    totals, hits = counts.sum(axis=1), counts.diagonal()
    right = axes.secondary_yaxis("right")
    errors = [percent(1 - hits[i] / totals[i], 0) if totals[i] else "no images" for i in shown]
    right.set_yticks(shown, errors, **style)
    for i, j in np.argwhere(counts) if numbered else ():
        style["color"] = "white" if counts[i, j] > 0.35 * totals[i] else "#222222"
        axes.text(j, i, str(counts[i, j]), ha="center", va="center", zorder=3, **style)
    axes.grid(color="#e5e8eb", linewidth=0.8)
    right.set_ylabel("error rate")
    title = f"error rate {percent(found.error_rate)} ({found.wrong.sum()} of {len(found.labels)} images wrong)"
    axes.set(xlabel="predicted", ylabel="actual", title=title)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph \d+")  # letters that the font lacks become boxes
        figure.savefig(path, format="png")


def _colours(counts: np.ndarray) -> np.ndarray:
    """(classes, classes, 4) RGBA in 0..1. By the root of the share: a tenth of a class must not look like nothing."""
    from matplotlib import colormaps

    shade = 0.9 * np.sqrt(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1))
    colours = np.where(np.eye(len(counts), dtype=bool)[..., None], colormaps["Blues"](shade), colormaps["Reds"](shade))
    colours[..., 3] = counts > 0
    return colours


def _write_csv(path: Path, rows: Sequence[tuple]) -> None:
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def _names(found: Interpretation, i: int) -> tuple[str, str]:
    """Predicted and actual class of image i."""
    return found.classes[found.predicted[i]], found.classes[found.labels[i]]
