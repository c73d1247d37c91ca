"""`--storage`: a copy of the run in an object store, from which `--resume` continues if the head's disk is lost.

`<storage>/<run name>/` holds two things. The files as they are on the disk, except the checkpoints, are for people. In
`resume/` is what `--resume` reads: each content once, named by its SHA-256, and `index.json`, which says which file had
which content in one snapshot of the search. Each pass puts new contents first, then the index, and only then removes
what the index no longer names. So wherever a pass is cut off, the store holds one snapshot as a whole, as a kill of the
search would have left it. A snapshot is taken between two steps of Tune, when only the trials write.
"""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from hashlib import file_digest
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

from ray import tune
from ray.tune.experiment import Trial

from search.cli.messages import say
from search.runs.paths import RunFolder
from search.runs.remote_run import FILES_AT_ONCE, STORE_ERRORS, RemoteRun, for_each
from search.runs.snapshot import CHECKPOINTS, TUNE, HeldFile, Signature, snapshot
from trainables.system.file_systems import without_secrets

PAUSE = 5.0
"""Minimum seconds from the end of a pass to the next one."""
SHARE = 0.05
"""Maximum share of the driver's time that snapshots take: with a thousand trials each takes some tenths of a second."""
LAST_TRIES = (0, 2, 5)
"""Seconds before each try of the last pass."""


class Mirror:
    """Copies a run to the store, within a `with` statement: during the search (see `Mirroring`), and at its end.

    Raises `ValueError` where the store cannot be used, or has a run of that name that is not resumed. Later failures
    are reported and retried; the search continues.
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
            raise ValueError(f"{self.remote} exists. Add --resume to resume it, or give another --name.")
        if index["files"] and index["files"].get(folder.command.name) != _digest(folder.command):
            say(f"storage: {self.remote} is of another start of this run; {folder}/ replaces it")
        self.writer_before: str | None = index["writer"]
        self.files: dict[str, str] = index["files"]
        """Digests by name, as the index has them."""
        self.whole = set(self.files.values()) & self.contents
        self.copied = dict.fromkeys(filter(_is_shown, self.files), "")  # what the files for people hold, where known
        self.known: dict[str, Signature] = {}
        self.thread: threading.Thread | None = None
        self.due, self.pause = 0.0, PAUSE
        self.error = self.reported = ""

    def __enter__(self) -> "Mirror":
        say(f"storage: the run is copied to {self.remote} during the search")
        _mirrors[self.folder.run_id] = self
        return self

    def __exit__(self, error_type: type | None, *error: object) -> None:
        del _mirrors[self.folder.run_id]
        if error_type is not KeyboardInterrupt:  # a second interrupt does not wait
            self.finish()

    def step(self, tunes: Path | None) -> None:
        """Begin a pass, unless one is running or ended recently, or there is nothing new."""
        if time.monotonic() < self.due or (self.thread and self.thread.is_alive()):
            return
        self._report()
        started = time.monotonic()
        try:
            found = snapshot(self.folder, tunes, self.known)
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
        """The last pass, when nothing writes to the run any more."""
        try:
            if self.thread:
                self.thread.join()
            for pause in LAST_TRIES:
                time.sleep(pause)
                self._try(snapshot(self.folder, None, self.known))
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

    def _news(self, found: dict[str, HeldFile]) -> bool:
        """Whether more has changed than Tune's state, which Tune rewrites every second."""
        changed = {name for name, file in found.items() if file.content} | (found.keys() ^ self.known.keys())
        return any(not name.startswith(TUNE) for name in changed)

    def _report(self) -> None:
        if self.error and not self.reported:
            say(f"storage: {self.remote} cannot be written, the search continues and tries again: {self.error}")
        elif self.reported and not self.error:
            say(f"storage: {self.remote} can be written again")
        self.reported = self.error

    def _try(self, found: dict[str, HeldFile]) -> None:
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

    def _copy(self, found: dict[str, HeldFile]) -> None:
        index = self.remote.index()
        if index and index["writer"] not in (self.writer, self.writer_before):
            raise OSError("another search of this name has begun to write there, and this one has stopped")
        with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
            new = {name: pool.submit(self._put, file.content) for name, file in found.items() if file.content}
        files = {name: new[name].result() if name in new else self.files[name] for name in found}
        self.remote.put_index({"writer": self.writer, "files": files})
        self.files, self.known = files, {name: file.signature for name, file in found.items()}
        self._show()
        self._forget()

    def _show(self) -> None:
        """Update the files for people."""
        shown_now = {name: digest for name, digest in self.files.items() if _is_shown(name)}
        changed = [name for name, digest in shown_now.items() if self.copied.get(name) != digest]
        for_each(lambda name: self.remote.copy(f"resume/{shown_now[name]}", name), changed)
        for_each(self.remote.remove, self.copied.keys() - shown_now.keys())
        self.copied = shown_now

    def _forget(self) -> None:
        """Remove the contents that the index does not name."""
        self.contents |= self.whole
        self.whole &= set(self.files.values())
        for_each(lambda digest: self.remote.remove(f"resume/{digest}"), self.contents - self.whole)
        self.contents &= self.whole

    def _put(self, content: BinaryIO) -> str:
        digest = file_digest(content, "sha256").hexdigest()  # type: ignore[arg-type]  # a BinaryIO has readinto
        if digest not in self.whole:
            content.seek(0)
            self.remote.put(f"resume/{digest}", content)
            self.whole.add(digest)
        return digest


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
