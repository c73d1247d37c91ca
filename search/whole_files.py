"""Where Tune writes its state: a local file system on which a kill, or a full disk, leaves the old file or the new one.

Tune renews the same files each second, and opens them to write where they are: one that was cut off could not be
resumed from.
"""

import os
from io import BufferedWriter, FileIO
from typing import Any

import pyarrow.fs
from fsspec.implementations.local import LocalFileSystem


class _WholeFile(BufferedWriter):
    """Takes its name when it is closed."""

    def __init__(self, path: str) -> None:
        folder, name = os.path.split(path)
        self.path, self.partial = path, os.path.join(folder, f".{name}.partial")  # noqa: PTH118
        super().__init__(FileIO(self.partial, "w"))

    def close(self) -> None:
        if not self.closed:
            super().close()
            os.replace(self.partial, self.path)  # noqa: PTH105


class _WholeFileSystem(LocalFileSystem):
    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **options: Any):
        return _WholeFile(path) if mode == "wb" else super()._open(path, mode, block_size, **options)


def whole_files() -> pyarrow.fs.FileSystem:
    """For Tune's `storage_filesystem`."""
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(_WholeFileSystem()))
