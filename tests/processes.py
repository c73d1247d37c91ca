"""Other processes: new ones, and what /proc tells of them."""

import multiprocessing
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path


def new_processes(number: int) -> ProcessPoolExecutor:
    """Processes of their own, forked from one that imports torch for all of them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["trainables.training.fine_tune"])
    return ProcessPoolExecutor(number, mp_context=context)


def open_to_all(folder: Path, mode: int = 0o755) -> Path:
    """Lets every user into `folder`, and as far as it with its parents; takes nothing from anyone."""
    for path, wanted in ((folder, mode), *((parent, 0o055) for parent in folder.parents)):
        if (has := path.stat().st_mode) & wanted != wanted:
            path.chmod(has | wanted)
    return folder


def as_user(uid: int, call: Callable[[], object]) -> str:
    """What `call` returns or raises in a process of that user's; only root's tests can be somebody else's."""
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setuid(uid)
            said = str(call())
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
        os.write(write, said.encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(write)
    with os.fdopen(read) as said:
        return said.read()


def descendants(pid: int) -> set[int]:
    """Processes below `pid`, without itself."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found, waiting = set(), [pid]
    while waiting:
        below = children.get(waiting.pop(), [])
        found.update(below)
        waiting += below
    return found


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def named(title: str, pid: int) -> list[int]:
    """Processes below `pid`, by what Ray calls them (a pattern)."""
    return [below for below in descendants(pid) if re.match(title, command_line(below))]


@contextmanager
def stopped(pids: Iterable[int]) -> Iterator[None]:
    """Within it, these do nothing: a test can take its time, however fast the machine is."""
    pids = list(pids)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def left_after(seconds: float, pids: set[int]) -> list[str]:
    """The command lines of those that still run then (one that ended may wait for its parent, without a line)."""
    deadline = time.monotonic() + seconds
    while (left := [line for pid in pids if (line := command_line(pid))]) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def listening_addresses(pids: Iterable[int]) -> set[str]:
    """The addresses on which these processes take TCP connections, such as 127.0.0.1, or 0.0.0.0 for all."""
    links = []
    for pid in pids:
        with suppress(OSError):
            links += [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()]  # noqa: PTH115
    inodes = {link[8:-1] for link in links if link.startswith("socket:[")}
    found = set()
    for name, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            local, state, inode = (line.split()[column] for column in (1, 3, 9))
            if state == "0A" and inode in inodes:
                words = bytes.fromhex(local.split(":")[0])
                address = b"".join(words[i : i + 4][::-1] for i in range(0, len(words), 4))
                found.add(socket.inet_ntop(family, address))
    return found
