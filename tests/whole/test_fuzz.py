"""Damaged images and tables, a few hundred of each; `tests/fuzz.py` tries as many as there is time for."""

import sys
import tempfile
import time
from pathlib import Path

import fuzz
import pytest
from fuzz import TARGETS, Finding, checked, quiet
from hypothesis import HealthCheck, Phase, given, settings


@pytest.mark.parametrize("target", TARGETS)
def test_whatever_the_bytes_a_reader_ends_in_its_own_words(tmp_path, target):
    _, inputs, read = TARGETS[target]
    outcomes = set()

    @settings(
        max_examples=200,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(inputs)
    def one(content: bytes) -> None:
        outcomes.add(checked(read, content, tmp_path / "input"))

    with quiet():
        one()
    assert "read" in outcomes and len(outcomes) > 1  # neither too much damage nor too little


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_damaged_there_was_sound_before(tmp_path, target):
    originals, _, read = TARGETS[target]
    for content in originals:
        assert checked(read, content, tmp_path / "input") == "read"


def test_what_an_input_must_not_do_is_noticed(tmp_path, monkeypatch):
    def surprised(file: Path) -> str:
        raise KeyError(file)

    with pytest.raises(KeyError):
        checked(surprised, b"", tmp_path / "input")
    peaks = iter((1 << 30, 2 << 30))
    monkeypatch.setattr(fuzz, "memory", lambda: next(peaks))
    with pytest.raises(Finding, match="it took 1024 MB"):
        checked(lambda file: "read", b"", tmp_path / "input")
    monkeypatch.undo()
    monkeypatch.setattr(fuzz, "MAX_SECONDS", 0.1)
    with pytest.raises(Finding, match=r"it took 0\.. s"):
        checked(lambda file: time.sleep(0.15), b"", tmp_path / "input")


def test_the_command_says_how_many_inputs_were_tried_and_keeps_what_breaks_a_reader(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["fuzz.py", "--seconds", "0.5", "trials", "epochs"])
    assert fuzz.main() == 0
    _, *lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["trials", "epochs"]
    assert all("nothing found" in line and " damaged" in line for line in lines)
    assert not (Path(fuzz.__file__).parents[1] / ".hypothesis").exists()

    def brittle(file: Path) -> str:
        return file.read_bytes().decode()[:0]

    monkeypatch.setitem(fuzz.TARGETS, "trials", TARGETS["trials"]._replace(read=brittle))
    monkeypatch.setattr(sys, "argv", ["fuzz.py", "--seconds", "60", "trials"])
    assert fuzz.main() == 1
    said = capsys.readouterr().out
    assert "FOUND UnicodeDecodeError" in said
    kept = Path(said.split("the input is ")[-1].strip())
    with pytest.raises(UnicodeDecodeError):
        brittle(kept)
