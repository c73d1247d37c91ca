"""Trials that train nothing, for the benchmarks of the search itself.

`search` runs this project's own search: its tuner, trial actors, warm workers, tables. Only what a worker trains is
another: `EmptyTraining` in the place of `FineTune`. All processes of Ray import this module, so it imports little.
"""

import contextlib
import math
import os
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from trainables.ray import worker
from trainables.ray.worker_group import GroupSize
from trainables.training.checkpoint import PREPROCESSING_FILE, TRAINING_FILE, WEIGHTS_FILE

CPUS_TOLD = 4
"""What Ray is told that this machine has: two workers and, in Ray's own pattern, the function that starts them."""
BEFORE_PROBES = (
    *("head_init=zeros", "freeze_epochs=1", "train_bn=unfrozen", "lr_max_frozen=0.002", "lr_max=0.001", "lr_ratio=100"),
    *("lr_max_frozen=0.0005..0.02", "lr_max=0.0001..0.01", "lr_ratio=3..1000"),
)
"""The quickstart's settings and dimensions when the published figures were measured."""
product_serve = worker.serve


class EmptyTraining:
    """Says what `FineTune` says after an epoch, at once. The error follows from the recipe, with noise of its own."""

    def __init__(self, recipe, images, *, load_pretrained: bool = True, **unused) -> None:
        from trainables.training.distributed import World

        self.recipe, self.world, self.epochs_done = recipe, World.current(), 0

    def run_epoch(self) -> dict[str, float | int | str]:
        import torch

        self.epochs_done += 1
        part = float(self.world.sum(torch.tensor(1 / self.world.size)))  # the workers meet, as in every epoch
        metrics = epoch_metrics(self.recipe, self.epochs_done)
        return metrics | {"valid_loss": metrics["valid_loss"] * part}

    def state(self) -> dict[str, bytes]:
        return {WEIGHTS_FILE: b"weights", PREPROCESSING_FILE: b"{}\n", TRAINING_FILE: b"optimizer"}

    def load_state(self, state: dict[str, bytes]) -> None:
        raise NotImplementedError("no worker is lost here")

    def close(self) -> None:
        pass


def epoch_metrics(recipe, epochs_done: int) -> dict[str, float | int | str]:
    """What `FineTune` says after an epoch."""
    done = max(0, epochs_done - recipe.freeze_epochs)
    error = error_rate(recipe, done / recipe.epochs)
    return {"epoch": epochs_done, "stage": "unfrozen" if done else "frozen", "progress": 100 * done // recipe.epochs,
            "train_loss": 3 * error, "valid_loss": 2.5 * error, "error_rate": error, "accuracy": 1 - error,
            "objective": error,
            "train_seconds": 0.001, "valid_seconds": 0.001, "images_per_second": 1.0}  # fmt: skip


def error_rate(recipe, progress: float) -> float:
    """A plausible one: best at a rate of 2e-3 with the larger networks and images, falling as the training goes on."""
    import numpy as np

    number = zlib.crc32(repr((sorted(recipe.to_dict().items()), progress)).encode())
    noise = np.random.default_rng(number).normal(0, 0.01)
    distances = np.log10([recipe.lr_max / 2e-3, recipe.lr_max_frozen / 4e-3])
    larger = 0.01 * int(recipe.arch[-1]) + 0.03 * (recipe.image_size / 96 - 1) + 0.01 * recipe.epochs
    error = 0.15 + 0.08 * float(np.square(distances).sum()) - larger + 0.3 * (1 - progress) + noise
    return float(np.clip(error, 0.01, 0.95))


def train_nothing() -> None:
    """Ray calls this in every process that it starts; torch comes in with the workers' `serve` only."""
    worker.serve = serve_nothing


def serve_nothing(config: dict) -> None:
    from trainables.training import fine_tune  # all that a training imports

    fine_tune.FineTune = EmptyTraining
    product_serve(config)


def start_ray(cache: Path, *, hook: Callable[[], None] | None = train_nothing) -> None:
    """A Ray of our own on this machine, with the environment of a search. Its processes call `hook` as they start."""
    environment = None
    if hook:
        before = os.environ.get("PYTHONPATH")
        paths = {"PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parent), before]))}
        environment = {"env_vars": paths, "worker_process_setup_hook": hook}
    _init_ray(cache, num_cpus=CPUS_TOLD, runtime_env=environment)


def start_bare_ray(cache: Path) -> None:
    """The same for a driver that is measured alone: with one process started ahead and no dashboard."""
    _init_ray(cache, num_cpus=1, include_dashboard=False)


def _init_ray(cache: Path, **options) -> None:
    from search.cluster.connect import prepare_environment

    os.environ["FINETUNE_SEARCH_CACHE"] = str(cache)
    prepare_environment(None)
    import ray

    ray.init(address="local", log_to_driver=False, logging_level="ERROR", **options)


def draw_images(folder: Path) -> Path:
    """What the workers presize before their first trial: two classes of four images."""
    from PIL import Image

    for name in ("dark", "light"):
        (folder / name).mkdir(parents=True)
        for n in range(4):
            Image.new("RGB", (64, 64), (50 * n, 50 * n, 255 * (name == "light"))).save(folder / name / f"{n}.jpg")
    return folder


def search_options(
    root: Path, settings: Sequence[str], *, trials: int, workers: int = 1, concurrent: int = 1, seed: int = 0
):
    """A search of the quickstart's dimensions as the command line would make it, in a folder of its own."""
    from search.options.search_options import SearchOptions
    from search.runs.paths import RunFolder
    from search.spaces.space import load_space
    from search.tuning.tuner import RunOptions

    space = load_space("quickstart")
    space = replace(space, seed=seed, settings=space.settings | {"seed": seed}).with_settings(BEFORE_PROBES)
    space = space.with_settings(settings)
    size = GroupSize(num_workers=workers, cpus_per_worker=1)
    options = SearchOptions(
        space=space.name, trials=trials, max_concurrent=concurrent, keep=1, screen="off", stall_timeout=math.inf,
        metric="error_rate", refit="off",
    )  # fmt: skip
    images = str(draw_images(root / "images"))
    folder = RunFolder(root / "run")
    return RunOptions(
        options=options, space=space, folder=folder, data=images, labels=["dark", "light"], group_size=size
    )


def pretend_room(workers: int) -> None:
    """The next searches of this process find a cluster with room for so many workers of one CPU."""
    from search.cluster import concurrency
    from search.cluster.resources import Node

    concurrency.present_nodes = lambda: [Node(cpus=workers, gpus=0)]


def end_search_when(is_over: Callable[[], bool]) -> None:
    """The next search of this process ends as soon as `is_over()`, whatever its options say."""
    from search.runs.results_table import TooManyFailures
    from search.tuning import tuner

    class Over(TooManyFailures):
        def stop_all(self) -> bool:
            return super().stop_all() or is_over()

    tuner.TooManyFailures = Over


def run_search(options, on_end: Callable, on_result: Callable = lambda result: None) -> list[dict]:
    """The whole search; its table's rows. `on_end(now)` is called after each trial, `on_result` after each epoch."""
    from search.reporting.live_table import Leaderboard
    from search.runs.result_rows import read_trials
    from search.tuning import tuner

    class Watched(Leaderboard):
        def on_trial_result(self, iteration: int, trials: list, trial, result: dict, **info) -> None:
            super().on_trial_result(iteration, trials, trial, result, **info)
            on_result(result)

        def on_trial_complete(self, iteration: int, trials: list, trial, **info) -> None:
            super().on_trial_complete(iteration, trials, trial, **info)
            on_end(time.perf_counter())

    tuner.Leaderboard = Watched
    options.folder.path.mkdir(parents=True)
    with open(os.devnull, "w") as lines, contextlib.redirect_stdout(lines):  # noqa: PTH123
        tuner.new_tuner(options).fit()
    rows = read_trials(options.folder.trials)
    failed = [row["reason"] for row in rows if row["status"] == "failed"]
    if failed:
        raise RuntimeError(f"{len(failed)} trials failed: {failed[0]}")
    return rows
