"""A search replayed in virtual time: its own searchers and schedulers, and trainings that were made before."""

import contextlib
import heapq
import itertools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
import pandas as pd
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState
from ray.tune.schedulers import TrialScheduler

from search.options.strategy import Strategy
from search.reporting.importance import MIN_TRIALS, study_importances
from search.spaces.space import Space
from search.tuning.curve_forecast import Prior
from search.tuning.early_stopping import Curve, ProgressHalvingScheduler, new_scheduler, rung_at
from search.tuning.forecast_stopping import ForecastScheduler
from search.tuning.halving import lengths, new_searcher
from search.tuning.searcher import OptunaSearcher
from trainables.ray.trial import OBJECTIVE

WEIGHTS = (0.0, 0.1, 0.3, 1.0, 3.0)
"""What a dimension may weigh in the distance of two configurations."""
VALID_IMAGES = 120
"""Of the quickstart."""
MEMORY = Path("/dev/shm")
"""Where there is one, journals are written to memory: nothing here has to outlast a crash."""
CURVES = ("stage", "progress", "error_rate", "valid_loss", "seconds")
Config = dict[str, Any]


@dataclass(frozen=True)
class Training:
    """One training's config, and its results, an entry an epoch."""

    config: Config
    stage: tuple[str, ...]
    progress: tuple[int, ...]
    error_rate: tuple[float, ...]
    valid_loss: tuple[float, ...]
    seconds: tuple[float, ...]

    def result(self, epoch: int) -> dict[str, Any]:
        """After `epoch`, which counts from 1: the part of a trial's result that searchers and schedulers read."""
        return {
            "stage": self.stage[epoch - 1],
            "progress": self.progress[epoch - 1],
            OBJECTIVE: self.error_rate[epoch - 1],
            "valid_loss": self.valid_loss[epoch - 1],
            "epoch": epoch,
            "epochs_total": len(self),
            "seconds": sum(self.seconds[:epoch]),
            "valid_images": VALID_IMAGES,
        }

    def __len__(self) -> int:
        return len(self.progress)


class CurveTable:
    """All trainings of a table. One that is not in it is answered by the nearest one that has as many epochs."""

    def __init__(self, rows: pd.DataFrame, space: Space) -> None:
        assert rows["failure"].isna().all(), "a training that diverged has no final error"
        self.others = [name for name in space.dimensions if name != "epochs"]
        self.space = space
        costs = rows.groupby(["arch", "image_size", "stage"])["seconds"].transform("median")
        trainings = rows.assign(seconds=costs).groupby([*space.dimensions, "seed"], sort=False)
        self.trainings: dict[int, list[list[Training]]] = {}  # by epochs; by configuration, then by seed
        self.points: dict[int, np.ndarray] = {}  # by epochs: the configurations' coordinates
        found: dict[tuple, list[Training]] = {}
        for (*config, _), curve in trainings:
            curve = curve.sort_values("epoch")
            entries = (tuple(curve[name].tolist()) for name in CURVES)
            training = Training(dict(zip(space.dimensions, config, strict=True)), *entries)
            found.setdefault(tuple(config), []).append(training)
        for same in found.values():
            epochs = same[0].config["epochs"]
            self.trainings.setdefault(epochs, []).append(same)
            self.points.setdefault(epochs, []).append(self._coordinates(same[0].config))
        self.points = {epochs: np.array(points) for epochs, points in self.points.items()}
        self.weights = np.ones(len(self.others))
        self._fit()

    def answers(self, config: Config) -> list[Training]:
        """The trainings of the nearest configuration, one for each seed."""
        away = self._distances(self._coordinates(config), config["epochs"])
        return self.trainings[config["epochs"]][int(away.argmin())]

    def error(self, config: Config) -> float:
        """What a configuration reaches, averaged over the trainings that answer for it."""
        return float(np.mean([training.error_rate[-1] for training in self.answers(config)]))

    def all(self) -> list[Training]:
        return [one for same in self.trainings.values() for seeds in same for one in seeds]

    def decisive(self) -> str:
        """The dimension that tells most of the final errors' variance; a numeric one by its thirds."""
        trainings = self.all()
        errors = pd.Series([training.error_rate[-1] for training in trainings])

        def told(name: str) -> float:
            values = pd.Series([training.config[name] for training in trainings])
            groups = pd.qcut(values, 3, duplicates="drop") if values.nunique() > 3 else values
            return float(errors.groupby(groups, observed=True).transform("mean").var())

        return max(self.space.dimensions, key=told)

    def repeats(self, *epochs: int) -> list[tuple[Training, Training]]:
        """Two trainings of each configuration that has so many epochs, with different seeds."""
        return [(seeds[0], seeds[1]) for length in epochs for seeds in self.trainings[length]]

    def pairs(self, shorter: int, longer: int) -> list[tuple[Training, Training]]:
        """Trainings of as many epochs, of the same configuration otherwise, and of the same seed."""
        short, long = (
            {tuple(point): same for point, same in zip(self.points[epochs], self.trainings[epochs], strict=True)}
            for epochs in (shorter, longer)
        )
        return [pair for point in short for pair in zip(short[point], long[point], strict=True)]

    def leave_one_out(self) -> tuple[np.ndarray, np.ndarray]:
        """Final errors of all configurations, of one seed, and of the nearest other one, of another seed."""
        own, nearest = [], []
        for epochs, same in self.trainings.items():
            errors = np.array([[training.error_rate[-1] for training in seeds] for seeds in same])
            for row, point in enumerate(self.points[epochs]):
                away = self._distances(point, epochs)
                away[row] = np.inf
                own.append(errors[row, 0])
                nearest.append(errors[away.argmin(), -1])
        return np.array(own), np.array(nearest)

    def _fit(self) -> None:
        """The weights with which the nearest other configuration says most: from 1, one dimension after another."""

        def loss(weights: np.ndarray) -> float:
            self.weights = weights
            own, nearest = self.leave_one_out()
            return float(np.square(own - nearest).mean())

        best = self.weights
        for _, dimension in itertools.product(range(2), range(len(self.others))):
            tried = [np.where(np.arange(len(best)) == dimension, weight, best) for weight in WEIGHTS]
            best = min(tried, key=loss)
        self.weights = best

    def _distances(self, point: np.ndarray, epochs: int) -> np.ndarray:
        return np.square((self.points[epochs] - point) * self.weights).sum(axis=1)

    def _coordinates(self, config: Mapping[str, Any]) -> np.ndarray:
        return np.array([self.space.dimensions[name].coordinate(config[name]) for name in self.others])


@dataclass
class Trial:
    """A proposal, the training that answers it, and how far it came."""

    config: Config
    training: Training
    epochs_done: int = 0
    stopped: bool = False

    @property
    def completed(self) -> bool:
        return self.epochs_done == len(self.training)

    @property
    def final_error(self) -> float:
        """What it reaches, or would have reached."""
        return self.training.error_rate[-1]


@dataclass
class Replay:
    """What a search did: its trials, at each end of one the epochs spent and the incumbent, and what it says when all
    epochs are spent, see `rung_and_final`; its study's completed trials, in order."""

    trials: list[Trial] = field(default_factory=list)
    epochs: int = 0
    incumbents: list[tuple[int, Trial]] = field(default_factory=list)
    rung_and_final: list[tuple[float, float]] = field(default_factory=list)
    completed: list[FrozenTrial] = field(default_factory=list)

    def run_epoch(self, trial: Trial) -> None:
        self.epochs += 1
        trial.epochs_done += 1
        if trial.completed:
            done = [one for one in self.trials if one.completed]
            best = min(done, key=lambda one: (one.final_error, one.training.valid_loss[-1]))
            self.incumbents.append((self.epochs, replace(best)))  # as it is now, see `_mark_left_short`

    def incumbent_at(self, epochs: int) -> Trial | None:
        return next((trial for spent, trial in reversed(self.incumbents) if spent <= epochs), None)

    def best_was_stopped(self) -> bool:
        """Whether the trial with the lowest final error, had all been trained to their ends, was stopped."""
        ended = [trial for trial in self.trials if trial.completed or trial.stopped]
        return min(ended, key=lambda trial: (trial.final_error, trial.stopped)).stopped


def replay(
    strategy: Strategy,
    table: CurveTable,
    *,
    seed: int,
    slots: int,
    budget: int,
    sampler: BaseSampler | None = None,
    forecasts: bool = True,
    prior: Prior | None = None,
) -> Replay:
    """A search by `strategy`, of `slots` trials at once, until `budget` epochs are spent; or one with another
    `sampler`, with rungs that forecast nothing, or with another `prior` of forecasts."""
    with _journal() as journal:
        searcher = new_searcher(table.space, journal, seed=seed, strategy=strategy)
        searcher.sampler = sampler or searcher.sampler
        scheduler = new_scheduler(strategy.scheduler, OBJECTIVE, table.space, journal.with_name("rungs.json"))
        if isinstance(scheduler, ProgressHalvingScheduler):
            scheduler.forecasts &= forecasts
        if isinstance(scheduler, ForecastScheduler):
            scheduler.prior = prior or scheduler.prior
        done = _run(searcher, scheduler, table, np.random.default_rng(seed), slots, budget)
        done.completed = searcher.study.get_trials(states=[TrialState.COMPLETE])
        if isinstance(scheduler, ProgressHalvingScheduler):
            done.rung_and_final = rung_and_final(scheduler, table)
    if strategy.scheduler == "halving":
        _mark_left_short(done, table)
        done.rung_and_final = short_and_long(table)
    return done


def replay_top_k(table: CurveTable, *, seed: int, budget: int) -> Replay:
    """Two thirds of the budget for the first epochs of random configs, the rest for those best after it."""
    rng, done = np.random.default_rng(seed), Replay()
    with _journal() as journal:
        searcher = OptunaSearcher(
            table.space, journal, seed=seed, strategy=Strategy(searcher="random", scheduler="none")
        )
        for number in range(2 * budget // 3):
            done.trials.append(_answered(searcher.suggest(str(number)), table, rng))
            done.run_epoch(done.trials[-1])
    for trial in sorted(done.trials, key=lambda trial: trial.training.error_rate[0]):
        while not trial.completed and done.epochs < budget:
            done.run_epoch(trial)
        trial.stopped = trial.epochs_done == 1
    return done


@contextlib.contextmanager
def _journal() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
        yield Path(folder, "journal.log")


def _answered(config: Config, table: CurveTable, rng: np.random.Generator) -> Trial:
    answers = table.answers(config)
    return Trial(config, answers[rng.integers(len(answers))])


def _run(
    searcher: OptunaSearcher,
    scheduler: TrialScheduler,
    table: CurveTable,
    rng: np.random.Generator,
    slots: int,
    budget: int,
) -> Replay:
    """Tune's loop: it tells its searcher and its scheduler of results in this order."""
    done, queue = Replay(), [(0.0, slot, -1) for slot in range(slots)]  # when a slot's epoch ends, and whose it is
    while True:
        now, slot, number = heapq.heappop(queue)
        if number >= 0 and _ends(number, done, searcher, scheduler):
            number = -1
        if done.epochs >= budget:
            return done
        if number < 0:
            number = len(done.trials)
            done.trials.append(_answered(searcher.suggest(str(number)), table, rng))
        trial = done.trials[number]
        heapq.heappush(queue, (now + trial.training.seconds[trial.epochs_done], slot, number))


def _ends(number: int, done: Replay, searcher: OptunaSearcher, scheduler: TrialScheduler) -> bool:
    """One epoch of a trial; whether it was the last."""
    trial, name = done.trials[number], str(number)
    done.run_epoch(trial)
    result = trial.training.result(trial.epochs_done)
    told = SimpleNamespace(trial_id=name, config=trial.training.config)
    if not trial.completed:
        trial.stopped = scheduler.on_trial_result(None, told, result) == TrialScheduler.STOP
    if trial.completed or trial.stopped:
        scheduler.on_trial_complete(None, told, result)
        searcher.on_trial_complete(name, result)
        return True
    searcher.on_trial_result(name, result)
    return False


def _mark_left_short(done: Replay, table: CurveTable) -> None:
    """With halving, to be stopped is to be trained for the shortest length only."""
    shortest, *_, longest = lengths(table.space.dimensions["epochs"])
    full = [trial.config for trial in done.trials if trial.config["epochs"] == longest]
    for trial in done.trials:
        if trial.config["epochs"] == shortest and (config := trial.config | {"epochs": longest}) not in full:
            seed = table.answers(trial.config).index(trial.training)
            trial.stopped, trial.training = True, table.answers(config)[seed]


# --- What a rung says of the end --------------------------------------------------------------------------------------


def rung_and_final(scheduler: ProgressHalvingScheduler, table: CurveTable) -> list[tuple[float, float]]:
    """What a scheduler that has seen a search expects at each rung, and what came of it: for all trainings of the table
    that reach it."""
    curves, finals = [], []
    for training in table.all():
        curve = Curve(table.space.coordinates(training.config))
        for progress, error in zip(training.progress[:-1], training.error_rate[:-1], strict=True):
            curve.add(progress, error, rung_at(progress, scheduler.rungs))
        curves.append(curve)
        finals.append(training.error_rate[-1])
    found = []
    for rung in scheduler.rungs:
        there = [rung in curve.results for curve in curves]
        if asked := list(itertools.compress(curves, there)):
            found += zip(scheduler.expected(asked, rung), itertools.compress(finals, there), strict=True)
    return found


def short_and_long(table: CurveTable) -> list[tuple[float, float]]:
    """Final errors of the shortest trainings, which are the first of the halving, and of the longest ones of the
    same configurations."""
    shortest, *_, longest = lengths(table.space.dimensions["epochs"])
    return [(short.error_rate[-1], long.error_rate[-1]) for short, long in table.pairs(shortest, longest)]


# --- What a search says of its settings -------------------------------------------------------------------------------


def most_important(trials: Sequence[FrozenTrial], best_share: float) -> str | None:
    """The dimension that a summary of a search would name first after these completed trials."""
    if len(trials) < MIN_TRIALS:
        return None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study()
    study.add_trials(trials)
    return next(iter(study_importances(study, best_share)))
