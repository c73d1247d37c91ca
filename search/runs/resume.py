"""Going on with a run: whose it is, what it was asked for, and whether it still is the same search."""

import argparse
import fcntl
import hashlib
import hmac
import json
import os
import secrets
import shlex
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from search.options.arguments import source
from search.runs.paths import RunFolder
from search.spaces.space import Space
from trainables.inference.model_folder import read_json
from trainables.system.file_systems import shown
from trainables.system.full_disk import require_writable
from trainables.system.text import duration

HERE = ("resume", "trust", "address", "name", "results", "storage")
"""Arguments that may differ where a run goes on."""
EXTENT = ("trials", "time_budget", "stall_timeout", "keep", "report")
"""Those that `--resume` may change for good: they change nothing about what is compared."""
SIZES = ("workers_per_trial", "cpus_per_worker", "gpus_per_worker", "max_concurrent")
"""Likewise, unless trials are compared by their seconds."""
PLACES = ("data", "weights", "test_split")
"""Likewise, where the same files lie there."""
SHOWN = 3
"""So many names of a difference."""


# --- One search at a time ---------------------------------------------------------------------------------------------


@contextmanager
def alone_in(folder: RunFolder) -> Iterator[None]:
    """Within it, no other search of this machine writes to the run. Raises `ValueError` where one does.

    The lock is a file beside the folder, which may be replaced as a whole. The kernel ends it with the process that
    holds it, however that ends.
    """
    results = folder.path.parent
    made_results = not results.exists()
    require_writable(results, "--results")
    file = folder.path.with_name(f".{folder.path.name}.lock")
    opened = _locked(file)
    if opened is None:
        raise ValueError(
            f"{folder}/ is being written by another search that is still running. Wait for its end, or give another "
            "--name."
        )
    made = not folder.path.exists()
    try:
        require_writable(folder.path, "--results")
        yield
    finally:
        if made:
            _remove_if_empty(folder.path)
        file.unlink(missing_ok=True)
        if made_results:
            _remove_if_empty(results)
        os.close(opened)  # last: nobody else is to make the folders meanwhile


def _locked(file: Path) -> int | None:
    """The descriptor of the locked file, or None where somebody else has locked it.

    Who held the lock before removes the file: a descriptor that was opened before that locks nothing any more.
    """
    while True:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            opened = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # the folder was removed at this moment
            continue
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(opened)
            return None
        except OSError:  # a file system without locks
            return opened
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(opened), file.stat()):
                return opened
        os.close(opened)


def _remove_if_empty(path: Path) -> None:
    with suppress(OSError):
        path.rmdir()


# --- Whose run it is --------------------------------------------------------------------------------------------------

KEY_BYTES = 32


def signature(folder: RunFolder, run_id: str) -> str:
    """What only this user on this machine can say of the run in this very folder, wherever it is moved to; empty where
    the user's key can neither be read nor made."""
    base = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    try:
        key = _key(Path(base).expanduser() / "finetune-search" / "key")
        place = folder.path.stat().st_ino  # a copy is another folder
    except OSError:
        return ""
    return hmac.digest(key, f"{run_id} {place}".encode(), "sha256").hex() if len(key) == KEY_BYTES else ""


def _key(file: Path) -> bytes:
    """The user's, made where there is none: it is there as a whole or not at all."""
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, partial = tempfile.mkstemp(dir=file.parent)  # for its owner alone
        with os.fdopen(descriptor, "wb") as new:
            new.write(secrets.token_bytes(KEY_BYTES))
        try:
            os.link(partial, file)
        except FileExistsError:  # another search was quicker
            pass
        except OSError:  # a file system without links
            Path(partial).replace(file)
        Path(partial).unlink(missing_ok=True)
    return file.read_bytes()


def require_own(folder: RunFolder, *, trust: bool) -> None:
    """Raises `ValueError` for a run that this user did not begin here: Ray keeps its state in pickles, and these
    execute what they say."""
    command = read_json(folder.command)
    mine = signature(folder, str(command.get("run_id")))
    if trust or (
        mine and hmac.compare_digest(mine.encode(), str(command.get("signature")).encode()) and _all_mine(folder)
    ):
        return
    raise ValueError(
        f"{folder}/ was not begun by you on this machine, and going on with it executes what its files say. If you "
        "trust whoever made it, add --trust. Reports and exports execute nothing and need no trust."
    )


def _all_mine(folder: RunFolder) -> bool:
    """Whether nobody else has put files among those that are executed."""
    return all(
        path.lstat().st_uid == os.geteuid()
        for path in (folder.path, folder.tune, *folder.tune.glob("*"))
        if path.exists()
    )


def require_whole(folder: RunFolder, dimensions: Iterable[str]) -> None:
    """Raises `ValueError` where the tables, the journal or the rungs are damaged, before anything is written."""
    from search.runs.results_table import check_tables
    from search.runs.study_journal import mend

    check_tables(folder, dimensions)
    if folder.journal.is_file():
        mend(folder.journal)
    if folder.rungs.is_file():
        read_json(folder.rungs)


# --- What it was asked for --------------------------------------------------------------------------------------------


def arguments_record(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments as they are kept with a run."""
    return {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items() if name != "given"}


def is_same_command(folder: RunFolder, args: argparse.Namespace) -> bool:
    """Whether `args` are those that the run was begun with, so that it goes on."""
    if not folder.command.is_file():
        return False
    before, now = ({k: v for k, v in each.items() if k not in ("resume", "trust", "address")}
                   for each in (read_json(folder.command).get("asked", {}), arguments_record(args)))  # fmt: skip
    return before == now


def is_begun(folder: RunFolder) -> bool:
    """Whether there is more than what a search leaves that was ended before its first trial: the finder's curves."""
    return folder.path.is_dir() and list(folder.path.iterdir()) not in ([], [folder.lr_find])


def arguments_to_go_on(args: argparse.Namespace, folder: RunFolder) -> argparse.Namespace:
    """The arguments with which `--resume`, or the command that began it, goes on with a run. Raises `ValueError` for
    another command, for one that asks for something else, and for a run of somebody else's."""
    if not args.resume and not is_same_command(folder, args):
        raise ValueError(f"{folder} exists. Add --resume to go on with it, or give another --name.")
    saved = saved_arguments(folder, args)
    require_own(folder, trust=args.trust)
    if "trials" in changes(folder, saved) and saved.trials < (begun := _num_begun(folder)):
        raise ValueError(
            f"--trials {saved.trials}: {begun} trials of {folder}/ have begun already. Give {begun} or more, or begin "
            "a new run with another --name."
        )
    return saved


def _num_begun(folder: RunFolder) -> int:
    from search.runs.results_table import read_trials
    from trainables.ray.trial import RETRAINS

    return sum(row[RETRAINS] == "" for row in read_trials(folder.trials))


def saved_arguments(folder: RunFolder, args: argparse.Namespace) -> argparse.Namespace:
    """The arguments that a run was started with; where it goes on, and what `--resume` may change, are this command's.
    Raises `ValueError` where this command asks for something else."""
    if not folder.command.is_file():
        raise ValueError(
            f"{folder} holds no run to resume (no command.json in it). Runs are listed by: "
            f"ls {shlex.quote(str(args.results))}"
        )
    command, now = read_json(folder.command), arguments_record(args)
    saved = command["arguments"]
    if missing := [name for name in now if name not in saved]:
        raise ValueError(
            f"{folder} was started by an older version, which knew no {_option(missing[0])}. Start it anew."
        )
    first = command.get("asked", saved)
    new = [name for name in args.given if args.resume and _may_change(name, saved, now)]
    different = [
        name for name in args.given if name not in (*HERE, *new) and now[name] not in (saved[name], first[name])
    ]
    if different:
        differences = "; ".join(
            f"{_option(name)} is {_shown(first[name])} there and {_shown(now[name])} here" for name in different
        )
        raise ValueError(
            f"--resume goes on with {folder}/ as it was begun, but {differences}. Leave that out, or begin a new run "
            "with another --name."
        )
    if "trials" in new and saved["recipes"]:
        raise ValueError(f"--trials has no say: {folder}/ runs each of its recipes once.")
    saved |= {name: now[name] for name in new}
    for name in ("data", "weights"):
        saved[name] = source(saved[name]) if saved[name] else None
    saved["results"] = Path(saved["results"])
    here = {"resume": True, "trust": args.trust, "address": args.address, "name": args.name, "results": args.results}
    return argparse.Namespace(**saved | here | {"storage": args.storage or saved["storage"]})


def _may_change(name: str, saved: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    if str(saved[name]).startswith(f"{now[name]}#sha256="):  # what was fetched from there then
        return False
    if name in SIZES:
        return not (saved["target_seconds"] or "seconds" in saved["objective"])
    if name in PLACES:  # of the space's own images the digest is known, too
        return isinstance(now[name], str) and (name == "data" or isinstance(saved[name], str))
    return name in EXTENT


def changes(folder: RunFolder, args: argparse.Namespace) -> dict[str, tuple[Any, Any]]:
    """The arguments of a run that are others in `args`, each as it was and as it is now."""
    before, now = read_json(folder.command)["arguments"], arguments_record(args)
    return {name: (before[name], now[name]) for name in now if name not in HERE and now[name] != before.get(name)}


def said_changes(folder: RunFolder, args: argparse.Namespace) -> str:
    """Such as ", now with --trials 40 (20 before)"; empty where nothing changes."""
    found = changes(folder, args).items()
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


def history(folder: RunFolder, args: argparse.Namespace, argv: list[str]) -> dict[str, Any]:
    """How and when a run was begun, and each time that it went on, with the arguments that changed."""
    now = {"argv": argv, "started_at": datetime.now().astimezone().isoformat(timespec="seconds")}
    if not args.resume:
        return now | {"resumes": []}
    before = read_json(folder.command)
    resumes = [*before.get("resumes", []), now | {"changed": list(changes(folder, args))}]
    return {name: before.get(name, now[name]) for name in now} | {"resumes": resumes}


# --- Whether it is the same search ------------------------------------------------------------------------------------


def images_record(images, digest: str) -> dict[str, Any]:
    """What tells a run's images from others; `names_digest` leaves the sizes of files out."""
    from trainables.data.source import images_digest

    named = images_digest(images, sizes=False)
    return {"digest": digest, "names_digest": named, "count": len(images.paths), "classes": list(images.classes)}


def same_files(folder: RunFolder, args: argparse.Namespace, space: Space) -> dict[str, Any]:
    """What tells the files that a run uses beside its images from others: a folder of test images, and the weights in
    a folder of them. None of what was not given.

    Raises `ValueError` where a run that goes on has others than when it began. Of a run without such a record, by an
    older version, nobody knows: then they must lie where they lay.
    """
    from search.options.preparation import setting_values
    from trainables.data.held_out_images import held_share
    from trainables.data.layouts import find_unchecked
    from trainables.data.source import folder_of, images_digest
    from trainables.network.pretrained_weights import find_weights

    has_folder = args.test_split is not None and held_share(args.test_split) is None
    record = {"test_images": images_digest(find_unchecked(args.test_split)) if has_folder else None, "weights": None}
    if args.weights and setting_values(space, "pretrained") != [False]:
        weights = folder_of(str(args.weights))
        found = {arch: find_weights(arch, weights) for arch in setting_values(space, "arch")}
        record["weights"] = {arch: _digest(file.path) for arch, file in found.items() if file}
    if args.resume:
        _require_same_files(folder, record, changes(folder, args))
    return record


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _require_same_files(folder: RunFolder, now: Mapping[str, Any], changed: Iterable[str]) -> None:
    before = read_json(folder.command).get("files")
    for name, option, what in (("test_images", "test_split", "test images"), ("weights", "weights", "weights")):
        known = before is not None
        if before[name] != now[name] if known else option in changed:
            why = "are others now" if known else "cannot be compared, as an older version began it"
            raise ValueError(
                f"{folder}/ cannot go on, its {what} {why}. Give {_option(option)} as it was, or begin a new run."
            )


def require_same(folder: RunFolder, space: Mapping[str, Any], images: Mapping[str, Any]) -> None:
    """Raises `ValueError`, with the difference, where a run's space or images are others now than when it began."""
    before = read_json(folder.command).get("images", images)
    if before["digest"] != images["digest"]:
        raise ValueError(
            f"{folder}/ cannot go on, its images are others now: {_image_changes(before, images)}. Bring them back, or "
            "begin a new run."
        )
    if folder.space.is_file() and (changes := _changes(read_json(folder.space), json.loads(json.dumps(space)))):
        raise ValueError(
            f"{folder}/ cannot go on, its search space has changed: {'; '.join(changes)}. Undo that, or begin a new "
            "run."
        )


def _image_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    changes = [] if before["count"] == now["count"] else [f"{now['count']} instead of {before['count']}"]
    for what, some, others in (("without", before, now), ("with", now, before)):
        if names := sorted(set(some["classes"]) - set(others["classes"])):
            changes.append(f"{what} the {'class' if len(names) == 1 else 'classes'} {_some(map(repr, names))}")
    if before.get("names_digest") == now["names_digest"]:
        return "their names are the same, but files have other sizes"
    return ", ".join(changes) or f"as many as before ({now['count']}), but with other names or in other classes"


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
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
