"""One space and the options of a run -> `ray.tune.Tuner`."""

import importlib
import math
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import Any

from ray import tune
from ray.tune.search import SearchGenerator
from ray.tune.stopper import CombinedStopper

from search.cluster.abandoned_room import AbandonedRoom
from search.cluster.concurrency import Capacity, CapacityNews
from search.options.strategy import Strategy
from search.reporting.live_report import LiveReport
from search.reporting.live_table import Leaderboard
from search.runs.disk_space import DiskWatch
from search.runs.paths import RunFolder
from search.runs.remote_copy import Mirroring
from search.runs.results_table import ResultsTable, TooManyFailures
from search.runs.time_budget import TimeBudget
from search.runs.tune_files import whole_files
from search.spaces.space import NamedRecipe, Space
from search.tuning.early_stopping import new_scheduler
from search.tuning.halving import new_searcher
from search.tuning.searcher import METRIC, OptunaSearcher
from trainables.data.held_out_images import WithoutTestImages
from trainables.data.labelled_images import MAX_UNREADABLE
from trainables.ray.retry_limits import ACTOR_RETRIES, MAX_CONSECUTIVE_FAILURES
from trainables.ray.trial import FineTuneTrial, TrialOptions, table_id
from trainables.ray.worker_group import GroupSize


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """One search: what it searches, where it writes, and how long it runs."""

    space: Space
    folder: RunFolder
    data: str | WithoutTestImages  # source of the images, see `trainables.data.source`
    weights: str | None  # source of pretrained weights
    cache: str  # how presized images are stored, see `presize`
    max_unreadable: float = MAX_UNREADABLE  # the share of the images that may be unreadable
    labels: list[str]
    group_size: GroupSize
    num_workers: dict[str, int] = field(default_factory=dict)  # of architectures by pattern, see `GroupSize`
    num_trials: int
    time_budget: float | None  # seconds
    strategy: Strategy
    max_concurrent: int | None  # None: as many as fit, also when the cluster grows or shrinks
    address: str | None = None  # of an existing Ray cluster
    recipes: tuple[NamedRecipe, ...] = ()  # the trials are these and no others
    data_digest: str | None = None  # of the images that every node must have
    report: str = "full"  # or tables, or off
    keep: int = 1  # how many of the best trials keep their weights
    keep_first: bool = False  # the weights of trial 0, which are tested at the end
    stall_timeout: float = math.inf  # seconds without progress after which a trial's workers are killed


def new_tuner(options: RunOptions) -> tune.Tuner:
    settings = options.space.full_settings
    table = ResultsTable(
        options.folder,
        settings=settings,
        dimensions=list(options.space.dimensions),
        pinned=list(options.space.pinned),
        labels=options.labels,
        confirm=options.strategy.confirm,
        front=options.strategy.num_objectives > 1,
        keep=options.keep,
        keep_first=options.keep_first,
    )
    import_tensorboardx()
    budget = TimeBudget(options.folder, options.time_budget)
    capacity = capacity_of(options)
    live_report = [] if options.report == "off" else [LiveReport(options.folder)]
    num_samples = options.num_trials + options.strategy.num_retrainings
    leaderboard = Leaderboard(table, num_trials=num_samples, time_budget=options.time_budget)
    return tune.Tuner(
        trainable(options, settings),
        tune_config=tune.TuneConfig(
            search_alg=Resumable(
                new_searcher(
                    options.space,
                    options.folder.journal,
                    seed=options.space.seed,
                    strategy=options.strategy,
                    capacity=capacity,
                    num_trials=options.num_trials,
                ),
                budget,
            ),
            scheduler=new_scheduler(options.strategy.scheduler, METRIC, options.space, options.folder.rungs),
            num_samples=num_samples,
            reuse_actors=True,
            trial_name_creator=table_id,
            trial_dirname_creator=table_id,
        ),
        run_config=tune.RunConfig(
            name=options.folder.tune.name,
            storage_path=str(options.folder.path),
            storage_filesystem=whole_files(),
            callbacks=[
                table,
                DiskWatch(options.folder),
                leaderboard,
                CapacityNews(capacity, settings),
                AbandonedRoom(),
                tune.logger.TBXLoggerCallback(),
                *live_report,
                Mirroring(options.folder),
            ],
            stop=CombinedStopper(TooManyFailures(table, MAX_CONSECUTIVE_FAILURES), budget),
            failure_config=tune.FailureConfig(max_failures=ACTOR_RETRIES),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            verbose=0,
        ),
    )


class Resumable(SearchGenerator):
    """What Tune puts around a searcher, made so that a search can be resumed.

    A search that a time budget or failures have ended is not finished for good: `--resume` runs the remaining trials,
    which may be more than when Tune saved it. And no trial is proposed when the time is over: it would be ended at
    once, and missing later.
    """

    def __init__(self, searcher: OptunaSearcher, budget: TimeBudget) -> None:
        super().__init__(searcher)
        self.proposer, self.budget = searcher, budget

    def is_finished(self) -> bool:
        return super().is_finished() or self.budget.is_over()

    def set_finished(self) -> None:
        super().set_finished()  # type: ignore[no-untyped-call]  # Ray's
        self.proposer.end()

    def get_state(self) -> dict[str, Any]:
        return super().get_state() | {"finished": False}

    def set_state(self, state: dict[str, Any]) -> None:
        super().set_state(state | {"total_samples": state["counter"] + self.proposer.most_left()})


def restored_tuner(options: RunOptions) -> tune.Tuner:
    """The search in `options.folder` as it was interrupted: ended trials stay, the others resume."""
    restorable = tune.Tuner.can_restore(str(options.folder.tune), storage_filesystem=whole_files())
    tuner = new_tuner(options)  # its settings replace the saved ones: the folder may have moved
    if not restorable:
        return tuner  # it ended before Tune saved anything
    return tune.Tuner.restore(
        str(options.folder.tune),
        storage_filesystem=whole_files(),
        trainable=trainable(options, options.space.full_settings),
        resume_unfinished=True,
        resume_errored=False,
    )


def capacity_of(options: RunOptions) -> Capacity:
    return Capacity(
        options.folder.run_id,
        options.group_size,
        options.num_workers,
        options.max_concurrent,
        launched=options.address is not None,
    )


def trainable(options: RunOptions, settings: dict[str, Any]) -> Any:
    """The trial, with what all trials share. Its actor is pinned to the head node, where checkpoints become files."""
    shared = TrialOptions(
        settings=settings,
        data=options.data,
        data_digest=options.data_digest,
        weights=options.weights,
        checkpoints=str(options.folder.checkpoints),
        cache=options.cache,
        max_unreadable=options.max_unreadable,
        group_size=options.group_size,
        num_workers=options.num_workers,
        split_seed=options.space.split_seed,
        stall_timeout=options.stall_timeout,
    )
    on_head = tune.PlacementGroupFactory([{"CPU": 0, "node:__internal_head__": 0.001}])
    return tune.with_resources(tune.with_parameters(FineTuneTrial, options=shared), on_head)


class _WithoutTorch(MetaPathFinder):
    """On `sys.meta_path`, it refuses torch to one thread; all others import it as always."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        if name == "torch" and threading.get_ident() == self.thread:
            raise ModuleNotFoundError("torch is not imported here")


def import_tensorboardx() -> None:
    """Import tensorboardX before Tune does, without torch.

    It tries to import torch, which takes 190 MB, only to recognise tensors; Tune logs numbers here.
    """
    finder = _WithoutTorch()
    sys.meta_path.insert(0, finder)
    try:
        importlib.import_module("tensorboardX")
    finally:
        sys.meta_path.remove(finder)
