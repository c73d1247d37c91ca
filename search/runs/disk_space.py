"""The disk of a run: how much space the search needs, and waiting while it is full."""

import math
import shutil
import time
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.experiment import Trial

from search.cli.messages import say
from search.options.preparation import setting_values
from search.runs.paths import RunFolder
from search.spaces.space import Space
from trainables.ray.trial import table_id
from trainables.system.full_disk import RETRY_SECONDS
from trainables.system.text import megabytes

RESERVE = 32_000_000
"""Bytes that tables, journal, report and Tune's state may take between two checks."""
STATE = 3
"""Size of a training's state as a multiple of its weights: AdamW keeps two numbers for each."""
MOST_FEATURES = 2048
"""Of an image, as ResNet-50 makes them and hardly any network more; how many an architecture has only torch knows."""


def needed(weights: int, *, at_once: int, kept: int) -> int:
    """The most bytes that a search can take besides the cache: each trial's state twice, while a new one replaces the
    old one, and the kept models."""
    return weights * (2 * STATE * at_once + kept) + RESERVE


def needed_on_nodes(weights: int, *, at_once: int, nodes: int) -> int:
    """The most bytes that each of so many nodes needs for training states, where these have them: those of its trials
    and as many copies of others', each twice while a new one replaces the old one."""
    copies = min(2, nodes)
    return weights * STATE * 2 * math.ceil(at_once * copies / nodes)


def features_needed(num_images: int, num_sets: int, *, concat_pool: bool) -> int:
    """The most bytes that so many sets of features take in the cache, in float16; concat pooling doubles them."""
    return 2 * num_images * num_sets * MOST_FEATURES * (1 + concat_pool)


def needs(folder: RunFolder, weights: int | None, *, at_once: int, kept: int, features: int = 0, nodes: int = 0) -> str:
    """What a search says about its disk at its start; `weights` are the bytes of the largest network, if known, and
    `nodes` the number of nodes besides the head that keep training states, if they do.

    The bytes of its `features` are counted as if the cache were on the same disk, as it is by default on one machine.
    """
    free = free_bytes(folder.path)
    cached = f"; up to {megabytes(features)} in each machine's cache for features" if features else ""
    if weights is None:
        return f"disk: {megabytes(free)} free; the size of a trial is known after its first epoch{cached}"
    wanted = needed(weights, at_once=0 if nodes else at_once, kept=kept)
    if nodes:
        each = megabytes(needed_on_nodes(weights, at_once=at_once, nodes=nodes))
        cached = f", up to {each} in each node's cache for training states{cached}"
    short = "" if free > wanted + features else ": TOO LITTLE, the search will wait for space"
    what = f"{kept} models" if nodes else f"checkpoints and {kept} models"
    return f"disk: up to {megabytes(wanted)} for {what}{cached}, {megabytes(free)} free{short}"


def largest_weights(space: Space, weights: str | None) -> int | None:
    """Bytes of the largest network's pretrained weights; None where some are not on this machine's disk."""
    from trainables.data.source import folder_of
    from trainables.network.pretrained_weights import find_weights

    if setting_values(space, "pretrained") == [False]:
        return None
    folder = folder_of(weights) if weights else None
    sizes = []
    for arch in setting_values(space, "arch"):
        if (file := find_weights(arch, folder)) is None:
            return None
        sizes.append(file.path.stat().st_size)
    return max(sizes)


def free_bytes(folder: Path) -> int:
    """On the disk of a folder that may not exist yet."""
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free


class DiskWatch(tune.Callback):
    """Pauses the search while its disk has no space for the next checkpoints, before anything fails."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.largest_state = 0  # bytes

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        state = self.folder.checkpoints / table_id(trial)
        size = sum(file.stat().st_size for file in state.glob("epoch_*/*"))
        self.largest_state = max(self.largest_state, size)

    def on_step_begin(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        free = free_bytes(self.folder.path)
        if free >= RESERVE + self.largest_state * max(1, len(trials)):
            return  # there would be room for all of them
        running = sum(trial.status == trial.RUNNING for trial in trials)
        wanted = RESERVE + self.largest_state * max(1, running)
        if free >= wanted:
            return
        say(
            f"DISK FULL: {megabytes(free)} left for {self.folder}/, which needs {megabytes(wanted)}. The search waits, "
            "and nothing is lost. Free some space, and it continues by itself; or end it (Ctrl-C) and resume it later."
        )
        while free_bytes(self.folder.path) < wanted:
            time.sleep(RETRY_SECONDS)
        say("disk: there is space again, the search continues")
