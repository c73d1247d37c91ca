"""Text and numbers for people, the same everywhere."""

import shlex
from collections.abc import Sequence


def printable(text: object) -> str:
    """`text` for a terminal or a font: line breaks, control characters and bytes that are no UTF-8 as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def shell_command(module: str, *words: object) -> str:
    """`python -m module words...` as it can be pasted into a shell, whatever characters its paths have."""
    return shlex.join(["python", "-m", module, *map(str, words)])


def printable_lines(text: str) -> str:
    """A file may have any name, and a folder, which is a label: none of them commands the terminal."""
    return "\n".join(map(printable, text.split("\n")))


def many(count: int, what: str) -> str:
    """Such as 1 trial, or 2 trials."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def last_line(text: object) -> str:
    """The last line of a text such as a traceback, where the error is named; empty where there is none."""
    return (str(text).strip().splitlines() or [""])[-1]


def some(names: Sequence[str], one: str, many: str) -> str:
    """ "3 classes ('a', 'b', 'c')", with at most five names."""
    shown = ", ".join(repr(name) for name in names[:5]) + (", ..." if len(names) > 5 else "")
    return f"{len(names)} {one if len(names) == 1 else many} ({shown})"


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
