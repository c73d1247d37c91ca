"""Label images with a finished run's best model or an exported one: `python -m search.predict DIR_OR_RUN IMAGE...`.

The same from Python, best label first:

    from search.predict import Predictor
    predictions = Predictor("exported").predict(["cat.jpg", "dog.jpg"])
    predictions[0].labels[0], predictions[0].probabilities[0]

Needs no Ray, and imports torch only once there is something to label.
"""

from __future__ import annotations

import argparse
import csv
import glob
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from search.cli import run_cli
from search.model_folder import ModelFolder, open_model
from trainables.data import IMAGE_SUFFIXES

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

EXAMPLES = """
examples:
  python -m search.predict exported cat.jpg holiday/ "more/*.png"
      files, whole folders and patterns; prints a line for each image
  python -m search.predict results/pets-20250101-120000 cat.jpg --top 3
      straight from a run, with its best model so far, and the three most probable labels
  python -m search.predict exported holiday/ --csv > labels.csv
      for a spreadsheet or a program; --json gives one JSON object a line

Exit code 0 if at least one image was labelled, 1 if none could be read, 2 if the model or an option is no good.
"""


@dataclass(frozen=True)
class Prediction:
    """What the model says of one image: labels from the most to the least probable, and their probabilities."""

    path: Path
    labels: tuple[str, ...] = ()
    probabilities: tuple[float, ...] = ()
    problem: str = ""
    """Why the image could not be read; then there are no labels."""


class Predictor:
    """Labels images as validation did in training. `path` is an exported folder or a run.

    `device` defaults to a GPU where there is one. Raises `ValueError` where `path` holds no model that can be loaded.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        device: torch.device | str | None = None,
        batch_size: int = 64,
        num_threads: int | None = None,
    ) -> None:
        folder = open_model(path)
        import torch

        from trainables.finetune import autocast_dtype

        self.labels = folder.labels
        self.device = _device(device)
        self.batch_size = batch_size
        self.num_threads = num_threads or _num_cpus()
        self.preprocessing = folder.preprocessing
        self.model = load_model(folder).eval().to(self.device, memory_format=torch.channels_last)
        self.mean, self.std = (
            255 * torch.tensor(values, device=self.device).view(1, 3, 1, 1)
            for values in (self.preprocessing.mean, self.preprocessing.std)
        )
        self.amp_dtype = autocast_dtype(folder.recipe.precision, self.device)

    def predict(self, images: Iterable[Path | str], *, top: int | None = None) -> list[Prediction]:
        """One prediction per image file, in the given order; of those that cannot be read it is the `problem`."""
        return list(self.predict_each(images, top=top))

    def predict_each(self, images: Iterable[Path | str], *, top: int | None = None) -> Iterator[Prediction]:
        """The same one by one, as the batches are done."""
        files = _PresizedFiles([Path(image) for image in images], self.preprocessing.presize)
        top = min(top or len(self.labels), len(self.labels))
        rows = (row for batch in self.logits(files) for row in zip(*_best(batch, top), strict=True))
        for index, (probabilities, indices) in enumerate(rows):
            if problem := files.problems.pop(index, ""):
                yield Prediction(files.paths[index], problem=problem)
            else:
                labels = tuple(self.labels[i] for i in indices)
                yield Prediction(files.paths[index], labels, tuple(probabilities))

    def logits(self, images: Sequence[np.ndarray]) -> Iterator[torch.Tensor]:
        """Logits (n, classes) of presized images (h, w, 3) uint8, batch by batch."""
        import torch

        for batch in self.batches(images):
            with torch.inference_mode():
                yield self.forward(self.model, batch)

    def batches(self, images: Sequence[np.ndarray]) -> Iterator[torch.Tensor]:
        """Presized images as uint8 batches (n, 3, image_size, image_size), made by threads ahead of their use."""
        import numpy as np

        from trainables import augment
        from trainables.loader import BatchLoader

        chunks = (range(i, min(i + self.batch_size, len(images))) for i in range(0, len(images), self.batch_size))
        plans = ((np.asarray(chunk), augment.centre(len(chunk))) for chunk in chunks)
        loader = BatchLoader(images, num_threads=self.num_threads)
        try:
            yield from loader.batches(plans, self.preprocessing.image_size, self.device)
        finally:
            loader.close()

    def forward(self, model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        """Float logits of a uint8 batch, in the precision of the training's validation."""
        import torch

        with torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None):
            return model((batch.float() - self.mean) / self.std).float()


def load_model(folder: ModelFolder) -> nn.Module:
    """The trained network on the CPU, whatever its head. Raises `ValueError`."""
    import safetensors.torch
    import torch
    from safetensors import SafetensorError

    from trainables.model import build

    with torch.random.fork_rng(devices=[]):  # build seeds it
        network = build(folder.recipe, len(folder.labels), load_pretrained=False)
    try:
        network.model.load_state_dict(safetensors.torch.load_file(folder.weights))
    except (SafetensorError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{folder.weights} does not hold the model of the recipe beside it: {reason}") from error
    return network.model


class _PresizedFiles:
    """Image files as presized images, decoded when asked for. One that cannot be read is black, its reason kept."""

    def __init__(self, paths: list[Path], size: int) -> None:
        self.paths = paths
        self.size = size
        self.problems: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> np.ndarray:
        import numpy as np

        from trainables.presize import UnreadableImage, read_image, resize_shorter_side

        try:
            return resize_shorter_side(read_image(self.paths[index], self.size), self.size)
        except UnreadableImage as error:
            self.problems[int(index)] = str(error)
            return np.zeros((self.size, self.size, 3), np.uint8)


def _best(logits: torch.Tensor, top: int) -> tuple[list[list[float]], list[list[int]]]:
    indices = logits.topk(top, dim=1).indices
    return logits.softmax(dim=1).gather(1, indices).tolist(), indices.tolist()


def _device(device: torch.device | str | None) -> torch.device:
    import torch

    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # torch's words for a wrong name and for a missing GPU
        raise ValueError(f"device {str(device)!r} cannot be used here: {str(error).splitlines()[0]}") from error


def _num_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --- The command line -------------------------------------------------------------------------------------------------


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m search.predict",
        description="Label images with an exported model, or with the best model of a run.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="DIR_OR_RUN", help="a folder written by search.export, or a run's folder")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help=(
        "image files, folders (searched with their sub-folders for JPEG, PNG and WebP) or quoted patterns"
    ))  # fmt: skip
    parser.add_argument("--top", type=_positive, default=1, metavar="K", help="the K most probable labels (default 1)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one JSON object a line: path, labels, probabilities")
    form.add_argument("--csv", action="store_true", help="a row for each label: path, rank, label, probability")
    parser.add_argument("--batch-size", type=_positive, default=64, metavar="N", help="images at a time (default 64)")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    open_model(args.model)  # before the search for images and the import of torch, which take their time
    paths = []
    for given in args.images:
        found = find_files(given)
        if not found:
            print(f"skipped {printable(given)}: no images there", file=sys.stderr)
        paths += found
    if not paths:
        return 1
    predictor = Predictor(args.model, device=args.device, batch_size=args.batch_size)
    write = _writer(args, paths, predictor.labels)
    num_read = 0
    with _progress(len(paths)) as advance:
        for prediction in predictor.predict_each(paths, top=args.top):
            advance()
            if prediction.problem:
                print(f"skipped {printable(prediction.path)}: {printable(prediction.problem)}", file=sys.stderr)
            else:
                write(prediction)
                num_read += 1
    if num_read < len(paths):
        print(f"{len(paths) - num_read} of {len(paths)} images could not be read", file=sys.stderr)
    return 0 if num_read else 1


def find_files(given: str) -> list[Path]:
    """The image files meant by a file, a folder or a pattern. A file is taken at its word, whatever its suffix."""
    path = Path(given).expanduser()
    if path.is_dir():
        return _images_below(path)
    if not path.exists() and any(sign in given for sign in "*?["):
        matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]  # noqa: PTH207
        return [file for match in matches for file in (_images_below(match) if match.is_dir() else [match])]
    return [path]


def _images_below(folder: Path) -> list[Path]:
    """Images in a folder and its sub-folders, hidden ones aside; links to folders are not followed."""
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__MACOSX")
        images = (name for name in names if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith("."))
        found += [Path(parent, name) for name in sorted(images)]
    return found


def _writer(args: argparse.Namespace, paths: list[Path], labels: Sequence[str]) -> Callable[[Prediction], None]:
    """What writes a prediction to stdout in the form asked for; writes the head of the table."""
    # names that are no valid UTF-8 go to programs as they are, to people escaped
    sys.stdout.reconfigure(errors="surrogateescape" if args.csv else "backslashreplace")
    if args.json:

        def write_object(found: Prediction) -> None:
            print(json.dumps({"path": str(found.path), "labels": found.labels, "probabilities": found.probabilities}))

        return write_object
    if args.csv:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(("path", "rank", "label", "probability"))

        def write_rows(found: Prediction) -> None:
            for rank, (label, share) in enumerate(zip(found.labels, found.probabilities, strict=True), 1):
                writer.writerow((found.path, rank, label, f"{share:.6f}"))

        return write_rows
    widths = [max(len(printable(text)) for text in texts) for texts in ((*paths, "image"), (*labels, "label"))]

    def write_line(path: str, label: str, share: str) -> None:
        print(f"{path:{widths[0]}}  {label:{widths[1]}}  {share:>11}")

    def write_lines(found: Prediction) -> None:
        for rank, (label, share) in enumerate(zip(found.labels, found.probabilities, strict=True)):
            write_line("" if rank else printable(found.path), printable(label), f"{100 * share:.1f} %")

    write_line("image", "label", "probability")
    return write_lines


@contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
    """A progress bar where stderr is a terminal and the table does not show the progress by itself."""
    if sys.stdout.isatty() or not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("predicting", total=total)
        yield lambda: progress.advance(task)


def printable(text: object) -> str:
    """`text` for a terminal, with line breaks and control characters as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


if __name__ == "__main__":
    run_cli(main)
