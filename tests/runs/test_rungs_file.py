"""What early stopping knows is appended, and read back whole."""

import json

import pytest

from search.runs.rungs_file import RungsFile


def test_lines_add_up_and_a_reader_sees_those_that_came_since(tmp_path):
    writer, reader = RungsFile(tmp_path / "rungs.json"), RungsFile(tmp_path / "rungs.json")
    assert reader.read() == {"curves": {}, "reasons": {}, "rungs": {}}
    writer.add({"curves": {"a": {"final": None}}})
    assert reader.read()["curves"] == {"a": {"final": None}}
    writer.add({"curves": {"a": {"final": 0.5}, "b": {}}, "reasons": {"b": "bad"}, "rungs": {"b": 60}})
    assert reader.read() == {"curves": {"a": {"final": 0.5}, "b": {}}, "reasons": {"b": "bad"}, "rungs": {"b": 60}}
    RungsFile(tmp_path / "rungs.json").tidy()
    assert RungsFile(tmp_path / "rungs.json").read() == reader.known
    assert len((tmp_path / "rungs.json").read_text().splitlines()) == 1


def test_half_a_last_line_is_skipped_and_gone_when_a_search_resumes(tmp_path):
    path = tmp_path / "rungs.json"
    path.write_text(json.dumps({"reasons": {"a": "bad"}}) + '\n{"reasons": {"b": "b')
    assert RungsFile(path).read()["reasons"] == {"a": "bad"}
    resumed = RungsFile(path)
    resumed.tidy()
    resumed.add({"reasons": {"c": "bad"}})
    assert set(RungsFile(path).read()["reasons"]) == {"a", "c"}


def test_damage_elsewhere_is_told(tmp_path):
    path = tmp_path / "rungs.json"
    path.write_text('{"reasons": {"b": "b\n{}\n')
    with pytest.raises(ValueError, match=r"rungs\.json is damaged.*Restore it"):
        RungsFile(path).read()
