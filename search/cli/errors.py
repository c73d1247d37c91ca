"""Reports errors that must not stop the caller, such as those after a search: its results are safe."""

from collections.abc import Iterator
from contextlib import contextmanager

from search.cli.messages import say

MAX_LENGTH = 400
"""Characters of a message; some errors contain a dump of all memory."""


def error_line(error: Exception) -> str:
    """An error in one line, with its type's name unless it is meant for users."""
    text = " ".join(str(error).split())[:MAX_LENGTH]
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}".rstrip(": ")


@contextmanager
def report_errors(what: str, retry: str = "") -> Iterator[None]:
    """Print an error instead of raising it, after `what`, such as "no report", and with the command to `retry`."""
    try:
        yield
    except BrokenPipeError:  # no one reads the output
        raise
    except Exception as error:
        line = error_line(error)
        say(f"{what}: {line.rstrip('.')}. To try again: {retry}" if retry else f"{what}: {line}")
