"""Where a trained model errs: its confusion matrix and the images of the largest loss, as fastai's interpretation.

As a command: `python -m trainables.interpret --help`. Imports torch only once there is something to label.
"""

import argparse
import csv
import logging
import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from trainables import augment, data, warp_cpu
from trainables.checkpoint import Preprocessing
from trainables.cli import run_cli
from trainables.disk import require_writable
from trainables.layouts import find_images
from trainables.model_folder import ModelFolder, read_model
from trainables.predictor import Predictor
from trainables.presize import PresizedImages, presize
from trainables.split_record import SPLITS, indices_of, part_of, read_split, warning_of
from trainables.wording import printable

LEAST = float(np.finfo(np.float32).smallest_subnormal)  # a probability of 0 counts as this: a loss of 103.3
MOST_SHOWN = 200  # images in one picture
MOST_NUMBERED = 40  # classes in a matrix that is drawn with its counts
LEAST_SIDE = 224  # px; smaller images are enlarged, so that names of breeds fit above
LINES = 10  # of a table in the terminal
RIGHT, WRONG = "#1a7f37", "#c62828"

EXAMPLES = """
examples:
  python -m trainables.interpret --model exported --data ~/my_images
      the validation images, which the export tells from the others; writes to interpretation/
  python -m trainables.interpret --model results/pets-20250101-120000/best --data ~/my_images --top 48
      straight from a run, on the images that it validated with
  python -m trainables.interpret --model exported --data ~/my_images --split all --out suspects
      all images, those that it was trained on among them: the largest losses often are wrong labels
  python -m trainables.interpret --model exported --data ~/new_images --split all
      other images of the same classes

Which images validated a model is known where --data holds those of its search, unchanged, wherever they lie now. Of
others, or of a model that an earlier version exported, --split all alone can be labelled.

written to --out (files of these names are replaced):
  confusion_matrix.png, .csv   how often each class (rows: actual) was taken for each (columns: predicted)
  top_losses.png               the images of the largest loss as the network saw them: green if right, red if wrong
  top_losses.csv               all images that were labelled, largest loss first

Exit code 0, or 2 if the model, the data or an option is no good.
"""


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
        lacking = f", and the data set lacks {data.some(missing, 'class', 'classes')} of its own" if missing else ""
        raise ValueError(
            f"{folder.path} does not know {data.some(unknown, 'class', 'classes')} of the data set{lacking}. "
            "Names are compared letter by letter. Rename or remove them, or give data of the model's classes."
        )
    return np.array([of_name[name] for name in classes], dtype=np.int64)


def centre_views(images: PresizedImages, indices: np.ndarray, preprocessing: Preprocessing) -> list[np.ndarray]:
    """What the network sees of the images: uint8 (image_size, image_size, 3) RGB each."""
    centre = augment.centre(1, preprocessing.resize_method)[0]
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
    from trainables.pictures import save_grid  # matplotlib is slow to import

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
    errors = [_percent(1 - hits[i] / totals[i], 0) if totals[i] else "no images" for i in shown]
    right.set_yticks(shown, errors, **style)
    for i, j in np.argwhere(counts) if numbered else ():
        style["color"] = "white" if counts[i, j] > 0.35 * totals[i] else "#222222"
        axes.text(j, i, str(counts[i, j]), ha="center", va="center", zorder=3, **style)
    axes.grid(color="#e5e8eb", linewidth=0.8)
    right.set_ylabel("error rate")
    title = f"error rate {_percent(found.error_rate)} ({found.wrong.sum()} of {len(found.labels)} images wrong)"
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


# --- The command line -------------------------------------------------------------------------------------------------


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m trainables.interpret",
        description="Show where a trained model errs: which classes it confuses, and which images it gets most wrong.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="an exported model, or best/ of a run")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder of labelled images")
    splits = "images to label (valid): those that validated the model, trained it, or were held out as a test share"
    parser.add_argument("--split", choices=SPLITS, default="valid", help=splits)
    tta = "average over N augmented views and the centre view of each image (0)"
    parser.add_argument("--tta", type=int, default=0, metavar="N", help=tta)
    parser.add_argument("--top", type=int, default=12, metavar="K", help="images in top_losses.png (12)")
    parser.add_argument("--out", type=Path, default="interpretation", metavar="DIR", help="folder to write")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    for name, least, most in (("top", 1, MOST_SHOWN), ("tta", 0, 1000)):
        if not least <= (value := getattr(args, name)) <= most:
            raise ValueError(f"--{name} is {value}; expected {least} to {most}.")
    model, folder = read_model(_model_path(args.model)), find_images(args.data)
    print(printable(f"data: {folder.describe()}"), file=sys.stderr)
    match_classes(folder.classes, model)  # before the images are presized, which takes its time
    record = read_split(model.path)
    part = part_of(folder, args.split, record, model.path)
    require_writable(args.out, "--out")
    sizes = model.preprocessing.presize, model.preprocessing.resize_method
    white = model.preprocessing.white_level
    # However many cannot be read: `indices_of` compares those that validated the model.
    images = presize(part, *sizes, white_level=white, max_unreadable=1)
    indices = indices_of(images, args.split, record, model.path)
    found = interpret(model, images, indices, tta=args.tta)
    with _writing_to(args.out):
        save_confusion_csv(args.out / "confusion_matrix.csv", found)
        save_confusion_picture(args.out / "confusion_matrix.png", found)
        save_losses_csv(args.out / "top_losses.csv", found)
        save_losses_picture(args.out / "top_losses.png", found, images, model, args.top)
    drawn = "" if args.split == "all" or folder.valid is not None else f", split seed {record.seed}"
    print(f"{len(indices)} images of {printable(folder.root)} ({args.split}{drawn}), {len(found.classes)} classes")
    if warning := warning_of(folder, args.split, record):
        print(warning)
    _report(found)
    print(f"\nwritten to {printable(args.out)}/: confusion_matrix.png, .csv, top_losses.png, .csv")
    return 0


def _report(found: Interpretation) -> None:
    print(f"error rate {_percent(found.error_rate)} ({found.wrong.sum()} wrong), mean loss {found.losses.mean():.3f}")
    counts = found.confusion_matrix()
    totals = counts.sum(axis=1)
    errors = totals - counts.diagonal()
    rates = errors / np.maximum(totals, 1)
    worst = [i for i in np.argsort(-rates, kind="stable") if errors[i]]
    rows = [(found.classes[i], f"{errors[i]} of {totals[i]} wrong", _percent(rates[i])) for i in worst]
    _print_table("worst classes", rows)
    _print_table("most confused (actual, predicted, images)", found.most_confused())


def _print_table(title: str, rows: Sequence[tuple[str, str, object]]) -> None:
    """The first LINES rows."""
    texts = [tuple(map(printable, row)) for row in rows[:LINES]]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    for i, (left, middle, right) in enumerate(texts):
        start = "" if i else f"\n{title}:\n"
        print(f"{start}  {left:{widths[0]}}  {middle:{widths[1]}}  {right:>{widths[2]}}")
    if len(rows) > LINES:
        print(f"  and {len(rows) - LINES} more")


@contextmanager
def _writing_to(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(f"--out {out} cannot be written: {error}. Make room, or give another folder.") from error


def _model_path(path: Path) -> Path:
    """A run's folder stands for its best model."""
    path = path.expanduser()
    if not path.is_dir():
        raise ValueError(f"There is no folder {path}. Expected an exported model, or best/ of a run.")
    return path / "best" if (path / "command.json").is_file() else path


def _percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run_cli(main)
