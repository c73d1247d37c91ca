"""Where a trained model errs, as files and tables: `python -m trainables.interpret --help`.

Imports torch only in order to predict.
"""

import argparse
import logging
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from trainables.data.address import add_table_options, with_table_options
from trainables.data.layouts import find_images
from trainables.data.presize import presize
from trainables.data.presized_images import PresizedImages
from trainables.inference.class_errors import (
    CLASSES_FILE,
    SCORES_FILE,
    ClassErrors,
    class_errors,
    never_predicted,
    save_class_errors,
)
from trainables.inference.heat_maps import HEAT_MAPS_FILE, HeatMap, save_heat_maps
from trainables.inference.interpretation import (
    MAX_SHOWN,
    Indices,
    Interpretation,
    explain_losses,
    interpret,
    match_classes,
    save_calibration,
    save_confusion_csv,
    save_confusion_picture,
    save_losses_csv,
    save_losses_picture,
    save_scores_csv,
)
from trainables.inference.model_folder import ModelFolder, read_model
from trainables.inference.split_record import SPLITS, SplitRecord, indices_of, part_of, read_split, warning_of
from trainables.inference.suspects import EFFORTS, SUSPECTS_FILE, counted, find_suspects, write_suspects
from trainables.network.calibration import Answered, Calibration
from trainables.system.command_line import run_cli
from trainables.system.full_disk import require_writable
from trainables.system.text import percent, printable, some_of

LINES = 10  # of a table in the terminal
SEVERAL = "an image may have several labels"

EXAMPLES = """
examples:
  python -m trainables.interpret --model exported --data ~/my_images
      the validation images, which the export can identify; writes to interpretation/
  python -m trainables.interpret --model results/pets-20250101-120000/best --data ~/my_images --top 48
      straight from a run, on the images that it validated with
  python -m trainables.interpret --model exported --data ~/my_images --suspects
      the images that may be labelled wrongly, among those that trained it, too: writes suspects.csv
  python -m trainables.interpret --model exported --data ~/new_images --split all
      other images of the same classes

The images that validated a model are known if --data holds those of its search, unchanged, in any place. For other
images, or a model that an earlier version exported, use --split all.

written to --out (files of these names are replaced):
  confusion_matrix.png, .csv   how often each class (rows) was predicted as each class (columns)
  classes.csv                  a row per class, largest error first: training images, images, error with its 95 %
                               interval, and the class that it is most often taken for
  class_scores.csv             instead of these, where an image may have several labels: F1 of each
  top_losses.png               the images with the largest losses as the network saw them: green if right, red if wrong;
                               beside each, heat maps of what speaks for the predicted class, and for the actual one
  top_losses.csv               all predicted images, largest loss first
  heat_maps.json               the heat maps as numbers, or why there are none
  calibration.json             how far to trust the probabilities: the bins of a reliability diagram, and what is
                               answered and wrong at several thresholds of search.predict --abstain
  suspects.csv                 with --suspects: a row per image; --leave-out of search.run takes the file

Exit code 0, or 2 if the model, the data or an option is invalid.
"""


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m trainables.interpret",
        description="Show where a trained model errs: which classes it confuses, and which images it gets most wrong.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="an exported model, or best/ of a run")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="labelled images")
    add_table_options(parser)
    splits = "images to predict (valid): those that trained the model, validated it, or were held out to test it"
    parser.add_argument("--split", choices=SPLITS, default="valid", help=splits)
    tta = "average over N augmented views and the centre view of each image (0)"
    parser.add_argument("--tta", type=int, default=0, metavar="N", help=tta)
    parser.add_argument("--top", type=int, default=12, metavar="K", help="images in top_losses.png (12)")
    parser.add_argument("--suspects", nargs="?", choices=EFFORTS, const="always", help=(
        "also list training and validation images that may be labelled wrongly, or are like no other; cached = only if "
        "the features of the model's pretrained backbone are cached, quick = or are those of few images (5000 on a "
        "CPU), always (default) = whatever that takes"
    ))  # fmt: skip
    weights = "with --suspects: folder with <arch>.safetensors; without it, installed packages and timm's hub are used"
    parser.add_argument("--weights", type=Path, metavar="DIR", help=weights)
    parser.add_argument("--out", type=Path, default="interpretation", metavar="DIR", help="folder to write")
    args = parser.parse_args(argv)
    if args.suspects and args.split not in ("train", "valid"):
        parser.error(f"--suspects is about the images that trained and validated the model: omit --split {args.split}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    for name, low, high in (("top", 1, MAX_SHOWN), ("tta", 0, 1000)):
        if not low <= (value := getattr(args, name)) <= high:
            raise ValueError(f"--{name} is {value}; expected {low} to {high}.")
    data = with_table_options(args.data, args.columns, args.images)
    model, folder = read_model(_model_path(args.model)), find_images(str(data))
    print(printable(f"data: {folder.describe()}"), file=sys.stderr)
    match_classes(folder.classes, model)  # before the images are presized, which may take long
    record = read_split(model.path)
    part = part_of(folder, args.split, record, model.path)
    require_writable(args.out, "--out")
    sizes = model.preprocessing.presize, model.preprocessing.resize_method
    white = model.preprocessing.white_level
    # All may be unreadable here: `indices_of` compares those that validated the model.
    images = presize(part, *sizes, white_level=white, max_unreadable=1)
    indices = indices_of(images, args.split, record, model.path)
    found = interpret(model, images, indices, tta=args.tta)
    several = found.truth is not None
    heat, problem = (None, SEVERAL) if several else _heat_maps(found, images, model, args.top)
    trained = _train_images(found, images, args.split, record)
    by_class = [] if several else class_errors(found.classes, found.confusion_matrix(), trained)
    with _writing_to(args.out):
        if several:
            save_scores_csv(args.out / SCORES_FILE, found)
        else:
            save_confusion_csv(args.out / "confusion_matrix.csv", found)
            save_confusion_picture(args.out / "confusion_matrix.png", found)
            save_class_errors(args.out / CLASSES_FILE, by_class)
            fitted_here = args.split == "valid" and not args.tta
            judged = save_calibration(args.out / "calibration.json", found, fitted_here=fitted_here)
        save_losses_csv(args.out / "top_losses.csv", found)
        save_losses_picture(args.out / "top_losses.png", found, images, model, args.top, heat)
        save_heat_maps(args.out / HEAT_MAPS_FILE, [found.paths[i] for i in found.top_losses(args.top)], heat, problem)
    drawn = f", split seed {record.seed}" if record and args.split != "all" and folder.valid is None else ""
    print(f"{len(indices)} images of {printable(folder.root)} ({args.split}{drawn}), {len(found.classes)} classes")
    if warning := warning_of(folder, args.split, record):
        print(warning)
    print(f"error rate {percent(found.error_rate)} ({found.wrong.sum()} wrong), mean loss {found.losses.mean():.3f}")
    if several:
        _report_scores(found)
    else:
        _report(found, by_class, judged)
    if problem:
        print(f"\nno heat maps: {printable(problem)}")
    of_classes = SCORES_FILE if several else f"confusion_matrix.png, .csv, {CLASSES_FILE}, calibration.json"
    print(f"\nwritten to {printable(args.out)}/: {of_classes}, top_losses.png, .csv, {HEAT_MAPS_FILE}")
    if args.suspects:
        assert record is not None  # see `part_of`
        suspects = find_suspects(
            model.recipe, images, weights=args.weights, seed=record.seed, effort=args.suspects
        )  # fmt: skip
        with _writing_to(args.out):
            write_suspects(args.out / SUSPECTS_FILE, suspects)
        print(f"suspects: {printable(counted(suspects))}, in {printable(args.out / SUSPECTS_FILE)}")
    return 0


def _heat_maps(found: Interpretation, images: PresizedImages, model: ModelFolder, k: int) -> tuple[HeatMap | None, str]:
    """The heat maps of the top losses, or why there are none: everything else is worth having without them."""
    try:
        return explain_losses(found, images, model, k), ""
    except Exception as error:  # one of timm's thousand networks, or a GPU without memory
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        return None, f"{kind}{' '.join(str(error).split())[:300]}"


def _train_images(
    found: Interpretation, images: PresizedImages, split: str, record: SplitRecord | None
) -> Indices | None:
    """(classes,) how many images trained the model; None if they are not among `images`."""
    if record is None or split not in ("train", "valid"):
        return None
    train, _ = images.split(seed=record.seed)
    counts = Counter(images.classes[label] for label in images.labels[train])
    return np.array([counts[name] for name in found.classes])


def _report(found: Interpretation, by_class: Sequence[ClassErrors], judged: Calibration) -> None:
    print(f"expected calibration error {percent(judged.error)}, by chance alone {percent(judged.error_by_chance)}")
    if missing := never_predicted(found.classes, found.confusion_matrix()):
        print(f"never predicts {some_of(missing, len(by_class), 'class', 'classes')}")
    errors = "wrong, error rate, 95 % interval"
    rows = [_row(each) for each in by_class if each.wrong]
    _print_table(f"worst classes (training images, {errors}, most often taken for)", "<>>>><", rows)
    confused = [(actual, predicted, str(count)) for actual, predicted, count in found.most_confused()]
    _print_table("most confused (actual, predicted, images)", "<<>", confused)
    shares = [(f"{row.threshold:g}", percent(row.images / judged.images), _error(row)) for row in judged.answered]
    _print_table("with --abstain (threshold, answered, error of the answers)", ">>>", shares)


def _report_scores(found: Interpretation) -> None:
    print(f"an image is wrong unless all of its labels are right; there is no confusion matrix, since {SEVERAL}")
    rows = [
        (name, f"{right} right", f"{images - right} missed", f"{taken - right} too many", f"{f1:.3f}")
        for name, images, taken, right, f1, _ in found.class_scores()
    ]
    _print_table("labels, worst F1 first", "<>>>>", rows)


def _error(row: Answered) -> str:
    return percent(row.wrong / row.images) if row.images else "no answer"


def _row(errors: ClassErrors) -> tuple[str, ...]:
    trained = "?" if errors.train_images is None else str(errors.train_images)
    share, (low, high) = percent(errors.error_rate), errors.interval
    interval = f"{100 * low:.1f} to {percent(high)}"
    return errors.name, trained, f"{errors.wrong} of {errors.images} wrong", share, interval, errors.confused_with


def _print_table(title: str, aligned: str, rows: Sequence[tuple[str, ...]]) -> None:
    """The first LINES rows; `aligned` has < or > for each column."""
    texts = [tuple(map(printable, row)) for row in rows[:LINES]]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    for i, row in enumerate(texts):
        start = "" if i else f"\n{title}:\n"
        cells = (f"{text:{side}{width}}" for text, side, width in zip(row, aligned, widths, strict=True))
        print(f"{start}  {'  '.join(cells).rstrip()}")
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


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run_cli(main)
