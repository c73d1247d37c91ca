"""What goes wrong after a search has ended is said and takes nothing else with it: the search has its results."""

from collections.abc import Iterator
from contextlib import contextmanager

from search.cli.messages import say

MOST = 400
"""Characters of an error; some hold a table of all memory."""


def told(error: Exception) -> str:
    """An error in one line. Of the kinds that are not meant for users, the name, too."""
    text = " ".join(str(error).split())[:MOST]
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}".rstrip(": ")


@contextmanager
def errors_said(what: str, once_more: str = "") -> Iterator[None]:
    """Within it an error ends no more than this. It is said after `what`, such as "no report", with the command that
    does it once more."""
    try:
        yield
    except BrokenPipeError:  # nobody listens
        raise
    except Exception as error:
        say(f"{what}: {told(error)}" if not once_more else f"{what}: {told(error).rstrip('.')}. Once more: {once_more}")
