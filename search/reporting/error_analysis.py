"""What the winner gets wrong: its confusion matrix and top losses, saved in the run's folder for its report; and which
images may be labelled wrongly.

`python -m trainables.interpret` computes them in a separate process, so this one needs no torch.
"""

import base64
import csv
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from search.cli.errors import error_line
from search.runs.run_record import RunRecord
from trainables.batches import augmentation, warp_cpu
from trainables.data.address import DataAddress
from trainables.data.image_file import WHITE_16_BIT, Pixels, UnreadableImage, read_image, resize
from trainables.data.layouts import root_of
from trainables.data.source import folder_of
from trainables.inference.class_errors import (
    CLASSES_FILE,
    SCORES_FILE,
    ClassErrors,
    class_errors,
    never_predicted,
)
from trainables.inference.heat_maps import HEAT_MAPS_FILE, HeatMap, overlay, read_heat_maps
from trainables.inference.model_folder import METRICS_FILE, read_json
from trainables.inference.suspects import SUSPECTS_FILE
from trainables.network.calibration import Calibration
from trainables.system.text import last_line, printable, shell_command, some_of
from trainables.training.checkpoint import PREPROCESSING_FILE

NUM_LOSSES = 12
THUMBNAIL = 176  # px
NO_ANALYSIS = "The winner's errors could not be analysed"
NO_SUSPECTS = "Wrong labels were not looked for"
LOSSES_FILE = "top_losses.csv"


@dataclass(frozen=True)
class Loss:
    """One of the images that the winner is most wrong about."""

    path: str
    actual: str
    predicted: str
    loss: float
    probability: float
    image: str
    """A data URL, empty if the image is not on this machine."""
    heat: tuple[str, ...]
    """Data URLs of the image with what speaks for the predicted class, and for the actual one if that is another; empty
    without heat maps."""


@dataclass(frozen=True)
class ClassScore:
    """How the winner does on one of several labels."""

    name: str
    images: int
    predicted: int
    right: int
    f1: float
    threshold: float


@dataclass(frozen=True, eq=False)
class ErrorAnalysis:
    """The winner's errors on the validation images."""

    classes: tuple[str, ...]
    counts: npt.NDArray[np.int64] | None
    """Images (classes, classes): rows are the actual classes, columns the predicted ones. None where an image may have
    several labels."""
    by_class: tuple[ClassErrors, ...]
    """Those with validation images, largest error rate first; none without counts."""
    losses: tuple[Loss, ...]
    no_heat_maps: str
    """Why the losses have none, if that is known."""
    calibration: Calibration | None = None
    """Unknown in analyses of earlier versions, and without counts."""
    scores: tuple[ClassScore, ...] = ()
    """Of the labels where an image may have several, worst F1 first."""

    def most_confused(self, max_pairs: int = 10) -> list[tuple[str, str, int]]:
        """(actual, predicted, images), most images first."""
        if self.counts is None:
            return []
        wrong = self.counts - np.diag(self.counts.diagonal())
        pairs = [(self.classes[i], self.classes[j], int(wrong[i, j])) for i, j in np.argwhere(wrong)]
        return sorted(pairs, key=lambda pair: -pair[2])[:max_pairs]

    @property
    def never_predicted(self) -> str:
        """Such as "2 of 37 classes ('a', 'b')"; empty where the winner predicts all that have validation images."""
        missing = [] if self.counts is None else never_predicted(self.classes, self.counts)
        return some_of(missing, len(self.by_class), "class", "classes") if missing else ""


def read_analysis(run: RunRecord) -> ErrorAnalysis | None:
    """The analysis of the current winner, or None if there is none, or only that of an earlier winner: a copy of its
    metrics tells which trial was analysed."""
    folder, model = run.folder.interpretation, run.folder.validated
    try:
        if read_json(folder / METRICS_FILE) != read_json(model / METRICS_FILE):
            return None
        preprocessing = read_json(model / PREPROCESSING_FILE)
        classes, counts, by_class, scores = _of_classes(folder)
        worst = islice(csv.DictReader(_text(folder / LOSSES_FILE)), NUM_LOSSES)
        # Earlier versions wrote no heat maps.
        maps, problem = read_heat_maps(file) if (file := folder / HEAT_MAPS_FILE).is_file() else ({}, "")
        images = root_of(run.command.data)
        losses = tuple(_loss(row, images, preprocessing, maps.get(row["path"], ())) for row in worst)
        judged = folder / "calibration.json"
        calibration = Calibration.from_dict(read_json(judged)) if judged.is_file() else None
    except (OSError, ValueError, KeyError, TypeError, csv.Error):  # missing, or cut short by a kill
        return None
    return ErrorAnalysis(classes, counts, by_class, losses, printable(problem), calibration, scores)


def analyse(run: RunRecord, *, effort: str | None = None) -> str:
    """Label the validation images with the winner and save what it gets wrong, and the suspects, for which features are
    computed as `effort`, one of `suspects.EFFORTS`, says; none without it. Returns why something is missing, or "".

    Takes as long as one validation, and some seconds to import torch. Does nothing if the analysis exists, unless
    always the suspects are asked for.
    """
    try:
        if run.best is None or (effort != "always" and read_analysis(run)):
            return ""
        return _analyse(run, effort)
    except Exception as error:  # a report without it is better than none
        return f"{NO_ANALYSIS}: {error_line(error)}"


def _analyse(run: RunRecord, effort: str | None) -> str:
    data = run.command.data
    if not DataAddress.of(data).path.exists():
        return f"The images, {data}, are not on this machine, so the winner's errors could not be analysed."
    folder, model = run.folder.interpretation, run.folder.validated
    metrics = read_json(model / METRICS_FILE)
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "trainables.interpret", "--model", model, "--data", data]
    command += ["--out", folder, "--top", NUM_LOSSES]
    command += ["--suspects", effort] if effort else []
    command += ["--weights", folder_of(run.command.weights)] if effort and run.command.weights else []
    child = subprocess.run([*map(str, command)], capture_output=True, text=True)
    reason = (last_line(child.stderr) or f"exit code {child.returncode}").removeprefix("error: ")
    if child.returncode and not (folder / LOSSES_FILE).is_file():
        return f"{NO_ANALYSIS}: {reason}"
    if read_json(run.folder.validated / METRICS_FILE) == metrics:  # else another trial has won in the meantime
        (folder / METRICS_FILE).write_text(json.dumps(metrics))
    if (found := folder / SUSPECTS_FILE).is_file():
        found.replace(run.folder.suspects)
    if not child.returncode:
        return ""
    again = shell_command("search.report", run.folder, "--suspects")
    return f"{NO_SUSPECTS}: {reason.rstrip('.')}. To look for them, whatever that takes: {again}"


def _text(path: Path) -> io.StringIO:
    return io.StringIO(path.read_text(encoding="utf-8", errors="surrogateescape"), newline="")


def _train_images(file: Path, names: Sequence[str]) -> npt.NDArray[np.int64] | None:
    """(classes,) the images that trained the winner; None in a run of an earlier version."""
    if not file.is_file():
        return None
    known = {row["class"]: int(row["train_images"]) for row in csv.DictReader(_text(file))}
    return np.array([known.get(name, 0) for name in names])


def _of_classes(
    folder: Path,
) -> tuple[tuple[str, ...], npt.NDArray[np.int64] | None, tuple[ClassErrors, ...], tuple[ClassScore, ...]]:
    """The classes with their confusion matrix and errors, or with their scores where an image may have several."""
    if (folder / SCORES_FILE).is_file():
        scores = tuple(map(_score, csv.DictReader(_text(folder / SCORES_FILE))))
        return tuple(score.name for score in scores), None, (), scores
    (_, *names), *rows = csv.reader(_text(folder / "confusion_matrix.csv"))
    classes = tuple(map(printable, names))
    counts = np.array([row[1:] for row in rows], dtype=np.int64).reshape(len(classes), len(classes))
    by_class = class_errors(classes, counts, _train_images(folder / CLASSES_FILE, names))
    return classes, counts, tuple(by_class), ()


def _score(row: dict[str, str]) -> ClassScore:
    images, predicted, right = (int(row[name]) for name in ("images", "predicted", "right"))
    f1, threshold = float(row["f1"]), float(row["threshold"])
    return ClassScore(printable(row["class"]), images, predicted, right, f1, threshold)


def _loss(row: dict[str, str], data: Path, preprocessing: Mapping[str, Any], maps: Sequence[HeatMap]) -> Loss:
    view = _view(data / row["path"], preprocessing)
    shown = maps[:1] if row["predicted"] == row["actual"] else maps
    return Loss(
        path=printable(row["path"]),
        actual=printable(row["actual"]),
        predicted=printable(row["predicted"]),
        loss=float(row["loss"]),
        probability=float(row["probability"]),
        image="" if view is None else _data_url(view),
        heat=() if view is None else tuple(_data_url(overlay(view, each)) for each in shown),
    )


def _view(path: Path, preprocessing: Mapping[str, Any]) -> Pixels | None:
    """The part of an image that the network sees, as a thumbnail; None if it is unreadable."""
    method = preprocessing.get("resize_method", "crop")
    try:
        pixels = read_image(path, THUMBNAIL, preprocessing.get("white_level", WHITE_16_BIT))
    except UnreadableImage:
        return None
    return warp_cpu.apply(resize(pixels, THUMBNAIL, method), augmentation.centre(1, method)[0], THUMBNAIL)


def thumbnail(path: Path, preprocessing: Mapping[str, Any]) -> str:
    """The same as a data URL; empty if the image is unreadable."""
    view = _view(path, preprocessing)
    return "" if view is None else _data_url(view)


def _data_url(picture: Pixels) -> str:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
