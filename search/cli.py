"""What all commands of `python -m search.<name>` share: how they end."""

import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from trainables.wording import printable

BAD_INPUT = 2
INTERRUPTED = 128 + signal.SIGINT


def run_cli(main: Callable[[], int]) -> NoReturn:
    """Runs a command and exits with the code that it returns.

    What the user can mend (`ValueError`: data, weights, settings, arguments) is one paragraph on stderr and exit code
    2. Ctrl-C exits with 130 and a reader that closed the pipe ends the command, both without a word. Anything else is a
    bug and keeps its traceback.
    """
    try:
        code = main()
        sys.stdout.flush()
    except ValueError as error:
        print(_lines(f"error: {error}"), file=sys.stderr)
        code = BAD_INPUT
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BrokenPipeError:  # such as `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code)


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


def say(text: str) -> None:
    print(_lines(text), flush=True)


def _lines(text: str) -> str:
    """A file may have any name, and a folder, which is a label: none of them commands the terminal."""
    return "\n".join(map(printable, text.split("\n")))
