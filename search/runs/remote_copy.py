"""`--storage`: a copy of the run in an object store, from which `--resume` goes on where the head's disk is lost.

`<storage>/<run name>/` holds two things. The files as they lie on the disk, but for the checkpoints, are for people. In
`resume/` is what `--resume` reads: each content once, named by its SHA-256, and `index.json`, which says which file had
which content at one moment of the search. Each pass puts new contents first, then the index, and only then removes what
the index no longer names. So wherever a pass is cut off, the store holds one moment as a whole, as a kill of the search
at that moment would have left it. A moment is taken between two steps of Tune, when nobody writes but the trials.
"""

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from hashlib import file_digest
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from uuid import uuid4

from pyarrow import ArrowException
from pyarrow.fs import FileSelector
from ray import tune
from ray.tune.experiment import Trial

from search.cli.messages import say
from search.runs.atomic_files import replace_folder
from search.runs.paths import RunFolder
from trainables.system.file_systems import filesystem, inside, shown, without_secrets
from trainables.training import checkpoint

PAUSE = 5.0
"""Seconds from the end of a pass to the next one, at least."""
SHARE = 0.05
"""Of the driver's time that taking moments may have: with a thousand trials each takes some tenths of a second."""
LAST_TRIES = (0, 2, 5)
"""Seconds before each try of the last pass."""
INDEX_TRIES = (0, 0.2, 1)
"""Seconds before each try to read the index."""
LOOKS = 5
"""So often the files may change while a moment is taken."""
FILES_AT_ONCE = 8
CHUNK = 1 << 20
INDEX = "resume/index.json"
CHECKPOINTS, TUNE = "checkpoints/", "tune/"
LARGE = (CHECKPOINTS, "models/", "best/", "first/")
STORE_ERRORS = (OSError, ArrowException)

Signature = tuple[int, int, int]
"""Inode, size and time of change of a file; another one means another content."""


class RemoteRun:
    """`<storage>/<run name>/` by names within it. What goes wrong there is an `OSError` or an `ArrowException`."""

    def __init__(self, storage: str, name: str) -> None:
        self.filesystem, path = filesystem(storage)
        self.path = f"{path.rstrip('/')}/{name}"
        self.address = f"{shown(storage).rstrip('/')}/{name}"

    def __str__(self) -> str:
        return f"{self.address}/"

    def put(self, name: str, content: BinaryIO) -> None:
        with self.filesystem.open_output_stream(self._target(name)) as out:
            shutil.copyfileobj(content, out, CHUNK)

    def get(self, name: str, file: BinaryIO) -> None:
        with self.filesystem.open_input_stream(f"{self.path}/{name}") as content:
            shutil.copyfileobj(content, file, CHUNK)

    def copy(self, name: str, to: str) -> None:
        self.filesystem.copy_file(f"{self.path}/{name}", self._target(to))

    def remove(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self.filesystem.delete_file(f"{self.path}/{name}")

    def index(self) -> dict[str, Any] | None:
        """Who wrote it last, and the digests of the files by name; None where there is no run yet.

        A store is asked for the length first, then for the content: of an index that a running search replaces in
        between, part can come. So what cannot be read is asked for again.
        """
        for wait in INDEX_TRIES:
            time.sleep(wait)
            text = BytesIO()
            try:
                self.get(INDEX, text)
                return dict(json.loads(text.getvalue()))
            except FileNotFoundError:
                return None
            except ValueError as error:
                damage = error
        raise OSError(f"its {INDEX} is damaged: {damage}") from damage

    def put_index(self, index: dict[str, Any]) -> None:
        self.put(f"{INDEX}.partial", BytesIO(json.dumps(index, indent=0).encode()))
        self.filesystem.move(f"{self.path}/{INDEX}.partial", f"{self.path}/{INDEX}")  # a local folder could be cut off

    def contents(self) -> set[str]:
        found = self.filesystem.get_file_info(FileSelector(f"{self.path}/resume", allow_not_found=True))
        return {info.base_name for info in found if "." not in info.base_name and info.is_file}

    def _target(self, name: str) -> str:
        path = f"{self.path}/{name}"
        if self.filesystem.type_name == "local":
            self.filesystem.create_dir(path.rpartition("/")[0], recursive=True)
        return path


def bring_back(storage: str, folder: RunFolder) -> None:
    """Make the run's folder from its copy. Raises `ValueError` where there is none, or it cannot be had as a whole."""
    remote = RemoteRun(storage, folder.path.name)
    try:
        index = remote.index()
        if index is None:
            raise ValueError(f"There is no run to resume: neither {folder}/ nor {remote} is there.")
        say(f"{folder}/ is not here: bringing it back from {remote}, {len(index['files'])} files")
        replace_folder(folder.path, lambda partial: _get_all(remote, index["files"], partial))
    except STORE_ERRORS as error:
        raise ValueError(f"{folder}/ cannot be brought back from {remote}: {without_secrets(error)}") from error


def _get_all(remote: RemoteRun, digests: dict[str, str], folder: Path) -> None:
    def get(name: str) -> None:
        path = inside(folder, name, remote.address)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w+b") as file:
            remote.get(f"resume/{digests[name]}", file)
            file.seek(0)
            if file_digest(file, "sha256").hexdigest() != digests[name]:
                raise OSError(f"{name} is damaged there")

    _for_each(get, digests)


# --- A moment of the search -------------------------------------------------------------------------------------------


class Found(NamedTuple):
    """A file at a moment: its content is held, whatever becomes of its name. None: as it was known to be."""

    signature: Signature
    content: BinaryIO | None


def moment(folder: RunFolder, tunes: Path | None, known: Mapping[str, Signature]) -> dict[str, Found]:
    """The files of a run by name. To be called when Tune's driver does nothing else.

    Tune writes its state to `tunes`, and later some thread of its own copies it to the run's folder: what is in the
    former is what belongs to this moment.
    """
    for _ in range(LOOKS):
        with suppress(FileNotFoundError):  # a trial has ended an epoch meanwhile
            return _look(folder, tunes, known)
    return _look(folder, tunes, known)


def _look(folder: RunFolder, tunes: Path | None, known: Mapping[str, Signature]) -> dict[str, Found]:
    trials = list(folder.checkpoints.iterdir()) if folder.checkpoints.is_dir() else []
    newest = [checkpoint.newest(trial) for trial in trials]
    paths = {str(path.relative_to(folder.path)): path for path in _below(folder.path, without=folder.checkpoints)}
    paths |= {TUNE + str(path.relative_to(tunes)): path for path in _below(tunes)} if tunes else {}
    epochs = [path for epoch in newest if epoch for path in _below(epoch)]
    paths |= {str(path.relative_to(folder.path)): path for path in epochs}
    found = {name: _hold(name, path, known.get(name)) for name, path in paths.items()}
    if newest != [checkpoint.newest(trial) for trial in trials]:
        raise FileNotFoundError("some of an epoch's files may have been gone already")
    return found


def _below(root: Path, without: Path | None = None) -> list[Path]:
    """Files, but for partial ones and locks."""
    found = []
    for folder, folders, names in os.walk(root):
        here = Path(folder)
        folders[:] = [name for name in folders if not name.startswith(".") and here / name != without]
        found += [here / name for name in names if not name.startswith(".") and not name.endswith(".lock")]
    return found


def _hold(name: str, path: Path, known: Signature | None) -> Found:
    if _signature(path.stat()) == known:
        return Found(known, None)
    file = path.open("rb")
    signature = _signature(os.fstat(file.fileno()))
    if name.startswith(LARGE) and signature[1] > CHUNK:
        return Found(signature, file)  # written once, and too large for the memory
    with file:
        return Found(signature, BytesIO(file.read()))


def _signature(stat: os.stat_result) -> Signature:
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


# --- Copying it -------------------------------------------------------------------------------------------------------


class Mirror:
    """Copies a run to the store, within a `with` statement: as the search goes (see `Mirroring`), and at its end.

    Raises `ValueError` where the store cannot be used, or has a run of that name that is not resumed. What goes wrong
    later is said, and tried again; the search does not end of it.
    """

    def __init__(self, folder: RunFolder, storage: str, *, resume: bool, resume_command: str) -> None:
        self.folder = folder
        self.remote = RemoteRun(storage, folder.path.name)
        self.resume_command = resume_command
        self.writer = uuid4().hex
        try:
            index = self.remote.index() or {"writer": None, "files": {}}
            self.remote.put("resume/probe", BytesIO(b"may this be written?"))
            self.remote.remove("resume/probe")
            self.contents = self.remote.contents()
        except STORE_ERRORS as error:
            raise ValueError(f"--storage: {self.remote} cannot be used: {without_secrets(error)}") from error
        if index["files"] and not resume:
            raise ValueError(f"{self.remote} exists. Add --resume to go on with it, or give another --name.")
        if index["files"] and index["files"].get(folder.command.name) != _digest(folder.command):
            say(f"storage: {self.remote} is of another start of this run; {folder}/ takes its place")
        self.writer_before: str | None = index["writer"]
        self.files: dict[str, str] = index["files"]
        """Digests by name, as the index has them."""
        self.whole = set(self.files.values()) & self.contents
        self.copied = dict.fromkeys(filter(_is_shown, self.files), "")  # what the files for people hold, where known
        self.known: dict[str, Signature] = {}
        self.thread: threading.Thread | None = None
        self.due, self.pause = 0.0, PAUSE
        self.error = self.told = ""

    def __enter__(self) -> "Mirror":
        say(f"storage: the run is copied to {self.remote} as it goes")
        _mirrors[self.folder.run_id] = self
        return self

    def __exit__(self, error_type: type | None, *error: object) -> None:
        del _mirrors[self.folder.run_id]
        if error_type is not KeyboardInterrupt:  # who asks twice wants no wait
            self.finish()

    def step(self, tunes: Path | None) -> None:
        """Begin a pass, unless one is under way or was a short time ago, or there is nothing new."""
        if time.monotonic() < self.due or (self.thread and self.thread.is_alive()):
            return
        self._tell()
        started = time.monotonic()
        try:
            found = moment(self.folder, tunes, self.known)
        except OSError as error:
            self.error, found = without_secrets(error), {}
        took = time.monotonic() - started
        self.pause = max(PAUSE, took / SHARE)
        self.due = started + took + self.pause
        if not found or not (self.error or self._news(found)):
            return
        self.thread = threading.Thread(target=self._try, args=(found,), daemon=True)
        self.thread.start()

    def finish(self) -> None:
        """The last pass, of a run that nobody writes to any more."""
        try:
            if self.thread:
                self.thread.join()
            for pause in LAST_TRIES:
                time.sleep(pause)
                self._try(moment(self.folder, None, self.known))
                if not self.error:
                    say(f"storage: {self.remote} holds the run as it is now")
                    return
        except OSError as error:  # of this machine's disk
            self.error = without_secrets(error)
        except KeyboardInterrupt:
            self.error = "interrupted"
        say(
            f"STORAGE: THE LAST COPY FAILED, {self.remote} IS NOT COMPLETE ({self.error}). Once more: "
            f"{self.resume_command}"
        )

    def _news(self, found: dict[str, Found]) -> bool:
        """Tune renews its state every second; as long as nothing else changes, the one of before is as good."""
        changed = {name for name, file in found.items() if file.content} | (found.keys() ^ self.known.keys())
        return any(not name.startswith(TUNE) for name in changed)

    def _tell(self) -> None:
        if self.error and not self.told:
            say(f"storage: {self.remote} cannot be written, the search goes on and tries again: {self.error}")
        elif self.told and not self.error:
            say(f"storage: {self.remote} can be written again")
        self.told = self.error

    def _try(self, found: dict[str, Found]) -> None:
        try:
            self._copy(found)
            self.error = ""
        except STORE_ERRORS as error:
            self.error = without_secrets(error)
        finally:
            for file in found.values():
                if file.content:
                    file.content.close()
            self.due = time.monotonic() + self.pause

    def _copy(self, found: dict[str, Found]) -> None:
        index = self.remote.index()
        if index and index["writer"] not in (self.writer, self.writer_before):
            raise OSError("another search of this name has begun to write there, and this one no longer does")
        with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
            new = {name: pool.submit(self._put, file.content) for name, file in found.items() if file.content}
        files = {name: new[name].result() if name in new else self.files[name] for name in found}
        self.remote.put_index({"writer": self.writer, "files": files})
        self.files, self.known = files, {name: file.signature for name, file in found.items()}
        self._show()
        self._forget()

    def _show(self) -> None:
        """Renew the files for people."""
        shown_now = {name: digest for name, digest in self.files.items() if _is_shown(name)}
        changed = [name for name, digest in shown_now.items() if self.copied.get(name) != digest]
        _for_each(lambda name: self.remote.copy(f"resume/{shown_now[name]}", name), changed)
        _for_each(self.remote.remove, self.copied.keys() - shown_now.keys())
        self.copied = shown_now

    def _forget(self) -> None:
        """Remove the contents that the index does not name."""
        self.contents |= self.whole
        self.whole &= set(self.files.values())
        _for_each(lambda digest: self.remote.remove(f"resume/{digest}"), self.contents - self.whole)
        self.contents &= self.whole

    def _put(self, content: BinaryIO) -> str:
        digest = file_digest(content, "sha256").hexdigest()  # type: ignore[arg-type]  # a BinaryIO has readinto
        if digest not in self.whole:
            content.seek(0)
            self.remote.put(f"resume/{digest}", content)
            self.whole.add(digest)
        return digest


def _for_each(act: Callable[[str], None], names: Iterable[str]) -> None:
    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        list(pool.map(act, names))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def _is_shown(name: str) -> bool:
    return not name.startswith(CHECKPOINTS)


_mirrors: dict[str, Mirror] = {}
"""Of the searches in this process, by run id."""


class Mirroring(tune.Callback):
    """Lets the run's `Mirror`, if it has one, copy what each step leaves. It must come last among the callbacks."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        if mirror := _mirrors.get(self.folder.run_id):
            mirror.step(Path(trials[0].local_experiment_path) if trials else None)
