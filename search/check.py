"""Check images before training on them: `python -m search.check --data ~/my_images`.

Reads every image once, reports what is there and what would spoil a training, and draws one training and one validation
batch as the network will see them. Needs neither Ray nor torch.
"""

import argparse
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import Progress

from search.cli.messages import command_name, say
from search.options.arguments import add_group, add_leave_out, add_max_unreadable, add_space, search_command
from search.options.preparation import has_pattern, own_dataset, say_depth, setting_values, space_of, with_groups
from search.options.search_options import folder_or_uri
from search.reporting.data_tables import (
    class_table,
    copies_lines,
    enlarged_line,
    formats_line,
    size_table,
    unreadable_lines,
)
from search.reporting.leakage import across
from search.spaces.architectures import refused
from search.spaces.space import Space, space_name
from trainables.batches import augmentation, warp_cpu
from trainables.data.address import DataAddress, add_table_options, with_table_options
from trainables.data.fetch import is_uri
from trainables.data.inspection import Finding, Inspection, find_folder, findings, inspect
from trainables.data.labelled_images import DataError, ImageFolder
from trainables.data.left_out_images import leave_out, read_left_out
from trainables.data.near_duplicates import MAX_IMAGES
from trainables.data.presize import presize
from trainables.data.presized_images import PresizedImages, write_unreadable
from trainables.data.source import folder_of
from trainables.recipe import Recipe
from trainables.system.command_line import run_cli
from trainables.system.text import many, printable

Indices = npt.NDArray[np.int64]

TRAIN_PICTURE, VALID_PICTURE = "train_batch.png", "valid_batch.png"
PAIRS, PAIRS_PICTURE = "near_duplicates.csv", "near_duplicates.png"
UNREADABLE = "unreadable.txt"
NUM_PICTURED, COLUMNS = 24, 6  # images in a picture, and in each of its rows

EXAMPLES = """
examples:
  python -m search.check --data ~/my_images
      what is in the folder, and whether a search can train on it
  python -m search.check --data ~/my_images --set image_size=128 --set max_rotate=45 --out look
      the same, with pictures of the images as the network sees them with this recipe
  python -m search.check --cache
      lists the presized images and features that this machine keeps for searches; --cache clear removes them

Exit code 0 if the data are ready to train on (there may be warnings), 1 if something would spoil the training, 2 if an
argument is invalid.
"""


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=command_name("search.check"),
        description="Check images before training on them.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_space(parser)
    parser.add_argument(
        "--data", type=folder_or_uri, metavar="DIR|URI", help="labelled images instead of the space's own"
    )
    add_table_options(parser)
    add_group(parser)
    add_leave_out(parser)
    add_max_unreadable(parser)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help=(
        "a setting, as in search.run; the pictures show presize, image_size and the augmentation; repeatable"
    ))  # fmt: skip
    parser.add_argument("--seed", type=int, metavar="N", help="of the pictured images (default: the space's)")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for the pictures (default: results/check-SPACE)"
    )
    parser.add_argument("--cache", nargs="?", choices=("list", "clear"), const="list", help=(
        "list or remove all presized images and features on this machine, and check nothing"
    ))  # fmt: skip
    args = parser.parse_args(argv)
    if not args.cache:
        try:
            args.data = with_table_options(args.data, args.columns, args.images)
            args.space = space_name(args.space, args.data)
        except ValueError as error:
            parser.error(str(error))
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    if args.cache:
        return show_caches(clear_them=args.cache == "clear")
    given = {"data": args.data, "settings": args.set, "max_unreadable": args.max_unreadable, "group": args.group}
    next_command = search_command(args.space, **given, leave_out=args.leave_out)
    space = space_of(args.space, args.set, seed=args.seed)
    if problems := refused(space):
        if not has_pattern(args.set) or len(problems) == len(setting_values(space, "arch")):
            raise ValueError(" ".join(problems.values()))
        say(f"a search leaves out: {', '.join(problems)}")
    recipe = Recipe.from_dict(space.settings)
    root = data_root(space, args.data)
    try:
        folder = find_here(root, args.group, read_left_out(args.leave_out))
    except DataError as error:
        return conclude([Finding(str(error), "", True)], next_command)
    out = output_folder(args.out or Path("results") / f"check-{args.space}")
    say_depth(folder)
    inspection = inspect_here(folder, recipe, space.split_seed)
    report(inspection, recipe, out / UNREADABLE)
    write_pictures(inspection, recipe, out)
    found = findings(inspection, args.max_unreadable)
    return conclude([*found, *look_for_near_duplicates(inspection, recipe, out)], next_command)


def show_caches(*, clear_them: bool) -> int:
    """List or remove all presized images and features on this machine."""
    from search.runs.caches import caches_table, clear, find_caches
    from trainables.system.cache import cache_dir
    from trainables.system.text import megabytes

    caches = find_caches()
    if not caches:
        say(f"there are no presized images and no features in {cache_dir()}")
    elif clear_them:
        freed, busy = clear(caches)
        say(f"removed {len(caches) - len(busy)} caches, {megabytes(freed)}")
        if busy:
            say(f"kept: {len(busy)} that are still being built")
    else:
        console().print(caches_table(caches))
        total = sum(cache.num_bytes for cache in caches)
        say(f"{len(caches)} caches in {cache_dir()}, {megabytes(total)}")
    return 0


def console() -> Console:
    return Console() if sys.stdout.isatty() else Console(width=200)


def data_root(space: Space, given: Path | str | None) -> Path:
    """The folder to check; the space's own data set is first made or downloaded if it is missing."""
    from trainables.data.datasets import DATASETS, locate, prepare_in_subprocess

    if given is None:
        dataset = own_dataset(space)
        if not locate(dataset).exists():
            say(f"preparing {DATASETS[dataset].title} in {locate(dataset)}")
        return prepare_in_subprocess(dataset)
    if not is_uri(str(given)) and not DataAddress.of(str(given)).path.exists():
        raise ValueError(f"--data {given}: there is no such folder or file. Give labelled images.")
    return folder_of(str(given))


def find_here(root: Path, group: str | None, left_out: Sequence[str]) -> ImageFolder:
    """The images in a folder without those `left_out`, with their groups; says what they are. Raises `DataError`."""
    try:
        folder = find_folder(root)
    except DataError:
        say(f"data: {root}")
        raise
    say(f"data: {folder.describe()}")
    if left_out:
        folder = leave_out(folder, left_out)
        say(f"left out: {many(len(left_out), 'image')}")
    return with_groups(folder, group)


def output_folder(path: Path) -> Path:
    """Make `path`, and remove the pictures of an earlier check from it. Raises `ValueError`."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        for name in (TRAIN_PICTURE, VALID_PICTURE, PAIRS, PAIRS_PICTURE, UNREADABLE):
            (path / name).unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(
            f"--out {path}: the pictures cannot be written there ({error.strerror or error}). Give another folder."
        ) from error
    return path


def inspect_here(folder: ImageFolder, recipe: Recipe, split_seed: int) -> Inspection:
    """Read all images, with a progress bar on a terminal."""
    with warnings.catch_warnings(), Progress(transient=True, disable=not sys.stdout.isatty()) as progress:
        warnings.filterwarnings("ignore", module=r"PIL\b")  # about images that are still readable
        task = progress.add_task("reading every image", total=len(folder.paths))
        return inspect(
            folder,
            size=recipe.presize,
            split_seed=split_seed,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )


# --- The report -------------------------------------------------------------------------------------------------------


def report(inspection: Inspection, recipe: Recipe, unreadable: Path) -> None:
    """Print what is there, without judging it. The file `unreadable` lists all unreadable images."""
    out = console()
    out.print("", class_table(inspection), "", sep="\n")
    if inspection.readable:
        out.print(size_table(inspection))
        say(enlarged_line(inspection, recipe))
        say(formats_line(inspection))
    if inspection.unreadable:
        write_unreadable(unreadable, {file.path: file.problem for file in inspection.unreadable})
    for line in (*unreadable_lines(inspection, unreadable), *copies_lines(inspection)):
        say(line)


# --- The pictures -----------------------------------------------------------------------------------------------------


def write_pictures(inspection: Inspection, recipe: Recipe, out: Path) -> None:
    """One training and one validation batch, as far as there are images for them."""
    from trainables.inference.pictures import save_grid  # matplotlib takes a second to import

    parts = (
        (TRAIN_PICTURE, inspection.train, augmented, "training images, augmented"),
        (VALID_PICTURE, inspection.valid, centred, "validation images"),
    )
    for name, indices, transform, what in parts:
        if len(indices) == 0:
            say(f"no {name}: there are no {what}")
            continue
        chosen = pick(inspection.folder.labels, indices, NUM_PICTURED, recipe.seed)
        with tempfile.TemporaryDirectory(prefix="finetune-search-") as cache:
            images = presized(inspection.folder, chosen, recipe, Path(cache))
            titles = [printable(images.label_names(i)) for i in range(len(images))]
            save_grid(out / name, transform(images, recipe), titles, columns=COLUMNS)
        mixup = " (before mixup)" if transform is augmented and recipe.mixup_alpha else ""
        say(f"picture: {out / name}  {len(images)} {what}, {recipe.image_size} px, as the network sees them{mixup}")


def look_for_near_duplicates(inspection: Inspection, recipe: Recipe, out: Path) -> list[Finding]:
    """A warning of those that the split separates; names them in a file, and pictures the most alike."""
    from trainables.inference.pictures import save_grid

    folder = inspection.folder
    if len(folder.paths) > MAX_IMAGES:
        say(f"near-duplicates: not looked for among more than {MAX_IMAGES} images, except by --group duplicates")
        return []
    of_images = folder.paths, folder.labels, folder.classes, inspection.valid
    found = across(inspection.near_duplicates, *of_images, own_split=folder.valid is not None)
    say(f"near-duplicates: {many(len(inspection.near_duplicates), 'pair')}, {len(found.rows)} across the split")
    if not found.rows:
        return []
    found.save(out / PAIRS)
    shown = np.array(found.indices[: NUM_PICTURED // 2], dtype=np.int64).ravel()
    names = [printable(folder.classes[folder.labels[index]]) for index in shown]
    titles = [f"{'valid' if place % 2 else 'train'}: {name}" for place, name in enumerate(names)]
    with tempfile.TemporaryDirectory(prefix="finetune-search-") as cache:
        images = presized(folder, shown, recipe, Path(cache))
        save_grid(out / PAIRS_PICTURE, centred(images, recipe), titles, columns=COLUMNS)
    say(f"picture: {out / PAIRS_PICTURE}  the {many(len(shown) // 2, 'pair')} most alike, side by side")
    return [Finding(found.text(out / PAIRS), found.remedy, False)]


def pick(labels: Sequence[int], indices: Indices, n: int, seed: int) -> Indices:
    """At most `n` random `indices` from as many classes as possible, grouped by class."""
    shuffled = np.random.default_rng(seed).permutation(indices)
    own = np.asarray(labels, dtype=np.int64)[shuffled]
    order = np.argsort(own, kind="stable")
    ranks = np.empty(len(own), dtype=np.int64)  # how many of its class precede each image
    ranks[order] = np.arange(len(own)) - np.searchsorted(own[order], own[order])
    chosen = np.argsort(ranks, kind="stable")[:n]
    return shuffled[chosen[np.argsort(own[chosen], kind="stable")]]


def presized(folder: ImageFolder, indices: Indices, recipe: Recipe, cache: Path) -> PresizedImages:
    """The images `indices` of `folder` as trials read them; presizing only these takes a moment."""
    few = replace(folder.only(indices), valid=None, groups=None)
    return presize(few, recipe.presize, recipe.resize_method, cache=cache)


def augmented(images: PresizedImages, recipe: Recipe) -> list[npt.NDArray[np.uint8]]:
    """A training batch: uint8 (image_size, image_size, 3) each."""
    drawn = augmentation.draw(np.random.default_rng(recipe.seed), len(images), recipe)
    return [warp_cpu.apply(images[i], drawn[i], recipe.image_size) for i in range(len(images))]


def centred(images: PresizedImages, recipe: Recipe) -> list[npt.NDArray[np.uint8]]:
    """A validation batch: uint8 (image_size, image_size, 3) each."""
    centre = augmentation.centre(len(images), recipe.resize_method)
    return [warp_cpu.apply(images[i], centre[i], recipe.image_size) for i in range(len(images))]


# --- The verdict ------------------------------------------------------------------------------------------------------


def conclude(found: list[Finding], next_command: str) -> int:
    """Print warnings, problems, and what to do. Returns the exit code."""
    for finding in found:
        if not finding.spoils:
            say(f"warning: {sentence(finding)}")
    if problems := [finding for finding in found if finding.spoils]:
        say(f"{many(len(problems), 'problem')}:")
        for number, finding in enumerate(problems, start=1):
            say(f"  {number}. {sentence(finding)}")
        return 1
    say(f"ready to train. Next: {next_command}")
    return 0


def sentence(finding: Finding) -> str:
    """A problem and its remedy in one line."""
    parts = (" ".join(part.split()) for part in (finding.text, finding.remedy) if part)
    return " ".join(f"{part[0].upper()}{part[1:].rstrip('.')}." for part in parts)


if __name__ == "__main__":
    run_cli(main)
