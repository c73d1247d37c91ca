"""Calling a function in a process of its own."""

import signal
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context


def in_new_process(function, *arguments):
    """What `function` returns in a fresh interpreter, which Ctrl-C ends without a word."""
    with ProcessPoolExecutor(
        1, mp_context=get_context("spawn"), initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_DFL)
    ) as pool:
        return pool.submit(function, *arguments).result()
