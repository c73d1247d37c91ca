"""What all commands of `python -m search.<name>` share: how they end."""

import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

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
        print(f"error: {error}", file=sys.stderr)
        code = BAD_INPUT
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BrokenPipeError:  # such as `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code)
