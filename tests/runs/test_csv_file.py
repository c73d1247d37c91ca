"""Tables: what is written comes back, and damage is told with its line and what to do."""

import math

import pytest

from search.runs.csv_file import (
    as_csv,
    float_or_nan,
    integer,
    one_of,
    optional_integer,
    read_rows,
    read_table,
    timestamp,
)

PARSERS = {"number": integer, "status": one_of("running", "completed"), "error_rate": float_or_nan}
TABLE = """number,status,error_rate,reason
0,completed,0.25,
1,running,,"one, ""two"" and
three"
2,completed,1e-05,
"""


@pytest.fixture
def path(tmp_path):
    (tmp_path / "trials.csv").write_text(TABLE)
    return tmp_path / "trials.csv"


def read(path):
    return read_table(path, PARSERS, needed=("number", "status"), key="number")


def test_fields_are_text_but_those_of_a_kind(path):
    columns, rows = read(path)
    assert columns == ["number", "status", "error_rate", "reason"]
    assert rows[0] == {"number": 0, "status": "completed", "error_rate": 0.25, "reason": ""}
    assert math.isnan(rows[1]["error_rate"]) and rows[1]["reason"] == 'one, "two" and\nthree'
    assert [row["error_rate"] for row in read_rows(path)] == ["0.25", "", "1e-05"]
    assert as_csv(columns, rows) == TABLE


def test_no_file_has_no_rows(tmp_path):
    assert read_rows(tmp_path / "trials.csv") == []


@pytest.mark.parametrize("text", ['a, "b"', "two\nlines", "two\r\nlines", "50 %\r100 %", "\r", "ä ° 一", " \t ", "\0"])
def test_any_text_comes_back_as_it_was(path, text):
    path.write_bytes(as_csv(["number", "reason"], [{"number": 3, "reason": text}]).encode())
    assert read_rows(path) == [{"number": "3", "reason": text}]


@pytest.mark.parametrize("cut", range(1, 20))
def test_a_row_that_was_torn_at_the_end_is_left_out(path, cut):
    path.write_text(TABLE[:-cut])
    assert [row["number"] for row in read(path)[1]] == ([0, 1, 2] if cut <= 1 else [0, 1])


DAMAGES = {
    "nothing in it": (lambda text: b"", "line 1 is empty, expected the names of the columns"),
    "only zeros": (lambda text: bytes(len(text)), "line 1 has no column number"),
    "half of its columns' names": (lambda text: text[:9], "line 1 has no column status"),
    "a column renamed": (lambda text: text.replace(b"status", b"stat\0s"), "line 1 has no column status"),
    "a column twice": (lambda text: text.replace(b"reason", b"number"), "line 1 names the column number twice"),
    "the columns' names again": (lambda text: text + text, r"line 6 has 'number' for number, expected a whole number"),
    "a field lost": (lambda text: text.replace(b"0.25,", b"0.25"), "line 2 has 3 fields, expected 4"),
    "a field more": (lambda text: text.replace(b"0.25,", b"0,25,"), "line 2 has 5 fields, expected 4"),
    "a row of words": (lambda text: text.replace(b"2,comp", b"bird\n2,comp"), "line 5 has 1 fields, expected 4"),
    "no number": (lambda text: text.replace(b"0.25", b"0.2x"), "line 2 has '0.2x' for error_rate, expected a number"),
    "a zero byte": (lambda text: text.replace(b"0.25", b"0\x0025"), r"line 2 has '0\\x0025' for error_rate"),
    "no whole number": (lambda text: text.replace(b"\n2,", b"\n-2,"), "line 5 has '-2' for number, expected a whole"),
    "another status": (lambda text: text.replace(b"running", b"runni~g"), "line 3 .*, expected one of running, compl"),
    "a number twice": (lambda text: text.replace(b"\n2,", b"\n0,"), "line 5 has number 0, as a line above it has"),
    "no UTF-8": (lambda text: text.replace(b"three", b"thr\xffe"), "line 4 is not UTF-8 text"),
    "a lost quotation mark": (
        lambda text: text.replace(b'three"', b"three"),
        "line 3 is not CSV: unexpected end of data",
    ),
    "one too many": (lambda text: text.replace(b'""two', b'"two'), "line 3 is not CSV: ',' expected after '\"'"),
    "a huge field": (
        lambda text: text.replace(b"three", b"3" * 200_000),
        "line 3 is not CSV: field larger than field limit",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_told_with_its_line_and_what_to_do(path, damage):
    change, message = DAMAGES[damage]
    path.write_bytes(change(TABLE.encode()))
    with pytest.raises(
        ValueError, match=f"trials.csv is damaged: {message}.* Repair that line, or restore a copy"
    ) as e:
        read(path)
    assert len(str(e.value)) < 500


def test_a_lost_quotation_mark_never_swallows_the_rows_below_it(path):
    path.write_text(TABLE.replace('three"', "three").rstrip("\n"))
    with pytest.raises(ValueError, match="line 3"):
        read(path)


@pytest.mark.parametrize(
    ("parser", "good", "bad"),
    [
        (integer, {"0": 0, "17": 17}, ["", "-1", "1.0", "٣", "1_0", "9" * 5000, "²"]),
        (optional_integer, {"": "", "3": 3}, ["x", " "]),
        (float_or_nan, {"1e-3": 0.001, "inf": math.inf}, ["0,1", "none"]),
        (
            timestamp,
            {text: text for text in ("", "2026-01-31T12:00:00+00:00", "2026-01-31T12:00:00-03:30")},
            ["2026-01-31", "2026-13-31T12:00:00+00:00", "today", "2026-01-31 12:00:00+00:00"],
        ),
        (one_of("a", "b"), {"a": "a"}, ["", "A", "a "]),
    ],
)
def test_a_parser_takes_what_is_written_and_nothing_else(parser, good, bad):
    assert {text: parser(text) for text in good} == good
    for text in bad:
        with pytest.raises(ValueError, match=r"^a |^one of"):
            parser(text)
