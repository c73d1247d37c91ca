"""Optuna as Tune's searcher, told the truth about every trial: finished, stopped early, or failed."""

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState
from ray.tune.search import Searcher

from search.cluster.concurrency import Capacity
from search.options.strategy import Strategy
from search.runs.study_journal import open_journal
from search.spaces.space import SWITCH, Choice, Dimension, Space, ends
from search.tuning.retraining import retrainings
from search.tuning.tpe import CachedTPESampler
from trainables.ray.trial import RETRAINS, text_id
from trainables.recipe import has_effect, spec_of

METRIC = "error_rate"
STARTUP_TRIALS = 5
"""Few random configs first: most searches here are short, and trial 0 is a good one already."""
FORGOTTEN = "forgotten when the search was killed"
ENDED = "the search ended"

_TUNE_ID, _SECONDS, _LOSS = "trial_id", "seconds", "valid_loss"

Config = dict[str, Any]


class OptunaSearcher(Searcher):
    """Asks Optuna for configs; the space's own recipes go first.

    The study is kept in a journal file, which Optuna's own tools can open while the search runs. Unlike Ray's
    `OptunaSearch` it reports a value at every `progress` percent, tells PRUNED for a trial that was stopped early and
    FAIL for one that failed.

    Where `capacity` has no room for the next trial it proposes none; Tune asks again. A trial that needs many workers
    keeps its turn: smaller ones do not go before it.

    After `num_trials` proposals, and when these have ended, the best `strategy.confirm` are trained again, except
    those that already were before the search was extended.
    """

    def __init__(
        self,
        space: Space,
        journal: Path,
        *,
        seed: int,
        strategy: Strategy | None = None,
        capacity: Capacity | None = None,
        num_trials: int | None = None,
    ) -> None:
        super().__init__(metric=METRIC, mode="min")
        self.space = space
        self.journal = Path(journal)
        self.strategy = strategy or Strategy()
        self.sampler = _sampler(self.strategy, seed)
        self.num_trials = num_trials
        self.first_configs = space.first_configs()
        if self.strategy.target_seconds:
            self.first_configs += _each_arch(space, self.first_configs)
        self.numbers: dict[str, int] = {}  # Tune's trial id -> Optuna's trial number
        # Tune's ids of trials that are others' once more -> whose, and the seed.
        self.retrained: dict[str, tuple[str, int]] = {}
        self.capacity = capacity
        self.live: dict[str, int] = {}  # Tune's trial id -> workers of a trial that has not ended
        self._next: tuple[optuna.Trial | None, Config] | None = None  # proposed, and waiting for room
        self._study: optuna.Study | None = None

    @property
    def study(self) -> optuna.Study:
        if self._study is None:
            known = self.journal.is_file()
            optuna.logging.set_verbosity(optuna.logging.WARNING)
            self._study = optuna.create_study(
                storage=open_journal(self.journal),
                study_name=self.space.name,
                sampler=self.sampler,
                directions=["minimize"] * self.strategy.num_objectives,
                load_if_exists=True,
            )
            if known and not self.numbers:  # a kill came before Tune had saved anything
                self._fail_forgotten_trials()
        return self._study

    def suggest(self, trial_id: str) -> Config | str | None:
        if not self._has_room(1):  # the later a trial is proposed, the more is known
            return None
        if self._next is None and self.num_trials is not None and len(self.numbers) >= self.num_trials:
            return self._retrain(trial_id)
        trial, config = self._next = self._next or self._ask()
        num_workers = self._num_workers(config)
        if not self._has_room(num_workers):
            return None
        self._next = None
        trial.set_user_attr(_TUNE_ID, trial_id)
        self.numbers[trial_id] = trial.number
        self.live[trial_id] = num_workers
        return config

    def _ask(self) -> tuple[optuna.Trial, Config]:
        self._leave_out_costlier()
        first = {}
        if len(self.numbers) < len(self.first_configs):
            first = self.first_configs[len(self.numbers)]
            self.study.enqueue_trial(as_params(self.space, first))
        trial = self.study.ask()
        return trial, first | propose(trial, self.space)

    def _leave_out_costlier(self) -> None:
        """Of the architectures that are still to be shown, those after one that took longer than wanted."""
        shown = len(self.numbers)
        if not len(self.space.first_configs()) <= shown < len(self.first_configs):
            return
        archs, limit = self.space.dimensions["arch"].values, self.strategy.target_seconds
        trials = self.study.get_trials(deepcopy=False)
        slow = [archs.index(t.params["arch"]) for t in trials if t.user_attrs.get(_SECONDS, 0) > limit]
        left = [c for c in self.first_configs[shown:] if archs.index(c["arch"]) < min(slow, default=len(archs))]
        self.first_configs = self.first_configs[:shown] + left

    def _retrain(self, trial_id: str) -> Config | str | None:
        """One of the best once more. The choice among all trials waits for the last of them."""
        if set(self.live) & set(self.numbers):
            return None
        done, best = self.retrained.values(), self._ranked()[: self.strategy.confirm]
        todo = [c for c in retrainings(best, self._last_seed()) if (c[RETRAINS], c["seed"]) not in done]
        if not todo:
            return Searcher.FINISHED
        config = todo[0]
        num_workers = self._num_workers(config)
        if not self._has_room(num_workers):
            return None
        self.retrained[trial_id] = config[RETRAINS], config["seed"]
        self.live[trial_id] = num_workers
        return config

    def _last_seed(self) -> int:
        """The highest that a trial may have had: `--set` can pin or search it."""
        searched = self.space.dimensions.get("seed")
        return (
            int(max(ends(searched)))
            if searched
            else self.space.full({"seed": self.space.seed} | self.space.settings)["seed"]
        )

    def _ranked(self) -> list[tuple[str, Config]]:
        """The table's id and config of the completed trials, best first: lowest error, ties by validation loss."""
        done = self.study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
        done = sorted(done, key=lambda trial: (trial.values[0], trial.user_attrs[_LOSS]))
        return [(text_id(trial.user_attrs[_TUNE_ID]), config_of(self.space, trial.params)) for trial in done]

    def _has_room(self, num_workers: int) -> bool:
        return self.capacity is None or self.capacity.has_room(self.live.values(), num_workers)

    def _num_workers(self, config: Config) -> int:
        if self.capacity is None:
            return 1
        return self.capacity.group_size((self.space.settings | config)["arch"]).num_workers

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        running, progress = self._running(trial_id), result["progress"]
        # A study has one value per step, and none where there are two objectives. In the frozen stage progress stands
        # still, and a trial that was restored says its last result once more.
        if running is None or len(self.study.directions) > 1:
            return
        if progress > 0 and progress not in running.intermediate_values:
            self._trial(running).report(result[METRIC], progress)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if self.capacity is not None:
            self.capacity.note_end(self.live.values())
        self.live.pop(trial_id, None)
        running = self._running(trial_id)
        if running is None:
            return
        trial, result = self._trial(running), result or {}
        if error or result.get("failure") or "epoch" not in result:
            failure = result.get("failure") or ("error" if error else "ended before its first epoch")
            _fail(self.study, trial, failure)
            return
        self.on_trial_result(trial_id, result)  # Tune keeps the result with which a trial ends for this call
        finished = result["epoch"] == result["epochs_total"]
        seconds = result[_SECONDS] * result["epochs_total"] / result["epoch"]
        trial.set_user_attr(_SECONDS, seconds)  # of the whole training, also where it was stopped
        trial.set_user_attr(_LOSS, result[_LOSS])
        if self.strategy.target_seconds:
            trial.set_constraint(_SECONDS, seconds - self.strategy.target_seconds)
        if finished:
            self.study.tell(trial, [result[METRIC], seconds][: len(self.study.directions)])
        else:
            self.study.tell(trial, state=TrialState.PRUNED)

    def end(self) -> None:
        """A time budget or failures end the search, and with it the trials under way, of which Tune tells nobody. The
        retrainings among them are still to be done where the search goes on."""
        self.retrained = {i: what for i, what in self.retrained.items() if i not in self.live}
        self.live = {}

    def most_left(self) -> int:
        """So many trials are still to be proposed, at most: of the best, some may have been trained again before."""
        return max(0, self.num_trials - len(self.numbers)) + self.strategy.num_retrainings

    def save(self, checkpoint_path: str) -> None:
        """The study is in its journal already; what is left is the sampler's random state and who is who."""
        Path(checkpoint_path).write_bytes(pickle.dumps((self.sampler, self.numbers, self.retrained, self.live)))

    def restore(self, checkpoint_path: str) -> None:
        self.sampler, self.numbers, self.retrained, live = pickle.loads(Path(checkpoint_path).read_bytes())
        self._study = self._next = None
        self._fail_forgotten_trials()
        running = {trial.number for trial in self._all_running()}
        self.live = {i: n for i, n in live.items() if i in self.retrained or self.numbers[i] in running}

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles its searcher; a journal's lock does not travel.
        return self.__dict__ | {"_study": None, "_next": None}

    def _fail_forgotten_trials(self) -> None:
        """Trials asked for after Tune last saved its state: nobody will ever tell how they ended."""
        while self.study.get_trials(deepcopy=False, states=[TrialState.WAITING]):
            self.study.ask()  # for what was put in the queue, and is none's turn any more
        for frozen in self._all_running():
            if frozen.number not in self.numbers.values():
                _fail(self.study, self._trial(frozen), FORGOTTEN)

    def _all_running(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=[TrialState.RUNNING])

    def _running(self, trial_id: str) -> FrozenTrial | None:
        number = self.numbers.get(trial_id)
        if number is None:
            return None
        frozen = self.study.get_trials(deepcopy=False)[number]
        return frozen if frozen.state == TrialState.RUNNING else None

    def _trial(self, frozen: FrozenTrial) -> optuna.Trial:
        return optuna.Trial(self.study, frozen._trial_id)


def end_study(journal: Path, name: str) -> None:
    """Tell how trials ended of which Tune told nobody: those under way when a time budget or failures end a search."""
    if not Path(journal).is_file():
        return
    study = optuna.load_study(study_name=name, storage=open_journal(Path(journal)))
    for frozen in study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
        trial = optuna.Trial(study, frozen._trial_id)
        if frozen.intermediate_values:
            study.tell(trial, state=TrialState.PRUNED)
        else:
            _fail(study, trial, ENDED)


def _fail(study: optuna.Study, trial: optuna.Trial, reason: str) -> None:
    trial.set_user_attr("failure", reason)
    study.tell(trial, state=TrialState.FAIL)


# --- Between a space and a study --------------------------------------------------------------------------------------


def propose(trial: optuna.Trial, space: Space) -> Config:
    """A value for each dimension that has an effect beside the others."""
    config: Config = {}
    for name in space.in_order():
        if has_effect(name, space.full(config)):
            config[name] = _suggest(trial, name, space.dimensions[name])
    return config


def _suggest(trial: optuna.Trial, name: str, dimension: Dimension) -> Any:
    if isinstance(dimension, Choice):
        return trial.suggest_categorical(name, dimension.values)
    number = spec_of(name).type
    if dimension.off and not trial.suggest_categorical(_switch(name), (True, False)):
        return number(0)
    low, high = number(dimension.low), number(dimension.high)
    suggest = trial.suggest_int if number is int else trial.suggest_float
    return suggest(name, low, high, log=dimension.log)


def as_params(space: Space, config: Mapping[str, Any]) -> dict[str, Any]:
    """What `propose` asks a study for to get `config`."""
    params = {}
    for name, value in config.items():
        if not has_effect(name, space.full(config)):
            continue
        if getattr(space.dimensions[name], "off", False):
            params[_switch(name)] = value != 0
            if value == 0:
                continue
        params[name] = value
    return params


def config_of(space: Space, params: Mapping[str, Any]) -> Config:
    """What `propose` made of these parameters of a study."""
    off = {name: 0 for name in space.dimensions if params.get(_switch(name)) is False}
    return off | {name: value for name, value in params.items() if name in space.dimensions}


def _switch(name: str) -> str:
    return name + SWITCH


def _each_arch(space: Space, first: Sequence[Config]) -> list[Config]:
    """Trial 0 with each of the other architectures, in the order of the space, which goes from cheap to costly."""
    archs = getattr(space.dimensions.get("arch"), "values", ())
    configs = [first[0] | {"arch": arch} for arch in archs]
    return [config for config in configs if config not in first]


# --- Samplers ---------------------------------------------------------------------------------------------------------


def _sampler(strategy: Strategy, seed: int) -> BaseSampler:
    common = {"seed": seed, "n_startup_trials": STARTUP_TRIALS}
    if strategy.searcher == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    if strategy.searcher == "gp":
        return optuna.samplers.GPSampler(**common, warn_independent_sampling=False)
    if strategy.searcher == "cmaes":
        return optuna.samplers.CmaEsSampler(**common, warn_independent_sampling=False)
    # One dimension at a time: measured to find more than Optuna 5's default, see results/bench/search_quality.md.
    return CachedTPESampler(**common)
