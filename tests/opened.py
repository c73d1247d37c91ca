"""Who opens which files, told by the kernel (inotify, Linux alone)."""

import ctypes
import os
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

IN_OPEN = 0x20
EVENT = struct.Struct("iIII")


@contextmanager
def watched(files: Iterable[Path], moment: Callable[[], object]) -> Iterator[list[tuple[Path, object]]]:
    """The files that any process opens, each with what `moment` gave at that time; all of them after the block."""
    libc, opened = ctypes.CDLL(None, use_errno=True), []
    notify = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    names = {libc.inotify_add_watch(notify, os.fsencode(file), IN_OPEN): file for file in files}
    assert notify >= 0 and -1 not in names, os.strerror(ctypes.get_errno())
    ended = threading.Event()

    def read() -> None:
        last = False
        while not last:
            last = ended.wait(0.05)
            try:
                events = os.read(notify, 1 << 16)
            except BlockingIOError:
                continue
            opened.extend((names[watch], moment()) for watch, *_ in EVENT.iter_unpack(events))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield opened
    finally:
        ended.set()
        reader.join()
        os.close(notify)
