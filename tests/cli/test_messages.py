"""How commands begin and end on machines that are not what they expect: outputs, terminals, systems."""

import importlib
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SEARCH = ("run", "check", "lr_find", "export", "predict", "report", "compare", "dashboard")
COMMANDS = [f"search.{name}" for name in SEARCH]
COMMANDS += ["trainables.finetune", "trainables.interpret"]


def python(code: str, stdout=subprocess.PIPE, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code]
    settings = {"cwd": ROOT, "env": os.environ | environment, "stdout": stdout, "stderr": subprocess.PIPE}
    return subprocess.run(command, **settings, timeout=60)


def test_every_command_says_on_windows_where_it_runs(capfd):
    """In a child process that takes itself for one on Windows, and has none of the modules that only Unix has."""
    if (child := os.fork()) == 0:
        try:
            pretend_windows_and_run(COMMANDS)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    out, err = capfd.readouterr()
    assert out.splitlines() == [f"{command} 2" for command in COMMANDS], err
    said = err.splitlines()
    assert len(said) == len(COMMANDS) and len(set(said)) == 1
    assert said[0].startswith("error: ") and "Linux and macOS" in said[0] and "WSL" in said[0]


def pretend_windows_and_run(commands: list[str]) -> None:
    for command in commands:
        importlib.import_module(command)  # the packages that it needs are as this system has them
    for name in list(sys.modules):
        if name.split(".")[0] in ("search", "trainables"):
            del sys.modules[name]
    sys.modules |= dict.fromkeys(("fcntl", "resource", "pwd", "grp", "termios"))
    sys.platform = "win32"
    for command in commands:
        sys.argv = [command, "--help"]
        try:
            runpy.run_module(command, run_name="__main__")
        except SystemExit as end:
            print(command, end.code, flush=True)


SAYS = """
from rich.console import Console
from rich.progress import track
from rich.table import Table
from search.cli.messages import say
from trainables.system.command_line import run_cli

def main():
    say("data: Öland ± 1")
    table = Table("Ö")
    table.add_row("…" * 300)
    Console().print(table)
    list(track([1], "Ö…"))
    raise ValueError("no – such folder")

run_cli(main)
"""


def test_a_terminal_that_knows_only_ascii_shows_escapes_and_costs_nothing():
    ended = python(SAYS, PYTHONIOENCODING="ascii")
    assert ended.returncode == 2, ended.stderr.decode()
    assert ended.stdout.decode("ascii").splitlines()[0] == r"data: \xd6land \xb1 1"
    assert ended.stderr.decode("ascii") == "error: no \\u2013 such folder\n"


@pytest.mark.parametrize("output", ["print('x' * 100_000)", "print('x')"])
def test_output_that_goes_to_a_full_disk_is_one_paragraph(output):
    """In the middle of it, or when the last of it is written."""
    code = f"from trainables.system.command_line import run_cli\nrun_cli(lambda: {output} or 0)"
    with Path("/dev/full").open("w") as full:
        ended = python(code, stdout=full)
    assert (ended.returncode, ended.stderr.decode().count("\n")) == (2, 1), ended.stderr.decode()
    assert ended.stderr.decode().startswith("error: ") and "is full (No space left on device)" in ended.stderr.decode()
