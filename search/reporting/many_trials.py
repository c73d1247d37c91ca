"""What a search shows of more trials at once than a person can follow: how many, how fast, and what comes next."""

import math
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from search.runs.csv_file import Row
from search.runs.result_rows import FAILED, RUNNING, STOPPED
from trainables.system.text import many

MANY = 48
"""More running trials than this are not shown one by one."""
LINE_SECONDS = 10.0
"""Between two lines about them in a log."""
WINDOW_SECONDS = 60.0
"""In which epochs and ends are counted."""


class ManyTrials:
    """Counts what happens to them, for the last minute."""

    def __init__(self, rungs: Sequence[int] = ()) -> None:
        self.rungs = rungs  # in percent, at which early stopping compares trials
        self.since = time.monotonic()
        self.epochs: deque[float] = deque()  # when they ended
        self.ends: deque[tuple[float, str]] = deque()  # of trials, with their status
        self.said_at = -math.inf

    def note_epoch(self) -> None:
        self.epochs.append(time.monotonic())

    def note_end(self, status: str) -> None:
        self.ends.append((time.monotonic(), status))

    @property
    def is_due(self) -> bool:
        """Whether a log wants its next line about them."""
        return time.monotonic() - self.said_at >= LINE_SECONDS

    def lines(self, running: Sequence[Row], settings: Mapping[str, Any]) -> list[tuple[str, str]]:
        """Slots, speed and next decisions, each with its text; `settings` are those that all trials share."""
        return [
            ("slots", self._slots(running)),
            ("speed", self._speed(running)),
            ("next", self._next(running, settings["freeze_epochs"])),
        ]

    def log_line(self, running: Sequence[Row], settings: Mapping[str, Any]) -> str:
        self.said_at = time.monotonic()
        return "; ".join(text for _, text in self.lines(running, settings))

    def _slots(self, running: Sequence[Row]) -> str:
        waiting = sum(math.isnan(row["error_rate"]) for row in running)
        before = f", {waiting} of them before their first result" if waiting else ""
        return f"{many(len(running), 'trial')} running{before}"

    def _speed(self, running: Sequence[Row]) -> str:
        now = time.monotonic()
        while self.epochs and self.epochs[0] < now - WINDOW_SECONDS:
            self.epochs.popleft()
        while self.ends and self.ends[0][0] < now - WINDOW_SECONDS:
            self.ends.popleft()
        per_minute = 60 / max(1.0, min(WINDOW_SECONDS, now - self.since))
        images = _known(row.get("images_per_second", math.nan) for row in running)
        ended = Counter(status for _, status in self.ends)
        kinds = [f"{ended[status]} {status}" for status in (STOPPED, FAILED) if ended[status]]
        details = f" ({', '.join(kinds)})" if kinds else ""
        speed = f"{len(self.epochs) * per_minute:.0f} epochs a minute, {images:.0f} images/s"
        return f"{speed}, {many(len(self.ends), 'trial')} ended in the last minute{details}"

    def _next(self, running: Iterable[Row], freeze_epochs: int) -> str:
        decisions: Counter[str] = Counter()
        for row in running:
            frozen = int(row.get("freeze_epochs", freeze_epochs))
            done, total = row["epochs_done"] - frozen, row["epochs_total"] - frozen
            if done + 1 >= total:
                decisions["end"] += 1
            elif (rung := self._rung(done + 1, total)) != self._rung(done, total) and rung:
                decisions[f"reach rung {rung} %"] += 1
        found = ", ".join(f"{decisions[what]} {what}" for what in sorted(decisions, reverse=True))
        return f"with their next epoch, {found}" if found else "no trial is near a rung or its end"

    def _rung(self, done: int, total: int) -> int | None:
        return max((rung for rung in self.rungs if rung <= 100 * max(0, done) // total), default=None)


def running_rows(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row["status"] == RUNNING]


def _known(values: Iterable[float]) -> float:
    return sum(value for value in values if not math.isnan(value))
