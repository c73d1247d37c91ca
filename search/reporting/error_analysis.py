"""What the winner gets wrong: its confusion matrix and top losses, kept in the run's folder for its report.

`python -m trainables.interpret` finds it out, in a process of its own: this one needs no torch.
"""

import base64
import csv
import io
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from search.cli.errors import told
from search.runs.run_record import RunRecord
from trainables.data.image_file import UnreadableImage, read_image
from trainables.data.layouts import split_level
from trainables.inference.model_folder import read_json
from trainables.system.text import last_line, printable
from trainables.training.checkpoint import PREPROCESSING_FILE

NUM_LOSSES = 12
THUMBNAIL = 176  # px
OF = "metrics.json"
"""Whose analysis it is: a copy of the winner's file of that name."""


@dataclass(frozen=True)
class Loss:
    """One of the images that the winner is most wrong about."""

    path: str
    actual: str
    predicted: str
    loss: float
    probability: float
    image: str
    """A data URL, empty where the image is not here."""


@dataclass(frozen=True, eq=False)
class ErrorAnalysis:
    """Of the winner, over the validation images."""

    classes: tuple[str, ...]
    counts: np.ndarray
    """(classes, classes) int64 images; rows are the actual classes, columns the predicted ones."""
    losses: tuple[Loss, ...]

    def most_confused(self, most: int = 10) -> list[tuple[str, str, int]]:
        """(actual, predicted, images), most images first."""
        wrong = self.counts - np.diag(self.counts.diagonal())
        pairs = [(self.classes[i], self.classes[j], int(wrong[i, j])) for i, j in np.argwhere(wrong)]
        return sorted(pairs, key=lambda pair: -pair[2])[:most]


def read_analysis(run: RunRecord) -> ErrorAnalysis | None:
    """The analysis of the present winner, or None where there is none, or one of an earlier winner."""
    folder, best = run.folder.interpretation, run.folder.best / OF
    try:
        if read_json(folder / OF) != read_json(best):
            return None
        white = read_json(run.folder.best / PREPROCESSING_FILE).get("white_level")
        with (folder / "confusion_matrix.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            (_, *classes), *rows = csv.reader(file)
        counts = np.array([row[1:] for row in rows], dtype=np.int64).reshape(len(classes), len(classes))
        with (folder / "top_losses.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            worst = [row for row, _ in zip(csv.DictReader(file), range(NUM_LOSSES), strict=False)]
        losses = tuple(_loss(row, _images_of(run), white) for row in worst)
    except (OSError, ValueError, KeyError, TypeError, csv.Error):  # not there, or cut short by a kill
        return None
    return ErrorAnalysis(tuple(map(printable, classes)), counts, losses)


def analyse(run: RunRecord) -> str:
    """Label the validation images with the winner and keep what it gets wrong. Why that cannot be, or "".

    Takes as long as validating once, and some seconds to import torch. Does nothing where it is known already.
    """
    try:
        return "" if run.best is None or read_analysis(run) else _analyse(run)
    except Exception as error:  # a report without it is better than none
        return f"The winner's errors could not be looked at: {told(error)}"


def _analyse(run: RunRecord) -> str:
    data = run.command.data
    if not _images_of(run).is_dir():
        return f"The images, {data}, are not on this machine, so the winner's errors could not be looked at."
    folder, of = run.folder.interpretation, read_json(run.folder.best / OF)
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "trainables.interpret", "--model", run.folder.best, "--data", data]
    command += ["--out", folder, "--top", NUM_LOSSES]
    child = subprocess.run([*map(str, command)], capture_output=True, text=True)
    if child.returncode:
        reason = last_line(child.stderr) or f"exit code {child.returncode}"
        return f"The winner's errors could not be looked at: {reason.removeprefix('error: ')}"
    if read_json(run.folder.best / OF) == of:  # else a better one came in the meantime
        (folder / OF).write_text(json.dumps(of))
    return ""


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
    """The centre square of an image as a data URL; empty where it cannot be read."""
    try:
        pixels = read_image(path, THUMBNAIL, white)
    except UnreadableImage:
        return ""
    height, width = pixels.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = Image.fromarray(pixels[top : top + side, left : left + side])
    file = io.BytesIO()
    square.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BILINEAR, reducing_gap=2).save(file, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
