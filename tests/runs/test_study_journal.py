"""The study's journal: what a machine's end or a full disk leaves of it can be gone on with, other damage is named."""

import errno
import json
import os

import optuna
import pytest

from search.runs.study_journal import open_journal, repair
from trainables.system import full_disk


def study(path) -> optuna.Study:
    return optuna.create_study(storage=open_journal(path), study_name="s", load_if_exists=True)


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "study.journal"
    study(file).add_trial(optuna.trial.create_trial(value=0.5))
    return file


@pytest.mark.parametrize("torn", ['{"op_code": 4, "trial', '{"op_code": 4}', "\0\0\0", "\n"])
def test_half_a_last_line_is_cut_off_and_the_study_goes_on(path, torn):
    whole = path.read_text()
    path.write_text(whole + torn)
    again = study(path)
    assert path.read_text().startswith(whole) and json.loads(path.read_text().splitlines()[-1])
    again.add_trial(optuna.trial.create_trial(value=0.25))
    assert [trial.value for trial in study(path).trials] == [0.5, 0.25]


def test_a_file_system_without_links_keeps_a_journal_as_well(path, monkeypatch):
    monkeypatch.setattr(os, "symlink", without_links)
    monkeypatch.setattr(os, "link", without_links)
    study(path).add_trial(optuna.trial.create_trial(value=0.25))
    assert [trial.value for trial in study(path).trials] == [0.5, 0.25]
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # no lock is left


def without_links(source, place, **options) -> None:
    """As vfat and exFAT, and some network file systems."""
    raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), source, None, place)


def test_damage_further_up_is_refused_by_its_line(path):
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0][:10] + "\n", *lines[1:]]))
    with pytest.raises(ValueError, match=r"study\.journal is damaged: line 1 is not JSON"):
        repair(path)
    assert len(path.read_text().splitlines()) == len(lines)


def test_a_full_disk_leaves_no_half_line_and_is_waited_for(path, monkeypatch):
    monkeypatch.setattr(full_disk, "RETRY_SECONDS", 0.01)
    storage, before, write, tries = study(path), path.read_bytes(), os.write, []

    def half_of_it_twice(file: int, content: bytes) -> int:
        tries.append(path.read_bytes())
        return write(file, content[:10] if len(tries) < 3 else content)

    monkeypatch.setattr(os, "write", half_of_it_twice)
    storage.set_user_attr("note", "kept")
    monkeypatch.undo()
    assert tries == [before] * 3
    assert path.read_bytes().startswith(before) and study(path).user_attrs == {"note": "kept"}
