"""What this machine gives: CPUs, and a home folder even to a user who has none.

In a container that runs under some user id there may be no home, and Ray does not load without one.
"""

import getpass
import os
import stat
import sys
import tempfile
from pathlib import Path


def num_cpus() -> int:
    """How many CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ensure_home() -> None:
    """Where there is no home, HOME becomes a private folder among the temporary ones; where there is no name, USER."""
    if sys.platform == "win32":
        return
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = str(os.geteuid())
    if not _has_home() and (home := private_folder()):
        os.environ["HOME"] = str(home)


def private_folder() -> Path | None:
    """The user's own among the temporary ones; None where there can be none, or somebody else has taken its place."""
    try:
        folder = Path(tempfile.gettempdir()) / f"finetune-search-{os.geteuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return None
    own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077
    return folder if own else None


def _has_home() -> bool:
    """One to write to, or at least to read from; / is what Docker gives to an id without a name."""
    home = Path(os.path.expanduser("~"))  # noqa: PTH111, the other one raises
    if home == Path("~"):
        return False
    if os.path.isdir(home) and home != Path("/"):  # noqa: PTH112, the other one raises where its parent is closed
        return os.access(home, os.R_OK | os.X_OK)
    while not os.path.exists(home):  # noqa: PTH110
        home = home.parent
    return os.access(home, os.W_OK)
