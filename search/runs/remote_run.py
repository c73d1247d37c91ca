"""One run in an object store: its files, its index, and bringing it back."""

import json
import shutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from hashlib import file_digest
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from pyarrow import ArrowException
from pyarrow.fs import FileSelector

from search.cli.messages import say
from search.runs.atomic_files import replace_folder
from search.runs.paths import RunFolder
from trainables.system.file_systems import filesystem, inside, shown, without_secrets

INDEX_TRIES = (0, 0.2, 1)
"""Seconds before each try to read the index."""
FILES_AT_ONCE = 8
CHUNK = 1 << 20
INDEX = "resume/index.json"
STORE_ERRORS = (OSError, ArrowException)


class RemoteRun:
    """`<storage>/<run name>/` by names within it. Failures are `STORE_ERRORS`."""

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

        A store is asked for the length first, then for the content. If a running search replaces the index in between,
        only a part arrives, so an index that cannot be parsed is read again.
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
        self.filesystem.move(
            f"{self.path}/{INDEX}.partial", f"{self.path}/{INDEX}"
        )  # writing to a local folder may be cut off

    def contents(self) -> set[str]:
        found = self.filesystem.get_file_info(FileSelector(f"{self.path}/resume", allow_not_found=True))
        return {info.base_name for info in found if "." not in info.base_name and info.is_file}

    def _target(self, name: str) -> str:
        path = f"{self.path}/{name}"
        if self.filesystem.type_name == "local":
            self.filesystem.create_dir(path.rpartition("/")[0], recursive=True)
        return path


def bring_back(storage: str, folder: RunFolder) -> None:
    """Make the run's folder from its copy. Raises `ValueError` where there is none, or a part of it cannot be read."""
    remote = RemoteRun(storage, folder.path.name)
    try:
        index = remote.index()
        if index is None:
            raise ValueError(f"There is no run to resume: neither {folder}/ nor {remote} exists.")
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

    for_each(get, digests)


def for_each(act: Callable[[str], None], names: Iterable[str]) -> None:
    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        list(pool.map(act, names))
