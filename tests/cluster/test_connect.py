"""What a Ray that starts on this machine finds there: folders for its sockets, and a place for its token."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from processes import as_user, open_to_all

from search.cluster import connect
from search.cluster.connect import MAX_TEMPORARY_PATH, prepare_folders, provide_token

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    for name in ("RAY_TMPDIR", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TMPDIR", "/tmp")


def test_uv_run_in_a_sub_folder_asks_nothing_of_the_workers(tmp_path):
    """Ray looks for a process above it that is called `uv run`: this one is a Python, and `run` its script."""
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "run").write_text(
        f"import subprocess; subprocess.run([{sys.executable!r}, '-c', {UNDER_UV!r}])"
    )
    as_uv = {"executable": sys.executable, "cwd": tmp_path / "sub", "env": os.environ | {"PYTHONPATH": str(ROOT)}}
    ended = subprocess.run(["uv", "run", "python"], **as_uv, capture_output=True, text=True)
    assert ended.stdout == "None\n", ended.stderr


UNDER_UV = """
from search.cluster.connect import prepare_environment
prepare_environment(None)
from ray._private import worker
print(worker._maybe_modify_runtime_env(None, False))
"""


@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
def test_a_temporary_folder_with_a_long_path_gets_a_short_name_for_a_while(tmp_path, variable):
    long = tmp_path / "long" / ("x" * 100)
    long.mkdir(parents=True)
    code = f"""
import os, pathlib
from search.cluster.connect import prepare_folders
prepare_folders()
print(os.environ[{variable!r}])
pathlib.Path(os.environ[{variable!r}], "note").touch()
"""
    environment = os.environ | {variable: str(long)}
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    short = Path(ended.stdout.strip())
    assert len(str(short)) <= MAX_TEMPORARY_PATH, ended.stderr
    assert (long / "note").is_file()  # what is written there is where the user wants it
    assert not os.path.lexists(short) and not short.parent.exists()


def test_a_temporary_folder_that_is_short_enough_stays(tmp_path, monkeypatch):
    prepare_folders()
    assert os.environ["TMPDIR"] == "/tmp"


def test_where_no_short_name_can_be_made_the_variable_is_named_with_what_ray_leaves_for_it(tmp_path, monkeypatch):
    monkeypatch.setattr(connect, "SHORT_FOLDERS", ("/proc",))
    monkeypatch.setenv("TMPDIR", f"/scratch/{'x' * 40}")
    with pytest.raises(ValueError, match=r"TMPDIR=/scratch/x+ is too long .* Set RAY_TMPDIR to .* at most 31 bytes"):
        prepare_folders()


def test_a_temporary_folder_that_cannot_be_written_is_refused_by_its_name(monkeypatch):
    monkeypatch.setenv("TMPDIR", "/proc/none")
    with pytest.raises(ValueError, match=r"/proc/none cannot be written .* with RAY_TMPDIR"):
        prepare_folders()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
@pytest.mark.parametrize("name", ["ray", "_ray_lockfiles"])
def test_beside_the_ray_of_another_user_a_search_has_a_folder_of_its_own(tmp_path, name, monkeypatch):
    open_to_all(tmp_path, 0o777)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    (tmp_path / name).mkdir(mode=0o755)

    def chosen() -> str:
        tempfile.tempdir = None
        connect.avoid_folders_of_other_users()
        return os.environ["RAY_TMPDIR"]

    assert as_user(54321, chosen) == str(tmp_path / "finetune-search-54321")
    connect.avoid_folders_of_other_users()
    assert "RAY_TMPDIR" not in os.environ


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_in_a_home_that_is_read_only_ray_has_its_token_from_the_environment(tmp_path):
    open_to_all(tmp_path)

    def token() -> str:
        provide_token()
        return os.environ["RAY_AUTH_TOKEN"]

    tokens = [as_user(54321, token) for _ in range(2)]
    assert [len(found) for found in tokens] == [64, 64] and tokens[0] != tokens[1]
    provide_token()
    assert "RAY_AUTH_TOKEN" not in os.environ  # where the home can be written, Ray keeps it there
