"""`ray up` for real, by the documented commands for machines of one's own, on a machine that is this one.

    python tests/cluster/ray_up.py

A new user stands for the other machine: an SSH server on 127.0.0.1 port 22 (the launcher knows no other port) lets the
launcher in, it installs this project there and starts Ray. Two short quickstart searches run, by `ray submit` and by
`ray job submit`, and their results are brought back.
Needs root, Debian's openssh-server, openssh-client, rsync and python3-venv, a free port 22, and 3 to 10 minutes.
The user and the server are gone at the end. Exit code 0 if everything held.
"""

import argparse
import contextlib
import csv
import os
import pwd
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
USER = "finetune-launcher"
SHORT = {"first": "--trials 3 --set epochs=1 --set image_size=96", "second": "--trials 1 --set epochs=1"}
"""The documented searches, by name, are cut short so."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    require()
    with tempfile.TemporaryDirectory() as temporary, other_user(), ssh_server(Path(temporary)) as key:
        here = checkout(Path(temporary) / "here", key)
        environment = os.environ | {
            "HOME": str(here.parent),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        environment["RAY_AUTH_MODE"] = "token"
        for command in documented_commands(ROOT / "docs" / "clusters.md"):
            step(shortened(command), here, environment)
        for name, trials in (("first", 3), ("second", 1)):
            check_results(here / "results" / name, trials)
    print("everything held")
    return 0


def require() -> None:
    """Raises `SystemExit` with what is missing on this machine."""
    if os.geteuid():
        sys.exit("error: run it as root: it makes a user and starts an SSH server")
    missing = [name for name in ("sshd", "ssh", "rsync", "useradd") if shutil.which(name, path=_path()) is None]
    if missing:
        sys.exit(f"error: {', '.join(missing)} missing: apt-get install openssh-server openssh-client rsync passwd")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", 22))
        except OSError:
            sys.exit("error: port 22 is taken: stop the SSH server of this machine first")


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


@contextlib.contextmanager
def other_user() -> Iterator[None]:
    """The user whose home is the other machine's."""
    _remove_user()
    # No password, but not locked either: the server would let nobody in.
    subprocess.run(["useradd", "--create-home", "--shell", "/bin/bash", "--password", "*", USER], check=True)
    try:
        yield
    finally:
        _remove_user()


def _remove_user() -> None:
    with contextlib.suppress(KeyError):
        pwd.getpwnam(USER)
        subprocess.run(["pkill", "-KILL", "-u", USER])
        time.sleep(2)
        subprocess.run(["userdel", "--remove", USER], capture_output=True)


@contextlib.contextmanager
def ssh_server(folder: Path) -> Iterator[Path]:
    """An SSH server for that user on 127.0.0.1: the private key that it lets in."""
    for name in ("host", "client"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(command, check=True)
    home = Path(pwd.getpwnam(USER).pw_dir)
    (home / ".ssh").mkdir(mode=0o700)
    shutil.copyfile(folder / "client.pub", home / ".ssh" / "authorized_keys")
    for path in (home / ".ssh", home / ".ssh" / "authorized_keys"):
        shutil.chown(path, USER, USER)
    # How this machine reaches its package index is the other one's business, too.
    settings = {
        name: value for name, value in os.environ.items() if re.match(r"PIP_|UV_|SSL_CERT|.*_proxy$", name, re.I)
    }
    passed_on = " ".join(f'"{name}={value}"' for name, value in settings.items())
    config = folder / "sshd_config"
    config.write_text(
        f"Port 22\nListenAddress 127.0.0.1\nHostKey {folder / 'host'}\nPidFile none\nPasswordAuthentication no\n"
        f"AllowUsers {USER}\nUsePAM no\n" + (f"SetEnv {passed_on}\n" if passed_on else "")
    )
    Path("/run/sshd").mkdir(exist_ok=True)
    server = subprocess.Popen([shutil.which("sshd", path=_path()), "-D", "-f", str(config)])
    try:
        yield folder / "client"
    finally:
        server.terminate()
        server.wait()


def checkout(folder: Path, key: Path) -> Path:
    """This project as a user has it, the lines marked CHANGE in cluster/local.yaml changed."""
    folder.mkdir()
    for name in ("constraints.txt", "LICENSE", "pyproject.toml", "README.md"):
        shutil.copyfile(ROOT / name, folder / name)
    for name in ("search", "trainables", "cluster"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    file = folder / "cluster" / "local.yaml"
    text = file.read_text().replace("HEAD-CHANGE-ME", "127.0.0.1").replace("USER-CHANGE-ME", USER)
    file.write_text(text.replace("~/.ssh/id_ed25519", str(key)))
    return folder


def documented_commands(page: Path) -> list[str]:
    """The commands for machines of one's own, as they stand there."""
    block = page.read_text().partition("<!-- own machines -->\n```sh\n")[2].partition("```")[0]
    return [line.partition("   # ")[0].strip() for line in block.splitlines()]


def shortened(command: str) -> str:
    for name, options in SHORT.items():
        command = command.replace(f"--name {name}", f"--name {name} {options}")
    return command


def step(command: str, folder: Path, environment: dict[str, str]) -> None:
    """Run one command; raises `SystemExit` with its output where it fails."""
    print(f"$ {command}", flush=True)
    started = time.monotonic()
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    print(f"  exit code {done.returncode}, {time.monotonic() - started:.0f} s", flush=True)
    if done.returncode:
        sys.exit(f"error: it failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")


def check_results(run: Path, num_trials: int) -> None:
    """Raises `SystemExit` unless the search is here, whole."""
    with (run / "trials.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    print(f"  {run.name}: trials {', '.join(row['status'] for row in rows)}")
    wanted = ("epochs.csv", "report.html", "best/model.safetensors", "study.journal")
    missing = [name for name in wanted if not (run / name).is_file()]
    if len(rows) != num_trials or missing or not any(row["status"] == "completed" for row in rows):
        sys.exit(f"error: {len(rows)} trials of {num_trials} came back; missing: {', '.join(missing) or 'no file'}")


if __name__ == "__main__":
    sys.exit(main())
