"""How many trials share a GPU: fewer where memory runs out, and with `--trials-per-gpu auto` more while that pays."""

from collections import defaultdict
from collections.abc import Collection, Hashable
from dataclasses import dataclass
from statistics import geometric_mean, median

MIN_GAIN = 1.1
"""More trials on a GPU must train this many times the images per second."""
MIN_EPOCHS = 3
"""Epochs that must have been measured, of kinds that are known from before."""
MAX_EPOCHS = 200
"""After that many without so many to compare, such as of architectures that are all different, it gives up."""
FULL = 0.9
"""The share of its company that an epoch must have had on its GPU to count: beside fewer trials it is faster."""


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """A trial's epoch on a GPU."""

    trial: str
    gpu: str
    kind: Hashable  # epochs of one kind cost the same: architecture, stage, image size
    began: float  # s
    ended: float
    images_per_second: float
    trials_per_gpu: int  # for which the trial has reserved its share

    def company(self, others: Collection["Epoch"]) -> float:
        """How many trials were busy on its GPU meanwhile, on average, itself included."""
        beside = (other for other in others if other.gpu == self.gpu and other.trial != self.trial)
        shared = sum(max(0.0, min(self.ended, o.ended) - max(self.began, o.began)) for o in beside)
        return min(float(self.trials_per_gpu), 1 + shared / (self.ended - self.began))


class GpuSharing:
    """Decides how many of the trials to come share a GPU, one of `levels`. Knows results only, and no clock.

    What memory is too small for is not tried again. If it `measures`, it begins with the fewest and goes on to the next
    level as long as the last step has paid; else it begins with the most.
    """

    def __init__(self, levels: Collection[int], *, measures: bool) -> None:
        self.levels = sorted(levels)
        self.measures = measures and len(self.levels) > 1
        self.trials_per_gpu = self.levels[0 if measures else -1]
        self._epochs: list[Epoch] = []

    def add(self, epoch: Epoch) -> str:
        """Learn from an epoch; what changes because of it, as a sentence, or nothing."""
        now = self.trials_per_gpu
        if not self.measures or epoch.trials_per_gpu != now or epoch.ended <= epoch.began:
            return ""
        self._epochs.append(epoch)
        place = self.levels.index(now)
        if place == 0:
            enough = sum(map(len, self._sums(now).values())) >= MIN_EPOCHS
            return self._try_next("one trial at a time is measured") if enough else ""
        before = self.levels[place - 1]
        gain = self._gain(before, now)
        if gain is None:
            if sum(epoch.trials_per_gpu == now for epoch in self._epochs) < MAX_EPOCHS:
                return ""
            self._settle(before)
            return f"no {MIN_EPOCHS} epochs at {now} at once can be compared with those before; {self._from_now_on()}"
        said = f"{now} trials at once train {gain:.2f} times the images per second of {before}"
        if gain > MIN_GAIN and now != self.levels[-1]:
            return self._try_next(said)
        self._settle(now if gain > MIN_GAIN else before)
        return f"{said}; {self._from_now_on()}"

    def ran_out_of_memory(self, trials_per_gpu: int) -> str:
        """Learn that a trial did which had reserved its share of so many; what changes, as a sentence, or nothing."""
        smaller = [level for level in self.levels if level < trials_per_gpu]
        if not smaller or smaller[-1] >= self.trials_per_gpu:
            return ""
        self._settle(smaller[-1])
        return f"1/{trials_per_gpu} of its memory was not enough for a trial; {self._from_now_on()}"

    def _try_next(self, said: str) -> str:
        self.trials_per_gpu = self.levels[self.levels.index(self.trials_per_gpu) + 1]
        return f"{said}, trying {self.trials_per_gpu} at once"

    def _settle(self, trials_per_gpu: int) -> None:
        self.trials_per_gpu, self.measures = trials_per_gpu, False
        self.levels = [level for level in self.levels if level <= trials_per_gpu]
        self._epochs = []

    def _from_now_on(self) -> str:
        count = self.trials_per_gpu
        return f"{count} share it from now on" if count > 1 else "each trial has one for itself from now on"

    def _gain(self, before: int, now: int) -> float | None:
        """How many times the images per second of `before` trials `now` train, as the mean over the kinds of epochs
        that are known of both; None while these are too few."""
        old, new = self._sums(before), self._sums(now)
        both = old.keys() & new.keys()
        if sum(len(new[kind]) for kind in both) < MIN_EPOCHS:
            return None
        return geometric_mean(median(new[kind]) / median(old[kind]) for kind in both)

    def _sums(self, trials_per_gpu: int) -> dict[Hashable, list[float]]:
        """By kind, the images per second of all trials on a GPU that had that many: those of an epoch times its
        company. Without each trial's first epoch, in which its worker warms up."""
        epochs = [epoch for epoch in self._epochs if epoch.trials_per_gpu == trials_per_gpu]
        found, begun = defaultdict(list), set[str]()
        for epoch in epochs:
            company = epoch.company(epochs)
            if epoch.trial in begun and company >= FULL * trials_per_gpu:
                found[epoch.kind].append(epoch.images_per_second * company)
            begun.add(epoch.trial)
        return found
