"""Search one space: `python -m search.run --space quickstart`.

(The file is long so that the steps of a search read from top to bottom in one place.)
"""

import json
import platform
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from importlib.metadata import version
from typing import TYPE_CHECKING

from search.cli.messages import Interruptible, say, show_progress
from search.cluster.connect import check_address, prepare_environment, start_ray
from search.options.arguments import parse_arguments, resume_command
from search.options.preparation import (
    find_data,
    has_pattern,
    pinned,
    presize_here,
    say_depth,
    searched_space,
    with_epochs,
    with_groups,
    with_metric,
    with_names,
    with_weights,
    without_untrainable,
)
from search.options.search_options import SearchOptions
from search.spaces.space import Space
from trainables.system.command_line import INTERRUPTED, run_cli
from trainables.system.gpu_share import reserved
from trainables.system.text import duration, many, shell_command

if TYPE_CHECKING:
    from search.cluster.resources import Node
    from search.runs.command import FilesRecord, ImagesRecord
    from search.runs.csv_file import Row
    from search.runs.paths import RunFolder
    from search.tuning.tuner import RunOptions
    from search.tuning.warm_start import WarmStart
    from trainables.data.labelled_images import ImageFolder
    from trainables.data.presized_images import PresizedImages


def main(argv: Sequence[str] | None = None) -> int:
    began = time.monotonic()
    argv = sys.argv[1:] if argv is None else argv
    options = parse_arguments(argv)
    if options.describe:
        print(searched_space(options).describe())
        return 0
    prepare_environment(options.address)  # before anything imports Ray, which reads it then
    from search.runs.paths import RunFolder
    from search.runs.resume import is_begun, options_to_resume, said_changes
    from search.runs.run_lock import alone_in

    name = options.name or f"{options.space}-{datetime.now():%Y%m%d-%H%M%S}"
    folder = RunFolder(options.results / name)
    if options.dry_run:
        return plan(options, folder)
    with alone_in(folder):
        if options.resume and options.storage and not is_begun(folder):
            from search.runs.remote_run import bring_back

            bring_back(options.storage, folder)
            options = replace(options, trust=True)  # this command itself names the place
        if options.resume or is_begun(folder):
            options = options_to_resume(options, folder)
            say(f"resuming {folder}/{said_changes(folder, options)}")
        return search(options, folder, argv, began)


def plan(options: SearchOptions, folder: "RunFolder") -> int:
    """`--dry-run`: all steps up to the start of Ray, and what the others would do."""
    from search.runs.resume import require_new
    from search.tuning.dry_run import say_plan

    require_new(folder)
    prepared = prepare(options, folder)
    say_plan(prepared.options, prepared.space, prepared.images, folder, prepared.warm_start)
    return 0


def search(options: SearchOptions, folder: "RunFolder", argv: Sequence[str], began: float) -> int:
    """The steps of a search, from its options to its exit code."""
    from search.runs.time_budget import seconds_spent

    prepared = prepare(options, folder)
    run = connect(prepared, folder, argv, began)
    with prepared.mirror:
        interrupted = execute(run, resume=options.resume)
        return conclude(run, seconds_spent(folder), interrupted=interrupted)


# --- Prepare ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A search that has been checked as far as that is possible without Ray."""

    options: SearchOptions
    asked: SearchOptions  # before names, epochs and rates were decided, and addresses pinned
    space: Space
    images: "ImageFolder"  # those that the search may know
    presized: "PresizedImages | None"  # where this machine trains on them
    groups: str  # of all images, as text
    left_out: tuple[str, ...]
    known: "ImagesRecord"
    files: "FilesRecord"
    mirror: AbstractContextManager[object]
    warm_start: "WarmStart | None"


def prepare(options: SearchOptions, folder: "RunFolder") -> Prepared:
    """Find the data and check everything that can be checked before Ray starts."""
    check_address(options.address)
    show_progress()
    asked, options = options, replace(options, set=with_names(options.set))
    space = searched_space(options)
    from search.reporting.test_set import hold_out
    from search.runs.resume import (
        begun_without_groups,
        files_record,
        images_record,
        left_out_images,
        require_same,
        require_whole,
    )
    from search.tuning.halving import check_lengths
    from search.tuning.warm_start import WarmStart, new_warm_start
    from trainables.data.groups import to_text

    if options.resume:
        require_whole(folder, space.dimensions)
    if options.strategy.scheduler == "halving":
        check_lengths(space)
    if options.weights:  # so that only networks that have some are tried out
        options, space = with_weights(options, space)
    options, space = without_untrainable(options, space, by_pattern=has_pattern(asked.set))
    mirror = mirror_of(options, folder)
    left_out = left_out_images(options, folder)
    images = find_data(space, options.data, left_out)
    if not (options.resume and begun_without_groups(folder)):
        images = with_groups(images, options.group)
    groups = to_text(images.groups)
    images = hold_out(images, options.test_split, space.split_seed, read=folder.test.is_file())
    say_depth(images)
    options, space = with_epochs(options, space, images)
    options, space = with_metric(options, space, images)
    if options.folds and images.valid is not None:
        raise ValueError(f"--folds {options.folds}: {images.root} says itself which images validate")
    if not options.weights:  # after the images, because fetching them may take long
        options, space = with_weights(options, space)
    known, files = images_record(images), files_record(options, space)
    if options.resume:
        require_same(folder, space.to_record(), known, files, groups)
        warm_start = WarmStart.load(folder)
    else:
        warm_start = new_warm_start(options, space, known, groups, files)
    options = pinned(options)
    presized = None
    if options.address is None and not options.dry_run:
        presized = presize_here(space, images, cache=options.cache, max_unreadable=options.max_unreadable)
    return Prepared(
        options=options, asked=asked, space=space, images=images, presized=presized, groups=groups, left_out=left_out,
        known=known, files=files, mirror=mirror, warm_start=warm_start,
    )  # fmt: skip


def mirror_of(options: SearchOptions, folder: "RunFolder") -> AbstractContextManager[object]:
    """What copies the run to `--storage`, as a context; one that does nothing without it."""
    if options.storage is None or options.dry_run:
        return nullcontext()
    from search.runs.remote_copy import Mirror

    again = resume_command(folder.path, options.address)
    return Mirror(folder, options.storage, resume=options.resume, resume_command=again)


# --- Connect ----------------------------------------------------------------------------------------------------------


def connect(prepared: Prepared, folder: "RunFolder", argv: Sequence[str], began: float) -> "RunOptions":
    """Start Ray or connect to it, size the trials, and write down what runs."""
    options, space, images = prepared.options, prepared.space, prepared.images
    look_for_near_duplicates(prepared, folder)
    nodes = start_ray(options.address)
    from search.cluster.resources import shared_sizes, sizes
    from search.options.preparation import setting_values
    from search.reporting.test_set import source_of
    from search.tuning.tuner import RunOptions

    size, num_workers = sizes(options, nodes, setting_values(space, "arch"))
    data = str(options.data or space.dataset)
    source = source_of(data, options.test_split, space.split_seed, prepared.left_out, prepared.groups)
    if options.lr_range == "auto":
        from search.lr_find import narrowed_rates

        presizing = {"storage": options.cache, "max_unreadable": options.max_unreadable}
        weights = str(options.weights) if options.weights else None
        rates = narrowed_rates(space, source, prepared.known.digest, weights, size, folder.lr_find, presizing)
        options = replace(options, set=(*options.set, *rates), lr_range="space")  # a resumed search keeps these bounds
        space = searched_space(options)
    run = RunOptions(
        options=options,
        space=space,
        folder=folder,
        data=source,
        data_digest=prepared.known.digest,
        labels=list(images.classes),
        group_size=size,
        num_workers=num_workers,
        shared_sizes=shared_sizes(options, nodes),
        warm_start=prepared.warm_start,
        began=began,
    )
    write_record(prepared, run, argv, nodes)
    announce(run, nodes, num_images=len(images.paths))
    return run


def look_for_near_duplicates(prepared: Prepared, folder: "RunFolder") -> None:
    """Say which images of the split are nearly the same, before a new search on this machine.

    Before Ray starts, never meanwhile: a process that is forked while a thread multiplies matrices may wait for ever
    (OpenBLAS).
    """
    if prepared.presized and not prepared.options.resume:
        from search.reporting.leakage import say_near_duplicates  # OpenCV takes a moment to import

        say_near_duplicates(prepared.presized, prepared.space.split_seed, folder.near_duplicates)


def write_record(prepared: Prepared, run: "RunOptions", argv: Sequence[str], nodes: "list[Node]") -> None:
    """What runs, on what: for the report, and for `--resume`."""
    from uuid import uuid4

    from search.cluster.resources import hardware
    from search.runs.atomic_files import write_atomically
    from search.runs.command import CommandRecord
    from search.runs.resume import history
    from search.runs.trust import signature

    folder, options = run.folder, run.options
    if run.warm_start and not options.resume:
        run.warm_start.save(folder)
    before = CommandRecord.load(folder.path) if options.resume else None
    run_id = before.run_id if before and before.run_id else uuid4().hex
    packages = ("finetune-search", "ray", "torch", "torchvision", "timm", "optuna")
    CommandRecord(
        run_id=run_id,
        signature=signature(folder, run_id),
        **history(folder, options, argv),
        arguments=options,
        asked=before.asked if before else prepared.asked,
        source=str(run.data),
        left_out=prepared.left_out,
        weights=run.weights,
        split_seed=run.space.split_seed,
        group_size=asdict(run.group_size),
        num_workers=run.num_workers,
        max_concurrent=options.max_concurrent,
        strategy=options.strategy,
        versions={"python": platform.python_version()} | {name: version(name) for name in packages},
        images=before.images if before and before.images else prepared.known,
        files=prepared.files,
        data=str(prepared.images.given),
        groups=before.groups if before else prepared.groups,
        hardware=hardware(nodes),
    ).save(folder.path)
    write_atomically(folder.space, json.dumps(run.space.to_record(), indent=2) + "\n")


def announce(run: "RunOptions", nodes: "list[Node]", *, num_images: int) -> None:
    from search.cluster.resources import memory_note, sharing_note, trials_at_once
    from search.tuning.tuner import disk_needs

    size, folder, options = run.group_size, run.folder, run.options
    measures = options.max_trials_per_gpu is None and bool(run.shared_sizes)
    asked, most = options.max_concurrent, trials_at_once(nodes, size, None)
    note = memory_note(nodes, size, None if measures else asked)
    at_once = min(asked or most, most) if measures else asked or most
    others = "".join(f", {arch} on {count}" for arch, count in run.num_workers.items())
    within = f" in at most {options.time_budget / 60:g} min" if options.time_budget else ""
    screen = run.screen
    probes = f", after a screen of {many(screen.num_probes, 'probe')}" if screen else ""
    probes += ", then the winner on all images" if run.refits else ""
    say(
        f"search: {run.num_trials} trials{probes}{within}, {at_once} at once{note}, each on "
        f"{many(size.num_workers, 'worker')} of {reserved(size.cpus_per_worker, size.gpus_per_worker)}{others}; the "
        "first one waits for its workers to start"
    )
    if note := sharing_note(run.shared_sizes, measures=measures):
        say(note)
    if run.warm_start and not options.resume:
        say(run.warm_start.line(run.space))
    say(f"results: {folder}/")
    say(disk_needs(run, at_once * (max(run.shared_sizes, default=1) if measures else 1), num_images))
    say(f"watch: {shell_command('search.dashboard', folder)}")


# --- Search -----------------------------------------------------------------------------------------------------------


def execute(run: "RunOptions", *, resume: bool) -> bool:
    """Run the trials to the end of the search; whether the user interrupted it."""
    import ray

    from search.cli.errors import report_errors
    from search.tuning.study_end import end_study
    from search.tuning.tuner import new_tuner, restored_tuner

    try:
        tuner = restored_tuner(run) if resume else new_tuner(run)
        with Interruptible() as search:
            tuner.fit()
    except ValueError as error:
        # All input was checked before: this is a bug, and it keeps its traceback.
        raise RuntimeError("the search broke") from error
    finally:
        ray.shutdown()
    if not search.interrupted:  # then --resume continues its trials
        with report_errors("the study could not be brought up to date"):
            end_study(run.folder.journal, run.space.name)
    return search.interrupted


# --- Conclude ---------------------------------------------------------------------------------------------------------


def conclude(run: "RunOptions", seconds: float, *, interrupted: bool) -> int:
    """The leaderboard, where things are, and what to do next. The exit code: 0 if there is a winner."""
    from search.cli.errors import report_errors
    from search.reporting.live_table import counts
    from search.reporting.test_set import read_once
    from search.runs.kinds import how_many, name_of
    from search.runs.result_rows import FAILED, RUNNING, leaders, read_trials
    from search.runs.results_table import deliver_running
    from trainables.training import checkpoint

    deliver_running(run.folder)
    rows = read_trials(run.folder.trials)
    ids = {row["trial_id"] for row in rows}
    with report_errors("states of ended trials could not be removed"):
        running = {row["trial_id"] for row in rows if row["status"] == RUNNING}
        for states in run.folder.checkpoints.glob("*/"):
            # An epoch that was running when the search ended has left its state. A resumed search continues running
            # trials and the refit, which has no row.
            if not (states.name in running or (interrupted and states.name not in ids)):
                checkpoint.drop(states)
    print_trials(run, rows)
    say(f"{how_many(row['kind'] for row in rows)} in {duration(seconds)}: {counts(rows)}")
    if not interrupted:
        say_budget(run, seconds, num_rows=len(rows))
    if leaders(rows) and not interrupted:
        read_once(run.folder, run.data_digest)  # before the report, which shows it
    write_last_report(run, analysis=run.options.report == "full" and not interrupted)
    if interrupted:
        if leaders(rows):
            say(f"the best model so far is in {run.folder}/best/")
        say(f"interrupted. Resume with: {resume_command(run.folder.path, run.options.address)}")
        return INTERRUPTED
    for row in rows:
        if row["status"] == FAILED:
            say(f"{name_of(row['number'])} failed: {row['reason']}")
    if not leaders(rows):
        ended_by_failures(run, rows)
        say("no trial completed, so there is no best checkpoint")
        return 1
    say_results(run)
    return 1 if ended_by_failures(run, rows) else 0


def print_trials(run: "RunOptions", rows: "list[Row]") -> None:
    from rich.console import Console

    from search.reporting.live_table import leaderboard, recipes_table
    from search.runs.objective import Objective

    console = Console() if sys.stdout.isatty() else Console(width=200)
    dimensions, of = list(run.space.dimensions), Objective(run.options.metric)
    console.print(recipes_table(dimensions, run.recipes, rows) if run.recipes else leaderboard(rows, dimensions, of))
    if any(recipe.error_rate for recipe in run.recipes):
        say("published: on the book's data, split and hardware; other images or settings give other errors")


def say_results(run: "RunOptions") -> None:
    """What the search found, where it is, and the next command."""
    from search.cli.errors import report_errors
    from search.reporting import suspects, test_set
    from search.reporting.summary import summary
    from search.runs.run_record import load

    with report_errors("no summary"):
        found = *test_set.lines(run.folder), *suspects.lines(run.folder)
        for line in (*summary(load(run.folder.path)), *found):
            say(line)
    say(f"table: {run.folder}/trials.csv    best checkpoint: {run.folder}/best/")
    if run.folder.report.is_file():
        say(f"report: {run.folder}/report.html    dashboard: {shell_command('search.dashboard', run.folder)}")
    say(f"next: {shell_command('search.export', run.folder, '--out', 'exported')}")


def say_budget(run: "RunOptions", seconds: float, *, num_rows: int) -> None:
    """Where a time budget has ended the search before its last trial, say so."""
    from search.runs.time_budget import for_trials

    budget = run.options.time_budget
    if budget is None or num_rows >= run.num_trials + run.num_probes or too_many_failures(run):
        return
    left = "is spent" if seconds >= (for_trials(budget) or 0) else "leaves no time for another trial"
    say(f"the time budget of {duration(budget)} {left}; --resume with a longer --time-budget continues")


def too_many_failures(run: "RunOptions") -> bool:
    """Whether consecutive failures aborted the search."""
    from search.runs.results_table import consecutive_failures
    from trainables.ray.retry_limits import MAX_CONSECUTIVE_FAILURES

    return consecutive_failures(run.folder) >= MAX_CONSECUTIVE_FAILURES


def ended_by_failures(run: "RunOptions", rows: "list[Row]") -> bool:
    """The same, and says so."""
    from search.runs.result_rows import FAILED
    from trainables.ray.retry_limits import MAX_CONSECUTIVE_FAILURES

    if not too_many_failures(run):
        return False
    last = [row for row in rows if row["status"] == FAILED][-1]
    say(f"ended early: {MAX_CONSECUTIVE_FAILURES} trials failed, one after another; the last one: {last['reason']}")
    return True


def write_last_report(run: "RunOptions", *, analysis: bool) -> None:
    """The report of a search that has ended. Whatever goes wrong with it, the search has its results."""
    if run.options.report == "off":
        return
    from search.cli.errors import report_errors
    from search.report import write_report
    from search.reporting.live_report import end_live_report
    from search.runs.run_record import load

    end_live_report(run.folder)
    try:
        with report_errors("no report"):
            write_report(load(run.folder.path), run.folder.report, analysis=analysis)
    except KeyboardInterrupt:
        say(f"report skipped. Write it with: {shell_command('search.report', run.folder)}")


if __name__ == "__main__":
    run_cli(main)
