"""How the commands print messages, and how a search handles interrupts."""

import logging
import os
import signal
import sys
from pathlib import Path

from trainables.system.text import printable_lines

LOGGERS = (
    "data.fetch",
    "data.layouts",
    "network.architecture",
    "network.architecture_names",
    "network.pretrained_weights",
    "system.cache",
    "system.full_disk",
)
"""Modules of `trainables` whose log is shown to the user."""


class Interruptible:
    """Within it, the first Ctrl-C (or SIGTERM) asks Tune to save its state and return; a second one exits at once.

    Tune then waits for the running epochs. No one needs them any more, so the wait is cut short.
    """

    MAX_WAIT = 6.0  # seconds; saving takes a fraction of one

    def __init__(self) -> None:
        self.interrupted = False

    def __enter__(self) -> "Interruptible":
        # Tune also stops cleanly on SIGUSR1; TUNE_DISABLE_SIGINT_HANDLER leaves SIGINT to us. Until Tune listens, any
        # signal is a plain interrupt.
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
        print("stopping the search: saving its state (interrupt again to exit at once)", flush=True)
        signal.setitimer(signal.ITIMER_REAL, self.MAX_WAIT)
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
    """Print `text` at once, with control characters escaped."""
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
