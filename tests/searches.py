"""Searches in processes of their own, with a tiny network on tiny images, and the tables that they leave."""

import csv
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

from processes import descendants, named

ROOT = Path(__file__).parents[1]
PINNED = "pretrained=false presize=40 image_size=32 batch_size=4 freeze_epochs=1 bn_momentum=0.3 div=1 weight_decay=10"
ALSO_PINNED = "lr_ratio=10 lr_max_frozen=0.002 mixup_alpha=0 smoothing=0.1 train_bn=unfrozen head=linear"
SEARCHED = "arch=test_resnet.r160_in1k,test_vit.r160_in1k epochs=1..3"
# With so much weight decay a rate of 10 multiplies the weights by -99 in every step: it diverges, whatever the network.
SMALL = f"{PINNED} {ALSO_PINNED} {SEARCHED} lr_max=0.001,10".split()
SEED = 1
TIMES = ("trial_id", "seconds", "overhead_seconds", "images_per_second")
EPOCH_TIMES = ("trial_id", "train_seconds", "valid_seconds", "images_per_second", "finished_at")


class Search:
    """`python -m search.run` in a process of its own, its output read as it comes."""

    def __init__(self, folder: Path, *arguments: object) -> None:
        self.folder = folder
        self.on_head = "--address" in arguments
        # The same as `python -m search.run`, and tells at its end whether torch came in.
        code = "import sys; from search import run; code = run.main(); print('torch' in sys.modules); sys.exit(code)"
        common = ["--results", folder.parent, "--name", folder.name]
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, [*arguments, *common])],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[str] = []
        self.ray_processes: set[int] = set()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def wait_for(self, pattern: str, seconds: float = 240) -> None:
        """Until a line of the output matches."""
        deadline = time.monotonic() + seconds
        while not any(re.search(pattern, line) for line in self.lines):
            assert self.process.poll() is None, f"ended before {pattern!r}:\n{self.text}"
            assert time.monotonic() < deadline, f"no {pattern!r} in {seconds} s:\n{self.text}"
            time.sleep(0.02)
        self.ray_processes |= descendants(self.process.pid)

    def wait(self, seconds: float = 300) -> int:
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"not ended after {seconds} s:\n{self.text}") from None
        self.reader.join(5)
        return code

    def processes(self, title: str) -> list[int]:
        """Of this search, by what Ray calls them (a pattern); of all searches on a Ray that the tests started."""
        return named(title, os.getpid() if self.on_head else self.process.pid)


def small_search(folder: Path, data: Path, *arguments: object) -> Search:
    """One trial at a time, without a report unless `arguments` ask for one: it has tests of its own."""
    one_at_a_time = ("--max-concurrent", 1, "--cpus-per-worker", 1, "--seed", SEED)
    if "--report" not in arguments:
        arguments = (*arguments, "--report", "off")
    return Search(folder, "--space", "quickstart", "--data", data, *one_at_a_time, *settings(*SMALL), *arguments)


def settings(*texts: str) -> list[str]:
    """As `--set` arguments; several in one text are parted by spaces."""
    return [word for text in texts for setting in text.split() for word in ("--set", setting)]


def tables(folder: Path) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The rows of trials.csv and of epochs.csv."""

    def read(name: str) -> list[dict[str, str]]:
        with (folder / name).open(newline="") as file:
            return list(csv.DictReader(file))

    return read("trials.csv"), read("epochs.csv")


def completed(folder: Path) -> list[dict[str, str]]:
    return [row for row in tables(folder)[0] if row["status"] == "completed"]


def without(rows: list[dict[str, str]], names: tuple[str, ...]) -> list[dict[str, str]]:
    return [{name: value for name, value in row.items() if name not in names} for row in rows]
