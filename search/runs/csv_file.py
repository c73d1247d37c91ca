"""Tables as CSV files: written, and read back with the line named where one is damaged."""

import csv
import io
import math
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Parser = Callable[[str], Any]
"""Converts the text of a field. Raises `ValueError` with what was expected."""


def as_csv(columns: list[str], rows: Iterable[Row], *, header: bool = True) -> str:
    lines = [columns] if header else []
    return "".join(map(_line, [*lines, *([as_text(row.get(name, "")) for name in columns] for row in rows)]))


def _line(fields: list[Any]) -> str:
    """With csv's own line ending, Python before 3.13 also quotes a carriage return in a field."""
    text = io.StringIO()
    csv.writer(text).writerow(fields)
    return text.getvalue().removesuffix("\r\n") + "\n"


def as_text(value: Any) -> Any:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return value


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a table as text, see `read_table`; empty if there is no file yet."""
    return read_table(path)[1] if path.is_file() else []


def read_table(
    path: Path, parsers: Mapping[str, Parser] | None = None, needed: Iterable[str] = (), key: str | None = None
) -> tuple[list[str], list[Row]]:
    """The columns and the rows of a table; fields are text except in columns that have one of the `parsers`.

    A last row that a kill has truncated is skipped. Other damage raises `ValueError` with the line number: too many or
    too few fields, a field that its parser rejects, one of the columns `needed` missing, or a duplicate value in the
    column `key`.
    """
    lines = list(io.StringIO(_decoded(path), newline=""))
    reader = csv.reader(lines, strict=True)  # a missing quotation mark must not consume the rows below it
    columns: list[str] = []
    rows: list[Row] = []
    seen = set()
    line = 1
    while True:
        try:
            if (fields := next(reader, None)) is None:
                break
            if fields and not columns:
                columns = _checked(fields, needed)
            elif fields:
                row = _row(columns, fields, parsers or {})
                if key and row[key] in seen:
                    raise ValueError(f"has {key} {row[key]}, as a line above it has")
                seen.add(row[key] if key else None)
                rows.append(row)
        except (csv.Error, ValueError) as error:
            if columns and line == len(lines) and not lines[-1].endswith("\n"):  # cut off
                break
            what = f"is not CSV: {error}" if isinstance(error, csv.Error) else str(error)
            raise _damaged(path, line, what) from error
        line = reader.line_num + 1
    if not columns:
        raise _damaged(path, 1, "is empty, expected the names of the columns")
    return columns, rows


def _decoded(path: Path) -> str:
    content = path.read_bytes()
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise _damaged(path, 1 + content.count(b"\n", 0, error.start), "is not UTF-8 text") from error


def _checked(columns: list[str], needed: Iterable[str]) -> list[str]:
    if missing := [name for name in needed if name not in columns]:
        raise ValueError(f"has no column {missing[0]}")
    if twice := [name for i, name in enumerate(columns) if name in columns[:i]]:
        raise ValueError(f"names the column {twice[0]} twice")
    return columns


def _row(columns: list[str], fields: list[str], parsers: Mapping[str, Parser]) -> Row:
    if len(fields) != len(columns):
        raise ValueError(f"has {len(fields)} fields, expected {len(columns)}")
    row: Row = dict(zip(columns, fields, strict=True))
    for name in [name for name in parsers if name in row]:
        try:
            row[name] = parsers[name](row[name])
        except ValueError as expected:
            raise ValueError(f"has {row[name][:40]!r} for {name}, expected {expected}") from None
    return row


def _damaged(path: Path, line: int, what: str) -> ValueError:
    return ValueError(
        f"{path} is damaged: line {line} {what}. Repair that line, or restore a copy of the file. Any line except the "
        "first can also be removed; only its content is lost."
    )


# --- Parsers ----------------------------------------------------------------------------------------------------------


def integer(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 19):
        raise ValueError("a whole number")
    return int(text)


def signed_integer(text: str) -> int:
    return -integer(text[1:]) if text.startswith("-") else integer(text)


def optional_integer(text: str) -> int | str:
    return integer(text) if text else ""


def float_or_nan(text: str) -> float:
    """A number; NaN if the field is empty."""
    try:
        return float(text) if text else math.nan
    except ValueError:
        raise ValueError("a number or nothing") from None


def timestamp(text: str) -> str:
    """An ISO 8601 time, to the second and with its time zone; or an empty field."""
    try:
        exact = datetime.fromisoformat(text).isoformat(timespec="seconds") == text
    except ValueError:
        exact = False
    if text and not exact:
        raise ValueError("a time such as 2026-01-31T12:00:00+00:00")
    return text


def one_of(*words: str) -> Parser:
    def parser(text: str) -> str:
        if text not in words:
            raise ValueError(f"one of {', '.join(words)}")
        return text

    return parser
