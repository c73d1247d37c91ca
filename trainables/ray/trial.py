"""One trial as Ray Tune sees it: a `tune.Trainable` whose step is one epoch.

The actor does not train and does not import torch. It drives a warm worker group, which outlives the trial: with
`reuse_actors=True` Tune gives the next trial to the same actor through `reset_config`. (The file is long so that all
that may happen to a trial's state stands in one place.)
"""

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import ray
from ray import tune
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from trainables.data.held_out_images import ImageSource
from trainables.data.labelled_images import MAX_UNREADABLE
from trainables.ray.messages import KeepOrder, Kept, Outcome, TrialSpec
from trainables.ray.node_states import LOST, NodeStates, is_head
from trainables.ray.retry_limits import MAX_HOSTS, MAX_LOST_NODES
from trainables.ray.worker_group import GroupEnded, GroupHost, GroupReleased, GroupSize, living_nodes, node_with_room
from trainables.recipe import Recipe
from trainables.training import checkpoint
from trainables.training.metrics import to_minimise

logger = logging.getLogger(__name__)

CLOSE_SECONDS = 10.0
"""How long a trial waits for its workers to leave."""
RETRAINS = "retrains"
"""In a config: the table's id of the trial whose recipe is trained again. Not a setting of the recipe."""
SCREENS = "screens"
"""In a config: the number of a probe of the screen, below 0. Not a setting of the recipe either."""
FOLD = "fold"
"""In a config: the number of the fold that validates, above 0. Not a setting of the recipe either."""
REFITS = "refits"
"""In a config: the table's id of the winner that is trained again on all images. Not a setting of the recipe either."""
REFIT_TEMPERATURE, REFIT_ALPHA = "refit_temperature", "refit_alpha"
"""In such a config: the winner's, which were chosen by images that it had not seen."""
AVERAGES = "averages"
"""In such a config: the numbers of the trials whose kept models it is averaged with, best first."""
DEADLINE = "deadline"
"""In the config of a probe: the `time.time` by which it must have ended, see `FineTune`."""
TRIALS_PER_GPU = "trials_per_gpu"
"""In a config: how many trials shared a GPU when it was proposed. Not a setting of the recipe either."""
OF_TRIAL = (RETRAINS, FOLD, SCREENS, REFITS, REFIT_TEMPERATURE, REFIT_ALPHA, AVERAGES, DEADLINE, TRIALS_PER_GPU)


@dataclass(frozen=True, kw_only=True)
class TrialOptions:
    """What all trials of a search share."""

    settings: dict[str, Any]  # the fixed settings of the recipe
    data: ImageSource  # source of the images, see `source`
    data_digest: str | None = None  # of the images that every node must have
    weights: str | None  # source of pretrained weights
    checkpoints: str  # folder of all trials' checkpoints, on the head
    models: str = ""  # folder of the kept models, by the numbers of their trials, there too
    keepers: str | None = None  # the id of the search whose keepers may have training states, see `keeper`
    keeps_here: bool = False  # whether the head's disk gets all states, also where there are other nodes
    group_size: GroupSize
    num_workers: Mapping[str, int] = field(default_factory=dict)  # by pattern of architectures, see `GroupSize`
    shared_sizes: Mapping[int, GroupSize] = field(default_factory=dict)  # by the trials that share a GPU
    cache: str = "auto"  # how presized images are stored, see `presize`
    max_unreadable: float = MAX_UNREADABLE  # largest share of unreadable images
    split_seed: int = 0
    stall_timeout: float = math.inf  # seconds without progress after which workers are killed
    keep_epoch: str = "last"  # whose model a trial leaves: that of its last epoch, or best
    folds: int = 1  # how many there are, with `FOLD` in a config
    metric: str = "error_rate"  # one of `trainables.training.metrics.METRICS`, which the search minimises


OBJECTIVE, EXPECTED_OBJECTIVE = "objective", "expected_objective"
"""In a result: what the search minimises, and what of it to expect on new images, as far as a probe tells."""
RANKED = (OBJECTIVE, "valid_loss")
"""What makes an epoch the best of its trial, the first one first."""
LOST_EPOCHS = "lost_epochs"
"""In a result: how many epochs before it were trained again, because their states were lost with their nodes."""
BEST = tuple(f"best_{name}" for name in ("epoch", "error_rate", *RANKED))


class HasTrialId(Protocol):
    """A trial of Tune, in the search or in its own actor."""

    @property
    def trial_id(self) -> str: ...


def table_id(trial: HasTrialId) -> str:
    """The trial's id in tables and file names."""
    return text_id(trial.trial_id)


def recipe_of(settings: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of the trial with this config, as `Recipe.from_dict` takes them."""
    return {**settings, **{name: value for name, value in config.items() if name not in OF_TRIAL}}


def text_id(trial_id: str) -> str:
    """Tune's trial id as text that no program reads as a number, as it might 00876659 or 976e1612."""
    return f"t{trial_id}"


class FineTuneTrial(tune.Trainable):
    """Reports one result per epoch: the metrics of `FineTune.run_epoch`, `epochs_total`, `seconds` of training and
    validation so far, and `overhead_seconds`.

    A trial that cannot continue (diverged, no weights, workers lost repeatedly) reports the reason as `failure` and is
    done: another try would end the same way.

    It keeps its own checkpoint of its last epoch, because Tune would write the state of all trials with each of its
    own, which dominated the cost after some hundred trials. A trial that finds a checkpoint first reports that epoch's
    result again, since the search may have been killed before it recorded the result, and then continues.

    Where a cluster has more nodes than the head, these keep the states (see `keeper`), and the trial its results and
    where the states are. An epoch whose state is lost is trained again, but not reported again: it is the same.
    """

    host: Any = None  # the handle of a `GroupHost`
    host_size: GroupSize | None = None
    host_node: str | None = None
    states: NodeStates | None = None
    on_nodes = False  # whether the nodes have the states, and not the head
    look_for_state = False  # before the next epoch: where the newest state is
    found: Any = None  # the reference of its files
    later: dict[str, Any] | None = None  # its result, if it is of an epoch that has not been reported
    lost_epochs = 0  # since the last result

    def setup(self, config: dict[str, Any], options: TrialOptions) -> None:  # type: ignore[override]
        # Tune passes `options` by keyword, see `tune.with_parameters`.
        self.options = options
        self._begin(config)
        if not self.repeat:  # a trial that has ended needs no workers: they would keep others waiting
            self._start_host()

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._begin(new_config)
        if self.size != self.host_size:
            self.cleanup()  # the next trial needs another number of workers
        return True

    def _begin(self, config: dict[str, Any]) -> None:
        self.recipe = recipe_of(self.options.settings, config)
        self.fold = config.get(FOLD, 0), self.options.folds
        deadline = config.get(DEADLINE)
        # One that has passed is of a search that was killed and resumed.
        self.deadline = deadline if deadline and deadline > time.time() else None
        winner = Path(self.options.checkpoints) / config[REFITS] if REFITS in config else None
        self.refit: dict[str, Any] = {
            "all_images": winner is not None,
            "temperature": config.get(REFIT_TEMPERATURE, 1.0),
            "wise_alpha": config.get(REFIT_ALPHA, 1.0),
            "thresholds": checkpoint.thresholds(winner) if winner else None,
        }
        self.averages: list[int] = config.get(AVERAGES, [])
        options = self.options
        size = options.shared_sizes.get(config.get(TRIALS_PER_GPU, 0), options.group_size)
        self.size = size.for_arch(self.recipe["arch"], options.num_workers)
        self.folder = Path(self.options.checkpoints) / table_id(self)
        self.handed_over = False  # whether the host has this trial
        self.files: checkpoint.Files | None
        saved, elsewhere = checkpoint.last_whole(self.folder), checkpoint.elsewhere(self.folder)
        self.lost_epochs = 0
        if saved and elsewhere and options.keepers is None:  # a cluster's search that goes on without the cluster
            self.lost_epochs = saved[1]["epoch"]
            saved, elsewhere = None, None
        files, self.last_result = saved or (None, {})
        self.files = None if elsewhere else files
        self.repeat = saved is not None
        self.has_ended = checkpoint.TRAINING_FILE not in (elsewhere.crc32 if elsewhere else files or {})
        self.on_nodes = self.look_for_state = elsewhere is not None
        if options.keepers is not None:
            self.states = NodeStates(options.keepers, table_id(self), elsewhere.nodes if elsewhere else ())
        self._continue_after(self.last_result)

    def _continue_after(self, result: dict[str, Any]) -> None:
        """Make the epoch with this result the last one; without a result, begin anew."""
        if "error_rate" in result:  # of an earlier version, which knew no other metric
            result.setdefault(OBJECTIVE, result["error_rate"])
        self.epochs_done = result.get("epoch", before_first_epoch(self.recipe))
        self.best = {name: result[name] for name in BEST if name in result}
        if self.best:
            self.best.setdefault(f"best_{OBJECTIVE}", self.best["best_error_rate"])
        self.overhead_seconds = result.get("overhead_seconds", 0.0)
        self.seconds = result.get("seconds", 0.0)

    def step(self) -> dict[str, Any]:
        if self.repeat:
            self.repeat = False
            return self.last_result | {"done": self.has_ended}
        reported, losses, is_news = self.epochs_done, 0, False
        while not is_news:
            result = self._next_result()
            if not self._save(result):
                losses += 1
                if losses < MAX_LOST_NODES:
                    continue
                result = self._failed(f"lost its state {losses} times after epoch {result['epoch']}")
                self._save(result)
            is_news = bool(result["failure"]) or result["epoch"] > reported
        lost, self.lost_epochs = self.lost_epochs, 0
        return result | ({LOST_EPOCHS: lost} if lost else {})

    # --- Its state, on the head's disk or on the nodes ----------------------------------------------------------------

    def _save(self, result: dict[str, Any]) -> bool:
        """Save the result and the state after it; whether there still is a state: it may be lost with its node."""
        if result["failure"] or not self.on_nodes:
            checkpoint.save(self.folder, self.epochs_done + bool(result["failure"]), self.files or {}, result)
            if self.on_nodes and self.states is not None:
                self.states.drop()
            return True
        assert self.states is not None and self.host_node is not None
        places = self.states.places(self.host_node)
        is_best = self.best["best_epoch"] == self.epochs_done if self.options.keep_epoch == "best" else None
        order = KeepOrder(
            search=self.states.search, trial=self.states.trial, result=result, places=places, is_best=is_best,
            finished=result["done"],
        )  # fmt: skip
        try:
            kept: Kept = ray.get(self.host.keep.remote(order))
        except (*LOST, GroupEnded) as error:
            logger.warning("the state of %s after epoch %d is lost: %s", self.folder.name, self.epochs_done, error)
            self.host, self.handed_over, self.look_for_state = None, False, True
            return False
        self.files = None
        checkpoint.save(self.folder, self.epochs_done, {}, result, self.states.note(kept, places))
        return True

    def _choose_place(self) -> None:
        """Leave the next state on the nodes from now on, if there are others than the head."""
        if self.on_nodes or self.states is None or self.options.keeps_here:
            return
        self.on_nodes = not all(map(is_head, living_nodes().values()))
        if self.on_nodes and self.files:  # the host lacks what the trial has added
            self.handed_over = False

    def _look_for_state(self) -> None:
        """Continue after the newest state that there is, on the nodes or here, or else from the beginning."""
        assert self.states is not None
        self.look_for_state, before = False, self.epochs_done
        self.found, result = (self.states.newest(before) if self.states.nodes else None) or (None, {})
        if self.found is None:
            files, result = checkpoint.last_whole(self.folder) or ({}, {})
            self.files, result = (files, result) if checkpoint.TRAINING_FILE in files else (None, {})
            self.on_nodes = False
            self._choose_place()  # there may be no nodes any more
        self._continue_after(result)
        self.lost_epochs = max(self.lost_epochs, before - self.epochs_done)
        self.later = result if self.epochs_done > before else None

    def _next_result(self) -> dict[str, Any]:
        try:
            recipe = Recipe.from_dict(self.recipe)
        except ValueError as error:
            return self._failed(str(error))
        self._choose_place()
        outcome = self._run_epoch()
        if self.later is not None:
            result, self.later = self.later, None
            return result
        if outcome.failure:
            self.handed_over = False
            return self._failed(outcome.failure)
        outcome.metrics[OBJECTIVE] = to_minimise(self.options.metric, outcome.metrics)
        if self.options.metric == "balanced_error" and "expected_balanced_error" in outcome.metrics:
            outcome.metrics[EXPECTED_OBJECTIVE] = outcome.metrics["expected_balanced_error"]
        if math.isnan(outcome.metrics[OBJECTIVE]):
            return self._failed(f"{self.options.metric} is not defined: all validation images are of one class")
        self.epochs_done = outcome.metrics["epoch"]
        finished = self.epochs_done == recipe.total_epochs
        self._note_best(outcome)
        self.files = checkpoint.model_only(outcome.state or {}) if finished else outcome.state
        if self.epochs_done == recipe.before_first_epoch + 1:
            self.overhead_seconds = outcome.metrics["overhead_seconds"]
        self.seconds += outcome.metrics["train_seconds"] + outcome.metrics["valid_seconds"]
        of_trial = {"seconds": self.seconds, "overhead_seconds": self.overhead_seconds}
        of_trial |= {"epochs_total": recipe.total_epochs, "training_iteration": self.epochs_done, **self.best}
        return {**outcome.metrics, **of_trial, "failure": "", "done": finished}

    def _note_best(self, outcome: Outcome) -> None:
        """Which epoch was the best so far, by the objective, then by validation loss. With `keep_epoch` best, its model
        goes with the state."""
        ours = {name: outcome.metrics[name.removeprefix("best_")] for name in BEST}
        is_best = not self.best or [ours[f"best_{name}"] for name in RANKED] < [self.best[f"best_{n}"] for n in RANKED]
        if is_best:
            self.best = ours
        if self.options.keep_epoch == "best" and outcome.state:
            outcome.state.update(checkpoint.with_best(outcome.state, self.files or {}, is_best=is_best))

    def _failed(self, reason: str) -> dict[str, Any]:
        self.files = None
        nothing = dict.fromkeys((OBJECTIVE, "error_rate", "valid_loss"), math.nan)
        return {"failure": reason, **nothing, "done": True}

    def cleanup(self) -> None:
        if self.host is not None:
            # The host ends with this actor. A group that still waits for resources cannot leave: the search frees
            # what it reserved, see `search.cluster.orphaned_placement_groups`.
            self.host.close.remote()
            ray.wait([self.host.ended.remote()], timeout=CLOSE_SECONDS)
        self.host = None

    def _run_epoch(self) -> Outcome:
        """One epoch, on a new worker group if the old one is gone."""
        lost_on: list[str | None] = []  # nodes
        reason = ""
        while _num_that_count(lost_on) < MAX_HOSTS:
            host = self.host or self._start_host()
            try:
                if not self.handed_over:
                    self._hand_over(host)
                    if self.later is not None:
                        return Outcome()
                outcome: Outcome = ray.get(host.run_epoch.remote(not self.on_nodes))
                return outcome
            except GroupReleased:
                self.host = None
            except (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError, GroupEnded) as error:
                self.host, reason = None, str(error)
                lost_on.append(self.host_node)
            self.handed_over, self.look_for_state = False, self.on_nodes and self.files is None
        return Outcome(failure=f"lost its worker group {MAX_HOSTS} times: {reason}")

    def _hand_over(self, host: Any) -> None:
        """Give the trial to a host, with its last state, which goes from node to node where nodes have it."""
        self.host_node = ray.get(host.node.remote())
        if self.look_for_state:
            self._look_for_state()
        state, self.found = self.found or self.files, None
        ray.get(host.begin.remote(self._spec(), self.epochs_done, state))
        self.handed_over = True

    def _spec(self) -> TrialSpec:
        names = ("data", "data_digest", "weights", "cache", "max_unreadable", "split_seed")
        shared = {name: getattr(self.options, name) for name in names}
        own = {"trial_id": self.trial_id, "recipe": self.recipe, "fold": self.fold, "probe_deadline": self.deadline}
        return TrialSpec(**own, **self.refit, **shared, earlier=self._earlier_models())

    def _earlier_models(self) -> Any:
        """The reference of the weights that this training is averaged with; None without any."""
        files = [Path(self.options.models, str(number), checkpoint.WEIGHTS_FILE) for number in self.averages]
        earlier = [file.read_bytes() for file in files if file.is_file()]
        return ray.put(earlier) if earlier else None

    def _start_host(self) -> Any:
        # It reserves no CPU: the workers reserve what the training uses. Any strategy but the default one keeps it out
        # of Tune's placement group, which is pinned to the head node.
        node = node_with_room(self.size)
        strategy: Any = PlacementGroupSchedulingStrategy(placement_group=None)  # type: ignore[arg-type]
        if node is not None:
            strategy = NodeAffinitySchedulingStrategy(node, soft=True)
        host = ray.remote(GroupHost).options(num_cpus=0, max_concurrency=1000, scheduling_strategy=strategy)
        self.host = host.remote(self.size, self.options.stall_timeout)
        self.host_size, self.host_node = self.size, node
        self.handed_over = False
        return self.host


def before_first_epoch(settings: Mapping[str, Any]) -> int:
    """`Recipe.before_first_epoch` of settings that may be invalid."""
    try:
        return Recipe.from_dict(dict(settings)).before_first_epoch
    except ValueError:
        return 0


def _num_that_count(lost_on: list[str | None]) -> int:
    """How many hosts were lost while their node stayed. Ray reports a lost node many seconds after its actors, so a
    loss that counts at first may not count later."""
    nodes = living_nodes() if lost_on else {}
    return sum(node is None or node in nodes for node in lost_on)
