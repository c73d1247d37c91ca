"""The arguments of `python -m search.run`."""

import argparse
import re
from pathlib import Path
from urllib.parse import urlsplit

from search.options.strategy import CONFIRM_SEEDS, OBJECTIVES, SCHEDULERS, SEARCHERS, Strategy
from search.spaces.space import space_names
from trainables.data.fetch import is_uri
from trainables.data.labelled_images import MAX_UNREADABLE
from trainables.system.file_systems import shown
from trainables.system.text import shell_command

EXAMPLES = """
examples:
  python -m search.run --space quickstart
      a few minutes on a laptop, with everything it needs made or installed
  python -m search.run --space pets --data ~/my_images --trials 30
      your own images: one folder per class, train/ and valid/ with such folders, or Oxford Pets' images/<breed>_<n>.jpg
  python -m search.run --space pets --set arch=resnet18.tv_in1k,resnet34.tv_in1k --set epochs=3..6 --set image_size=160
      choose the architectures, narrow the epochs, pin the image size
  python -m search.run --resume --name NAME
      go on with a search that was interrupted
  python -m search.run --resume --name NAME --trials 40
      extend a search, also one that has ended, to 40 trials in all
  python -m search.run --resume --name NAME --storage s3://bucket/runs --address auto
      go on with it on another cluster, from the copy that --storage had made of it there
  python -m search.run --space pets --recipes book
      the runs of fastai's book, each once, with the published errors beside ours
  python -m search.run --space pets --describe
      the space's dimensions and every setting that --set knows
"""


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m search.run",
        description="Fine-tune many image classifiers, stop the hopeless ones early, keep the best.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_argument_group("what to search")
    what.add_argument("--space", metavar="SPACE", help=f"the search space: {', '.join(space_names())}")
    what.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help=(
        "pin a setting (epochs=5), narrow or add a dimension (epochs=3..8, arch=resnet18,resnet34, or "
        "mixup_alpha=0,0.1..0.4 for off or a number); repeatable"
    ))  # fmt: skip
    what.add_argument(
        "--data", type=source, metavar="DIR|URI", help=(
            "labelled images instead of the space's own: a folder that every node has, or the s3://, gs:// or https:// "
            "address of a folder or an archive, which every node fetches once; with '/*' at its end the folders in it "
            "are the classes, with '/*/*' those one level deeper"
        ))  # fmt: skip
    what.add_argument(
        "--weights", type=source, metavar="DIR|URI", help=(
            "<arch>.safetensors files for every architecture, likewise; installed packages and timm's hub are only "
            "searched without it"
        ))  # fmt: skip
    what.add_argument("--test-split", type=_test_split, metavar="SHARE|DIR", help=(
        "hold out this share of every class (0.2), or take a folder of other images of the same classes; they are "
        "opened once, at the end, to test the winner and trial 0"
    ))  # fmt: skip
    what.add_argument("--recipes", metavar="NAME", help=(
        "run just the space's recipes of that name, such as book, each once and to its end; --searcher and "
        "--scheduler have no say"
    ))  # fmt: skip
    what.add_argument("--describe", action="store_true", help="print the space and all settings, and stop")
    how = parser.add_argument_group("how")
    how.add_argument("--trials", type=positive, metavar="N", help="how many trials in all (default: the space's)")
    how.add_argument("--time-budget", type=_seconds, metavar="30m", help=(
        "stop after this time (90s, 30m, 8h) of searching; what a search that was resumed has spent before counts"
    ))  # fmt: skip
    how.add_argument("--searcher", choices=SEARCHERS, default="tpe", help=(
        "who proposes, of Optuna's samplers: tpe (default), random, gp = Gaussian process, cmaes; gp and cmaes draw at "
        "random what not every trial has, such as mixup_alpha=0,0.1..0.4, and cmaes also choices, such as arch"
    ))  # fmt: skip
    how.add_argument("--scheduler", choices=SCHEDULERS, help=(
        "which trials end early: rungs = those that, late in their schedule, are expected to end badly; median = those "
        "that are worse than the median at any time; halving = none, but all except the space's own recipes begin "
        "short, and the best third of a length is trained anew with the next one; none; default rungs, and none with "
        "--objective error,seconds"
    ))  # fmt: skip
    how.add_argument("--objective", choices=OBJECTIVES, default="error", help=(
        "what is to be small: the validation error, or that and the seconds of training, whose Pareto front the table "
        "then marks; default error"
    ))  # fmt: skip
    how.add_argument("--target-seconds", type=_seconds, metavar="90s", help=(
        "prefer trials whose training takes no longer; begins with a trial of each architecture, in the order of the "
        "space, but those after one that takes longer"
    ))  # fmt: skip
    how.add_argument("--confirm", type=positive, default=0, metavar="K", help=(
        f"train the best K configs again in the end, each with {CONFIRM_SEEDS} new seeds; the mean decides who has won"
    ))  # fmt: skip
    how.add_argument("--lr-range", choices=("space", "auto"), default="space", help=(
        "bounds of the learning rates: the space's own, or narrowed by the learning-rate finder, which then runs once "
        "per architecture; default space"
    ))  # fmt: skip
    how.add_argument("--seed", type=int, metavar="N", help="seed of proposals and trainings (default: the space's)")
    where = parser.add_argument_group("on what")
    where.add_argument("--address", help=(
        "Ray cluster: auto (RAY_ADDRESS, or the one on this machine), or host:port; default: start Ray on this machine"
    ))  # fmt: skip
    where.add_argument("--workers-per-trial", type=_workers, action="append", metavar="N", help=(
        "DDP workers (default 1), or ARCH=N for some architectures ('resnet101*=4'); repeatable"
    ))  # fmt: skip
    where.add_argument(
        "--cpus-per-worker", type=_above_zero, metavar="N", help="default: a GPU's share of a node, or 2"
    )
    where.add_argument("--gpus-per-worker", type=_whole, metavar="N", help="whole GPUs; default: 1 where there are any")
    where.add_argument("--max-concurrent", type=_auto_or_positive, default="auto", metavar="N", help=(
        "trials at once, or auto (default): what CPUs, GPUs and memory are enough for, as nodes come and go"
    ))  # fmt: skip
    where.add_argument("--stall-timeout", type=_seconds, default=600.0, metavar="10m", help=(
        "workers that train no batch for so long are taken for hung and started anew; their trial goes on from its "
        "last epoch; default 10m"
    ))  # fmt: skip
    add_max_unreadable(what)
    add_cache(where)
    out = parser.add_argument_group("results")
    out.add_argument("--results", type=Path, default=Path("results"), metavar="DIR", help="default: results/")
    out.add_argument("--name", help="the run's folder in there (default: space and time)")
    out.add_argument("--storage", type=_storage, metavar="URI", help=(
        "an s3://, gs:// or file:// address; <URI>/<name>/ gets a copy of everything as the search goes, from which "
        "--resume --storage goes on with it on another head node"
    ))  # fmt: skip
    out.add_argument("--keep", type=positive, default=3, metavar="N", help=(
        "how many of the best trials keep their weights, for search.export --trial; default 3"
    ))  # fmt: skip
    out.add_argument("--report", choices=("full", "tables", "off"), default="full", help=(
        "write report.html as the search goes and at its end: full labels the validation images with the winner, for "
        "its confusion matrix and top losses, tables leaves that out; default full"
    ))  # fmt: skip
    out.add_argument("--resume", action="store_true", help=(
        "go on with the run called --name, options as they were; the command that began it does so, too. More --trials "
        "or a longer --time-budget extend it. --keep, --report, --max-concurrent, --stall-timeout and the workers' "
        "options may change, too, and --data, --weights and a folder of --test-split where the same files lie there"
    ))  # fmt: skip
    out.add_argument("--trust", action="store_true", help=(
        "resume a run that somebody else began, or you on another machine: what its files say is executed"
    ))  # fmt: skip
    args = parser.parse_args(argv)
    args.given = given(parser, argv)
    if args.space is None and not args.resume:
        parser.error(f"--space is needed: one of {', '.join(space_names())}")
    if args.recipes and args.trials:
        parser.error("--trials has no say: --recipes runs each of the recipes once")
    if args.recipes and args.lr_range == "auto":
        parser.error("--lr-range auto has nothing to narrow: --recipes gives every trial its rates")
    if args.recipes and (args.target_seconds or args.objective != "error"):
        parser.error("--objective and --target-seconds have no say: --recipes runs each of the recipes once")
    if args.resume and args.name is None:
        parser.error("--resume needs --name, the folder of the run to go on with")
    return args


def given(parser: argparse.ArgumentParser, argv: list[str] | None) -> list[str]:
    """The arguments that the command line names, be it with their default."""
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return list(vars(parser.parse_args(argv)))


def strategy_of(args: argparse.Namespace) -> Strategy:
    """Raises `ValueError` where its parts do not fit each other."""
    if args.recipes:  # all are proposed already, and none ends early
        return Strategy(searcher="random", scheduler="none", confirm=args.confirm)
    default = "rungs" if args.objective == "error" else "none"
    names = ("searcher", "objective", "target_seconds", "confirm")
    return Strategy(scheduler=args.scheduler or default, **{name: getattr(args, name) for name in names})


def add_cache(parser) -> None:
    """`--cache`, as all commands have it that train."""
    parser.add_argument("--cache", choices=("auto", "memory-map", "jpeg", "off"), default="auto", help=(
        "how each node keeps the presized images: as pixels that all trials share, as smaller JPEGs, or not at all; "
        "default auto: pixels while they fit half of the memory and the disk, then JPEGs"
    ))  # fmt: skip


def add_max_unreadable(parser) -> None:
    """`--max-unreadable`, as all commands have it that read images to train on."""
    parser.add_argument("--max-unreadable", type=_share, default=MAX_UNREADABLE, metavar="SHARE", help=(
        "the share of the images that may be unreadable; they are skipped, and listed in a file; default "
        f"{MAX_UNREADABLE:g}"
    ))  # fmt: skip


def resume_command(folder, address: str | None) -> str:
    """The command that goes on with an interrupted run."""
    words = ["--resume", "--name", folder.path.name]
    if folder.path.parent != Path("results").absolute():
        words += ["--results", folder.path.parent]
    return shell_command("search.run", *words, *(["--address", address] if address else []))


def search_command(args: argparse.Namespace, *more: str) -> str:
    """The `search.run` that goes on from another command's --space, --data and --set; `more` words follow."""
    data = ["--data", args.data] if args.data else []
    if args.max_unreadable != MAX_UNREADABLE:
        data += ["--max-unreadable", args.max_unreadable]
    settings = [word for setting in args.set for word in ("--set", setting)]
    return shell_command("search.run", "--space", args.space, *data, *settings, *more)


def absolute(text: str) -> Path:
    """Workers, and a search that is resumed, may be in another folder."""
    return Path(text).expanduser().absolute()


def source(text: str) -> Path | str:
    """A folder, or a URI as it is."""
    return text if is_uri(text) else absolute(text)


def _test_split(text: str) -> float | Path:
    try:
        share = float(text)
    except ValueError:
        return absolute(text)
    if not 0 < share < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a share between 0 and 1, such as 0.2, nor a folder")
    return share


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
            f"{shown(text)!r} is no place in an object store: expected s3://bucket/path, gs://bucket/path or file:///path"
        )
    if "@" in parts.netloc:
        raise argparse.ArgumentTypeError(
            f"{shown(text)} came with a key, and the address is kept in the run's files. Give the key by the "
            "environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY) or by the node's role"
        )
    return text


def workers_per_trial(asked: list[str] | None) -> tuple[int, dict[str, int]]:
    """The workers of a trial, and those of some architectures by their pattern."""
    parts = [text.rpartition("=") for text in asked or []]
    everywhere = [int(count) for pattern, _, count in parts if not pattern]
    return everywhere[-1] if everywhere else 1, {pattern: int(count) for pattern, _, count in parts if pattern}


def _workers(text: str) -> str:
    pattern, equals, count = text.rpartition("=")
    if equals and not pattern.strip():
        raise argparse.ArgumentTypeError(f"{text!r} names no architecture before the =")
    positive(count)
    return text


def _auto_or_positive(text: str) -> int | str:
    return text if text == "auto" else positive(text)


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _whole(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, 0 or more")
    return int(text)


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
