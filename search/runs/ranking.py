"""The rows of a results table, kept in order while trials end: sorting ten thousand for each end would be slow."""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable
from typing import Any

from search.runs.csv_file import Row
from search.runs.kinds import PROBE
from search.runs.result_rows import CONFIRMED, CONFIRMED_OBJECTIVE, is_ranked, leaders, pareto_front, rank

Key = Callable[[Row], tuple[float, ...]]


def unconfirmed_rank(row: Row) -> tuple[float, ...]:
    """The rank that a trial has without its retrainings."""
    return rank(row | dict.fromkeys((CONFIRMED, CONFIRMED_OBJECTIVE), float("nan")))


class Order:
    """What `leaders` would return of the rows that it was told of."""

    def __init__(self, rows: Iterable[Row] = (), key: Key = rank) -> None:
        self.key = key
        self.rows = {row["trial_id"]: row for row in rows if is_ranked(row)}
        self.keys = {trial_id: key(row) for trial_id, row in self.rows.items()}
        self.order: list[tuple[Any, str]] = sorted((key, trial_id) for trial_id, key in self.keys.items())

    def update(self, row: Row) -> None:
        """To be called when a row has changed."""
        trial_id = row["trial_id"]
        if trial_id in self.keys:
            old = self.keys.pop(trial_id), trial_id
            place = bisect_left(self.order, old)
            if self.order[place : place + 1] == [old]:
                del self.order[place]
            else:  # NaN has no place
                self.order.remove(old)
            del self.rows[trial_id]
        if is_ranked(row):
            self.rows[trial_id] = row
            self.keys[trial_id] = self.key(row)
            insort(self.order, (self.keys[trial_id], trial_id))

    def best(self, number: int, *more: Row) -> list[Row]:
        """The first rows, with `more` in the place of theirs."""
        others = {row["trial_id"] for row in more}
        first = (trial_id for _, trial_id in self.order[: number + len(more)] if trial_id not in others)
        return sorted([*leaders(more), *(self.rows[trial_id] for trial_id in first)], key=self.key)[:number]


class Ranking:
    """The order of a search's trials: who is the best, who keeps its model, and who is on the Pareto front."""

    def __init__(self, rows: Iterable[Row] = (), *, keep: int = 1, confirm: int = 0, front: bool = False) -> None:
        rows = list(rows)
        self.keep, self.confirm = keep, confirm
        self.all = Order(rows)
        self.by_error = Order(rows if confirm else (), unconfirmed_rank)
        self.probes = Order((row for row in rows if confirm and row["kind"] == PROBE), unconfirmed_rank)
        self.front = {row["trial_id"]: row for row in pareto_front(rows)} if front else None

    def update(self, row: Row) -> list[Row]:
        """To be called when a row's rank may have changed. Returns the others that are on the front now, or no more."""
        self.all.update(row)
        if self.confirm:
            self.by_error.update(row)
            if row["kind"] == PROBE:
                self.probes.update(row)
        return self._mark_front(row)

    def best(self) -> Row | None:
        return next(iter(self.all.best(1)), None)

    def kept(self, *more: Row) -> list[int]:
        """The trials, with `more`, that keep their models: first the best, then those that are to be confirmed next,
        and the probe that may win when they are."""
        kept = self.all.best(self.keep, *more)
        if self.confirm:
            probes = [row for row in more if row["kind"] == PROBE]
            kept += [*self.by_error.best(self.confirm, *more), *self.probes.best(1, *probes)]
        return list(dict.fromkeys(row["number"] for row in kept))

    def _mark_front(self, row: Row) -> list[Row]:
        if self.front is None:
            return []
        # What is beaten stays beaten, unless what has beaten it is trained again.
        known = list(self.all.rows.values()) if row["trial_id"] in self.front else [*self.front.values(), row]
        self.front = {each["trial_id"]: each for each in pareto_front(known)}
        changed = [each for each in [*known, row] if (each["front"] == "yes") != (each["trial_id"] in self.front)]
        for each in changed:
            each["front"] = "yes" if each["trial_id"] in self.front else ""
        return changed
