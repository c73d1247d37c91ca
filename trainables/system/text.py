"""Text and numbers in messages."""

import shlex
from collections.abc import Sequence


def printable(text: object) -> str:
    """`text` with escapes for line breaks, control characters and bytes that are not UTF-8."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def shell_command(module: str, *words: object) -> str:
    """`python -m module words...`, quoted for a shell."""
    return shlex.join(["python", "-m", module, *map(str, words)])


def printable_lines(text: str) -> str:
    """The same for several lines: names of files and classes must not control the terminal."""
    return "\n".join(map(printable, text.split("\n")))


def many(count: int, what: str) -> str:
    """Such as 1 trial, or 2 trials."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def last_line(text: object) -> str:
    """The last line of a text, which names the error of a traceback; empty if there is none."""
    return (str(text).strip().splitlines() or [""])[-1]


def some(names: Sequence[str], one: str, many: str) -> str:
    """ "3 classes ('a', 'b', 'c')", with at most five names."""
    return f"{len(names)} {one if len(names) == 1 else many} ({_first(names)})"


def some_of(names: Sequence[str], count: int, one: str, many: str) -> str:
    """ "2 of 37 classes ('a', 'b')", with at most five names."""
    return f"{len(names)} of {count} {one if count == 1 else many} ({_first(names)})"


def _first(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names[:5]) + (", ..." if len(names) > 5 else "")


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"


def duration(seconds: float) -> str:
    """Such as 3 h 20 min, 3 min 8 s, or 8 s."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def megabytes(count: float) -> str:
    """Bytes, such as 8.5 MB, 85 MB or 1.2 GB."""
    if count >= 1e9:
        return f"{count / 1e9:.1f} GB"
    return f"{count / 1e6:.{0 if count >= 1e7 else 1}f} MB"
