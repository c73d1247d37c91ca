"""What `bench/chaos.py` does to a search: each fault is a function of a `Victim`."""

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from processes import descendants, left_after, named
from searches import Search

FULL_SECONDS = 6
NODE_SECONDS = 3
LEAVE_SECONDS = 90
PATIENCE = 400
"""Seconds in which a search must show that it goes on after a fault."""


class Victim:
    """A search, with what is needed to hurt it and to begin it again."""

    def __init__(self, folder: Path, arguments: list[object], cluster=None) -> None:
        self.folder = folder
        self.arguments = arguments
        self.cluster = cluster
        self.search = Search(folder, *arguments)
        self.before: set[int] = set()  # processes below the drivers before this one

    @property
    def alive(self) -> bool:
        return self.search.process.poll() is None

    @property
    def epochs_seen(self) -> int:
        return sum("epoch " in line and "error" in line for line in self.search.lines)

    def below(self, title: str) -> list[int]:
        """The search's processes of a title, wherever Ray was started."""
        return named(title, os.getpid() if self.cluster else self.search.process.pid)

    def kill_one(self, title: str, rng: random.Random, signal_number: int = signal.SIGKILL) -> bool:
        """False where there is none just now."""
        found = self.below(title)
        if not found:
            return False
        with suppress(ProcessLookupError):
            os.kill(rng.choice(found), signal_number)
        return True

    def wait_for_driver(self) -> None:
        """Of one that was killed or asked to end. Ray's agents take a minute to find out that nobody hears them."""
        if not self.cluster:
            self.before |= descendants(self.search.process.pid)
        self.search.wait(PATIENCE)

    def begin_again(self, rng: random.Random) -> None:
        self.search = Search(self.folder, *(["--resume", *self._place()] if rng.random() < 0.5 else self.arguments))

    def _place(self) -> list[object]:
        return ["--address", self.cluster.address] if self.cluster else []

    def left_behind(self) -> list[str]:
        """Command lines of what runs on after the search's end."""
        return left_after(LEAVE_SECONDS, self.before)

    def wait_for_progress(self) -> None:
        """Until the search trains its next epoch, or has ended."""
        seen, deadline = self.epochs_seen, time.monotonic() + PATIENCE
        while self.alive and self.epochs_seen <= seen:
            if time.monotonic() > deadline:
                raise TimeoutError(f"no progress for {PATIENCE} s:\n{self.search.text}")
            time.sleep(0.05)


def worker_killed(victim: Victim, rng: random.Random) -> bool:
    return victim.kill_one("ray::RayTrainWorker", rng)


def worker_hung(victim: Victim, rng: random.Random) -> bool:
    return victim.kill_one("ray::RayTrainWorker", rng, signal.SIGSTOP)


def group_host_killed(victim: Victim, rng: random.Random) -> bool:
    return victim.kill_one("ray::GroupHost", rng)


def trial_actor_killed(victim: Victim, rng: random.Random) -> bool:
    return victim.kill_one("ray::(FineTuneTrial|ResourceTrainable)", rng)


def driver_killed(victim: Victim, rng: random.Random) -> bool:
    victim.search.process.kill()
    victim.wait_for_driver()
    victim.begin_again(rng)
    return True


def driver_interrupted(victim: Victim, rng: random.Random) -> bool:
    victim.search.process.send_signal(signal.SIGINT)
    victim.wait_for_driver()
    victim.begin_again(rng)
    return True


def head_killed(victim: Victim, rng: random.Random) -> bool:
    """The machine goes, and everything on it at once."""
    for pid in (victim.search.process.pid, *descendants(victim.search.process.pid)):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    victim.wait_for_driver()
    victim.begin_again(rng)
    return True


def disk_full(victim: Victim, rng: random.Random) -> bool:
    ballast = victim.folder.parent / "ballast"
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(1 << 16))
    time.sleep(FULL_SECONDS)
    ballast.unlink()
    return True


def files_corrupted(victim: Victim, rng: random.Random) -> bool:
    """A machine stops while files are written: half a line at the end of some, and a cache with other bytes."""
    victim.search.process.kill()
    victim.wait_for_driver()
    for name, half in (("study.journal", '{"op_code": 6, "tri'), ("epochs.csv", "7,t12345678,3,unfro")):
        if (victim.folder / name).is_file():
            with (victim.folder / name).open("a") as file:
                file.write(half)
    for index in Path(os.environ["FINETUNE_SEARCH_CACHE"]).glob("presized/*/index.json"):
        content = bytearray(index.read_bytes())
        content[rng.randrange(len(content))] ^= 0xFF
        index.write_bytes(content)
    victim.begin_again(rng)
    return True


def node_killed(victim: Victim, rng: random.Random) -> bool:
    """And another one comes a little later."""
    node = rng.choice(sorted(victim.cluster.worker_nodes, key=lambda node: node.node_id))
    victim.cluster.remove_node(node, allow_graceful=False)
    time.sleep(NODE_SECONDS)
    victim.cluster.add_node(num_cpus=1)
    return True


Fault = Callable[[Victim, random.Random], bool]
"""Does it; False where what it is about is not there just now."""

OF_ANY_SEARCH: list[Fault] = [
    worker_killed, worker_hung, group_host_killed, trial_actor_killed, driver_killed,
    driver_interrupted, disk_full, files_corrupted,
]  # fmt: skip
OF_THIS_MACHINE: list[Fault] = [*OF_ANY_SEARCH, head_killed]
OF_A_CLUSTER: list[Fault] = [*OF_ANY_SEARCH, node_killed]
