"""One name for all commands: `finetune-search COMMAND`, which is `python -m search.COMMAND`."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from search import __main__ as script

ROOT = Path(__file__).parents[2]


def answer(*words: str, argv0: str | None = None) -> subprocess.CompletedProcess:
    """What `python -m search` says, or the script of another name."""
    start = ["-m", "search"] if argv0 is None else ["-c", f"import sys; sys.argv[0] = {argv0!r}\n{RUN}"]
    return subprocess.run([sys.executable, *start, *words], cwd=ROOT, capture_output=True, text=True)


RUN = "from search.__main__ import main; main()"


def test_the_package_installs_the_script():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"finetune-search": "search.__main__:main"}


def test_help_names_every_command_in_a_line_of_its_own(capsys):
    for words in ([], ["--help"]):
        with pytest.raises(SystemExit) as ended:
            script.main(words)
        assert ended.value.code == 0
        lines = capsys.readouterr().out.splitlines()
        for name in script.COMMANDS:
            assert sum(line.startswith(f"  {name} ") for line in lines) == 1
            assert (ROOT / "search" / f"{name.replace('-', '_')}.py").is_file()


@pytest.mark.parametrize(
    ("name", "hint"), [("rum", "Did you mean run"), ("lr_fnd", "lr-find"), ("xyz", "The commands are: run, check")]
)
def test_an_unknown_command_is_refused_with_what_is_like_it(name, hint, capsys):
    with pytest.raises(SystemExit) as ended:
        script.main([name])
    assert ended.value.code == 2 and hint in capsys.readouterr().err


def test_a_command_says_the_name_that_it_was_started_by():
    assert "usage: finetune-search run " in answer("run", "--help", argv0="/usr/bin/finetune-search").stdout
    refused = answer("lr-find")
    assert refused.returncode == 2 and "python -m search lr-find: error:" in refused.stderr


def test_nothing_heavy_is_loaded_before_the_command_is_known():
    code = "import sys, search.__main__; print(sorted({'numpy', 'torch', 'ray'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "[]\n"
