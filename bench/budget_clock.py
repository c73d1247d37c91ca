"""The clock of one command of bench/budget.py: seconds from its first one, without those that label test images."""

import json
import os
import threading
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LOOK_SECONDS = 0.2


class Clock:
    """Counts from `started`, which is `time.monotonic()` of the process that gave the command, and ends this process
    after `limit` seconds, whatever it does then."""

    def __init__(self, started: float, limit: float, file: Path) -> None:
        self.started, self.limit, self.file = started, limit, file
        self.stopped_at: float | None = None
        threading.Thread(target=self._end, daemon=True).start()

    @property
    def seconds(self) -> float:
        return (self.stopped_at or time.monotonic()) - self.started

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """What happens within takes no time."""
        self.stopped_at = time.monotonic()
        yield
        self.started += time.monotonic() - self.stopped_at
        self.stopped_at = None

    def record(self, **model: Any) -> None:
        """Adds a model to the file: it is ready now. Called while the clock is stopped."""
        with self.file.open("a") as file:
            file.write(json.dumps({"seconds": self.seconds} | model) + "\n")

    def _end(self) -> None:
        while self.stopped_at is not None or self.seconds < self.limit:
            time.sleep(LOOK_SECONDS)
        os._exit(0)


def parser_of(description: str) -> ArgumentParser:
    """The arguments of a command that is measured, as `budget_methods.peer` gives them."""
    parser = ArgumentParser(description=description)
    parser.add_argument("--train", type=Path, required=True, help="class folders")
    parser.add_argument("--test", type=Path, required=True, help="class folders of images that choose nothing")
    parser.add_argument("--weights", type=Path, help="folder with <arch>.safetensors")
    parser.add_argument("--archs", required=True, help="from cheap to dear: a,b,c")
    parser.add_argument("--sizes", required=True, help="px: 160,224")
    parser.add_argument("--presize", type=int, required=True, help="px; the shorter side before augmentation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--started", type=float, required=True, help="time.monotonic() of the command")
    parser.add_argument("--seconds", type=float, required=True, help="when to end")
    parser.add_argument("--models", type=Path, required=True, help="a line of JSON is added for each model")
    return parser


def clock_of(args: Namespace) -> Clock:
    return Clock(args.started, args.seconds, args.models)


def files_of(folder: Path) -> list[Path]:
    """All images of class folders, sorted."""
    return sorted(folder.glob("*/*"))
