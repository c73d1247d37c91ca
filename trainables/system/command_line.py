"""How all commands, with Ray or without, print and exit."""

import io
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from trainables.system.allocator import keep_freed_memory
from trainables.system.full_disk import FULL
from trainables.system.text import printable_lines

BAD_INPUT = 2
INTERRUPTED = 128 + signal.SIGINT


def run_cli(main: Callable[[], int | None]) -> NoReturn:
    """Runs a command and exits with the code that it returns.

    Errors that the user can fix (`ValueError`: data, weights, settings, arguments; a full disk) are one paragraph on
    stderr with exit code 2. Ctrl-C exits silently with 130, a closed pipe with 1. Anything else is a bug and keeps its
    traceback.
    """
    never_fail_to_print()
    try:
        require_system()
        keep_freed_memory()
        code = main()
        sys.stdout.flush()
    except ValueError as error:
        code = _refuse(error)
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BrokenPipeError:  # such as `... | head`
        code = 1
        _give_up_output()
    except OSError as error:
        if error.errno not in FULL:
            raise
        place = f" {error.filename}" if error.filename else " the output"
        _give_up_output()  # in case that is full
        code = _refuse(f"The disk of{place} is full ({error.strerror}). Make room and run this again.")
    sys.exit(code)


def never_fail_to_print() -> None:
    """Prints escapes for characters that a terminal or a pipe cannot encode."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def require_system() -> None:
    """Raises `ValueError` on Windows, which lacks the locks and signals that a search relies on."""
    if sys.platform == "win32":
        raise ValueError(
            "finetune-search runs on Linux and macOS, not directly on Windows. Windows runs Linux programs in WSL "
            "(wsl --install): install finetune-search there."
        )


def _refuse(why: object) -> int:
    print(printable_lines(f"error: {why}"), file=sys.stderr)
    return BAD_INPUT


def _give_up_output() -> None:
    """Redirects stdout to nothing: Python flushes it again on exit, which must not fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
