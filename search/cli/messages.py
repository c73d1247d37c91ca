"""What the commands of `python -m search.<name>` share beside their end: what they say, and how a search stops."""

import logging
import os
import signal
import sys
from pathlib import Path

from trainables.system.command_line import INTERRUPTED, run_cli
from trainables.system.text import printable_lines

__all__ = ["INTERRUPTED", "Interruptible", "command_name", "run_cli", "say"]

LOGGERS = (
    "data.fetch",
    "data.layouts",
    "network.architecture",
    "network.pretrained_weights",
    "system.cache",
    "system.full_disk",
)
"""Modules of `trainables` whose log is shown to the user."""


class Interruptible:
    """Within it, the first Ctrl-C (or SIGTERM) asks Tune to save its state and return; a second one ends at once.

    Tune then waits for the epochs under way. They are not wanted any more, so the wait is cut short.
    """

    PATIENCE = 6.0  # seconds, of which saving takes a fraction of one

    def __init__(self) -> None:
        self.interrupted = False

    def __enter__(self) -> "Interruptible":
        # Tune ends in good order on SIGUSR1, too, and leaves SIGINT to us by TUNE_DISABLE_SIGINT_HANDLER. Until it
        # listens, a signal is a plain interrupt.
        handlers = dict.fromkeys((signal.SIGUSR1, signal.SIGALRM), _interrupt)
        handlers |= dict.fromkeys((signal.SIGINT, signal.SIGTERM), self._pass_on)
        self.before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        return self

    def __exit__(self, error_type: type | None, *error: object) -> bool:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self.before.items():
            signal.signal(number, handler)
        return error_type is KeyboardInterrupt and self.interrupted

    def _pass_on(self, number: int, frame: object) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        print("ending the search: saving its state (again to end at once)", flush=True)
        signal.setitimer(signal.ITIMER_REAL, self.PATIENCE)
        os.kill(os.getpid(), signal.SIGUSR1)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def command_name(module: str) -> str:
    """How the user started the command of `module`, such as `search.run`: its own module, `search`, or the script."""
    started = Path(sys.argv[0])
    name = module.rpartition(".")[2].replace("_", "-")
    if started.name == "finetune-search":
        return f"finetune-search {name}"
    return f"python -m search {name}" if started.parts[-2:] == ("search", "__main__.py") else f"python -m {module}"


def say(text: str) -> None:
    print(printable_lines(text), flush=True)


def show_progress() -> None:
    """Print what is logged about fetching, waiting and the images. Presizing has a progress bar."""
    for name in LOGGERS:
        logger = logging.getLogger(f"trainables.{name}")
        logger.setLevel(logging.INFO)
        logger.addHandler(_Sayer())


class _Sayer(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage())
