"""What a search would do, without training anything: the searcher proposes, and a clock goes on by what that costs.

The real searcher runs with its screen, its sampler and its time budget. Only the results of the trainings are made up:
their errors are drawn at random, so several plans show what depends on them.
"""

import heapq
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

from ray.tune.search import Searcher

from search.runs.kinds import PROBE, TRIAL
from search.tuning.halving import new_searcher
from search.tuning.pace import WISE_PASSES
from search.tuning.tuner import RunOptions
from trainables.ray.trial import FOLD, REFITS, RETRAINS, SCREENS, recipe_of, text_id
from trainables.recipe import Recipe

Features = Counter[tuple[str, int, bool, int]]
"""How many sets of features are cached, by architecture, image size, whether they are of augmented views, and number of
images."""


class Costs(Protocol):
    """Seconds that parts of a search take."""

    @property
    def start(self) -> float:
        """Until the first probe or trial begins."""

    @property
    def end(self) -> float:
        """After the last one."""

    @property
    def fitting(self) -> float:
        """Of a linear probe on the features of the training images."""

    def forward(self, arch: str, size: int) -> float: ...
    def training(self, arch: str, size: int) -> float: ...
    def building(self, arch: str) -> float: ...
    def judging(self, arch: str) -> float: ...


@dataclass(kw_only=True)
class Work:
    """What one or more trainings do."""

    epochs: int = 0
    forward: int = 0
    """Passes of an image through a network, forwards alone: for features, validation and test-time augmentation."""
    training: int = 0
    """Forwards and backwards."""
    seconds: float = 0.0

    def add(self, other: "Work") -> None:
        self.epochs += other.epochs
        self.forward += other.forward
        self.training += other.training
        self.seconds += other.seconds


@dataclass(kw_only=True)
class Plan:
    """One course of a search."""

    counts: Counter[str] = field(default_factory=Counter)
    """Of probes, trials, retrainings and refits."""
    work: dict[str, Work] = field(default_factory=dict)
    """Of all of each."""
    seconds: float = 0.0
    """From the command to its end."""

    @property
    def total(self) -> Work:
        total = Work()
        for work in self.work.values():
            total.add(work)
        return total


PROBES, TRIALS, RETRAININGS, REFITTED = "probes", "trials", "retrainings", "refit"


@dataclass
class Clock:
    """A `TimeBudget` whose time only passes in the plan."""

    limit: float | None
    spent: float = 0.0

    @property
    def seconds_left(self) -> float:
        return float("inf") if self.limit is None else max(0.0, self.limit - self.spent)

    def is_over(self) -> bool:
        return self.seconds_left <= 0


@dataclass(order=True)
class _Running:
    ends: float
    trial_id: str
    kind: str = field(compare=False)
    work: Work = field(compare=False)
    results: list[dict[str, Any]] = field(compare=False)


def plan_search(
    run: RunOptions, costs: Costs, images: tuple[int, int], *, at_once: int, limit: float | None, seed: int,
    features: Features | None = None,
) -> Plan:  # fmt: skip
    """The course of a search of so many `images` for training and validation with `at_once` trials at a time, which
    ends after `limit` seconds if there is one; `features` are cached from before. `seed` draws the errors."""
    with TemporaryDirectory(prefix="plan-") as folder:
        return _Simulation(run, costs, images, limit, seed, features or Counter(), Path(folder)).plan(at_once)


class _Simulation:
    def __init__(
        self, run: RunOptions, costs: Costs, images: tuple[int, int], limit: float | None, seed: int,
        features: Features, folder: Path,
    ) -> None:  # fmt: skip
        self.costs, self.images, self.draw = costs, images, random.Random(seed)
        self.settings = run.space.full_settings
        self.features, self.heads = Counter(features), set[tuple[Any, ...]]()
        self.clock = Clock(limit, spent=costs.start)
        self.best: dict[str, Any] | None = None
        self.folds = run.options.folds
        strategy = run.options.strategy
        if strategy.searcher == "gp":  # which imports torch, and would take long
            strategy = replace(strategy, searcher="tpe")
        self.searcher = new_searcher(
            run.space,
            folder / "study.journal",
            seed=run.space.seed,
            strategy=strategy,
            num_trials=run.num_trials,
            screen=run.screen,
            budget=self.clock,
            num_classes=len(run.labels),
            winner=(lambda: self.best) if run.refits else None,
            warm_start=run.warm_start,
        )

    def plan(self, at_once: int) -> Plan:
        plan, running, count = Plan(), list[_Running](), 0
        while True:
            while len(running) < at_once and not self.clock.is_over():
                config = self.searcher.suggest(str(count))
                if config is None or config == Searcher.FINISHED:
                    break
                assert isinstance(config, dict)
                heapq.heappush(running, self._begun(str(count), config))
                count += 1
            if not running:
                break
            first = heapq.heappop(running)
            plan.counts[first.kind] += 1
            if self.clock.limit is not None and first.ends > self.clock.limit:  # it ends it, and all others
                share = 1 - (first.ends - self.clock.limit) / first.work.seconds
                plan.work.setdefault(first.kind, Work()).add(_part(first.work, max(0.0, share)))
                self.clock.spent = self.clock.limit
                continue
            plan.work.setdefault(first.kind, Work()).add(first.work)
            self.clock.spent = max(first.ends, self.clock.spent)
            for result in first.results[:-1]:
                self.searcher.on_trial_result(first.trial_id, result)
            self._note(first)
            self.searcher.on_trial_complete(first.trial_id, first.results[-1])
        plan.seconds = self.clock.spent + self.costs.end
        return plan

    def _note(self, ended: _Running) -> None:
        """Who would win."""
        error = ended.results[-1]["objective"]
        if ended.kind in (PROBES, TRIALS) and (self.best is None or error < self.best["objective"]):
            kind = PROBE if ended.kind == PROBES else TRIAL
            row = {"kind": kind, "trial_id": text_id(ended.trial_id), "seconds": ended.work.seconds}
            self.best = row | {"objective": error}

    def _begun(self, trial_id: str, config: Mapping[str, Any]) -> _Running:
        names = {SCREENS: PROBES, RETRAINS: RETRAININGS, REFITS: REFITTED}
        kind = next((name for key, name in names.items() if key in config), TRIALS)
        work, results = self._training(Recipe.from_dict(recipe_of(self.settings, config)), config)
        return _Running(self.clock.spent + work.seconds, trial_id, kind, work, results)

    def _training(self, recipe: Recipe, config: Mapping[str, Any]) -> tuple[Work, list[dict[str, Any]]]:
        """What a training does, and its results: one with its probe, if it starts from one, and its last one."""
        train, valid = self.images
        parts = [train]
        if REFITS in config:
            train, parts = train + valid, [train, valid]
        elif config.get(FOLD):
            train, valid = train + valid - (train + valid) // self.folds, (train + valid) // self.folds
            parts = [train]
        work, results = Work(seconds=self.costs.building(recipe.arch)), []
        counts = {"train_images": train, "valid_images": valid, "failure": "", "epochs_total": recipe.total_epochs}
        error = self.draw.random() + (SCREENS in config)  # a search is for fine-tuning to win
        counts |= dict.fromkeys(("objective", "error_rate", "valid_loss"), error)
        if recipe.starts_with_probe:
            work.add(self._probe(recipe, parts, config.get(FOLD, 0)))
            features = self.costs.forward(recipe.arch, recipe.image_size) * sum(self.images)
            seconds = {"feature_seconds": features, "train_seconds": features + self.costs.fitting}
            results.append(counts | seconds | {"epoch": 0, "stage": "probe", "progress": 0, "valid_seconds": 0.0})
        for epoch in range(recipe.total_epochs):
            done = self._epoch(recipe, epoch, train, valid)
            work.add(done)
            stage = "frozen" if epoch < recipe.freeze_epochs else "unfrozen"
            result = counts | {"epoch": epoch + 1, "stage": stage, "valid_seconds": 0.0}
            judged = self.costs.forward(recipe.arch, recipe.image_size) * valid
            result |= {"train_seconds": max(0.0, done.seconds - judged), "progress": 0}
            if epoch in (recipe.total_epochs - 1, recipe.freeze_epochs):
                results.append(result)
        if recipe.total_epochs:
            passes = bool(recipe.tta_views) + recipe.tta_views + WISE_PASSES * recipe.wise_ft
            self._forward(work, recipe, valid * passes)
        results[-1] |= {"progress": 100} if recipe.total_epochs else {}
        return work, [result | {"seconds": work.seconds} for result in results]

    def _epoch(self, recipe: Recipe, epoch: int, train: int, valid: int) -> Work:
        size, batch = recipe.image_size_at(epoch), min(recipe.batch_size_at(epoch), train)
        trained = train // batch * batch  # whole batches only
        work = Work(epochs=1, seconds=self.costs.judging(recipe.arch))
        if epoch < recipe.freeze_epochs:
            self._forward(work, recipe, trained, size)
        else:
            work.training += trained
            work.seconds += trained * self.costs.training(recipe.arch, size)
        self._forward(work, recipe, valid)
        return work

    def _probe(self, recipe: Recipe, parts: list[int], fold: int) -> Work:
        """The features that are not cached yet, and the heads that are not fitted yet."""
        work, total, pair = Work(), sum(self.images), (recipe.arch, recipe.image_size)
        if not self.features[*pair, False, total]:
            self.features[*pair, False, total] += 1
            self._forward(work, recipe, total)
        linear: tuple[Any, ...] = (*pair, "linear", parts[0], fold)
        if linear not in self.heads:
            self.heads.add(linear)
            work.seconds += self.costs.fitting
        if recipe.head == "linear" and not recipe.probe_views and len(parts) == 1:
            return work
        head: tuple[Any, ...] = (*pair, recipe.head, recipe.probe_views, recipe.flip, sum(parts), fold)
        if head in self.heads:
            return work
        self.heads.add(head)
        for part in parts:
            views = (*pair, True, part + fold)  # another fold has other images for training
            missing = max(0, recipe.probe_views - self.features[views])
            self.features[views] += missing
            self._forward(work, recipe, missing * part)
        work.seconds += self.costs.fitting
        return work

    def _forward(self, work: Work, recipe: Recipe, count: int, size: int | None = None) -> None:
        work.forward += count
        work.seconds += count * self.costs.forward(recipe.arch, size or recipe.image_size)


def _part(work: Work, share: float) -> Work:
    return Work(
        epochs=int(share * work.epochs),
        forward=int(share * work.forward),
        training=int(share * work.training),
        seconds=share * work.seconds,
    )
