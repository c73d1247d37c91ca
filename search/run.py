"""Search one space: `python -m search.run --space quickstart`."""

import argparse
import fnmatch
import json
import logging
import platform
import re
import sys
from contextlib import nullcontext
from dataclasses import asdict
from datetime import datetime
from importlib.metadata import version
from typing import Any

from search.cli.messages import INTERRUPTED, Interruptible, run_cli, say
from search.cluster.connect import check_address, prepare_environment, start_ray
from search.options.arguments import parse_arguments, resume_command, strategy_of, workers_per_trial
from search.options.preparation import check_weights, find_data, pin, presize_here, say_depth, setting_values, space_of
from search.spaces.space import Space
from trainables.system.text import duration, many, shell_command

PUBLISHED = "published: on the book's data, split and hardware; other images or settings give other errors"


def main() -> int:
    args = parse_arguments()
    if args.describe:
        print(description(space_of(args)))
        return 0
    from search.runs.paths import RunFolder
    from search.runs.resume import alone_in, arguments_to_go_on, is_begun, said_changes

    name = args.name or f"{args.space}-{datetime.now():%Y%m%d-%H%M%S}"
    folder = RunFolder(args.results / name)
    with alone_in(folder):
        if args.resume and args.storage and not is_begun(folder):
            from search.runs.remote_copy import bring_back

            bring_back(args.storage, folder)
            args.trust = True  # it is this command that names the place
        if args.resume or is_begun(folder):
            args = arguments_to_go_on(args, folder)
            say(f"going on with {folder}/{said_changes(folder, args)}")
        return search(args, folder)


def search(args: argparse.Namespace, folder) -> int:
    """Check everything that can be checked before Ray starts, then run the search to its end."""
    prepare_environment(args.address)
    check_address(args.address)
    show_progress()
    space, strategy = space_of(args), strategy_of(args)
    from search.reporting.test_set import hold_out, source_of
    from search.runs.resume import arguments_record, images_record, require_same, require_whole, same_files
    from search.spaces.architectures import check_architectures
    from search.tuning.halving import check_lengths
    from search.tuning.tuner import RunOptions
    from trainables.data.source import images_digest

    as_asked = arguments_record(args)  # before the learning-rate finder narrows it
    if args.resume:
        require_whole(folder, space.dimensions)
    if strategy.scheduler == "halving":
        check_lengths(space)
    check_architectures(space)
    mirror = mirror_of(args, folder)
    images = hold_out(find_data(space, args), args.test_split, space.split_seed, read=folder.test.is_file())
    say_depth(images)
    digest = images_digest(images)
    known = images_record(images, digest)
    if args.resume:
        require_same(folder, space_record(space), known)
    check_weights(space, args)
    files = same_files(folder, args, space)
    pin(args)
    presize_here(space, images, args)
    nodes, ray_dashboard = start_ray(args.address)
    from search.cluster.resources import hardware

    size, num_workers = sizes(args, nodes, setting_values(space, "arch"))
    source = source_of(args, space)
    weights = str(args.weights) if args.weights else None
    if args.lr_range == "auto":
        from search.lr_find import narrowed_rates

        presizing = {"storage": args.cache, "max_unreadable": args.max_unreadable}
        rates = narrowed_rates(space, source, digest, weights, size, folder.lr_find, presizing)
        args.set, args.lr_range = [*args.set, *rates], "space"  # a resumed search keeps these bounds
        space = space_of(args)
    options = RunOptions(
        space=space,
        folder=folder,
        data=source,
        data_digest=digest,
        weights=weights,
        cache=args.cache,
        max_unreadable=args.max_unreadable,
        labels=list(images.classes),
        group_size=size,
        num_workers=num_workers,
        num_trials=args.trials or space.num_trials,
        time_budget=args.time_budget,
        strategy=strategy,
        max_concurrent=None if args.max_concurrent in ("auto", None) else args.max_concurrent,
        address=args.address,
        recipes=space.recipes[args.recipes] if args.recipes else (),
        report=args.report,
        keep=args.keep,
        keep_first=args.test_split is not None,
        stall_timeout=args.stall_timeout,
    )
    of_machine = {"data": images.given, "ray_dashboard": ray_dashboard, "hardware": hardware(nodes)}
    write_command(args, options, asked=as_asked, images=known, files=files, **of_machine)
    announce(options, nodes)
    with mirror:
        return run(options, resume=args.resume)


def show_progress() -> None:
    """Say what is logged of fetching, of waiting, and what was noticed of the images. Presizing has a bar."""
    for name in (
        "data.fetch",
        "data.layouts",
        "network.architecture",
        "network.pretrained_weights",
        "system.cache",
        "system.full_disk",
    ):
        logger = logging.getLogger(f"trainables.{name}")
        logger.setLevel(logging.INFO)
        logger.addHandler(_Sayer())


class _Sayer(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage())


def mirror_of(args: argparse.Namespace, folder):
    """What copies the run to `--storage`, as a context; one that does nothing without it."""
    if args.storage is None:
        return nullcontext()
    from search.runs.remote_copy import Mirror

    return Mirror(folder, args.storage, resume=args.resume, resume_command=resume_command(folder, args.address))


def sizes(args: argparse.Namespace, nodes: list, archs: list[str]):
    """The size of a trial's worker group, and the workers of some of the architectures; raises `ValueError` where not
    even the nodes that the autoscaler can add have room, or a pattern is one of no architecture."""
    from dataclasses import replace

    from search.cluster.resources import group_size, trials_at_once

    num_workers, of_archs = workers_per_trial(args.workers_per_trial)
    for pattern in of_archs:
        if not fnmatch.filter(archs, pattern):
            raise ValueError(
                f"--workers-per-trial {pattern}={of_archs[pattern]}: none of {', '.join(archs)} is like that"
            )
    asked = None if args.max_concurrent in ("auto", None) else args.max_concurrent
    counts = [num_workers, *of_archs.values()]
    largest = group_size(
        nodes,
        num_workers=max(counts),
        cpus_per_worker=args.cpus_per_worker,
        gpus_per_worker=args.gpus_per_worker,
    )
    trials_at_once(nodes, largest, None)
    trials_at_once(nodes, replace(largest, num_workers=min(counts)), asked)
    return replace(largest, num_workers=num_workers), of_archs


def run(options, *, resume: bool) -> int:
    import ray

    from search.cli.errors import errors_said
    from search.runs.time_budget import seconds_spent
    from search.tuning.searcher import end_study
    from search.tuning.tuner import new_tuner, restored_tuner

    try:
        tuner = restored_tuner(options) if resume else new_tuner(options)
        with Interruptible() as search:
            tuner.fit()
    except ValueError as error:
        # All input was checked before: this is a bug, and it keeps its traceback.
        raise RuntimeError("the search broke") from error
    finally:
        ray.shutdown()
    if not search.interrupted:  # then --resume goes on with its trials
        with errors_said("the study could not be brought up to date"):
            end_study(options.folder.journal, options.space.name)
    return conclude(options, seconds_spent(options.folder), interrupted=search.interrupted)


def words_to_show(argv: list[str]) -> list[str]:
    """The command line for the report: its URIs without user, password and query."""
    from trainables.system.file_systems import shown

    return [re.sub(r"[a-z][a-z0-9]*://\S+", lambda uri: shown(uri[0]), word) for word in argv]


def announce(options, nodes: list) -> None:
    from search.cluster.resources import memory_note, trials_at_once
    from search.runs.disk_space import needs

    size, folder = options.group_size, options.folder
    note = memory_note(nodes, size, options.max_concurrent)
    at_once = options.max_concurrent or trials_at_once(nodes, size, None)
    others = "".join(f", {arch} on {count}" for arch, count in options.num_workers.items())
    what = f"{options.num_trials} trials" + (
        f" in at most {options.time_budget / 60:g} min" if options.time_budget else ""
    )
    gpus = f" and {size.gpus_per_worker} GPUs" if size.gpus_per_worker else ""
    say(
        f"search: {what}, {at_once} at once{note}, each on {many(size.num_workers, 'worker')} of "
        f"{size.cpus_per_worker:g} CPUs{gpus}{others}; the first one waits for its workers to start"
    )
    say(f"results: {folder}/")
    kept = options.keep + options.keep_first
    say(needs(folder, largest_weights(options), at_once=at_once, kept=kept))
    say(f"watch: {shell_command('search.dashboard', folder)}")


def largest_weights(options) -> int | None:
    """Bytes of the largest network's pretrained weights; None where some are not on this machine's disk."""
    from trainables.data.source import folder_of
    from trainables.network.pretrained_weights import find_weights

    if setting_values(options.space, "pretrained") == [False]:
        return None
    folder = folder_of(options.weights) if options.weights else None
    files = [find_weights(arch, folder) for arch in setting_values(options.space, "arch")]
    return max(file.path.stat().st_size for file in files) if all(files) else None


def conclude(options, seconds: float, *, interrupted: bool) -> int:
    """The leaderboard, where things are, and what to do next. The exit code: 0 if there is a winner."""
    from rich.console import Console

    from search.cli.errors import errors_said
    from search.reporting.live_table import counts, leaderboard, recipes_table
    from search.reporting.summary import summary
    from search.reporting.test_set import lines, read_once
    from search.runs.results_table import FAILED, RUNNING, leaders, read_trials
    from search.runs.run_record import load
    from trainables.training import checkpoint

    rows = read_trials(options.folder.trials)
    with errors_said("states of ended trials could not be removed"):
        for row in rows:
            if row["status"] != RUNNING:  # an epoch under way when the search ended has left its state
                checkpoint.drop(options.folder.checkpoints / row["trial_id"])
    console = Console() if sys.stdout.isatty() else Console(width=200)
    if options.recipes:
        console.print(recipes_table(list(options.space.dimensions), options.recipes, rows))
        if any(recipe.error_rate for recipe in options.recipes):
            say(PUBLISHED)
    else:
        console.print(leaderboard(rows, list(options.space.dimensions)))
    say(f"{many(len(rows), 'trial')} in {duration(seconds)}: {counts(rows)}")
    if options.time_budget and seconds >= options.time_budget and not interrupted:
        say(
            f"the time budget of {duration(options.time_budget)} is spent; --resume with a longer --time-budget goes on"
        )
    if leaders(rows) and not interrupted:
        read_once(options.folder, options.data_digest)  # before the report, which shows it
    write_last_report(options, analysis=options.report == "full" and not interrupted)
    if interrupted:
        say(f"interrupted. Go on with: {resume_command(options.folder, options.address)}")
        return INTERRUPTED
    for row in rows:
        if row["status"] == FAILED:
            say(f"trial {row['number']} failed: {row['reason']}")
    if not leaders(rows):
        ended_by_failures(options, rows)
        say("no trial completed, so there is no best checkpoint")
        return 1
    with errors_said("no summary"):
        for line in (*summary(load(options.folder.path)), *lines(options.folder)):
            say(line)
    say(f"table: {options.folder}/trials.csv    best checkpoint: {options.folder}/best/")
    if options.folder.report.is_file():
        dashboard = shell_command("search.dashboard", options.folder)
        say(f"report: {options.folder}/report.html    dashboard: {dashboard}")
    say(f"next: {shell_command('search.export', options.folder, '--out', 'exported')}")
    return 1 if ended_by_failures(options, rows) else 0


def ended_by_failures(options, rows: list) -> bool:
    """Says so where one trial after another failed and the search gave up."""
    from search.runs.results_table import FAILED, failures_in_a_row
    from trainables.ray.retry_limits import MAX_CONSECUTIVE_FAILURES

    if failures_in_a_row(options.folder) < MAX_CONSECUTIVE_FAILURES:
        return False
    last = [row for row in rows if row["status"] == FAILED][-1]
    say(f"ended early: {MAX_CONSECUTIVE_FAILURES} trials failed, one after another; the last one: {last['reason']}")
    return True


def write_last_report(options, *, analysis: bool) -> None:
    """The report of a search that has ended. Whatever goes wrong with it, the search has its results."""
    if options.report == "off":
        return
    from search.cli.errors import errors_said
    from search.report import write_report
    from search.reporting.live_report import end_live_report
    from search.runs.run_record import load

    end_live_report(options.folder)
    try:
        with errors_said("no report"):
            write_report(load(options.folder.path), options.folder.report, analysis=analysis)
    except KeyboardInterrupt:
        say(f"left out. Once more: {shell_command('search.report', options.folder)}")


def write_command(args: argparse.Namespace, options, **found: Any) -> None:
    """What ran, on what: for the report, and for `--resume`."""
    from uuid import uuid4

    from search.runs.atomic_files import write_atomically
    from search.runs.resume import arguments_record, history, signature
    from trainables.inference.model_folder import read_json

    before = read_json(options.folder.command) if args.resume else {}
    run_id = before.get("run_id", uuid4().hex)
    packages = ("finetune-search", "ray", "torch", "torchvision", "timm", "optuna")
    command = {
        "run_id": run_id,
        "signature": signature(options.folder, run_id),
        **history(options.folder, args, words_to_show(sys.argv[1:])),
        "arguments": arguments_record(args),
        "source": str(options.data),
        "weights": options.weights,
        "split_seed": options.space.split_seed,
        "group_size": asdict(options.group_size),
        "num_workers": options.num_workers,
        "max_concurrent": options.max_concurrent,
        "method": asdict(options.strategy),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        **found | {name: before[name] for name in ("asked", "images") if name in before},
    }
    write_atomically(options.folder.command, json.dumps(command, indent=2) + "\n")
    write_atomically(options.folder.space, json.dumps(space_record(options.space), indent=2) + "\n")


def space_record(space: Space) -> dict[str, Any]:
    """The space as it is kept with a run."""
    record = asdict(space) | {"dimensions": {name: str(of) for name, of in space.dimensions.items()}}
    del record["recipes"]  # what could have run
    return record


def description(space: Space) -> str:
    """The space, and every setting with its default there."""
    from dataclasses import fields

    from trainables.recipe import Recipe

    defaults = Recipe.from_dict(space.settings).to_dict()
    lines = [f"{space.name}: {space.doc}", "", "searched:"]
    lines += [f"  {name:18} {dimension}" for name, dimension in space.dimensions.items()]
    if space.recipes:
        lines += ["", "recipes:"]
        lines += [f"  {name:18} {recipe.name}" for name, found in space.recipes.items() for recipe in found]
    lines += ["", "all settings, with this space's default:"]
    for spec in fields(Recipe):
        meta, kind = spec.metadata, spec.type.__name__
        allowed = ", ".join(meta["choices"]) or (
            kind if meta["low"] is None else f"{kind} {meta['low']:g}..{meta['high']:g}"
        )
        lines.append(f"  {spec.name:18} {defaults[spec.name]!s:22} {meta['doc']} [{allowed}]")
    return "\n".join(lines)


if __name__ == "__main__":
    run_cli(main)
