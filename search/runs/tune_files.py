"""Tune's state and TensorBoard's event files, written so that a kill or a full disk leaves none of them damaged.

Tune rewrites its state in place each second, and a search could not be resumed from a truncated file. So it gets a file
system that replaces files atomically.
"""

import os
import time
from functools import partial
from io import BufferedWriter, FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.fs
from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]  # no hints
from ray import tune

from search.runs.atomic_files import append_whole
from search.runs.paths import RunFolder
from trainables.system.full_disk import when_there_is_room

if TYPE_CHECKING:
    from typing_extensions import Buffer

EVENTS = "event-files"
"""Scheme of the paths that tensorboardX writes with `_EventFile`."""


class _AtomicFile(BufferedWriter):
    """Replaces the file at `path` when it is closed, unless a write has failed."""

    def __init__(self, path: str) -> None:
        folder, name = os.path.split(path)
        self.path, self.partial = path, os.path.join(folder, f".{name}.partial")  # noqa: PTH118
        self.complete = True
        super().__init__(FileIO(self.partial, "w"))

    def write(self, data: "Buffer") -> int:
        try:
            return super().write(data)
        except OSError:
            self.complete = False
            raise

    def close(self) -> None:
        if self.closed:
            return
        try:
            super().close()
        except OSError:
            self.complete = False
            raise
        finally:
            if self.complete:
                os.replace(self.partial, self.path)  # noqa: PTH105
            else:
                Path(self.partial).unlink(missing_ok=True)

    def __del__(self) -> None:
        if not self.closed:  # never closed: its writer did not finish
            self.complete = False
        super().__del__()


class _AtomicFileSystem(LocalFileSystem):  # type: ignore[misc]  # fsspec has no hints
    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **options: Any) -> Any:
        return _AtomicFile(path) if mode == "wb" else super()._open(path, mode, block_size, **options)


def atomic_filesystem() -> pyarrow.fs.FileSystem:
    """For Tune's `storage_filesystem`."""
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(_AtomicFileSystem()))


class EventFiles(tune.logger.TBXLoggerCallback):
    """Writes TensorBoard's event files directly into the run's folder. From Tune's own location it would copy the files
    of all trials each second."""

    def __init__(self, folder: RunFolder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # Ray's
        self._summary_writer_cls = partial(_event_writer, folder.tune)


def _event_writer(tune_folder: Path, trial_folder: str, **options: Any) -> "_EventWriter":
    return _EventWriter(f"{EVENTS}:{tune_folder / Path(trial_folder).name}")


class _EventWriter:
    """What Tune's logger asks of tensorboardX's `SummaryWriter`. That has a thread, a pipe and an exit handler for each
    trial; with a thousand trials at once they are more files than a process may open. A flush writes one event."""

    def __init__(self, path: str) -> None:
        from tensorboardX.event_file_writer import EventsWriter  # type: ignore[import-untyped]  # no hints
        from tensorboardX.record_writer import register_writer_factory  # type: ignore[import-untyped]  # no hints

        register_writer_factory(EVENTS, _EventFile)
        _EventFile.directory_check(path)
        self.writer = EventsWriter(f"{path}/events")
        self.scalars: dict[str, float] = {}
        self.step = 0
        self.file_writer = self  # which Tune tells of the hyperparameters

    def add_scalar(self, tag: str, value: float, global_step: int) -> None:
        self.scalars[tag], self.step = float(value), global_step

    def add_histogram(self, *args: Any, **options: Any) -> None:
        """No result of ours has a list."""

    def add_summary(self, summary: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event  # type: ignore[import-untyped]  # no hints

        self.writer.write_event(Event(summary=summary, wall_time=time.time(), step=self.step))

    def flush(self) -> None:
        from tensorboardX.proto.summary_pb2 import Summary  # type: ignore[import-untyped]  # no hints

        if self.scalars:
            values = [Summary.Value(tag=tag, simple_value=value) for tag, value in self.scalars.items()]
            self.add_summary(Summary(value=values))
        self.scalars = {}
        self.writer.flush()

    def close(self) -> None:
        self.flush()
        self.writer.close()


class _EventFile:
    """tensorboardX's writer: it appends whole events, and waits while the disk is full."""

    def __init__(self, path: str) -> None:
        self.path, self.content = _path_of(path), b""

    @classmethod
    def open(cls, path: str) -> "_EventFile":
        return cls(path)

    @staticmethod
    def directory_check(path: str) -> None:
        when_there_is_room(lambda: _path_of(path).mkdir(parents=True, exist_ok=True), _path_of(path))

    def write(self, content: bytes) -> None:
        self.content += content

    def flush(self) -> None:
        def append() -> None:
            self.path.touch()
            append_whole(self.path, self.content)

        if self.content:
            when_there_is_room(append, self.path)
        self.content = b""

    def close(self) -> None:
        self.flush()


def _path_of(path: str) -> Path:
    return Path(path.removeprefix(f"{EVENTS}:"))
