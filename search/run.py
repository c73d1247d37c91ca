"""Search one space: `python -m search.run --space quickstart`."""

import argparse
import json
import os
import platform
import re
import socket
import sys
import time
from dataclasses import asdict, replace
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from search.cli import INTERRUPTED, Interruptible, run_cli
from search.space import Space, load_space, space_names

METHODS = ("tpe-asha", "tpe", "random-asha", "random")

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
        "pin a setting (epochs=5), narrow or add a dimension (epochs=3..8, arch=resnet18,resnet34); repeatable"
    ))  # fmt: skip
    what.add_argument(
        "--data", type=_absolute, metavar="DIR", help="folder of labelled images instead of the space's own"
    )
    what.add_argument(
        "--weights", type=_absolute, metavar="DIR", help="folder with <arch>.safetensors, looked into first"
    )
    what.add_argument("--describe", action="store_true", help="print the space and all settings, and stop")
    how = parser.add_argument_group("how")
    how.add_argument("--trials", type=_positive, metavar="N", help="how many recipes to try (default: the space's)")
    how.add_argument("--time-budget", type=_seconds, metavar="30m", help="stop after this time (90s, 30m, 8h)")
    how.add_argument("--method", choices=METHODS, default="tpe-asha", help=(
        "who proposes (Optuna's TPE or random), and whether bad trials end early (-asha); default tpe-asha"
    ))  # fmt: skip
    how.add_argument("--seed", type=int, metavar="N", help="seed of proposals and trainings (default: the space's)")
    where = parser.add_argument_group("on what")
    where.add_argument("--address", help="Ray cluster: auto, or host:port (default: start Ray on this machine)")
    where.add_argument("--workers-per-trial", type=_positive, default=1, metavar="N", help="DDP workers (default 1)")
    where.add_argument(
        "--cpus-per-worker", type=_above_zero, metavar="N", help="default: a GPU's share of a node, or 2"
    )
    where.add_argument("--gpus-per-worker", type=_whole, metavar="N", help="whole GPUs; default: 1 where there are any")
    where.add_argument("--max-concurrent", type=_positive, metavar="N", help="trials at once (default: what fits)")
    out = parser.add_argument_group("results")
    out.add_argument("--results", type=Path, default=Path("results"), metavar="DIR", help="default: results/")
    out.add_argument("--name", help="the run's folder in there (default: space and time)")
    out.add_argument("--resume", action="store_true", help="go on with the run called --name, options as they were")
    args = parser.parse_args(argv)
    if args.space is None and not args.resume:
        parser.error(f"--space is needed: one of {', '.join(space_names())}")
    if args.resume and args.name is None:
        parser.error("--resume needs --name, the folder of the run to go on with")
    return args


def main() -> int:
    args = parse_arguments()
    if args.describe:
        print(description(with_settings(load_space(args.space), args)))
        return 0
    from search.results import RunFolder

    if args.resume:
        folder = RunFolder(args.results / args.name)
        return search(saved_arguments(folder, args), folder)
    name = args.name or f"{args.space}-{datetime.now():%Y%m%d-%H%M%S}"
    folder = RunFolder(args.results / name)
    if folder.path.exists():
        raise ValueError(f"{folder} exists. Add --resume to go on with it, or give another --name.")
    return search(args, folder)


def search(args: argparse.Namespace, folder) -> int:
    """Check everything that can be checked before Ray starts, then run the search to its end."""
    prepare_environment()
    space = with_settings(load_space(args.space), args)
    from search.tuner import RunOptions, full_settings

    full_settings(space)
    images = find_data(space, args)
    check_weights(space, args)
    presize_here(space, images, args)
    nodes = start_ray(args)
    from search.resources import group_size, trials_at_once

    size = group_size(
        nodes,
        num_workers=args.workers_per_trial,
        cpus_per_worker=args.cpus_per_worker,
        gpus_per_worker=args.gpus_per_worker,
    )
    options = RunOptions(
        space=space,
        folder=folder,
        data=str(images.root),
        weights=str(args.weights) if args.weights else None,
        labels=list(images.classes),
        group_size=size,
        num_trials=args.trials or space.num_trials,
        time_budget=args.time_budget,
        method=args.method,
        max_concurrent=trials_at_once(nodes, size, args.max_concurrent),
    )
    write_command(args, options)
    return run(options, resume=args.resume)


def run(options, *, resume: bool) -> int:
    import ray

    from search.tuner import new_tuner, restored_tuner

    announce(options)
    started = time.monotonic()
    try:
        tuner = restored_tuner(options) if resume else new_tuner(options)
        with Interruptible() as search:
            tuner.fit()
    except ValueError as error:
        # All input was checked before: this is a bug, and it keeps its traceback.
        raise RuntimeError("the search broke") from error
    finally:
        ray.shutdown()
    return conclude(options, time.monotonic() - started, interrupted=search.interrupted)


def with_settings(space: Space, args: argparse.Namespace) -> Space:
    """The space with the command line's `--set`s and seed in it; all their problems in one `ValueError`."""
    seed = space.seed if args.seed is None else args.seed
    return replace(space, seed=seed, settings=space.settings | {"seed": seed}).with_settings(args.set)


def find_data(space: Space, args: argparse.Namespace):
    from trainables.data import find_images
    from trainables.datasets import prepare_in_subprocess

    images = find_images(args.data or prepare_in_subprocess(space.dataset))
    say(f"data: {images.describe()} in {images.root}")
    return images


def check_weights(space: Space, args: argparse.Namespace) -> None:
    from trainables.weights import require_weights

    if setting_values(space, "pretrained") != [False]:
        require_weights(setting_values(space, "arch"), args.weights)


def presize_here(space: Space, images, args: argparse.Namespace) -> None:
    """On this machine alone the images are decoded now, with progress and errors shown; a cluster's nodes do it
    themselves when their first trial starts."""
    if args.address is not None:
        return
    from rich.progress import Progress

    from trainables.presize import presize

    with Progress(transient=True) as progress:
        for size in setting_values(space, "presize"):
            task = progress.add_task(f"presizing to {size} px", total=len(images.paths))
            presized = presize(
                images, size, progress=lambda done, total, t=task: progress.update(t, completed=done, total=total)
            )
    train, valid = presized.split(seed=space.split_seed)
    left_out = f", {len(presized.unreadable)} unreadable ones left out" if presized.unreadable else ""
    say(f"split: {len(train)} training and {len(valid)} validation images{left_out}")


def setting_values(space: Space, name: str) -> list[Any]:
    """The values that a search can give to a setting whose values can be listed."""
    from search.tuner import full_settings

    dimension = space.dimensions.get(name)
    if dimension is None:
        return [full_settings(space)[name]]
    return list(getattr(dimension, "values", None) or range(int(dimension.low), int(dimension.high) + 1))


def prepare_environment() -> None:
    """The environment of Ray and its workers, before Ray is imported. Our own lines tell what happens, not Ray's."""
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # see Interruptible
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")  # failed trials have no metric
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "1")  # what a kill of this process can make Tune forget
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "300")  # imports are slow on a busy machine
    os.environ.setdefault("RAY_TRAIN_COLLECTIVE_TIMEOUT_S", "600")
    # Threads that spin while they wait made an epoch 4 times as long where another process wanted the CPU, too.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


def start_ray(args: argparse.Namespace):
    """Connect to a cluster or start Ray here; the nodes that a search can use."""
    import logging

    import ray

    from search.resources import cluster_nodes

    for name in ("ray", "ray.tune", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    say("starting Ray on this machine" if args.address is None else f"connecting to Ray at {args.address}")
    check_address(args.address)
    environment = {name: value for name, value in os.environ.items() if name.startswith(("RAY_TRAIN_", "OMP_WAIT"))}
    context = ray.init(
        address=args.address or "local",
        log_to_driver=False,
        logging_level=logging.ERROR,
        runtime_env={"env_vars": environment},
    )
    if context.dashboard_url:
        say(f"Ray's dashboard: http://{context.dashboard_url}")
    return cluster_nodes()


def check_address(address: str | None) -> None:
    """Raises `ValueError` where nobody listens at host:port; Ray itself would go on trying for minutes."""
    host, colon, port = (address or "").rpartition(":")
    if not colon or not port.isdigit() or "/" in host:
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise ValueError(
            f"--address {address}: no Ray cluster answers there ({error}). Give the address that `ray start` "
            "printed on the head node, or auto on the head node itself, or leave it out to start Ray on this machine."
        ) from error


def announce(options) -> None:
    size, folder = options.group_size, options.folder
    what = f"{options.num_trials} trials" + (
        f" in at most {options.time_budget / 60:g} min" if options.time_budget else ""
    )
    gpus = f" and {size.gpus_per_worker} GPUs" if size.gpus_per_worker else ""
    say(
        f"search: {what}, {options.max_concurrent} at once, each on {size.num_workers} workers of "
        f"{size.cpus_per_worker:g} CPUs{gpus}; the first one waits for its workers to start"
    )
    say(f"results: {folder}/")
    say(f"curves: tensorboard --logdir {folder}/tune (pip install tensorboard)")


def conclude(options, seconds: float, *, interrupted: bool) -> int:
    """The leaderboard, where things are, and what to do next. The exit code: 0 if there is a winner."""
    from rich.console import Console

    from search.leaderboard import counts, duration, leaderboard
    from search.results import COMPLETED, FAILED, leaders, read_trials

    rows = read_trials(options.folder.trials)
    console = Console() if sys.stdout.isatty() else Console(width=200)
    console.print(leaderboard(rows, list(options.space.dimensions)))
    say(f"{len(rows)} trials in {duration(seconds)}: {counts(rows)}")
    if interrupted:
        say(f"interrupted. Go on with: python -m search.run --resume --name {options.folder.path.name}")
        return INTERRUPTED
    for row in rows:
        if row["status"] == FAILED:
            say(f"trial {row['number']} failed: {row['reason']}")
    best = leaders(rows)
    if not best:
        say("no trial completed, so there is no best checkpoint")
        return 1
    first = next((row for row in rows if row["number"] == 0 and row["status"] == COMPLETED), None)
    beside = f" (trial 0, the space's own recipe: {100 * first['error_rate']:.1f} %)" if first else ""
    say(f"best: trial {best[0]['number']} with {100 * best[0]['error_rate']:.1f} % validation error{beside}")
    say(f"table: {options.folder}/trials.csv    best checkpoint: {options.folder}/best/")
    say(f"next: python -m search.export {options.folder} --out exported")
    return 0


def write_command(args: argparse.Namespace, options) -> None:
    """What ran, on what: for the report, and for `--resume`."""
    from search.files import write_atomically

    options.folder.path.mkdir(parents=True, exist_ok=True)
    packages = ("finetune-search", "ray", "torch", "torchvision", "timm", "optuna")
    command = {
        "argv": sys.argv[1:],
        "arguments": {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items()},
        "data": options.data,
        "weights": options.weights,
        "split_seed": options.space.split_seed,
        "group_size": asdict(options.group_size),
        "max_concurrent": options.max_concurrent,
        "started_at": datetime.now().astimezone().isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "hardware": {"machine": platform.machine(), "system": platform.system(), "cpus": os.cpu_count()},
    }
    write_atomically(options.folder.command, json.dumps(command, indent=2) + "\n")
    space = asdict(options.space) | {"dimensions": {n: str(d) for n, d in options.space.dimensions.items()}}
    write_atomically(options.folder.space, json.dumps(space, indent=2) + "\n")


def saved_arguments(folder, args: argparse.Namespace) -> argparse.Namespace:
    """The arguments that a run was started with; where it goes on is this command's."""
    if not folder.command.is_file():
        raise ValueError(
            f"{folder} holds no run to resume (no command.json in it). Runs are listed by: ls {args.results}"
        )
    saved = json.loads(folder.command.read_text())["arguments"]
    for name in ("data", "weights", "results"):
        saved[name] = Path(saved[name]) if saved[name] else None
    return argparse.Namespace(
        **saved | {"resume": True, "address": args.address, "name": args.name, "results": args.results}
    )


def description(space: Space) -> str:
    """The space, and every setting with its default there."""
    from dataclasses import fields

    from trainables.recipe import Recipe

    defaults = Recipe.from_dict(space.settings).to_dict()
    lines = [f"{space.name}: {space.doc}", "", "searched:"]
    lines += [f"  {name:18} {dimension}" for name, dimension in space.dimensions.items()]
    lines += ["", "all settings, with this space's default:"]
    for spec in fields(Recipe):
        meta, kind = spec.metadata, spec.type.__name__
        allowed = ", ".join(meta["choices"]) or (
            kind if meta["low"] is None else f"{kind} {meta['low']:g}..{meta['high']:g}"
        )
        lines.append(f"  {spec.name:18} {defaults[spec.name]!s:22} {meta['doc']} [{allowed}]")
    return "\n".join(lines)


def say(text: str) -> None:
    print(text, flush=True)


def _absolute(text: str) -> Path:
    """Workers, and a search that is resumed, may be in another folder."""
    return Path(text).expanduser().absolute()


def _positive(text: str) -> int:
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


if __name__ == "__main__":
    run_cli(main)
