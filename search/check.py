"""Look at the images before training on them: `python -m search.check --space pets --data ~/my_images`.

Reads every image once, says what is there and what would spoil a training, and draws one training and one validation
batch as the network will see them. Needs neither Ray nor torch.
"""

import argparse
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from search.cli.messages import command_name, run_cli, say
from search.options.arguments import add_max_unreadable, search_command
from search.options.preparation import say_depth, space_of
from search.options.search_options import folder_or_uri
from search.spaces.architectures import check_architectures
from search.spaces.space import Space, space_names
from trainables.batches import augmentation, warp_cpu
from trainables.data.fetch import is_uri
from trainables.data.inspection import Copies, Finding, Inspection, find_folder, findings, inspect
from trainables.data.labelled_images import DataError, ImageFolder
from trainables.data.layouts import split_level
from trainables.data.presize import PresizedImages, caches_folder, presize
from trainables.data.presized_images import write_unreadable
from trainables.data.source import folder_of
from trainables.recipe import Recipe
from trainables.system.text import printable

TRAIN_PICTURE, VALID_PICTURE = "train_batch.png", "valid_batch.png"
UNREADABLE = "unreadable.txt"
PICTURED = 24  # images in a picture, in rows of COLUMNS
COLUMNS = 6
ALL_SHOWN = 40  # classes; of more only the SMALLEST and the LARGEST are shown
SMALLEST, LARGEST = 10, 5
UNREADABLE_SHOWN = 20
COPIES_SHOWN = 10
PATHS_SHOWN = 4  # of one image's copies

EXAMPLES = """
examples:
  python -m search.check --space pets --data ~/my_images
      what lies in the folder, and whether a search can train on it
  python -m search.check --space pets --data ~/my_images --set image_size=128 --set max_rotate=45 --out look
      the same, with pictures of the images as this recipe shows them to the network
  python -m search.check --cache
      the presized images that this machine keeps for searches; --cache clear removes them

Exit code 0 if the data are ready to train on (there may be warnings), 1 if something would spoil the training, 2 if an
argument is no good.
"""


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=command_name("search.check"),
        description="Look at the images before training on them.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--space", metavar="SPACE", help=f"the search space: {', '.join(space_names())}")
    parser.add_argument(
        "--data", type=folder_or_uri, metavar="DIR|URI", help="labelled images instead of the space's own"
    )
    add_max_unreadable(parser)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help=(
        "a setting, as in search.run; presize, image_size and the augmentation show in the pictures; repeatable"
    ))  # fmt: skip
    parser.add_argument(
        "--seed", type=int, metavar="N", help="another one pictures other images (default: the space's)"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the pictures go (default: results/check-SPACE)")
    parser.add_argument("--cache", nargs="?", choices=("list", "clear"), const="list", help=(
        "list or remove all presized images that this machine keeps, and look at nothing else"
    ))  # fmt: skip
    args = parser.parse_args(argv)
    if not args.space and not args.cache:
        parser.error(f"--space is needed: one of {', '.join(space_names())}")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    if args.cache:
        return show_caches(clear_them=args.cache == "clear")
    given = {"data": args.data, "settings": args.set, "max_unreadable": args.max_unreadable}
    next_command = search_command(args.space, **given)
    space = space_of(args.space, args.set, seed=args.seed)
    check_architectures(space)
    recipe = Recipe.from_dict(space.settings)
    root = data_root(space, args.data)
    try:
        folder = find_folder(root)
    except DataError as error:
        say(f"data: {root}")
        return conclude([Finding(str(error), "", True)], next_command)
    out = output_folder(args.out or Path("results") / f"check-{args.space}")
    say(f"data: {folder.describe()}")
    say_depth(folder)
    inspection = inspect_here(folder, recipe, space.split_seed)
    report(inspection, recipe, out / UNREADABLE)
    write_pictures(inspection, recipe, out)
    return conclude(findings(inspection, args.max_unreadable), next_command)


def show_caches(*, clear_them: bool) -> int:
    """List, or remove, all presized images on this machine."""
    from search.runs.caches import caches_table, clear, find_caches
    from trainables.system.text import megabytes

    caches = find_caches(caches_folder())
    if not caches:
        say(f"no presized images are kept in {caches_folder()}")
    elif clear_them:
        freed, busy = clear(caches)
        say(f"removed {len(caches) - len(busy)} caches, {megabytes(freed)}")
        if busy:
            say(f"left alone: {len(busy)} that are being built")
    else:
        console().print(caches_table(caches))
        total = sum(cache.num_bytes for cache in caches)
        say(f"{len(caches)} caches in {caches_folder()}, {megabytes(total)}")
    return 0


def console() -> Console:
    return Console() if sys.stdout.isatty() else Console(width=200)


def data_root(space: Space, given: Path | str | None) -> Path:
    """The folder to look at; the space's own data set is made or downloaded first where it is missing."""
    from trainables.data.datasets import DATASETS, locate, prepare_in_subprocess

    if given is None:
        if not locate(space.dataset).exists():
            say(f"preparing {DATASETS[space.dataset].title} in {locate(space.dataset)}")
        return prepare_in_subprocess(space.dataset)
    if not is_uri(str(given)) and not Path(given).exists() and not Path(split_level(str(given))[0]).is_dir():
        raise ValueError(f"--data {given}: there is no such folder. Give a folder of labelled images.")
    return folder_of(str(given))


def output_folder(path: Path) -> Path:
    """Makes `path`, without the pictures of an earlier check; raises `ValueError` where it cannot."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        for name in (TRAIN_PICTURE, VALID_PICTURE, UNREADABLE):
            (path / name).unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(
            f"--out {path}: the pictures cannot be written there ({error.strerror or error}). Give another folder."
        ) from error
    return path


def inspect_here(folder: ImageFolder, recipe: Recipe, split_seed: int) -> Inspection:
    """Reads all images, with progress on a terminal."""
    with warnings.catch_warnings(), Progress(transient=True, disable=not sys.stdout.isatty()) as progress:
        warnings.filterwarnings("ignore", module=r"PIL\b")  # what does not keep an image from being read
        task = progress.add_task("reading every image", total=len(folder.paths))
        return inspect(
            folder,
            size=recipe.presize,
            split_seed=split_seed,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )


# --- The report -------------------------------------------------------------------------------------------------------


def report(inspection: Inspection, recipe: Recipe, unreadable: Path) -> None:
    """What is there, without judging it. All unreadable images go to the file `unreadable`."""
    out = console()
    out.print()
    out.print(class_table(inspection))
    out.print()
    if inspection.readable:
        out.print(size_table(inspection))
        say(enlarged(inspection, recipe))
        say(f"formats: {formats(inspection)}")
    if inspection.unreadable:
        write_unreadable(unreadable, {file.path: file.problem for file in inspection.unreadable})
    for line in (*unreadable_lines(inspection, unreadable), *copies_lines(inspection)):
        say(line)


def class_table(inspection: Inspection) -> Table:
    """Images for training and validation, by class and in all; of wide sets the smallest and the largest classes."""
    classes, counts = inspection.folder.classes, inspection.counts
    counts = np.column_stack([counts, counts.sum(axis=1)])
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("class", overflow="fold")
    for name in ("train", "valid", "all"):
        table.add_column(name, justify="right", no_wrap=True)
    shown = list(range(len(classes)))
    left_out = len(classes) - SMALLEST - LARGEST if len(classes) > ALL_SHOWN else 0
    if left_out:
        by_size = np.argsort(counts[:, 2], kind="stable").tolist()
        shown = by_size[:SMALLEST] + by_size[-LARGEST:]
    for place, label in enumerate(shown):
        if left_out and place == SMALLEST:
            text = f"... {left_out} more classes (shown are the {SMALLEST} smallest and the {LARGEST} largest)"
            table.add_row(Text(text, style="dim"))
        table.add_row(Text(printable(classes[label])), *map(str, counts[label]))
    table.add_row()
    for name, values in summary(counts):
        table.add_row(Text(f"{name} of a class", style="bold"), *(f"{value:g}" for value in values))
    table.add_row(Text(f"all {len(classes)} classes", style="bold"), *map(str, counts.sum(axis=0)))
    return table


def size_table(inspection: Inspection) -> Table:
    sides = inspection.sides
    columns = np.column_stack([sides, sides[:, 0] / sides[:, 1]])
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("image size")
    rows = [("width, px", "{:.0f}"), ("height, px", "{:.0f}"), ("width / height", "{:.2f}")]
    parts = summary(columns)
    for name, _ in parts:
        table.add_column(name, justify="right", no_wrap=True)
    for column, (name, form) in enumerate(rows):
        table.add_row(name, *(form.format(values[column]) for _, values in parts))
    return table


def summary(values: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Smallest, median and largest of each column of `values` (n, columns)."""
    return [("min", values.min(axis=0)), ("median", np.median(values, axis=0)), ("max", values.max(axis=0))]


def enlarged(inspection: Inspection, recipe: Recipe) -> str:
    """How many images have fewer pixels than presizing gives them."""
    longer = recipe.resize_method == "pad"
    sides = inspection.sides.max(axis=1) if longer else inspection.sides.min(axis=1)
    number, total = int((sides < recipe.presize).sum()), len(sides)
    which = f"{'longer' if longer else 'shorter'} side below presize={recipe.presize}"
    if number == 0:
        return f"no image has its {which}, so none is enlarged"
    return f"{number} of {total} ({number / total:.0%}) have their {which} and are enlarged"


def formats(inspection: Inspection) -> str:
    return ", ".join(
        f"{count} {name}"
        for name, count in Counter(inspection.files[i].format for i in inspection.readable).most_common()
    )


def unreadable_lines(inspection: Inspection, listed: Path) -> list[str]:
    bad = inspection.unreadable
    lines = [f"unreadable: {len(bad)}, all listed in {listed}" if bad else "unreadable: none"]
    lines += [f"  {file.path!r}: {file.problem}" for file in bad[:UNREADABLE_SHOWN]]
    return lines + more(len(bad) - UNREADABLE_SHOWN)


def copies_lines(inspection: Inspection) -> list[str]:
    """Images that are there more than once, the harmful ones first."""
    groups = sorted(inspection.copies, key=lambda copies: (len(copies.labels) == 1, not copies.across_splits))
    number = f"{len(groups)} image{'s' if len(groups) > 1 else ''} more than once" if groups else "none"
    lines = [f"exact copies: {number}"]
    lines += [f"  {_same(inspection, copies)}" for copies in groups[:COPIES_SHOWN]]
    return lines + more(len(groups) - COPIES_SHOWN)


def _same(inspection: Inspection, copies: Copies) -> str:
    valid = set(inspection.valid.tolist())
    names = [
        f"{inspection.files[i].path!r} ({'valid' if i in valid else 'train'})" for i in copies.indices[:PATHS_SHOWN]
    ]
    left = len(copies.indices) - PATHS_SHOWN
    return " = ".join(names) + (f" = {left} more" if left > 0 else "")


def more(number: int) -> list[str]:
    return [f"  ... and {number} more"] if number > 0 else []


# --- The pictures -----------------------------------------------------------------------------------------------------


def write_pictures(inspection: Inspection, recipe: Recipe, out: Path) -> None:
    """One training and one validation batch, as far as there are images for them."""
    from trainables.inference.pictures import (
        save_grid,  # matplotlib takes a second, which a wrong argument need not wait for
    )

    parts = (
        (TRAIN_PICTURE, inspection.train, augmented, "training images, augmented"),
        (VALID_PICTURE, inspection.valid, centred, "validation images"),
    )
    for name, indices, transform, what in parts:
        if len(indices) == 0:
            say(f"no {name}: there are no {what}")
            continue
        chosen = pick(inspection.folder.labels, indices, PICTURED, recipe.seed)
        with tempfile.TemporaryDirectory(prefix="finetune-search-") as cache:
            images = presized(inspection.folder, chosen, recipe, Path(cache))
            titles = [printable(images.classes[label]) for label in images.labels]
            save_grid(out / name, transform(images, recipe), titles, columns=COLUMNS)
        mixup = " (before mixup)" if transform is augmented and recipe.mixup_alpha else ""
        say(f"picture: {out / name}  {len(images)} {what}, {recipe.image_size} px, as the network sees them{mixup}")


def pick(labels: Sequence[int], indices: np.ndarray, n: int, seed: int) -> np.ndarray:
    """At most `n` of `indices` at random, as many classes as possible among them; images of a class side by side."""
    shuffled = np.random.default_rng(seed).permutation(indices)
    own = np.asarray(labels, dtype=np.int64)[shuffled]
    seen: Counter = Counter()
    turns = np.empty(len(own), dtype=np.int64)  # how many of its class come before each image
    for place, label in enumerate(own.tolist()):
        turns[place] = seen[label]
        seen[label] += 1
    chosen = np.argsort(turns, kind="stable")[:n]
    return shuffled[chosen[np.argsort(own[chosen], kind="stable")]]


def presized(folder: ImageFolder, indices: np.ndarray, recipe: Recipe, cache: Path) -> PresizedImages:
    """The images `indices` of `folder` as trials read them; a few alone are ready in a moment, all take their time."""
    few = replace(
        folder,
        paths=tuple(folder.paths[i] for i in indices),
        labels=tuple(folder.labels[i] for i in indices),
        valid=None,
    )
    return presize(few, recipe.presize, recipe.resize_method, cache=cache)


def augmented(images: PresizedImages, recipe: Recipe) -> list[np.ndarray]:
    """A training batch: uint8 (image_size, image_size, 3) each."""
    drawn = augmentation.draw(np.random.default_rng(recipe.seed), len(images), recipe)
    return [warp_cpu.apply(images[i], drawn[i], recipe.image_size) for i in range(len(images))]


def centred(images: PresizedImages, recipe: Recipe) -> list[np.ndarray]:
    """A validation batch: uint8 (image_size, image_size, 3) each."""
    centre = augmentation.centre(len(images), recipe.resize_method)
    return [warp_cpu.apply(images[i], centre[i], recipe.image_size) for i in range(len(images))]


# --- The verdict ------------------------------------------------------------------------------------------------------


def conclude(found: list[Finding], next_command: str) -> int:
    """Warnings, problems, and what to do; the exit code."""
    problems = [finding for finding in found if finding.spoils]
    for finding in found:
        if not finding.spoils:
            say(f"warning: {sentence(finding)}")
    if problems:
        say(f"{len(problems)} problem{'s' if len(problems) > 1 else ''}:")
        for number, finding in enumerate(problems, start=1):
            say(f"  {number}. {sentence(finding)}")
        return 1
    say(f"ready to train. Next: {next_command}")
    return 0


def sentence(finding: Finding) -> str:
    """What is wrong and what to do about it, in one line."""
    parts = (" ".join(part.split()) for part in (finding.text, finding.remedy) if part)
    return " ".join(f"{part[0].upper()}{part[1:].rstrip('.')}." for part in parts)


if __name__ == "__main__":
    run_cli(main)
