"""Text for people."""

import shlex


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
