"""A user id without a name or a home, as containers have them."""

import os
import stat
import tempfile

import pytest
from processes import as_user, open_to_all

from trainables.system.cache import cache_dir
from trainables.system.machine import ensure_home

NAMELESS = 54321
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")


@pytest.fixture
def nameless(tmp_path, monkeypatch):
    """A function that looks for a home as a user of no name, and says what then is in the environment."""
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME", "XDG_CACHE_HOME", "FINETUNE_SEARCH_CACHE"):
        monkeypatch.delenv(name, raising=False)
    open_to_all(tmp_path, 0o777)

    def look(home: str | None) -> list[str]:
        def in_child() -> str:
            tempfile.tempdir = str(tmp_path)
            os.environ.pop("HOME", None)
            if home is not None:
                os.environ["HOME"] = home
            ensure_home()
            return f"{os.environ.get('USER')} {os.environ.get('HOME')} {cache_dir()}"

        return as_user(NAMELESS, in_child).split()

    return look


@pytest.mark.parametrize("home", [None, "/", "/nowhere/home"])
def test_a_user_without_a_home_gets_a_private_one_among_the_temporary_files(nameless, tmp_path, home):
    made = tmp_path / f"finetune-search-{NAMELESS}"
    for _ in range(2):
        assert nameless(home) == [str(NAMELESS), str(made), f"{made}/.cache/finetune-search"]
    assert (stat.S_IMODE(made.stat().st_mode), made.stat().st_uid) == (0o700, NAMELESS)


def test_a_home_that_is_there_or_can_be_made_stays(nameless, tmp_path):
    (tmp_path / "read_only").mkdir(mode=0o555)
    for home in (tmp_path, tmp_path / "read_only", tmp_path / "to" / "be" / "made"):
        assert nameless(str(home))[1] == str(home)


def test_a_home_of_somebody_else_that_is_closed_is_none(nameless, tmp_path):
    (tmp_path / "closed" / "home").mkdir(parents=True, mode=0o700)
    (tmp_path / "closed").chmod(0o700)
    for home in ("closed", "closed/home"):
        assert nameless(str(tmp_path / home))[1] == str(tmp_path / f"finetune-search-{NAMELESS}")


@pytest.mark.parametrize("kind", ["folder", "link", "open"])
def test_a_folder_that_somebody_else_has_put_there_is_no_home(nameless, tmp_path, kind):
    place = tmp_path / f"finetune-search-{NAMELESS}"
    if kind == "link":
        place.symlink_to(tmp_path)
    else:
        place.mkdir()
        place.chmod(0o777)
        if kind == "open":
            os.chown(place, NAMELESS, NAMELESS)
    assert nameless("/nowhere")[1] == "/nowhere"
