"""Where images lie, as one text: on the command line, in a run's record, and back."""

import contextlib
import sys
from pathlib import Path

import pytest

from search import check, lr_find
from search.options.arguments import parse_arguments
from search.options.search_options import SearchOptions
from trainables import finetune, interpret
from trainables.data.address import DataAddress
from trainables.data.labelled_images import DataError

TABLE = ["--columns", "path=file,label=my, breed,group=patient", "--images", "pics"]


def expected(folder: Path, table: str) -> str:
    return f"{table}?path=file&label=my, breed&group=patient&images={folder}/pics"


def test_all_commands_take_a_table_with_its_columns_and_its_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for parse in (parse_arguments, check.parse_arguments, lr_find.parse_arguments):
        assert str(parse(["--data", "labels.csv", *TABLE]).data) == expected(tmp_path, f"{tmp_path}/labels.csv")
    (tmp_path / "model").mkdir()
    for command, more in ((finetune, []), (interpret, ["--model", "model"])):
        monkeypatch.setattr(sys, "argv", ["command", "--data", "labels.csv", *TABLE, *more])
        with contextlib.suppress(SystemExit, ValueError):
            command.main()
        assert "unrecognized" not in capsys.readouterr().err


def test_a_run_keeps_the_table_and_is_resumed_with_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = parse_arguments(["--data", "labels.csv", *TABLE])
    assert SearchOptions.from_record(options.to_record()) == options
    again = parse_arguments(["--data", str(options.data)])  # as the commands in its report say
    assert again == options and "columns" not in options.to_record()


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--columns", "label=x"], "--columns needs --data with a table"),
        (["--images", "pics", "--space", "pets"], "--images needs --data with a table"),
        (["--data", "s3://bucket/birds.tar", "--columns", "label=x"], "--columns does not go with an address"),
        (["--data", "labels.csv?label=x", "--columns", "label=y"], "says label= already"),
        (["--data", "birds/*", "--columns", "label=y"], "takes the classes from folders"),
        (["--data", "labels.csv", "--columns", "label"], "'label' is none of path=NAME, label=NAME"),
        (["--data", "labels.csv", "--columns", "label=a,label=b"], "'label=b' is there twice"),
        (["--data", "labels.csv", "--columns", "colour=a"], "'colour=a' is none of"),
        (["--data", "labels.csv", "--columns", "label="], "expected a name after label="),
    ],
)
def test_columns_that_cannot_be_meant_are_refused_with_the_reason(capsys, words, why):
    with pytest.raises(SystemExit) as ended:
        parse_arguments(words)
    assert ended.value.code == 2 and why in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("name", ["a&b=c", "a?b", "a%26b", "a//b/./c", "a#b", "né'\"*", " a", "path=x", "a\\b"])
def test_any_name_of_a_column_comes_through(tmp_path, name):
    address = DataAddress(path=tmp_path / "labels.csv", options={"label": name, "images": "/some/where"})
    for text in (str(address), str(Path(str(address)))):
        assert DataAddress.of(text) == address
    assert str(address).endswith("&images=/some/where")


def test_paths_without_options_stay_as_they_are(tmp_path):
    for text in ("/data/what?", "/data/a?b/c", "/data/x=y", "/data/birds/*"):
        address = DataAddress.of(text)
        assert (str(address), address.options) == (text, {})
    with pytest.raises(DataError, match="behind the"):
        DataAddress.of("/data/labels.csv?colour=red")
