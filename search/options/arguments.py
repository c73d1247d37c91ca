"""The arguments of `python -m search.run`. (The file is long because the help of each stands beside it.)"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from search.cli.messages import command_name
from search.options.search_options import CONFIRMED_IN_FOLDS, SearchOptions, absolute, folder_or_uri
from search.options.strategy import CONFIRM_SEEDS, OBJECTIVES, SCHEDULERS, SEARCHERS
from search.spaces.space import OWN_IMAGES, space_names
from trainables.data import groups
from trainables.data.address import add_table_options, with_table_options
from trainables.data.labelled_images import MAX_UNREADABLE
from trainables.system.file_systems import shown
from trainables.system.text import shell_command
from trainables.training.metrics import IMBALANCED, METRICS

EXAMPLES = """
examples:
  python -m search.run --space quickstart
      a few minutes on a laptop, with everything it needs made or installed
  python -m search.run --data ~/my_images --trials 30
      your own images: one folder per class, train/ and valid/ with such folders, or Oxford Pets' images/<breed>_<n>.jpg
  python -m search.run --data labels.csv --columns path=file,label=breed --images ~/my_images
      your own images with their labels in a table; the columns need no names where they are called path and label
  python -m search.run --space pets --set arch=resnet18.tv_in1k,resnet34.tv_in1k --set epochs=3..6 --set image_size=160
      choose the architectures, narrow the epochs, pin the image size
  python -m search.run --data ~/my_images --set arch='resnet*d,convnext_*' --time-budget 8h
      all of timm's pretrained architectures whose names match a pattern
  python -m search.run --resume --name NAME
      resume a search that was interrupted
  python -m search.run --resume --name NAME --trials 40
      extend a search, also one that has ended, to 40 trials in all
  python -m search.run --resume --name NAME --storage s3://bucket/runs --address auto
      resume it on another cluster, from the copy that --storage made of it
  python -m search.run --data ~/my_images --time-budget 8h --dry-run
      what this would do, how long it takes and what it needs; nothing is trained
  python -m search.run --data ~/my_images --warm-start results/first --name second
      learn from an earlier search, on the same images or others
  python -m search.run --space pets --recipes book
      the runs of fastai's book, each once, with the published errors beside ours
  python -m search.run --space pets --describe
      the space's dimensions and every setting that --set knows
"""


MIN_FOLDS, MAX_FOLDS = 3, 20
"""One fold is that of the search, a fifth of the images. Of two, the other would train on that fifth alone."""

Group = argparse._ArgumentGroup | argparse.ArgumentParser


def parse_arguments(argv: Sequence[str] | None = None) -> SearchOptions:
    parser = argparse.ArgumentParser(
        prog=command_name("search.run"),
        description="Fine-tune many image classifiers, stop the hopeless ones early, keep the best.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_what(parser.add_argument_group("what to search"))
    _add_how(parser.add_argument_group("how"))
    _add_where(parser.add_argument_group("on what"))
    _add_results(parser.add_argument_group("results"))
    values = vars(parser.parse_args(argv))
    columns, images = values.pop("columns"), values.pop("images")
    lists = {name: tuple(values[name]) for name in ("set", "workers_per_trial", "warm_start")}
    try:
        values["data"] = with_table_options(values["data"], columns, images)
        return SearchOptions(**values | lists, given=_given(parser, argv))
    except ValueError as error:
        parser.error(str(error))


def _given(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> frozenset[str]:
    """The arguments that the command line names, even with their default."""
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return frozenset(vars(parser.parse_args(argv)))


def _add_what(group: Group) -> None:
    add_space(group)
    group.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help=(
        "pin a setting (epochs=5), narrow or add a dimension (epochs=3..8, arch=resnet18,resnet34, or "
        "mixup_alpha=0,0.1..0.4 for off or a number); architectures can be patterns (arch='resnet*d,convnext_*'); "
        "repeatable"
    ))  # fmt: skip
    group.add_argument("--data", type=folder_or_uri, metavar="DIR|URI", help=(
        "labelled images instead of the space's own: a folder, a table of paths and labels (labels.csv) or "
        "WebDataset's .tar that every node has, or the s3://, gs:// or https:// address of a folder or an archive, "
        "which every node fetches once; with '/*' at its end the folders in it are the classes, with '/*/*' those one "
        "level deeper"
    ))  # fmt: skip
    add_table_options(group)
    group.add_argument("--weights", type=folder_or_uri, metavar="DIR|URI", help=(
        "a folder or URI with an <arch>.safetensors file for every architecture, those without one are left out; "
        "without it, installed packages and timm's hub are searched"
    ))  # fmt: skip
    group.add_argument("--test-split", type=_test_split, metavar="SHARE|DIR", help=(
        "hold out this share of every class (0.2), or take a folder of other images of the same classes; they are "
        "opened once, at the end, to test the winner and trial 0"
    ))  # fmt: skip
    add_group(group)
    add_leave_out(group)
    group.add_argument("--recipes", metavar="NAME", help=(
        "run only the space's recipes of that name, such as book, each once and to its end; ignores --searcher and "
        "--scheduler"
    ))  # fmt: skip
    group.add_argument("--warm-start", type=absolute, nargs="+", action="extend", default=[], metavar="RUN", help=(
        "folders of earlier runs to learn from: on the same images and split, with the same weights and metric, their "
        "trials that are in this space count as if the search had made them before its first one; of all others the "
        "best three configs are tried after trial 0"
    ))  # fmt: skip
    group.add_argument("--describe", action="store_true", help="print the space and all settings, and stop")
    group.add_argument("--dry-run", action="store_true", help=(
        "check everything, measure this machine for half a minute, say what the search would do (trials, epochs, "
        "minutes, disk, memory), and stop"
    ))  # fmt: skip
    add_max_unreadable(group)


def _add_how(group: Group) -> None:
    group.add_argument("--trials", type=positive, metavar="N", help="total number of trials (default: the space's)")
    group.add_argument("--time-budget", type=_seconds, metavar="30m", help=(
        "stop after searching this long (90s, 30m, 8h); time spent before a resume counts"
    ))  # fmt: skip
    group.add_argument("--searcher", choices=SEARCHERS, default="tpe", help=(
        "Optuna's sampler that proposes trials: tpe (default), random, gp = Gaussian process, cmaes; gp and cmaes "
        "sample at random what not every trial has, such as mixup_alpha=0,0.1..0.4, and cmaes also choices, such as "
        "arch"
    ))  # fmt: skip
    group.add_argument("--scheduler", choices=SCHEDULERS, help=(
        "which trials end early: forecast = those that are unlikely to beat the best, by a forecast after each epoch; "
        "rungs = those that, late in their schedule, are expected to end badly; median = those "
        "that are worse than the median at any time; halving = none, but all except the space's own recipes start "
        "short, and the best third of each length is trained again with the next one; none; default forecast, and none "
        "with --objective error,seconds"
    ))  # fmt: skip
    group.add_argument("--objective", choices=OBJECTIVES, default="error", help=(
        "what is minimised: the validation error, or both the error and the seconds of training, whose Pareto front "
        "the table then marks; default error"
    ))  # fmt: skip
    group.add_argument("--metric", choices=("auto", *METRICS), default="auto", help=(
        "the validation error in all of this: error_rate; balanced_error = the mean error of the classes, small ones "
        "count as much as large ones; macro_f1, the mean F1 of the classes; auroc; log_loss; top5_error; map, the mean "
        "average precision, where an image may have several labels. auto (default): macro_f1 there, else error_rate or "
        f"balanced_error where the largest class has over {IMBALANCED:g} times the images of the median one. With "
        "balanced_error and macro_f1 of one label each, logit_adjustment is 1, unless --set balances the classes in "
        "another way"
    ))  # fmt: skip
    group.add_argument("--target-seconds", type=_seconds, metavar="90s", help=(
        "prefer trials that train no longer than this; starts with one trial of each architecture, in the order of the "
        "space, and skips those after the first one that takes longer"
    ))  # fmt: skip
    group.add_argument("--confirm", type=positive, default=0, metavar="K", help=(
        f"at the end, train the best K configs again, each with {CONFIRM_SEEDS} new seeds; the mean decides the winner"
    ))  # fmt: skip
    group.add_argument("--folds", type=_folds, default=0, metavar="K", help=(
        f"for small sets: train the best again (--confirm of them, default {CONFIRMED_IN_FOLDS}) so that each image "
        "validates once, in one of K folds; the mean over the folds decides the winner"
    ))  # fmt: skip
    group.add_argument("--screen", type=_screen, default="auto", metavar="N", help=(
        "begin with a linear probe of every architecture and image size of the space, then fine-tune only the N "
        "architectures with the best ones; auto (default): the best third, at least 3; off: no probes"
    ))  # fmt: skip
    group.add_argument("--lr-range", choices=("space", "auto"), default="space", help=(
        "bounds of the learning rates: the space's own, or narrowed by the learning-rate finder, which then runs once "
        "per architecture; default space"
    ))  # fmt: skip
    group.add_argument("--seed", type=int, metavar="N", help="seed of proposals and trainings (default: the space's)")


def _add_where(group: Group) -> None:
    group.add_argument("--address", help=(
        "Ray cluster: auto (RAY_ADDRESS, or the one on this machine), or host:port; default: start Ray on this machine"
    ))  # fmt: skip
    group.add_argument("--workers-per-trial", type=_workers, action="append", default=[], metavar="N", help=(
        "DDP workers (default 1), or ARCH=N for some architectures ('resnet101*=4'); repeatable"
    ))  # fmt: skip
    group.add_argument("--cpus-per-worker", type=_above_zero, metavar="N", help=(
        "default: a GPU's share of a node, or 2"
    ))  # fmt: skip
    group.add_argument("--gpus-per-worker", type=_gpus, metavar="N", help=(
        "whole GPUs, or a share such as 0.25, which is --trials-per-gpu 4; default: 1 where there are any"
    ))  # fmt: skip
    group.add_argument("--trials-per-gpu", type=_auto_or_count, default="1", metavar="N", help=(
        "trials of one worker that share a GPU and its memory, which small networks do not fill alone; auto: begins "
        "with 1 and doubles that while the images per second of all of them grow by more than 10 %%; default 1"
    ))  # fmt: skip
    group.add_argument("--max-concurrent", type=_auto_or_positive, metavar="N", help=(
        "concurrent trials, or auto (default): as many as CPUs, GPUs and memory allow, as nodes come and go"
    ))  # fmt: skip
    group.add_argument("--stall-timeout", type=_seconds, default=600.0, metavar="10m", help=(
        "workers that train no batch for this long count as hung and are restarted; their trial resumes from its last "
        "epoch; default 10m"
    ))  # fmt: skip
    add_cache(group)


def _add_results(group: Group) -> None:
    group.add_argument("--results", type=Path, default=Path("results"), metavar="DIR", help="default: results/")
    group.add_argument("--name", help="the run's folder in there (default: space and time)")
    group.add_argument("--storage", type=_storage, metavar="URI", help=(
        "an s3://, gs:// or file:// address; the run is copied to <URI>/<name>/ during the search, and --resume "
        "--storage resumes it from there on another head node"
    ))  # fmt: skip
    group.add_argument("--keep", type=positive, default=3, metavar="N", help=(
        "number of best trials that keep their weights, for search.export --trial and for --refit; default 3"
    ))  # fmt: skip
    group.add_argument("--keep-epoch", choices=("last", "best"), default="last", help=(
        "whose model and error a trial leaves: those of its last epoch, or of its best one, whose error is lower than "
        "on new images, because it was chosen by it; default last"
    ))  # fmt: skip
    group.add_argument("--refit", choices=("on", "off"), default="on", help=(
        "at the end, train the winner again on all images, those for validation included, and average its weights with "
        "those of the best trials of the same network: that is the model in best/, and the one whose error is known "
        "stays in models/; default on"
    ))  # fmt: skip
    group.add_argument("--report", choices=("full", "tables", "off"), default="full", help=(
        "write report.html during the search and at its end: full labels the validation images with the winner, for "
        "its confusion matrix and top losses, tables skips that; default full"
    ))  # fmt: skip
    group.add_argument("--resume", action="store_true", help=(
        "resume the run called --name with its options; the command that began it resumes it, too. More --trials or a "
        "longer --time-budget extend it. --keep, --report, --max-concurrent, --stall-timeout and the workers' options "
        "may change, too, and --data, --weights, --leave-out and a folder of --test-split if the same files are "
        "there"
    ))  # fmt: skip
    group.add_argument("--trust", action="store_true", help=(
        "resume a run that another user began, or you on another machine: code in its files is executed"
    ))  # fmt: skip


def add_space(group: Group) -> None:
    """`--space`, for all commands that take images or a space, see `space_name`."""
    group.add_argument("--space", metavar="SPACE", help=(
        f"the search space: {', '.join(space_names())}; default with --data: {OWN_IMAGES}"
    ))  # fmt: skip


def add_cache(group: Group) -> None:
    """`--cache`, for all commands that train."""
    group.add_argument("--cache", choices=("auto", "memory-map", "jpeg", "off"), default="auto", help=(
        "how each node keeps the presized images: as pixels that all trials share, as smaller JPEGs, or not at all; "
        "default auto: pixels while they fit half of the memory and the disk, then JPEGs"
    ))  # fmt: skip


def add_max_unreadable(group: Group) -> None:
    """`--max-unreadable`, for all commands that read images to train on."""
    group.add_argument("--max-unreadable", type=_share, default=MAX_UNREADABLE, metavar="SHARE", help=(
        "the share of the images that may be unreadable; they are skipped, and listed in a file; default "
        f"{MAX_UNREADABLE:g}"
    ))  # fmt: skip


def add_group(group: Group) -> None:
    """`--group`, for all commands that split images."""
    ways = "|".join(groups.WAYS)
    group.add_argument("--group", type=_group, metavar=f"{ways}|REGEX", help=groups.HELP)


def add_leave_out(group: Group) -> None:
    """`--leave-out`, for all commands that read images to train on."""
    group.add_argument("--leave-out", type=absolute, metavar="FILE", help=(
        "a CSV file whose column path names images of --data that are not used at all, such as the suspects.csv of an "
        "earlier search; delete the rows of images whose label is right first"
    ))  # fmt: skip


def resume_command(run: Path, address: str | None) -> str:
    """The command that resumes the interrupted run in a folder."""
    words = ["--resume", "--name", run.name]
    if run.parent != Path("results").absolute():
        words += ["--results", str(run.parent)]
    return shell_command("search.run", *words, *(["--address", address] if address else []))


def search_command(
    space: str,
    *,
    data: Path | str | None,
    settings: Sequence[str],
    max_unreadable: float,
    group: str | None = None,
    leave_out: Path | None = None,
) -> str:
    """The `search.run` that follows another command with its space, data and settings."""
    words = ["--space", space, *(["--data", str(data)] if data else []), *(["--group", group] if group else [])]
    words += ["--leave-out", str(leave_out)] if leave_out else []
    if max_unreadable != MAX_UNREADABLE:
        words += ["--max-unreadable", str(max_unreadable)]
    return shell_command("search.run", *words, *(word for setting in settings for word in ("--set", setting)))


# --- Types ------------------------------------------------------------------------------------------------------------


def _test_split(text: str) -> float | Path:
    try:
        share = float(text)
    except ValueError:
        return absolute(text)
    if not 0 < share < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a share between 0 and 1, such as 0.2, nor a folder")
    return share


def _group(text: str) -> str:
    try:
        return groups.checked_group(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share from 0 to 1, such as 0.05")
    return share


def _storage(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in ("s3", "gs", "file") or not parts.netloc + parts.path.strip("/"):
        raise argparse.ArgumentTypeError(
            f"{shown(text)!r} is not an address in an object store: expected s3://bucket/path, gs://bucket/path or "
            "file:///path"
        )
    if "@" in parts.netloc:
        raise argparse.ArgumentTypeError(
            f"{shown(text)} contains a key, and the address is kept in the run's files. Pass the key in the "
            "environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY) or use the node's role"
        )
    return text


def _workers(text: str) -> str:
    pattern, equals, count = text.rpartition("=")
    if equals and not pattern.strip():
        raise argparse.ArgumentTypeError(f"{text!r} names no architecture before the =")
    positive(count)
    return text


def _screen(text: str) -> str:
    return text if text in ("auto", "off") else str(positive(text))


def _auto_or_count(text: str) -> str:
    return text if text == "auto" else str(positive(text))


def _auto_or_positive(text: str) -> int | None:
    return None if text == "auto" else positive(text)


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _folds(text: str) -> int:
    if not text.isdigit() or not MIN_FOLDS <= int(text) <= MAX_FOLDS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {MIN_FOLDS} to {MAX_FOLDS}")
    return int(text)


def _gpus(text: str) -> float:
    if text.isdigit():
        return int(text)
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a whole number, 0 or more, nor a share of one GPU, such as 0.25"
        )
    return share


def _above_zero(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text.strip())
    if not match or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time such as 90s, 30m or 8h")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]
