"""Resuming a run: with which options, and whether it still is the same search."""

import hashlib
import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from search.options.search_options import SearchOptions
from search.runs.command import FORMAT, CommandRecord, FilesRecord, ImagesRecord, Resume
from search.runs.paths import RunFolder
from search.runs.trust import require_own
from search.spaces.space import Space, dimension_text
from trainables.inference.model_folder import read_json
from trainables.system.file_systems import shown
from trainables.system.text import duration, many

if TYPE_CHECKING:
    from trainables.data.labelled_images import ImageFolder

HERE = ("address", "name", "results", "storage")
"""Options that may differ where a run is resumed."""
EXTENT = ("trials", "time_budget", "stall_timeout", "keep", "report")
"""Those that `--resume` may change for good: they change nothing about what is compared."""
SIZES = ("workers_per_trial", "cpus_per_worker", "gpus_per_worker", "trials_per_gpu", "max_concurrent")
"""Likewise, unless trials are compared by their seconds."""
PLACES = ("data", "weights", "test_split", "leave_out")
"""Likewise, if the same files are there."""
MAX_NAMES = 3
"""Names of a difference that are shown."""


# --- With which options -----------------------------------------------------------------------------------------------


def is_begun(folder: RunFolder) -> bool:
    """Whether it holds more than what a search leaves that ended before its first trial."""
    left = {folder.lr_find, folder.near_duplicates, folder.warm_start}
    return folder.path.is_dir() and not set(folder.path.iterdir()) <= left


def require_new(folder: RunFolder) -> None:
    """Raises `ValueError` where a run has this name already."""
    if is_begun(folder):
        raise ValueError(f"{folder} exists. Add --resume to resume it, or give another --name.")


def is_same_command(folder: RunFolder, options: SearchOptions) -> bool:
    """Whether the run was begun with these options; then they resume it."""
    if not folder.command.is_file():
        return False
    before, now = (each.to_record() | {"address": None} for each in (CommandRecord.load(folder.path).asked, options))
    return before == now


def options_to_resume(options: SearchOptions, folder: RunFolder) -> SearchOptions:
    """The options with which `--resume`, or the command that began it, resumes a run. Raises `ValueError` for another
    command, for one that asks for something else, and for a run that another user or an earlier version began."""
    if not options.resume and not is_same_command(folder, options):
        require_new(folder)
    saved = saved_options(folder, options)
    require_own(folder, trust=options.trust)
    if "trials" in changes(folder, saved) and (saved.trials or 0) < (begun := _num_begun(folder)):
        raise ValueError(
            f"--trials {saved.trials}: {begun} trials of {folder}/ have begun already. Give {begun} or more, or begin "
            "a new run with another --name."
        )
    return saved


def _num_begun(folder: RunFolder) -> int:
    from search.runs.result_rows import read_trials
    from trainables.ray.trial import RETRAINS

    return sum(row[RETRAINS] == "" and row["number"] >= 0 for row in read_trials(folder.trials))


def saved_options(folder: RunFolder, options: SearchOptions) -> SearchOptions:
    """The options that a run was begun with; those of `HERE`, and what `--resume` may change, are this command's.
    Raises `ValueError` where this command asks for something else."""
    if not folder.command.is_file():
        raise ValueError(
            f"{folder} holds no run to resume (no command.json in it). Runs are listed by: "
            f"ls {shlex.quote(str(options.results))}"
        )
    command = CommandRecord.load(folder.path)
    if command.format < FORMAT:
        raise ValueError(
            f"{folder}/ was begun by an earlier version of finetune-search and cannot be resumed, because its Ray "
            "state names modules that have moved; reports and exports of it still work, and a new run needs another "
            "--name."
        )
    saved, first, now = (each.to_record() for each in (command.arguments, command.asked, options))
    named = sorted(options.given & now.keys())
    new = [name for name in named if options.resume and _may_change(name, saved, now)]
    different = [name for name in named if name not in (*HERE, *new) and now[name] not in (saved[name], first[name])]
    if different:
        differences = "; ".join(
            f"{_option(name)} is {_shown(first[name])} there and {_shown(now[name])} here" for name in different
        )
        raise ValueError(
            f"--resume resumes {folder}/ as it was begun, but {differences}. Omit that, or begin a new run with "
            "another --name."
        )
    if "trials" in new and saved["recipes"]:
        raise ValueError(f"--trials has no effect: {folder}/ runs each of its recipes once.")
    changed = {name: getattr(options, name) for name in (*new, "address", "name", "results", "trust")}
    return replace(command.arguments, resume=True, storage=options.storage or command.arguments.storage, **changed)


def _may_change(name: str, saved: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    if str(saved[name]).startswith(f"{now[name]}#sha256="):  # what was fetched from there then
        return False
    if name in SIZES:
        return not (saved["target_seconds"] or "seconds" in saved["objective"])
    if name in PLACES:  # of the space's own images the digest is known, too
        return isinstance(now[name], str) and (name == "data" or isinstance(saved[name], str))
    return name in EXTENT


def changes(folder: RunFolder, options: SearchOptions) -> dict[str, tuple[Any, Any]]:
    """The options of a run that differ in `options`, each as it was and as it is now."""
    before, now = (each.to_record() for each in (CommandRecord.load(folder.path).arguments, options))
    return {name: (before[name], now[name]) for name in now if name not in HERE and now[name] != before[name]}


def said_changes(folder: RunFolder, options: SearchOptions) -> str:
    """Such as ", now with --trials 40 (20 before)"; empty where nothing changes."""
    found = changes(folder, options).items()
    said = ", ".join(f"{_option(name)} {_shown(new, name)} ({_shown(old, name)} before)" for name, (old, new) in found)
    return said and f", now with {said}"


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _shown(value: Any, name: str = "") -> str:
    if name in ("time_budget", "stall_timeout") and value is not None:
        return duration(value)
    if isinstance(value, list):
        return " ".join(map(str, value)) or "not given"
    if value is None:
        return "not given"
    return f"{value:g}" if isinstance(value, float) else shown(value) if "://" in str(value) else str(value)


def history(folder: RunFolder, options: SearchOptions, argv: Sequence[str]) -> dict[str, Any]:
    """How and when a run was begun, and each time that it was resumed: fields of `CommandRecord`."""
    words, now = tuple(words_to_show(argv)), datetime.now().astimezone().isoformat(timespec="seconds")
    if not options.resume:
        return {"argv": words, "started_at": now}
    before = CommandRecord.load(folder.path)
    resume = Resume(argv=words, started_at=now, changed=tuple(changes(folder, options)))
    return {
        "argv": before.argv or words,
        "started_at": before.started_at or now,
        "resumes": (*before.resumes, resume),
    }


def words_to_show(argv: Sequence[str]) -> list[str]:
    """The command line for the report: its URIs without user, password and query."""
    return [re.sub(r"[a-z][a-z0-9]*://\S+", lambda uri: shown(uri[0]), word) for word in argv]


# --- Whether it is the same search ------------------------------------------------------------------------------------


def require_whole(folder: RunFolder, dimensions: Iterable[str]) -> None:
    """Raises `ValueError` where the tables, the journal or the rungs are damaged, before anything is written. The
    tables have the `dimensions` of the run's own space, if that is known: `require_same` compares them."""
    from search.runs.result_rows import check_tables
    from search.runs.study_journal import repair

    check_tables(folder, read_json(folder.space)["dimensions"] if folder.space.is_file() else dimensions)
    if folder.journal.is_file():
        repair(folder.journal)
    folder.stop_reasons()


def images_record(images: "ImageFolder") -> ImagesRecord:
    from trainables.data.source import images_digest

    return ImagesRecord(
        digest=images_digest(images),
        names_digest=images_digest(images, sizes=False),
        count=len(images.paths),
        classes=tuple(images.classes),
    )


def left_out_images(options: SearchOptions, folder: RunFolder) -> tuple[str, ...]:
    """The paths of the images that `--leave-out` names. A resumed run has them in its record, with which the file must
    agree where it still is there. Raises `ValueError`."""
    from trainables.data.left_out_images import read_left_out

    if not options.resume:
        return read_left_out(options.leave_out)
    kept = CommandRecord.load(folder.path).left_out
    if options.leave_out and options.leave_out.is_file() and (now := read_left_out(options.leave_out)) != kept:
        raise ValueError(
            f"{folder}/ cannot be resumed, {options.leave_out} has changed since it began: it names "
            f"{many(len(now), 'image')} instead of {len(kept)}, {len(set(now) - set(kept))} of them others. Restore "
            "it, move it away, or begin a new run."
        )
    return kept


def files_record(options: SearchOptions, space: Space) -> FilesRecord:
    from search.options.preparation import setting_values
    from trainables.data.layouts import find_unchecked
    from trainables.data.source import folder_of, images_digest
    from trainables.network.pretrained_weights import find_weights

    test = None if options.test_folder is None else images_digest(find_unchecked(options.test_folder))
    if not options.weights or setting_values(space, "pretrained") == [False]:
        return FilesRecord(test_images=test)
    folder = folder_of(str(options.weights))
    found = {arch: find_weights(arch, folder) for arch in setting_values(space, "arch")}
    return FilesRecord(test_images=test, weights={arch: _digest(file.path) for arch, file in found.items() if file})


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def begun_without_groups(folder: RunFolder) -> bool:
    """Whether an earlier version began the run, which split copies of an image like any others."""
    return CommandRecord.load(folder.path).groups is None


def require_same(
    folder: RunFolder, space: Mapping[str, Any], images: ImagesRecord, files: FilesRecord, groups: str = ""
) -> None:
    """Raises `ValueError`, with the difference, where the images, their groups, the space, the test images or the
    weights of a run have changed since it began."""
    command = CommandRecord.load(folder.path)
    before = command.images or images
    if before.digest != images.digest:
        raise ValueError(
            f"{folder}/ cannot be resumed, its images have changed: {_image_changes(before, images)}. Restore them, or "
            "begin a new run."
        )
    if (command.groups or "") != groups:
        raise ValueError(
            f"{folder}/ cannot be resumed, the groups of its images have changed, and with them the split. Restore the "
            "images and their table as they were, or begin a new run."
        )
    if folder.space.is_file() and (found := _changes(_with_texts(read_json(folder.space)), _with_texts(space))):
        raise ValueError(
            f"{folder}/ cannot be resumed, its search space has changed: {'; '.join(found)}. Undo that, or begin a new "
            "run."
        )
    for what, option, then, now in (
        ("test images", "--test-split", command.files.test_images, files.test_images),
        ("weights", "--weights", command.files.weights, files.weights),
    ):
        if then != now:
            raise ValueError(
                f"{folder}/ cannot be resumed, its {what} have changed. Give {option} as it was, or begin a new run."
            )


def _with_texts(space: Mapping[str, Any]) -> dict[str, Any]:
    """A space's record with its dimensions as texts, which earlier versions saved instead of their fields."""
    dimensions = {name: dimension_text(saved) for name, saved in space["dimensions"].items()}
    return dict(json.loads(json.dumps({**space, "dimensions": dimensions})))


def _image_changes(before: ImagesRecord, now: ImagesRecord) -> str:
    changes = [] if before.count == now.count else [f"{now.count} instead of {before.count}"]
    for what, some, others in (("without", before, now), ("with", now, before)):
        if names := sorted(set(some.classes) - set(others.classes)):
            changes.append(f"{what} the {'class' if len(names) == 1 else 'classes'} {_some(map(repr, names))}")
    if before.names_digest == now.names_digest:
        return "their names are the same, but files have other sizes"
    return ", ".join(changes) or f"as many as before ({now.count}), but with other names or in other classes"


def _changes(before: Mapping[str, Any], now: Mapping[str, Any], where: str = "") -> list[str]:
    found = []
    for name in dict.fromkeys([*before, *now]):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _changes(old, new, f"{where}{name}.")
        elif old != new:
            found.append(f"{where}{name} was {old!r} and is {new!r}")
    return found


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:MAX_NAMES]) + (", ..." if len(names) > MAX_NAMES else "")
