"""What this machine has: CPUs, memory, and a home folder even for a user without one.

A container that runs under any user id may have no home, and Ray does not load without one.
"""

import getpass
import os
import stat
import sys
import tempfile
from contextlib import suppress
from pathlib import Path


def num_cpus() -> int:
    """The number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def total_memory() -> int:
    """Bytes of memory of this machine, or of the container that this process runs in."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # absent, or "max"
            memory = min(memory, int(Path(limit).read_text()))
    return memory


def ensure_home() -> None:
    """Without a home, sets HOME to a private temporary folder; without a user name, sets USER to the user's id."""
    if sys.platform == "win32":
        return
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = str(os.geteuid())
    if not _has_home() and (home := private_folder()):
        os.environ["HOME"] = str(home)


def private_folder() -> Path | None:
    """The user's own temporary folder; None if it cannot be made, or if another user has made it."""
    try:
        folder = Path(tempfile.gettempdir()) / f"finetune-search-{os.geteuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return None
    own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077
    return folder if own else None


def _has_home() -> bool:
    """Whether there is a readable home, or room to make one. / is not one: Docker gives it to an id without a name."""
    home = Path(os.path.expanduser("~"))  # noqa: PTH111, the other one raises
    if home == Path("~"):
        return False
    if os.path.isdir(home) and home != Path("/"):  # noqa: PTH112, the other one raises where its parent is closed
        return os.access(home, os.R_OK | os.X_OK)
    while not os.path.exists(home):  # noqa: PTH110
        home = home.parent
    return os.access(home, os.W_OK)
