"""Commands that run in the tests' own process, which has torch in memory already, as they would in one of their own."""

import io
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import torch

from trainables.system.command_line import run_cli


def run_here(
    main: Callable[[], int | None], *arguments: object, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess:
    """What `python -m <module> <arguments>` returns and prints, without what processes below it print.

    Afterwards the environment, logging and torch's threads are as before.
    """
    words = [sys.modules[main.__module__].__file__, *map(str, arguments)]
    out, error = io.StringIO(), io.StringIO()
    environment = mock.patch.dict(os.environ, env or {}, clear=env is not None)
    with (
        environment,
        mock.patch.object(sys, "argv", words),
        unchanged_logging(),
        unchanged_threads(),
        warnings.catch_warnings(),
        chdir(cwd or Path.cwd()),
        redirect_stdout(out),
        redirect_stderr(error),
    ):
        try:
            run_cli(main)
        except SystemExit as ended:
            code = ended.code or 0
    return subprocess.CompletedProcess(words, code, out.getvalue(), error.getvalue())


@contextmanager
def unchanged_logging() -> Iterator[None]:
    before = {logger: (logger.level, [*logger.handlers]) for logger in loggers()}
    yield
    for logger in loggers():
        level, logger.handlers[:] = before.get(logger, (logging.NOTSET, []))
        logger.setLevel(level)


@contextmanager
def unchanged_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def loggers() -> list[logging.Logger]:
    """Of this project, as far as they are known by now."""
    return [logging.getLogger(name) for name in [*logging.root.manager.loggerDict] if name.startswith("trainables")]
