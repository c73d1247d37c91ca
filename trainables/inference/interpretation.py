"""The errors of a trained model: its confusion matrix and the images with the largest losses, as in fastai.

As a command: `python -m trainables.interpret --help`. Imports torch only in order to predict.
"""

import csv
import itertools
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trainables.batches import augmentation, warp_cpu
from trainables.data.image_file import Pixels
from trainables.data.label_sets import multi_hot, to_cell
from trainables.data.presized_images import PresizedImages
from trainables.inference.heat_maps import HeatMap, heat_maps, overlay
from trainables.inference.model_folder import ModelFolder
from trainables.inference.predictor import Predictor
from trainables.network.calibration import Calibration, Floats, calibration_of, cross_fitted
from trainables.system.text import percent, printable, some
from trainables.training.checkpoint import Preprocessing
from trainables.training.label_set_metrics import (
    Thresholds,
    Truth,
    above_thresholds,
    class_f1,
    label_set_losses,
)

Indices = npt.NDArray[np.int64]
MIN_PROBABILITY = float(np.finfo(np.float32).smallest_subnormal)  # of 0, for a finite loss: 103.3
MAX_SHOWN = 200  # images in one picture
MAX_NUMBERED = 40  # classes in a matrix that is drawn with its counts
MIN_SIDE = 224  # px; smaller images are enlarged, so that names of breeds fit above
RIGHT, WRONG = "#1a7f37", "#c62828"


@dataclass(frozen=True, eq=False)
class Interpretation:
    """A model's predictions of n labelled images and their classes: fastai's `ClassificationInterpretation`."""

    classes: tuple[str, ...]
    """The model's; labels are indices into them and not into the data set's."""
    probabilities: npt.NDArray[np.float32]
    """(n, classes)."""
    labels: Indices
    """(n,) the actual classes."""
    indices: Indices
    """(n,) the images' places in the data set."""
    paths: tuple[str, ...]
    """Relative to the data set's folder."""
    temperature: float = 1.0
    """What the logits were divided by."""
    truth: Truth | None = None
    """(n, classes) where an image may have several labels; `labels` is the rarest of them then."""
    thresholds: Thresholds | None = None
    """Of the classes, with `truth`."""

    def cross_fitted(self) -> Floats:
        """(n, classes) probabilities with temperatures that have not seen their images, where these are the images that
        the model's own temperature was fitted on."""
        logits = self.temperature * np.log(np.clip(self.probabilities, MIN_PROBABILITY, 1.0).astype(np.float64))
        return cross_fitted(logits, self.labels)

    @cached_property
    def losses(self) -> npt.NDArray[np.float64]:
        """(n,) cross-entropy of the probabilities in nats, always finite; binary where there are several labels."""
        if self.truth is not None:
            return label_set_losses(self.probabilities, self.truth)
        actual = self.probabilities[np.arange(len(self.labels)), self.labels].astype(np.float64)
        losses: npt.NDArray[np.float64] = np.abs(np.log(np.clip(actual, MIN_PROBABILITY, 1.0)))
        return losses

    @cached_property
    def predicted(self) -> Indices:
        """(n,) the most probable classes."""
        predicted: Indices = self.probabilities.argmax(axis=1)
        return predicted

    @cached_property
    def wrong(self) -> npt.NDArray[np.bool_]:
        """(n,) whether the prediction is wrong; of several labels, any of them."""
        wrong: npt.NDArray[np.bool_] = self.predicted != self.labels
        return wrong if self.truth is None else (self.predicted_labels != self.truth).any(1)

    @cached_property
    def predicted_labels(self) -> Truth:
        """(n, classes) where an image may have several labels: which ones are above their thresholds."""
        assert self.thresholds is not None
        return above_thresholds(self.probabilities, self.thresholds)

    @property
    def error_rate(self) -> float:
        return float(self.wrong.mean())

    def confusion_matrix(self) -> Indices:
        """(classes, classes) counts of images; rows are the actual classes, columns the predicted ones.

        Raises `ValueError` where an image may have several labels: it is not taken for one other class.
        """
        if self.truth is not None:
            raise ValueError("images with several labels have no confusion matrix. `class_scores` has their classes.")
        n = len(self.classes)
        return np.bincount(self.labels * n + self.predicted, minlength=n * n).reshape(n, n)

    def most_confused(self, min_count: int = 1) -> list[tuple[str, str, int]]:
        """(actual, predicted, images) of wrong predictions, most images first, ties in the order of the classes.

        Without pairs of fewer than `min_count` images. Raises `ValueError` if it is below 1.
        """
        if min_count < 1:
            raise ValueError(f"min_count is {min_count}; expected 1 or more, the fewest images of a pair.")
        counts = self.confusion_matrix()
        np.fill_diagonal(counts, 0)
        pairs = [(self.classes[i], self.classes[j], int(counts[i, j])) for i, j in np.argwhere(counts >= min_count)]
        return sorted(pairs, key=lambda pair: pair[2], reverse=True)

    def class_scores(self) -> list[tuple[str, int, int, int, float, float]]:
        """Class, its images, images predicted as it, both of these, F1 and threshold, for each class of images with
        several labels, worst F1 first."""
        assert self.truth is not None and self.thresholds is not None
        found, truth = self.predicted_labels, self.truth
        counts = (truth.sum(0).tolist(), found.sum(0).tolist(), (found & truth).sum(0).tolist())
        rows = zip(self.classes, *counts, class_f1(found, truth).tolist(), self.thresholds, strict=True)
        return sorted(rows, key=lambda row: row[4])

    def top_losses(self, k: int | None = None) -> Indices:
        """(k,) the images with the largest losses, largest first, ties in their order; all of them without `k`.

        Raises `ValueError` if `k` is below 1.
        """
        if k is not None and k < 1:
            raise ValueError(f"k is {k}; expected 1 or more, the number of images.")
        return np.argsort(-self.losses, kind="stable")[:k]


def interpret(
    folder: ModelFolder, images: PresizedImages, chosen: Iterable[int], *, tta: int = 0, device: str | None = None
) -> Interpretation:
    """Predicts the images `chosen` as validation did in training; `tta` and `device` are the predictor's.

    Raises `ValueError` if the data set has a class that the model does not know (names count, not their order), if the
    images have another size than the model expects, if `chosen` is empty, or if predictions are not finite.
    """
    indices, wanted = np.array(list(chosen), dtype=np.int64), folder.preprocessing.presize
    to_model = match_classes(images.classes, folder)
    if images.size != wanted:
        raise ValueError(
            f"The images are presized to {images.size} px, the model expects {wanted} px. Presize to that."
        )
    if not len(indices):
        raise ValueError("There are no images to predict. Give at least one index.")
    batches = Predictor(folder, device=device, tta=tta).probabilities([images[int(i)] for i in indices])  # no copies
    probabilities = np.concatenate([batch.cpu().numpy() for batch in batches])
    if bad := int((~np.isfinite(probabilities)).any(axis=1).sum()):
        raise ValueError(
            f"{folder.path} predicts probabilities that are not finite for {bad} images. Use another model."
        )
    paths = tuple(images.paths[index] for index in indices)
    labels, thresholds = to_model[images.labels[indices]], folder.preprocessing.thresholds
    truth = None
    if thresholds is not None:
        own = [[label] for label in images.labels] if images.label_sets is None else images.label_sets
        truth = multi_hot([to_model[list(own[i])] for i in indices], len(folder.labels))
    known = folder.temperature, truth, thresholds
    return Interpretation(folder.labels, probabilities, labels, indices, paths, *known)


def match_classes(classes: Sequence[str], folder: ModelFolder) -> Indices:
    """(classes,) the model's label of each class of a data set, by name. The model may have further classes.

    Raises `ValueError` for classes that the model does not know.
    """
    of_name = {name: label for label, name in enumerate(folder.labels)}
    if unknown := [name for name in classes if name not in of_name]:
        missing = [name for name in folder.labels if name not in set(classes)]
        lacking = f", and the data set lacks {some(missing, 'class', 'classes')} of the model" if missing else ""
        raise ValueError(
            f"{folder.path} does not know {some(unknown, 'class', 'classes')} of the data set{lacking}. "
            "Names are compared letter by letter. Rename or remove them, or give data of the model's classes."
        )
    return np.array([of_name[name] for name in classes], dtype=np.int64)


def centre_views(images: PresizedImages, indices: Indices, preprocessing: Preprocessing) -> list[Pixels]:
    """The images as the network sees them: (image_size, image_size, 3) each."""
    centre = augmentation.centre(1, preprocessing.resize_method)[0]
    return [warp_cpu.apply(images[int(index)], centre, preprocessing.image_size) for index in indices]


def explain_losses(found: Interpretation, images: PresizedImages, model: ModelFolder, k: int) -> HeatMap:
    """Heat maps (k, 2, side, side) of the k images with the largest losses: what speaks for the predicted class, and
    what for the actual one. Raises `ValueError` if the network has no map of features."""
    order = found.top_losses(k)
    classes = np.stack([found.predicted[order], found.labels[order]], axis=1)
    return heat_maps(model, [images[int(i)] for i in found.indices[order]], classes)


# --- Files ------------------------------------------------------------------------------------------------------------


def save_confusion_csv(path: Path, found: Interpretation) -> None:
    """One row per actual class, one column per predicted class."""
    rows = zip(found.classes, found.confusion_matrix().tolist(), strict=True)
    _write_csv(path, [("actual", *found.classes), *((name, *counts) for name, counts in rows)])


def save_scores_csv(path: Path, found: Interpretation) -> None:
    """One row per class of images with several labels, worst F1 first."""
    rows = [(*counts, f"{f1:.6f}", f"{threshold:.6f}") for *counts, f1, threshold in found.class_scores()]
    _write_csv(path, [("class", "images", "predicted", "right", "f1", "threshold"), *rows])


def save_calibration(path: Path, found: Interpretation, *, fitted_here: bool) -> Calibration:
    """How far probabilities are to be trusted, as JSON; `fitted_here` if the temperature was fitted on these images."""
    judged = calibration_of(found.cross_fitted() if fitted_here else found.probabilities, found.labels)
    path.write_text(json.dumps(asdict(judged), indent=2) + "\n", encoding="utf-8")
    return judged


def save_losses_csv(path: Path, found: Interpretation) -> None:
    """One row per image, largest loss first; `probability` is that of the predicted class, as in fastai, or of the most
    probable one of several labels."""
    numbers = [(f"{loss:.6f}", f"{row.max():.6f}") for loss, row in zip(found.losses, found.probabilities, strict=True)]
    rows = [(found.paths[i], *_names(found, i), *numbers[i]) for i in found.top_losses()]
    _write_csv(path, [("path", "predicted", "actual", "loss", "probability"), *rows])


def save_losses_picture(
    path: Path, found: Interpretation, images: PresizedImages, model: ModelFolder, k: int, heat: HeatMap | None = None
) -> None:
    """The k images with the largest losses as the PNG `path`: predicted and actual class, loss and probability.

    With the maps `heat` of `explain_losses`, each is followed by what speaks for either class, or for the one if it is
    right.
    """
    from trainables.inference.pictures import enlarged, save_grid  # matplotlib is slow to import

    order = found.top_losses(k)
    views = [enlarged(view, MIN_SIDE) for view in centre_views(images, found.indices[order], model.preprocessing)]
    cells: list[Pixels] = []
    titles: list[str] = []
    colours: list[str] = []
    for row, (i, view) in enumerate(zip(order, views, strict=True)):
        predicted, actual = map(printable, _names(found, i))
        numbers = f"loss {found.losses[i]:.2f}, probability {found.probabilities[i].max():.2f}"
        cells.append(view)
        titles.append(f"predicted {predicted}\nactual {actual}\n{numbers}")
        if heat is not None:
            cells += [overlay(view, each) for each in heat[row]]
            titles += [f"for {predicted}", f"for {actual}"]
            if not found.wrong[i]:
                cells[-1], titles[-1] = np.full_like(view, 255), ""
        colours += [WRONG if found.wrong[i] else RIGHT] * (len(cells) - len(colours))
    save_grid(path, cells, titles, columns=6, colours=colours)


def save_confusion_picture(path: Path, found: Interpretation) -> None:
    """The confusion matrix as the PNG `path`: right is blue, wrong red; darker is a larger share of the row.

    Only classes that occur are drawn, as actual or predicted.
    """
    from matplotlib.figure import Figure

    from trainables.inference.pictures import without_glyph_warnings

    counts = found.confusion_matrix()
    occur = np.flatnonzero(counts.sum(axis=0) + counts.sum(axis=1))
    counts, names = counts[np.ix_(occur, occur)], [printable(found.classes[i]) for i in occur]
    numbered = len(names) <= MAX_NUMBERED
    cell = 0.32 if numbered else min(0.13, 20 / len(names))  # inches
    shown = range(0, len(names), math.ceil(0.13 / cell))  # with a step, so that the names fit
    side = max(2.5, cell * len(names))
    figure = Figure(figsize=(side + 3.2, side + 2.6), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.imshow(_colours(counts), interpolation="nearest", zorder=2)
    style: dict[str, Any] = {"fontsize": 9 if numbered else 7, "parse_math": False}
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
    with without_glyph_warnings():
        figure.savefig(path, format="png")


def _colours(counts: Indices) -> npt.NDArray[np.float64]:
    """(classes, classes, 4) RGBA in 0..1, by the root of the share, so that a tenth of a class is visible."""
    from matplotlib import colormaps

    shade = 0.9 * np.sqrt(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1))
    right = np.eye(len(counts), dtype=bool)[..., None]
    colours: npt.NDArray[np.float64] = np.where(right, colormaps["Blues"](shade), colormaps["Reds"](shade))
    colours[..., 3] = counts > 0
    return colours


def _write_csv(path: Path, rows: Sequence[tuple[object, ...]]) -> None:
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def _names(found: Interpretation, i: int) -> tuple[str, str]:
    """Predicted and actual class of image i, or classes."""
    if found.truth is not None:
        sets = found.predicted_labels[i], found.truth[i]
        predicted, actual = (to_cell([*itertools.compress(found.classes, own)]) for own in sets)
        return predicted, actual
    return found.classes[found.predicted[i]], found.classes[found.labels[i]]
