"""Several machines on this one: each has an address, processes, home and temporary folders of its own.

Linux namespaces (network, mount, process and host name) stand for the machines, a bridge for the network between them.
Needs root and Debian's iproute2 and util-linux.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BRIDGE = "ftsearch"
NETWORK = "10.231.7"
OUTSIDE = f"{NETWORK}.254"
"""This machine's own address in that network."""


def require() -> None:
    """Raises `SystemExit` with what is missing on this machine."""
    if os.geteuid():
        sys.exit("error: run it as root: it makes namespaces and a bridge")
    if missing := [name for name in ("ip", "unshare", "nsenter", "mount") if shutil.which(name) is None]:
        sys.exit(f"error: {', '.join(missing)} missing: apt-get install iproute2 util-linux mount")


class Host:
    """One machine, up from its making on. `folder` is where all of them have their home, with other content in each."""

    def __init__(self, name: str, number: int, folder: Path) -> None:
        self.name = name
        self.address = f"{NETWORK}.{number}"
        self.home = folder / "home"
        self.link = f"{BRIDGE}-{name}"
        own = folder / "hosts" / name
        for path in (own / "home", own / "tmp", self.home):
            path.mkdir(parents=True, exist_ok=True)
        # As Debian has it, and the trap for whoever asks a host name for the address that others can reach.
        (own / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n")
        ip("netns", "add", self.link)
        ip("link", "add", self.link, "type", "veth", "peer", "name", "eth0", "netns", self.link)
        ip("link", "set", self.link, "master", BRIDGE, "up")
        for command in (f"addr add {self.address}/24 dev eth0", "link set lo up", "link set eth0 up"):
            ip("-n", self.link, *command.split())
        mounts = f"""
            mount --bind {own}/home {self.home} && mount --bind {own}/tmp /tmp && mount --bind {own}/hosts /etc/hosts &&
            mount -t tmpfs -o size=1g tmpfs /dev/shm && hostname {name} && echo up && exec sleep infinity"""
        self.init = subprocess.Popen(
            ["ip", "netns", "exec", self.link, "unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child",
             "--mount-proc", "bash", "-c", mounts],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        if self.init.stdout.readline() != "up\n":
            sys.exit(f"error: {name} did not come up")
        (self.pid,) = Path(f"/proc/{self.init.pid}/task/{self.init.pid}/children").read_text().split()

    def start(self, *command: str, env: Mapping[str, str] | None = None, **options) -> subprocess.Popen:
        """A command on this machine."""
        inside = ["nsenter", "--target", self.pid, "--mount", "--uts", "--net", "--pid", f"--wd={ROOT}", "--"]
        return subprocess.Popen([*inside, *command], env=self.environment | (env or {}), **options)

    def run(self, *command: str, check: bool = True) -> str:
        """Its output. Raises `SystemExit` where it fails."""
        process = self.start(*command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        output, _ = process.communicate()
        if check and process.returncode:
            sys.exit(f"error: on {self.name}: {' '.join(command)}\n{output[-3000:]}")
        return output

    @property
    def environment(self) -> dict[str, str]:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "XDG_", "FINETUNE"))}
        own = {"HOME": str(self.home), "PATH": path, "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}
        threads = {"OMP_NUM_THREADS": "1", "no_proxy": f"{OUTSIDE},{os.environ.get('no_proxy', '')}"}
        return kept | own | threads | {"RAY_object_store_memory": "200000000"}

    def count(self, title: str) -> int:
        """How many of its processes have this in their command line."""
        return sum(title in line for line in self.run("ps", "-eo", "args").splitlines())

    def vanish(self) -> None:
        """As by a power cut: its network is silent, then its processes are gone."""
        ip("link", "set", self.link, "down")
        os.kill(int(self.pid), signal.SIGKILL)
        self.init.wait()

    def remove(self) -> None:
        self.init.kill()
        self.init.wait()
        for command in (["link", "del", self.link], ["netns", "del", self.link]):
            subprocess.run(["ip", *command], capture_output=True)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


@contextlib.contextmanager
def network(folder: Path) -> Iterator["Hosts"]:
    """A place for hosts; all of them are gone at the end."""
    subprocess.run(["ip", "link", "del", BRIDGE], capture_output=True)
    ip("link", "add", BRIDGE, "type", "bridge")
    ip("addr", "add", f"{OUTSIDE}/24", "dev", BRIDGE)
    ip("link", "set", BRIDGE, "up")
    hosts = Hosts(folder)
    try:
        yield hosts
    finally:
        for host in hosts.all:
            host.remove()
        ip("link", "del", BRIDGE)


class Hosts:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.all: list[Host] = []

    def add(self, name: str) -> Host:
        subprocess.run(["ip", "netns", "del", f"{BRIDGE}-{name}"], capture_output=True)  # of a run that was killed
        host = Host(name, len(self.all) + 1, self.folder)
        self.all.append(host)
        return host

    def copy(self, file: str, source: Host, target: Host) -> None:
        """A file in the home of one, to the same place on the other."""
        homes = [self.folder / "hosts" / host.name / "home" for host in (source, target)]
        (homes[1] / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(homes[0] / file, homes[1] / file)


def ray_start(host: Host, *options: str, cpus: int = 1) -> None:
    common = ["--node-ip-address", host.address, "--num-cpus", str(cpus), "--object-store-memory", "200000000"]
    host.run("ray", "start", *common, *options)


def wait_until(condition, seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            sys.exit(f"error: {what}: not within {seconds:.0f} s")
        time.sleep(0.5)


def arguments_of(settings: Sequence[str]) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]
