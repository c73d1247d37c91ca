"""One search at a time writes to a run's folder."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from search.runs.paths import RunFolder
from trainables.system.full_disk import require_writable


@contextmanager
def alone_in(folder: RunFolder) -> Iterator[None]:
    """Within it, no other search of this machine writes to the run. Raises `ValueError` where one does.

    The lock is a file next to the folder, because the folder may be replaced as a whole. The kernel releases it when
    the process that holds it ends, in whatever way.
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
        os.close(opened)  # last: until then no other search makes these folders


def _locked(file: Path) -> int | None:
    """The descriptor of the locked file, or None where another process holds the lock.

    The previous holder removes the file: a descriptor that was opened before that locks nothing.
    """
    while True:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            opened = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # the folder was removed in between
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
