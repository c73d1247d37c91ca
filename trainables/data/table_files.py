"""Reads tables of texts: CSV, TSV, JSON Lines and Parquet, each row with its place, damaged rows with the reason.

Numbers stay as they are written: the label 01 is "01". Imports no torch.
"""

import csv
import io
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trainables.data.labelled_images import DataError

CSV, TSV, JSON_LINES, PARQUET = (".csv",), (".tsv",), (".jsonl", ".ndjson"), (".parquet",)
TABLES = (*CSV, *TSV, *JSON_LINES, *PARQUET)
"""The suffixes of tables."""
DELIMITERS = (",", ";", "\t")
"""Of a CSV file; the first one that its first line has."""
NO_TEXTS: dict[type, str] = {dict: "several fields", list: "a list", bytes: "bytes"}


class TableRow(NamedTuple):
    """A row of a table, or why it cannot be read."""

    place: str
    """Such as "line 5"."""
    cells: tuple[str, ...] = ()
    problem: str = ""


def is_table(name: str) -> bool:
    return name.lower().endswith(TABLES)


def columns_of(file: Path) -> list[str]:
    """The names of a table's columns. Raises `DataError`."""
    suffix = file.suffix.lower()
    if suffix in PARQUET:
        return list(_parquet(file).schema_arrow.names)
    if suffix in JSON_LINES:
        return list(dict.fromkeys(name for _, found in _json_lines(file) if isinstance(found, dict) for name in found))
    return _header(file, _csv_lines(file))


def rows_of(file: Path, names: Sequence[str]) -> Iterator[TableRow]:
    """The cells of the columns `names`, without blanks at their ends; empty where there is no such column.

    Rows without any text are left out.
    """
    suffix = file.suffix.lower()
    rows = _parquet_rows if suffix in PARQUET else _json_rows if suffix in JSON_LINES else _csv_rows
    return (row for row in rows(file, names) if row.problem or any(row.cells))


# --- CSV and TSV ------------------------------------------------------------------------------------------------------


def _csv_rows(file: Path, names: Sequence[str]) -> Iterator[TableRow]:
    lines = _csv_lines(file)
    columns = _header(file, lines)
    chosen = [columns.index(name) if name in columns else len(columns) for name in names]
    for line, fields in lines:
        if isinstance(fields, str):
            yield TableRow(f"line {line}", problem=fields)
        elif len(fields) == len(columns):
            yield TableRow(f"line {line}", tuple([*fields, ""][i].strip() for i in chosen))
        elif any(map(str.strip, fields)):
            yield TableRow(f"line {line}", problem=f"has {len(fields)} fields, expected {len(columns)}")


def _header(file: Path, lines: Iterator[tuple[int, list[str] | str]]) -> list[str]:
    _, header = next(lines, (1, "is empty"))
    if isinstance(header, str):
        raise DataError(f"{file} {header}. Expected a table with the names of the columns in its first line.")
    return [name.strip() for name in header]


def _csv_lines(file: Path) -> Iterator[tuple[int, list[str] | str]]:
    """Line number and fields of each row that has any; at the end why the rest cannot be read, if so."""
    lines = io.StringIO(_text(file), newline="")
    first = lines.readline()
    lines.seek(0)
    found = "\t" if file.suffix.lower() in TSV else next((each for each in DELIMITERS if each in first), ",")
    reader = csv.reader(lines, delimiter=found, strict=True)
    line = 1
    try:
        for fields in reader:
            if fields:
                yield line, fields
            line = reader.line_num + 1
    except csv.Error as error:
        yield line, f"is not CSV ({error}), nor is what follows it"


def _text(file: Path) -> str:
    content = file.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 + content.count(b"\n", 0, error.start)
        raise DataError(f"{file} is not UTF-8 text (line {line}). Save the table again, in UTF-8.") from error


# --- JSON Lines -------------------------------------------------------------------------------------------------------


def _json_rows(file: Path, names: Sequence[str]) -> Iterator[TableRow]:
    for line, found in _json_lines(file):
        if isinstance(found, str):
            yield TableRow(f"line {line}", problem=found)
        else:
            yield _row_of(f"line {line}", names, [found.get(name) for name in names])


def _json_lines(file: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Line number and object of each line that has any text, or why it cannot be read."""
    for line, text in enumerate(_text(file).split("\n"), start=1):
        if not text.strip():
            continue
        try:
            found = json.loads(text, parse_int=str, parse_float=str, parse_constant=str)
        except (ValueError, RecursionError) as error:
            yield line, f"is not JSON: {error}"
            continue
        yield line, found if isinstance(found, dict) else "is not a JSON object, such as {" + '"path": ...}'


# --- Parquet ----------------------------------------------------------------------------------------------------------


def _parquet(file: Path) -> Any:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise DataError(f"{file} needs pyarrow to be read ({error}). Install it: pip install pyarrow.") from error
    try:
        return ParquetFile(file)
    except (ArrowException, OSError, ValueError) as error:
        raise _damaged(file, error) from error


def _parquet_rows(file: Path, names: Sequence[str]) -> Iterator[TableRow]:
    from pyarrow import ArrowException

    number = 1
    try:
        table = _parquet(file)
        known = table.schema_arrow.names
        for batch in table.iter_batches(columns=[name for name in names if name in known]):
            columns = [batch.column(name).to_pylist() if name in known else [None] * len(batch) for name in names]
            for values in zip(*columns, strict=True):
                yield _row_of(f"row {number}", names, values)
                number += 1
    except (ArrowException, OSError, ValueError) as error:
        raise _damaged(file, error) from error


def _damaged(file: Path, error: Exception) -> DataError:
    return DataError(f"{file} cannot be read as Parquet: {' '.join(str(error).split())}. Restore it from a copy.")


def _row_of(place: str, names: Sequence[str], values: Sequence[Any]) -> TableRow:
    for name, value in zip(names, values, strict=True):
        for kind, what in NO_TEXTS.items():
            if isinstance(value, kind):
                return TableRow(place, problem=f"has no text in {name!r}, but {what}")
    return TableRow(place, tuple(map(_cell, values)))


def _cell(value: object) -> str:
    missing = value is None or (isinstance(value, float) and math.isnan(value))
    return "" if missing else str(value).strip()
