"""Optuna as Tune's searcher, told the truth about every trial: finished, stopped early, or failed."""

import pickle
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from ray.tune.search import Searcher

from search.capacity import Capacity
from search.space import Choice, Dimension, Space
from trainables.recipe import spec_of

METRIC = "error_rate"
_TUNE_ID = "trial_id"


class OptunaSearcher(Searcher):
    """Asks Optuna for configs; the space's own recipes go first.

    The study is kept in a journal file, which Optuna's own tools can open while the search runs. Unlike Ray's
    `OptunaSearch` it reports a value at every `progress` percent, tells PRUNED for a trial that was stopped early and
    FAIL for one that failed.

    Where `capacity` has no room for the next trial it proposes none; Tune asks again. A trial that needs many workers
    keeps its turn: smaller ones do not go before it.
    """

    def __init__(
        self, space: Space, journal: Path, *, sampler: str, seed: int, capacity: Capacity | None = None
    ) -> None:
        super().__init__(metric=METRIC, mode="min")
        self.space = space
        self.journal = Path(journal)
        self.sampler = _sampler(sampler, seed)
        self.distributions = {name: _distribution(name, d) for name, d in space.dimensions.items()}
        self.first_configs = space.first_configs()
        self.numbers: dict[str, int] = {}  # Tune's trial id -> Optuna's trial number
        self.capacity = capacity
        self.live: dict[str, int] = {}  # Tune's trial id -> workers of a trial that has not ended
        self._next: optuna.Trial | None = None  # proposed, and waiting for room
        self._study: optuna.Study | None = None

    @property
    def study(self) -> optuna.Study:
        if self._study is None:
            optuna.logging.set_verbosity(optuna.logging.WARNING)
            storage = JournalStorage(JournalFileBackend(str(self.journal)))
            self._study = optuna.create_study(
                storage=storage, study_name=self.space.name, sampler=self.sampler, load_if_exists=True
            )
        return self._study

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        if not self._has_room(1):  # the later a trial is proposed, the more is known
            return None
        trial = self._next = self._next or self._ask()
        num_workers = self._num_workers(trial.params)
        if not self._has_room(num_workers):
            return None
        self._next = None
        trial.set_user_attr(_TUNE_ID, trial_id)
        self.numbers[trial_id] = trial.number
        self.live[trial_id] = num_workers
        return trial.params

    def _ask(self) -> optuna.Trial:
        if len(self.numbers) < len(self.first_configs):
            self.study.enqueue_trial(self.first_configs[len(self.numbers)])
        return self.study.ask(self.distributions)

    def _has_room(self, num_workers: int) -> bool:
        return self.capacity is None or self.capacity.has_room(self.live.values(), num_workers)

    def _num_workers(self, config: dict[str, Any]) -> int:
        if self.capacity is None:
            return 1
        return self.capacity.group_size((self.space.settings | config)["arch"]).num_workers

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        running, progress = self._running(trial_id), result["progress"]
        # A study has one value per step. In the frozen stage progress stands still, and a trial that was restored says
        # its last result once more.
        if running is not None and progress > 0 and progress not in running.intermediate_values:
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
            trial.set_user_attr("failure", failure)
            self.study.tell(trial, state=TrialState.FAIL)
            return
        self.on_trial_result(trial_id, result)  # Tune keeps the result with which a trial ends for this call
        if result["epoch"] == result["epochs_total"]:
            self.study.tell(trial, result[METRIC])
        else:
            self.study.tell(trial, state=TrialState.PRUNED)

    def save(self, checkpoint_path: str) -> None:
        """The study is in its journal already; what is left is the sampler's random state and who is who."""
        Path(checkpoint_path).write_bytes(pickle.dumps((self.sampler, self.numbers)))

    def restore(self, checkpoint_path: str) -> None:
        self.sampler, self.numbers = pickle.loads(Path(checkpoint_path).read_bytes())
        self._study = self._next = None
        self._fail_forgotten_trials()
        running = {trial.number: trial.params for trial in self._all_running()}
        self.live = {i: self._num_workers(running[n]) for i, n in self.numbers.items() if n in running}

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles its searcher; a journal's lock does not travel.
        return self.__dict__ | {"_study": None, "_next": None}

    def _fail_forgotten_trials(self) -> None:
        """Trials asked for after Tune last saved its state: nobody will ever tell how they ended."""
        for frozen in self._all_running():
            if frozen.number not in self.numbers.values():
                trial = self._trial(frozen)
                trial.set_user_attr("failure", "forgotten when the search was killed")
                self.study.tell(trial, state=TrialState.FAIL)

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


def _sampler(name: str, seed: int) -> optuna.samplers.BaseSampler:
    if name == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    # Few random configs first: most searches here are short, and trial 0 is a good one already.
    return optuna.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=5)


def _distribution(name: str, dimension: Dimension) -> BaseDistribution:
    if isinstance(dimension, Choice):
        return CategoricalDistribution(dimension.values)
    if spec_of(name).type is int:
        return IntDistribution(int(dimension.low), int(dimension.high), log=dimension.log)
    return FloatDistribution(float(dimension.low), float(dimension.high), log=dimension.log)
