"""Builds the `ray.tune.Tuner` of a run."""

import importlib
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import Any

import ray
from ray import tune
from ray.tune.execution import class_cache
from ray.tune.search import SearchGenerator
from ray.tune.stopper import CombinedStopper

from search.cluster.concurrency import Capacity, CapacityNews
from search.cluster.orphaned_placement_groups import PlacementGroupCleanup
from search.cluster.ray_dashboard import RayDashboard
from search.cluster.state_keepers import StateKeepers
from search.options.preparation import setting_values
from search.options.search_options import SearchOptions
from search.reporting.live_report import LiveReport
from search.reporting.live_table import Leaderboard
from search.runs.disk_space import DiskWatch, features_needed, largest_weights, needs
from search.runs.objective import Objective
from search.runs.paths import RunFolder
from search.runs.refit import Refit, winner_to_refit
from search.runs.remote_copy import Mirroring
from search.runs.results_table import ResultsTable, TooManyFailures
from search.runs.time_budget import TimeBudget, for_trials
from search.runs.tune_files import EventFiles, atomic_filesystem
from search.spaces.space import NamedRecipe, Space
from search.tuning.controller import use_short_controller
from search.tuning.early_stopping import new_scheduler, rungs_of
from search.tuning.forecast_stopping import Goal
from search.tuning.halving import new_searcher
from search.tuning.screen import Screen, new_screen
from search.tuning.searcher import OptunaSearcher
from search.tuning.warm_start import WarmStart
from trainables.data.held_out_images import ImageSource
from trainables.data.source import folder_of
from trainables.ray.node_states import is_head
from trainables.ray.retry_limits import ACTOR_RETRIES, MAX_CONSECUTIVE_FAILURES
from trainables.ray.trial import OBJECTIVE, FineTuneTrial, TrialOptions, table_id
from trainables.ray.worker_group import GroupSize, living_nodes


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """One search: its options, what was prepared for them, and its folder."""

    options: SearchOptions
    space: Space
    folder: RunFolder
    data: ImageSource  # source of the images, see `trainables.data.source`
    data_digest: str | None = None  # every node must have images with this digest
    labels: list[str]
    group_size: GroupSize
    num_workers: dict[str, int] = field(default_factory=dict)  # of architectures by pattern, see `GroupSize`
    shared_sizes: dict[int, GroupSize] = field(default_factory=dict)  # see `search.cluster.resources`
    warm_start: WarmStart | None = None
    began: float | None = None  # when the command did, by `time.monotonic`; its time budget counts from then

    @property
    def num_trials(self) -> int:
        return self.options.trials or self.space.num_trials

    @property
    def recipes(self) -> tuple[NamedRecipe, ...]:
        """The recipes that `--recipes` names; the search tries only these."""
        return self.space.recipes[self.options.recipes] if self.options.recipes else ()

    @property
    def screen(self) -> Screen | None:
        """The probes before the first fine-tuning; None where there are none."""
        options = self.options
        if options.screen == "off" or self.recipes:
            return None
        keep = None if options.screen == "auto" else int(options.screen)
        return new_screen(self.space, keep, folder_of(self.weights) if self.weights else None)

    @property
    def num_probes(self) -> int:
        screen = self.screen
        return screen.num_probes if screen else 0

    @property
    def refits(self) -> bool:
        """Whether the winner is trained again on all images."""
        return self.options.refit == "on" and not self.recipes

    @property
    def weights(self) -> str | None:
        """The source of the pretrained weights."""
        return str(self.options.weights) if self.options.weights else None


def disk_needs(run: RunOptions, at_once: int, num_images: int) -> str:
    """What the search says about its disk."""
    options, screen = run.options, run.screen
    concat_pool = True in setting_values(run.space, "concat_pool")
    # Those of the screen and its views; a range may have other image sizes, too.
    num_sets = len(screen.pairs) * (1 + screen.views) if screen else 0
    return needs(
        run.folder,
        largest_weights(run.space, run.weights),
        at_once=at_once,
        kept=options.keep + (options.test_split is not None) + run.refits,
        features=features_needed(num_images, num_sets, concat_pool=concat_pool),
        nodes=num_keeping_nodes(options),
    )


def num_keeping_nodes(options: SearchOptions) -> int:
    """How many nodes besides the head keep training states now; 0 where the head's disk has them."""
    if options.address is None or options.storage is not None or not ray.is_initialized():
        return 0
    return sum(not is_head(resources) for resources in living_nodes().values())


def new_tuner(run: RunOptions) -> tune.Tuner:
    options, strategy, folder = run.options, run.options.strategy, run.folder
    settings = run.space.full_settings
    table = table_of(run)
    import_tensorboardx()
    use_short_controller()
    budget, capacity = TimeBudget(folder, for_trials(options.time_budget), run.began), capacity_of(run)
    searcher = new_searcher(
        run.space,
        folder.journal,
        seed=run.space.seed,
        strategy=strategy,
        capacity=capacity,
        num_trials=run.num_trials,
        screen=run.screen,
        budget=budget,
        num_classes=len(run.labels),
        winner=partial(winner_to_refit, table) if run.refits else None,
        warm_start=run.warm_start,
    )
    num_shown = run.num_trials + strategy.num_retrainings + run.num_probes
    callbacks = [
        table,
        Refit(table),
        DiskWatch(folder),
        Leaderboard(table, num_trials=num_shown, time_budget=options.time_budget, rungs=rungs_of(strategy.scheduler)),
        CapacityNews(capacity, settings),
        PlacementGroupCleanup(),
        *([] if options.address is None else [StateKeepers(table)]),
        RayDashboard(folder),
        EventFiles(folder),
        *([] if options.report == "off" else [LiveReport(folder)]),
        Mirroring(folder),
    ]
    return tune.Tuner(
        trainable(run, settings),
        tune_config=tune.TuneConfig(
            search_alg=Resumable(searcher, budget),
            scheduler=new_scheduler(strategy.scheduler, OBJECTIVE, run.space, folder.rungs, goal_of(run)),
            num_samples=num_shown + run.refits,
            reuse_actors=True,
            trial_name_creator=table_id,
            trial_dirname_creator=table_id,
        ),
        run_config=tune.RunConfig(
            name=folder.tune.name,
            storage_path=str(folder.path),
            storage_filesystem=atomic_filesystem(),
            callbacks=callbacks,
            stop=CombinedStopper(TooManyFailures(table, MAX_CONSECUTIVE_FAILURES), budget),
            failure_config=tune.FailureConfig(max_failures=ACTOR_RETRIES),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            verbose=0,
        ),
    )


def goal_of(run: RunOptions) -> Goal:
    return Goal(OBJECTIVE, Objective(run.options.metric), len(run.labels), both=run.options.strategy.num_objectives > 1)


def table_of(run: RunOptions) -> ResultsTable:
    options, strategy = run.options, run.options.strategy
    return ResultsTable(
        run.folder,
        settings=run.space.full_settings,
        dimensions=list(run.space.dimensions),
        pinned=list(run.space.pinned),
        labels=run.labels,
        confirm=strategy.confirm,
        folds=strategy.folds,
        front=strategy.num_objectives > 1,
        keep=options.keep,
        keep_first=options.test_split is not None,
        keep_epoch=options.keep_epoch,
        metric=options.metric,
    )


class Resumable(SearchGenerator):
    """Tune's wrapper of a searcher, for searches that can be resumed.

    Tune saves a search that a time budget or failures have ended as finished, but `--resume` runs the remaining trials,
    which may be more than when it was saved. And no trial is proposed after the time budget: it would be ended at once,
    and a resumed search would not run it.
    """

    def __init__(self, searcher: OptunaSearcher, budget: TimeBudget) -> None:
        super().__init__(searcher)
        self.optuna_searcher, self.budget = searcher, budget

    def is_finished(self) -> bool:
        return super().is_finished() or self.budget.is_over()

    def set_finished(self) -> None:
        super().set_finished()  # type: ignore[no-untyped-call]  # Ray's
        self.optuna_searcher.end()

    def get_state(self) -> dict[str, Any]:
        return super().get_state() | {"finished": False}

    def set_state(self, state: dict[str, Any]) -> None:
        super().set_state(state | {"total_samples": state["counter"] + self.optuna_searcher.max_remaining()})


def restored_tuner(run: RunOptions) -> tune.Tuner:
    """The interrupted search in the run's folder: ended trials keep their results, the others resume."""
    tune_folder = str(run.folder.tune)
    restorable = tune.Tuner.can_restore(tune_folder, storage_filesystem=atomic_filesystem())
    tuner = new_tuner(run)  # replaces the saved settings: the folder may have moved
    if not restorable:
        return tuner  # it stopped before Tune saved anything
    return tune.Tuner.restore(
        tune_folder,
        storage_filesystem=atomic_filesystem(),
        trainable=trainable(run, run.space.full_settings),
        resume_unfinished=True,
        resume_errored=False,
    )


def capacity_of(run: RunOptions) -> Capacity:
    launched, max_trials = run.options.address is not None, run.options.max_concurrent
    return Capacity(
        run.folder.run_id,
        run.group_size,
        run.num_workers,
        max_trials,
        launched=launched,
        shared_sizes=run.shared_sizes,
        measures=run.options.max_trials_per_gpu is None,
    )


def trainable(run: RunOptions, settings: dict[str, Any]) -> Any:
    """The trainable with the options that all trials share, pinned to the head node, which has the run's folder."""
    shared = TrialOptions(
        settings=settings,
        data=run.data,
        data_digest=run.data_digest,
        weights=run.weights,
        checkpoints=str(run.folder.checkpoints),
        models=str(run.folder.models),
        keepers=None if run.options.address is None else run.folder.run_id,
        keeps_here=run.options.storage is not None,  # it copies what is on this disk
        cache=run.options.cache,
        max_unreadable=run.options.max_unreadable,
        group_size=run.group_size,
        num_workers=run.num_workers,
        shared_sizes=run.shared_sizes,
        split_seed=run.space.split_seed,
        stall_timeout=run.options.stall_timeout,
        keep_epoch=run.options.keep_epoch,
        metric=run.options.metric,
        folds=max(1, run.options.folds),
    )
    if run.options.address is None:
        share_environment()
    on_head = tune.PlacementGroupFactory([{"CPU": 0, "node:__internal_head__": 0.001}])
    return tune.with_resources(tune.with_parameters(FineTuneTrial, options=shared), on_head)


def share_environment() -> None:
    """Let trial actors inherit this process's environment, like all processes of a Ray that starts here.

    Tune would set a few variables for them, and with an environment of their own neither they nor the actors that they
    start could use the processes that Ray starts in advance.
    """
    class_cache.DEFAULT_ENV_VARS.clear()
    class_cache.ENV_VARS_TO_PROPAGATE.clear()


class _WithoutTorch(MetaPathFinder):
    """On `sys.meta_path`, it hides torch from one thread; all others can import it."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        if name == "torch" and threading.get_ident() == self.thread:
            raise ModuleNotFoundError("torch is hidden from this import")


def import_tensorboardx() -> None:
    """Import tensorboardX before Tune does, without torch.

    It tries to import torch, which takes 190 MB, only to recognise tensors; Tune logs only numbers.
    """
    finder = _WithoutTorch()
    sys.meta_path.insert(0, finder)
    try:
        importlib.import_module("tensorboardX")
    finally:
        sys.meta_path.remove(finder)
