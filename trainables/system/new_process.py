"""Running a function or a module in a new process."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def in_new_process(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What `function` returns in a fresh interpreter, which Ctrl-C ends silently."""
    with ProcessPoolExecutor(
        1, mp_context=get_context("spawn"), initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_DFL)
    ) as pool:
        return pool.submit(function, *args, **kwargs).result()


def run_module(
    module: str, *arguments: str, stdin: str | None = None, environment: Mapping[str, str] = os.environ
) -> subprocess.CompletedProcess[str]:
    """`python -m module`, which finds this project's modules as this process does; captures its stdout."""
    python_path = os.pathsep.join([str(Path(__file__).resolve().parents[2]), environment.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        input=stdin,
        stdout=subprocess.PIPE,
        text=True,
        errors="replace",
        env={**environment, "PYTHONPATH": python_path},
        check=False,
    )
