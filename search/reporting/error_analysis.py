"""What the winner gets wrong: its confusion matrix and top losses, saved in the run's folder for its report.

`python -m trainables.interpret` computes them in a separate process, so this one needs no torch.
"""

import base64
import csv
import io
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from search.cli.errors import error_line
from search.runs.run_record import RunRecord
from trainables.data.image_file import WHITE_16_BIT, UnreadableImage, read_image
from trainables.data.layouts import split_level
from trainables.inference.model_folder import METRICS_FILE, read_json
from trainables.system.text import last_line, printable
from trainables.training.checkpoint import PREPROCESSING_FILE

NUM_LOSSES = 12
THUMBNAIL = 176  # px
NO_ANALYSIS = "The winner's errors could not be analysed"


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


@dataclass(frozen=True, eq=False)
class ErrorAnalysis:
    """The winner's errors on the validation images."""

    classes: tuple[str, ...]
    counts: npt.NDArray[np.int64]
    """Images (classes, classes): rows are the actual classes, columns the predicted ones."""
    losses: tuple[Loss, ...]

    def most_confused(self, max_pairs: int = 10) -> list[tuple[str, str, int]]:
        """(actual, predicted, images), most images first."""
        wrong = self.counts - np.diag(self.counts.diagonal())
        pairs = [(self.classes[i], self.classes[j], int(wrong[i, j])) for i, j in np.argwhere(wrong)]
        return sorted(pairs, key=lambda pair: -pair[2])[:max_pairs]


def read_analysis(run: RunRecord) -> ErrorAnalysis | None:
    """The analysis of the current winner, or None if there is none, or only that of an earlier winner: a copy of its
    metrics tells which trial was analysed."""
    folder, model = run.folder.interpretation, run.folder.validated
    try:
        if read_json(folder / METRICS_FILE) != read_json(model / METRICS_FILE):
            return None
        white = read_json(model / PREPROCESSING_FILE).get("white_level", WHITE_16_BIT)
        (_, *classes), *rows = csv.reader(_text(folder / "confusion_matrix.csv"))
        counts = np.array([row[1:] for row in rows], dtype=np.int64).reshape(len(classes), len(classes))
        worst = islice(csv.DictReader(_text(folder / "top_losses.csv")), NUM_LOSSES)
        losses = tuple(_loss(row, _images_of(run), white) for row in worst)
    except (OSError, ValueError, KeyError, TypeError, csv.Error):  # missing, or cut short by a kill
        return None
    return ErrorAnalysis(tuple(map(printable, classes)), counts, losses)


def analyse(run: RunRecord) -> str:
    """Label the validation images with the winner and save what it gets wrong. Returns why that failed, or "".

    Takes as long as one validation, and some seconds to import torch. Does nothing if the analysis exists.
    """
    try:
        return "" if run.best is None or read_analysis(run) else _analyse(run)
    except Exception as error:  # a report without it is better than none
        return f"{NO_ANALYSIS}: {error_line(error)}"


def _analyse(run: RunRecord) -> str:
    data = run.command.data
    if not _images_of(run).is_dir():
        return f"The images, {data}, are not on this machine, so the winner's errors could not be analysed."
    folder, model = run.folder.interpretation, run.folder.validated
    metrics = read_json(model / METRICS_FILE)
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "trainables.interpret", "--model", model, "--data", data]
    command += ["--out", folder, "--top", NUM_LOSSES]
    child = subprocess.run([*map(str, command)], capture_output=True, text=True)
    if child.returncode:
        reason = last_line(child.stderr) or f"exit code {child.returncode}"
        return f"{NO_ANALYSIS}: {reason.removeprefix('error: ')}"
    if read_json(run.folder.validated / METRICS_FILE) == metrics:  # else another trial has won in the meantime
        (folder / METRICS_FILE).write_text(json.dumps(metrics))
    return ""


def _text(path: Path) -> io.StringIO:
    return io.StringIO(path.read_text(encoding="utf-8", errors="surrogateescape"), newline="")


def _images_of(run: RunRecord) -> Path:
    return Path(split_level(run.command.data)[0])


def _loss(row: dict[str, str], data: Path, white: int) -> Loss:
    return Loss(
        path=printable(row["path"]),
        actual=printable(row["actual"]),
        predicted=printable(row["predicted"]),
        loss=float(row["loss"]),
        probability=float(row["probability"]),
        image=_thumbnail(data / row["path"], white),
    )


def _thumbnail(path: Path, white: int) -> str:
    """The centre square of an image as a data URL; empty if it is unreadable."""
    try:
        pixels = read_image(path, THUMBNAIL, white)
    except UnreadableImage:
        return ""
    size = THUMBNAIL, THUMBNAIL
    file = io.BytesIO()
    ImageOps.fit(Image.fromarray(pixels), size, Image.Resampling.BILINEAR).save(file, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
