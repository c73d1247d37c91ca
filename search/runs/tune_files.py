"""Where Tune writes its state: a local file system on which a kill, or a full disk, leaves the old file or the new one.

Tune rewrites the same files in place each second, and a search could not be resumed from one that was cut off.
"""

import os
from functools import partial
from io import BufferedWriter, FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.fs
from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]  # has no hints
from ray import tune

from search.runs.atomic_files import append_whole
from search.runs.paths import RunFolder
from trainables.system.full_disk import when_there_is_room

if TYPE_CHECKING:
    from typing_extensions import Buffer

EVENTS = "event-files"
"""Before a path, for tensorboardX: `_EventFile` writes it."""


class _WholeFile(BufferedWriter):
    """Takes its name when it is closed, unless part of it could not be written."""

    def __init__(self, path: str) -> None:
        folder, name = os.path.split(path)
        self.path, self.partial = path, os.path.join(folder, f".{name}.partial")  # noqa: PTH118
        self.whole = True
        super().__init__(FileIO(self.partial, "w"))

    def write(self, data: "Buffer") -> int:
        try:
            return super().write(data)
        except OSError:
            self.whole = False
            raise

    def close(self) -> None:
        if self.closed:
            return
        try:
            super().close()
        except OSError:
            self.whole = False
            raise
        finally:
            if self.whole:
                os.replace(self.partial, self.path)  # noqa: PTH105
            else:
                Path(self.partial).unlink(missing_ok=True)

    def __del__(self) -> None:
        if not self.closed:  # its writer did not finish
            self.whole = False
        super().__del__()


class _WholeFileSystem(LocalFileSystem):  # type: ignore[misc]  # untyped
    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **options: Any) -> Any:
        return _WholeFile(path) if mode == "wb" else super()._open(path, mode, block_size, **options)


def whole_files() -> pyarrow.fs.FileSystem:
    """For Tune's `storage_filesystem`."""
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(_WholeFileSystem()))


class ShortState(tune.Callback):
    """Removes the statistics of an ended trial's metrics, half of the state that Tune writes each second. Nobody reads
    them."""

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        trial.run_metadata.metric_analysis = {}
        trial.run_metadata.metric_n_steps = {}

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.on_trial_complete(iteration, trials, trial)


class EventFiles(tune.logger.TBXLoggerCallback):
    """TensorBoard's files, in the run's folder from the start. In Tune's place for them those of all trials would be
    copied each second."""

    def __init__(self, folder: RunFolder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._summary_writer_cls = partial(_event_writer, folder.tune)


def _event_writer(tune_folder: Path, trial_folder: str, **options: Any) -> Any:
    from tensorboardX import SummaryWriter  # type: ignore[import-untyped]
    from tensorboardX.record_writer import register_writer_factory  # type: ignore[import-untyped]

    register_writer_factory(EVENTS, _EventFile)
    return SummaryWriter(f"{EVENTS}:{tune_folder / Path(trial_folder).name}", **options)


class _EventFile:
    """What tensorboardX writes to: whole events, which wait while the disk is full."""

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
