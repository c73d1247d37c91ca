"""Label images with a run's best model or an exported one: `python -m search.predict DIR_OR_RUN IMAGE...`.

The same in Python, the most probable label first:

    from search.predict import Predictor
    predictions = Predictor("exported").predict(["cat.jpg", "dog.jpg"])
    predictions[0].labels[0], predictions[0].probabilities[0]

Needs no Ray, and imports torch only if there is something to label.
"""

import argparse
import csv
import glob
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from io import TextIOWrapper
from pathlib import Path

from search.cli.messages import command_name
from search.runs.trained_model import Predictor, open_model
from trainables.data.image_file import SUFFIXES
from trainables.data.label_sets import to_cell
from trainables.inference.predictor import Prediction
from trainables.system.command_line import run_cli
from trainables.system.text import percent, printable

UNSURE = "unsure"
"""What is answered instead of a label by `--abstain`."""

EXAMPLES = """
examples:
  python -m search.predict exported cat.jpg holiday/ "more/*.png"
      files, folders and patterns; prints a line for each image
  python -m search.predict results/pets-20250101-120000 cat.jpg --top 3
      the three most probable labels from a run's best model so far
  python -m search.predict exported cat.jpg --tta 4
      with test-time augmentation: the mean of four augmented views and the centre view
  python -m search.predict exported holiday/ --csv > labels.csv
      for a spreadsheet or a program; --json prints one JSON object per line
  python -m search.predict exported holiday/ --abstain 0.9
      images whose most probable label has a probability below 0.9 are "unsure", and it says how many are. The report
      has a table of thresholds, with the share that is answered and the error of the answers

Exit code 0 if at least one image was labelled, 1 if none was readable, 2 if the model or an option is invalid.
"""


# --- The command line -------------------------------------------------------------------------------------------------


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=command_name("search.predict"),
        description="Label images with an exported model, or with the best model of a run.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="DIR_OR_RUN", help="a folder written by search.export, or a run's folder")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help=(
        "image files, folders (searched with their sub-folders) or quoted patterns"
    ))  # fmt: skip
    parser.add_argument("--top", type=_positive, metavar="K", help=(
        "the K most probable labels (default 1; of a model that gives images several labels, all above their "
        "thresholds, which its validation images have chosen)"
    ))  # fmt: skip
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one JSON object per line: path, labels, probabilities")
    form.add_argument("--csv", action="store_true", help=(
        "a row for each label: path, rank, label, probability; where an image has several, without --top, a row for "
        "each image: path, and labels and probabilities joined by ;"
    ))  # fmt: skip
    parser.add_argument("--tta", type=_positive, default=0, metavar="N", help=(
        "average over N augmented views and the centre view of each image: slower, often a little better"
    ))  # fmt: skip
    parser.add_argument("--abstain", type=_probability, default=0.0, metavar="P", help=(
        "label images unsure whose highest probability is below P, such as 0.9: probabilities are calibrated, so about "
        "90 %% of those near 0.9 are right. What they would have been stands in brackets, in the column guess (--csv) "
        "or in labels (--json)"
    ))  # fmt: skip
    parser.add_argument("--batch-size", type=_positive, default=64, metavar="N", help="images at a time (default 64)")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    model = open_model(args.model)  # before searching for images and importing torch, which take time
    if args.abstain and model.preprocessing.several_labels:
        raise ValueError("--abstain is for models of one label; each of several labels has a threshold of its own")
    paths = []
    for given in args.images:
        found = find_files(given)
        if not found:
            why = "it contains no images" if Path(given).expanduser().is_dir() else "no file matches this pattern"
            print(f"skipped {printable(given)}: {why}", file=sys.stderr)
        paths += found
    if not paths:
        return 1
    predictor = Predictor(args.model, device=args.device, batch_size=args.batch_size, tta=args.tta)
    joined = predictor.several_labels and args.top is None
    write = _writer(args, paths, predictor.labels, joined=joined)
    num_read = num_unsure = 0
    with _progress(len(paths)) as advance:
        for prediction in predictor.predict_each(paths, top=None if joined else args.top or 1):
            advance()
            if prediction.problem:
                print(f"skipped {printable(prediction.path)}: {printable(prediction.problem)}", file=sys.stderr)
            else:
                write(_chosen(prediction) if joined else prediction)
                num_read += 1
                num_unsure += _is_unsure(prediction, args.abstain)
    if num_read < len(paths):
        print(f"{len(paths) - num_read} of {len(paths)} images could not be read", file=sys.stderr)
    if args.abstain and num_read:
        share = f"{num_unsure} of {num_read} images ({percent(num_unsure / num_read)})"
        print(f"unsure: {share}, whose highest probability is below {args.abstain:g}", file=sys.stderr)
    if args.abstain and not model.is_calibrated:
        print("warning: an earlier version trained this model: its probabilities are not calibrated", file=sys.stderr)
    return 0 if num_read else 1


def find_files(given: str) -> list[Path]:
    """The image files of a file, a folder or a pattern. A file may have any suffix.

    An existing path is never a pattern, nor are the folders before one: `2024 [raw]/*.jpg` searches `2024 [raw]`.
    """
    path = Path(given).expanduser()
    if path.is_dir():
        return _images_below(path)
    if path.exists() or not any(sign in given for sign in "*?["):
        return [path]
    folder = next((parent for parent in path.parents if parent.exists()), Path())
    pattern = str(path.relative_to(folder))
    matches = [folder / match for match in sorted(glob.glob(pattern, root_dir=folder, recursive=True))]  # noqa: PTH207
    return [file for match in matches for file in (_images_below(match) if match.is_dir() else [match])]


def _images_below(folder: Path) -> list[Path]:
    """Images in a folder and its sub-folders except hidden ones, without following links to folders."""
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__MACOSX")
        images = (name for name in names if name.lower().endswith(SUFFIXES) and not name.startswith("."))
        found += [Path(parent, name) for name in sorted(images)]
    return found


def _chosen(found: Prediction) -> Prediction:
    """Only its labels above their thresholds."""
    probability_of = dict(zip(found.labels, found.probabilities, strict=True))
    return replace(found, labels=found.chosen, probabilities=tuple(probability_of[name] for name in found.chosen))


def _writer(
    args: argparse.Namespace, paths: list[Path], labels: Sequence[str], *, joined: bool
) -> Callable[[Prediction], None]:
    """A function that writes a prediction to stdout in the requested form; writes the header of a table. In CSV,
    `joined` puts all labels of an image into one row."""
    if args.csv and isinstance(sys.stdout, TextIOWrapper):  # programs get UTF-8, and file names as they are
        sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")
    if args.json:

        def write_object(found: Prediction) -> None:
            answer = {"label": _answer(found, args.abstain)} if args.abstain else {}
            known = {"labels": found.labels, "probabilities": found.probabilities}
            print(json.dumps({"path": str(found.path), **answer, **known}))

        return write_object
    if args.csv:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        head = ("path", "label", "probability") if joined else ("path", "rank", "label", "probability")
        writer.writerow((*head, *(["guess"] if args.abstain else [])))

        def write_row(found: Prediction) -> None:
            writer.writerow((found.path, to_cell(found.labels), ";".join(f"{p:.6f}" for p in found.probabilities)))

        def write_rows(found: Prediction) -> None:
            for rank, (label, share) in enumerate(zip(found.labels, found.probabilities, strict=True), 1):
                shown = label if rank > 1 else _answer(found, args.abstain)
                writer.writerow((found.path, rank, shown, f"{share:.6f}", *([label] if args.abstain else [])))

        return write_row if joined else write_rows
    shown = [f"{UNSURE} ({label})" for label in labels] if args.abstain else labels
    widths = [max(len(printable(text)) for text in texts) for texts in ((*paths, "image"), (*shown, "label"))]

    def write_line(path: str, label: str, share: str) -> None:
        print(f"{path:{widths[0]}}  {label:{widths[1]}}  {share:>11}")

    def write_lines(found: Prediction) -> None:
        if not found.labels:
            write_line(printable(found.path), "-", "")
        for rank, (label, share) in enumerate(zip(found.labels, found.probabilities, strict=True)):
            if rank == 0 and _is_unsure(found, args.abstain):
                label = f"{UNSURE} ({label})"
            write_line("" if rank else printable(found.path), printable(label), f"{100 * share:.1f} %")

    write_line("image", "label", "probability")
    return write_lines


@contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
    """A progress bar if stderr is a terminal and stdout, which shows the progress itself, is not."""
    if sys.stdout.isatty() or not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("predicting", total=total)
        yield lambda: progress.advance(task)


def _is_unsure(found: Prediction, abstain: float) -> bool:
    return found.probabilities[0] < abstain


def _answer(found: Prediction, abstain: float) -> str:
    """The most probable label, unless it is not probable enough."""
    return UNSURE if _is_unsure(found, abstain) else found.labels[0]


def _probability(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a probability above 0 and up to 1, such as 0.9")
    return value


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


if __name__ == "__main__":
    run_cli(main)
