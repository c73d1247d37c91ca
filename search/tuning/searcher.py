"""Optuna as Tune's searcher. It learns how every trial ended: finished, stopped early, or failed.

(The file is long so that all decisions on what runs next stand in one place, in the order in which they are made.)
"""

import math
import pickle
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from ray.tune.search import Searcher

from search.cluster.concurrency import Capacity
from search.options.strategy import Strategy
from search.runs.csv_file import Row
from search.runs.kinds import PROBE
from search.runs.study_journal import WARM_START, open_journal, own_trials
from search.runs.time_budget import TimeBudget
from search.spaces.space import Choice, Range, Space, ends
from search.tuning.pace import Pace
from search.tuning.retraining import key, retrainings
from search.tuning.samplers import new_sampler
from search.tuning.screen import Probe, Screen
from search.tuning.study_configs import Config, config_of, params_of, propose
from search.tuning.study_end import fail
from search.tuning.time_left import TimeLeft
from search.tuning.warm_start import WarmStart
from trainables.ray.trial import AVERAGES, DEADLINE, OBJECTIVE, REFIT_ALPHA, REFIT_TEMPERATURE, REFITS, SCREENS, text_id

NEARLY = 0.25
"""Share that may be missing from an epoch."""
LEAST_REFIT = 0.5
"""Share of the winner's epochs that its refit has at least."""
FORGOTTEN = "forgotten when the search was killed"

_TUNE_ID, _SECONDS, _LOSS = "trial_id", "seconds", "valid_loss"


class OptunaSearcher(Searcher):
    """Gets configs from Optuna, the recipes of the space first.

    The study is stored in a journal file, which Optuna's own tools can open during the search. Unlike Ray's
    `OptunaSearch`, it reports a value at every `progress` percent, and tells Optuna PRUNED for a trial that was stopped
    early and FAIL for one that failed.

    If `capacity` has no room for the next trial, it proposes none, and Tune asks again later. A trial that needs many
    workers keeps its turn: smaller ones do not overtake it.

    A `screen` comes first. Its probes are trials of a study of their own in the same journal: they have other
    parameters, and a sampler is to learn from fine-tunings.

    With a `warm_start`, the study has the trials of earlier runs before the first proposal, and their configs follow
    trial 0.

    Where a `budget` limits the time, nothing is proposed that is not expected to end in it.

    When all of `num_trials` proposals have ended, the best `strategy.confirm` are trained again, except those that
    already were before the search was extended. With a `winner`, the row of the best trial or probe, that one comes
    last, on all images.
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
        screen: Screen | None = None,
        budget: TimeBudget | None = None,
        num_classes: int = 1,
        winner: Callable[[], Row | None] | None = None,
        warm_start: WarmStart | None = None,
    ) -> None:
        super().__init__(metric=OBJECTIVE, mode="min")
        self.space = space
        self.journal = Path(journal)
        self.strategy = strategy or Strategy()
        # With the seed of an earlier run it would repeat that one's random proposals.
        self.sampler = new_sampler(self.strategy, seed + (warm_start.num_trials if warm_start else 0))
        self.num_trials = num_trials
        self.warm_start = warm_start
        self.first_configs = self._first_configs()
        self.numbers: dict[str, int] = {}  # Tune's trial id -> Optuna's trial number
        self.retrained: dict[str, tuple[str, int]] = {}  # Tune's id of a retraining -> see `retraining.key`
        self.screen = screen
        self.narrowed = False  # whether the space is what the screen has left of it
        self.budget = budget
        self.num_classes = num_classes
        self.winner = winner
        self.refitted: dict[str, str] = {}  # Tune's id of a refit -> table's id of its winner
        self.pace = Pace()
        self.capacity = capacity
        self.live: dict[str, int] = {}  # Tune's id of a trial that has not ended -> number of its workers
        self._waiting: tuple[optuna.Trial, Config] | None = None  # a proposal that waits for room
        self._study: optuna.Study | None = None

    @property
    def study(self) -> optuna.Study:
        if self._study is None:
            existed = self.journal.is_file()
            self._study = self._open_study(self.space.name, sampler=self.sampler)
            if existed and not self.numbers:  # the search was killed before Tune had saved anything
                self._fail_forgotten_trials()
        return self._study

    def _open_study(self, name: str, **options: Any) -> optuna.Study:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        return optuna.create_study(
            storage=open_journal(self.journal),
            study_name=name,
            directions=["minimize"] * self.strategy.num_objectives,
            load_if_exists=True,
            **options,
        )

    def suggest(self, trial_id: str) -> Config | str | None:  # type: ignore[override]  # Ray's hint omits FINISHED
        found = self._suggest(trial_id)
        return found | self.capacity.config(trial_id) if isinstance(found, dict) and self.capacity else found

    def _suggest(self, trial_id: str) -> Config | str | None:
        if not self._has_room(1):  # the later a trial is proposed, the more is known
            return None
        if self.screen and not self.narrowed:
            config = self._probe(trial_id, self.screen)
            if config or not self.screen.is_over:
                return config
            self._narrow(self.screen)
        if self._waiting is None and self.num_trials is not None and len(self.numbers) >= self.num_trials:
            return self._retrain(trial_id)
        if self._waiting is None and not self._has_time():
            return self._refit(trial_id)
        self._add_earlier_trials()
        trial, config = self._waiting = self._waiting or self._ask()
        num_workers = self._num_workers(config)
        if not self._has_room(num_workers):
            return None
        self._waiting = None
        trial.set_user_attr(_TUNE_ID, trial_id)
        self.numbers[trial_id] = trial.number
        self.live[trial_id] = num_workers
        return config

    def _probe(self, trial_id: str, screen: Screen) -> Config | None:
        """The next probe of the screen; None while it has to wait, or others have to end."""
        while (place := screen.next_place) is not None and not self._time.for_probe(screen, place, self.space):
            screen.skip(place)
        if place is None:
            return None
        if place == screen.last:
            screen.chosen = screen.most_promising(self._promised_error)
        config = screen.config(place)
        num_workers = self._num_workers(config)
        if not self._has_room(num_workers):
            return None
        screen.begin(trial_id, place)
        self.live[trial_id] = num_workers
        # Nothing tells yet how long a probe takes, and without the first one there is no model.
        limited = self.budget is not None and self.budget.limit is not None and not screen.probes
        return config | {DEADLINE: time.time() + self._time.seconds} if limited else config

    def _narrow(self, screen: Screen) -> None:
        """The screen is over: fine-tune what it has found."""
        self.narrowed = True
        self.space = screen.narrowed(self.space, self._promised_error)
        self.first_configs = self._first_configs()

    def _promised_error(self, pair: Config, probe: Probe) -> float:
        return self._time.promised_error(pair, probe, self.space)

    def _first_configs(self) -> list[Config]:
        """What is proposed before the sampler is asked."""
        first = self._before_archs()
        return first + (_default_per_arch(self.space, first) if self.strategy.target_seconds else [])

    def _before_archs(self) -> list[Config]:
        """Trial 0, the configs of earlier runs, and the space's own."""
        first, *others = self.space.first_configs()
        earlier = self.warm_start.configs(self.space) if self.warm_start else []
        return [first, *(config for config in earlier if config not in (first, *others)), *others]

    def _add_earlier_trials(self) -> None:
        """Give the study the trials of earlier runs, once: a killed search may have added some of them."""
        if self.warm_start and not self.numbers:
            known = {trial.user_attrs.get(WARM_START) for trial in self.study.get_trials(deepcopy=False)}
            for trial in self.warm_start.trials(self.space, self.strategy):
                if trial.user_attrs[WARM_START] not in known:
                    self.study.add_trial(trial)

    @property
    def _time(self) -> TimeLeft:
        whole, least = self._refit_seconds(), self._refit_seconds(LEAST_REFIT)
        return TimeLeft(self.budget, self.pace, self.num_classes, whole, least)

    def _refit_seconds(self, share: float = 1.0) -> float | None:
        """That the winner's refit is expected to take with a share of its epochs; None without one. Most features are
        kept."""
        if self.winner is None:
            return None
        if self.budget is None or self.budget.limit is None or not (best := self.winner()):
            return 0.0
        training = 0.0 if best["kind"] == PROBE else share * best["seconds"]
        settings = self.space.full_settings | best
        judging = self.pace.validation_seconds((settings["arch"], int(settings["image_size"])))
        averaging = judging * (len(best[AVERAGES]) + 1) if best.get(AVERAGES) else 0.0
        return self.pace.refit_seconds(self.pace.fitting + training) + averaging

    def _has_time(self) -> bool:
        """Whether an epoch of any trial fits into what is left of the time budget."""
        settings, left = self.space.full_settings, self._time
        pairs = [settings, *({"arch": arch, "image_size": size} for arch, size in self.pace.forward)]
        archs = _archs(self.space) or (settings["arch"],)
        return any(left.epochs(settings | pair) >= 1 for pair in pairs if pair["arch"] in archs)

    def _most_epochs(self, config: Config) -> float:
        """That a trial may have in what is left of the time budget, at least 1. It is rounded down later, but what is
        nearly a whole epoch may use up the pace's slack."""
        return max(1, self._time.most_epochs(self.space.full_settings | config) + NEARLY)

    def _ask(self) -> tuple[optuna.Trial, Config]:
        self._skip_slow_archs()
        first = {}
        if len(self.numbers) < len(self.first_configs):
            first = self._in_time(self.first_configs[len(self.numbers)])
            self.study.enqueue_trial(params_of(self.space, first))
        trial = self.study.ask()
        return trial, first | propose(trial, self.space, self._most_epochs)

    def _in_time(self, config: Config) -> Config:
        """A config with fewer epochs where its own do not fit into the time budget."""
        if not isinstance(self.space.dimensions.get("epochs"), Range):
            return config
        return config | {"epochs": int(min(config["epochs"], self._most_epochs(config)))}

    def _skip_slow_archs(self) -> None:
        """While one config per architecture is tried, skip those that follow one above `target_seconds`."""
        num_proposed, limit = len(self.numbers), self.strategy.target_seconds
        if limit is None or not len(self._before_archs()) <= num_proposed < len(self.first_configs):
            return
        archs = _archs(self.space)
        trials = self.study.get_trials(deepcopy=False)
        slow = [archs.index(t.params["arch"]) for t in trials if t.user_attrs.get(_SECONDS, 0) > limit]
        first_slow = min(slow, default=len(archs))
        left = [config for config in self.first_configs[num_proposed:] if archs.index(config["arch"]) < first_slow]
        self.first_configs = self.first_configs[:num_proposed] + left

    def _retrain(self, trial_id: str) -> Config | str | None:
        """The next retraining. Which trials are the best is known when all have ended."""
        if set(self.live) & set(self.numbers):
            return None
        done, best = self.retrained.values(), self._ranked()[: self.strategy.confirm]
        todo = [c for c in retrainings(best, self._max_seed(), self.strategy.folds) if key(c) not in done]
        if not todo:
            return self._refit(trial_id)
        config = todo[0]
        num_workers = self._num_workers(config)
        if not self._has_room(num_workers):
            return None
        self.retrained[trial_id] = key(config)
        self.live[trial_id] = num_workers
        return config

    def _refit(self, trial_id: str) -> Config | str | None:
        """The winner again, on all images: the last proposal, unless it was made already or a time budget leaves no
        time for it."""
        if self.winner and self.live:  # one of them may win
            return None
        winner = self.winner() if self.winner else None
        if winner is None or winner["trial_id"] in self.refitted.values() or not self._time.for_refit:
            return Searcher.FINISHED
        config = self._config_of(winner["trial_id"])
        num_workers = self._num_workers(config)
        if not self._has_room(num_workers):
            return None
        config |= self._fewer_epochs((self.space.settings | config)["epochs"])
        self.refitted[trial_id] = winner["trial_id"]
        self.live[trial_id] = num_workers
        chosen = {
            REFIT_TEMPERATURE: winner.get("temperature", math.nan),
            REFIT_ALPHA: winner.get("wise_alpha", math.nan),
        }
        known = {name: value for name, value in chosen.items() if not math.isnan(value)}
        averages = {AVERAGES: winner[AVERAGES]} if winner.get(AVERAGES) else {}
        return config | {REFITS: winner["trial_id"]} | known | averages

    def _fewer_epochs(self, epochs: int) -> Config:
        """What changes in a refit for which there is no time with all of its epochs."""
        left, whole, without = self._time.all_seconds, self._refit_seconds(), self._refit_seconds(0.0)
        assert whole is not None and without is not None
        if whole <= left:
            return {}
        return {"epochs": max(1, int(epochs * (left - without) / (whole - without)))}

    def _config_of(self, winner: str) -> Config:
        """Of a trial or a probe by the table's id."""
        for trial_id, place in (self.screen.begun if self.screen else {}).items():
            if self.screen and text_id(trial_id) == winner:
                return {name: value for name, value in self.screen.config(place).items() if name != SCREENS}
        trials = self.study.get_trials(deepcopy=False)
        params = next(t.params for t in trials if text_id(t.user_attrs.get(_TUNE_ID, "")) == winner)
        return config_of(self.space, params)

    def _max_seed(self) -> int:
        """The highest seed that a trial can have: `--set` can pin or search it."""
        searched = self.space.dimensions.get("seed")
        return int(max(ends(searched)) if searched else self.space.settings.get("seed", self.space.seed))

    def _ranked(self) -> list[tuple[str, Config]]:
        """The table's id and config of the completed trials, best first: lowest objective, ties by validation loss."""
        done = own_trials(self.study, TrialState.COMPLETE)
        done = sorted(done, key=lambda trial: (trial.values[0], trial.user_attrs[_LOSS]))
        return [(text_id(trial.user_attrs[_TUNE_ID]), config_of(self.space, trial.params)) for trial in done]

    def _has_room(self, num_workers: int) -> bool:
        return self.capacity is None or self.capacity.has_room(self.capacity.weighed(self.live), num_workers)

    def _num_workers(self, config: Config) -> int:
        if self.capacity is None:
            return 1
        return self.capacity.group_size((self.space.settings | config)["arch"]).num_workers

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        running, progress = self._running(trial_id), result["progress"]
        if running is not None:
            self.pace.add(self.space.full_settings | config_of(self.space, running.params), result)
        # A study has one value per step, and none with two objectives. Progress stays 0 in the frozen stage, and a
        # restored trial repeats its last result.
        if running is None or len(self.study.directions) > 1:
            return
        if progress > 0 and progress not in running.intermediate_values:
            self._trial(running).report(result[OBJECTIVE], progress)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if self.capacity is not None:
            self.capacity.note_end(self.capacity.weighed(self.live))
        self.live.pop(trial_id, None)
        if self.screen and trial_id in self.screen.begun:
            return self._end_probe(trial_id, self.screen, result or {})
        running = self._running(trial_id)
        if running is None:
            return
        trial, result = self._trial(running), result or {}
        if error or result.get("failure") or "epoch" not in result:
            failure = result.get("failure") or ("error" if error else "ended before its first epoch")
            fail(self.study, trial, failure)
            return
        self.on_trial_result(trial_id, result)  # Tune passes a trial's last result to this method only
        seconds = result[_SECONDS] * result["epochs_total"] / max(1, result["epoch"])
        trial.set_user_attr(_SECONDS, seconds)  # of the whole training, even if it was stopped early
        trial.set_user_attr(_LOSS, result[_LOSS])
        if self.strategy.target_seconds:
            trial.set_constraint(_SECONDS, seconds - self.strategy.target_seconds)
        if result["epoch"] == result["epochs_total"]:
            self.study.tell(trial, [result[OBJECTIVE], seconds][: len(self.study.directions)])
        else:
            if result["progress"] == 0 and len(self.study.directions) == 1:  # all that it had
                trial.report(result[OBJECTIVE], 0)
            self.study.tell(trial, state=TrialState.PRUNED)

    def _end_probe(self, trial_id: str, screen: Screen, result: dict[str, Any]) -> None:
        probe = screen.end(trial_id, result)
        if probe is None:
            return
        config = screen.config(screen.begun[trial_id])
        self.pace.add(self.space.full_settings | config, result)
        pair = {name: config[name] for name in screen.pairs[0]}
        choices = {name: tuple(dict.fromkeys(other[name] for other in screen.pairs)) for name in pair}
        found = optuna.trial.create_trial(
            params=pair,
            distributions={name: optuna.distributions.CategoricalDistribution(of) for name, of in choices.items()},
            values=[probe.objective, result[_SECONDS]][: self.strategy.num_objectives],
            user_attrs={_TUNE_ID: trial_id, _LOSS: probe.valid_loss, _SECONDS: result[_SECONDS]},
        )
        study = self._open_study(probes_study(self.space.name))
        if all(trial.user_attrs[_TUNE_ID] != trial_id for trial in study.get_trials(deepcopy=False)):
            study.add_trial(found)  # a killed search may have added it before

    def end(self) -> None:
        """Forget the running trials: when a time budget or failures end the search, Tune does not report them. A
        resumed search repeats the probes and the retrainings among them."""
        if self.screen:
            self.screen.forget_running(begun_again=not self.numbers)
        self.retrained = {i: what for i, what in self.retrained.items() if i not in self.live}
        self.refitted = {i: what for i, what in self.refitted.items() if i not in self.live}
        self.live = {}

    def max_remaining(self) -> int:
        """Upper bound on the trials still to propose: some of the best may already have been retrained."""
        assert self.num_trials is not None  # Tune's searches have a number
        probes = self.screen.num_probes - len(self.screen.begun) if self.screen and not self.narrowed else 0
        refits = int(self.winner is not None)
        return max(0, self.num_trials - len(self.numbers)) + self.strategy.num_retrainings + probes + refits

    def save(self, checkpoint_path: str) -> None:
        """Save what the journal does not have: the sampler's random state and Tune's trial ids."""
        state = (self.sampler, self.numbers, self.retrained, self.refitted, self.live, self.screen, self.pace)
        Path(checkpoint_path).write_bytes(pickle.dumps(state))

    def restore(self, checkpoint_path: str) -> None:
        state = pickle.loads(Path(checkpoint_path).read_bytes())
        self.sampler, self.numbers, self.retrained, self.refitted, live, self.screen, self.pace = state
        self._study = self._waiting = None
        self._fail_forgotten_trials()
        running = {trial.number for trial in self._all_running()}
        probes = self.screen.begun if self.screen else {}
        trials = {i for i, number in self.numbers.items() if number in running}
        kept = {*self.retrained, *self.refitted, *probes, *trials}
        self.live = {i: n for i, n in live.items() if i in kept}

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles its searcher, and a journal's lock cannot be pickled.
        return self.__dict__ | {"_study": None, "_waiting": None}

    def _fail_forgotten_trials(self) -> None:
        """Fail the trials that were proposed after Tune last saved its state: their end will never be reported."""
        while self.study.get_trials(deepcopy=False, states=[TrialState.WAITING]):
            self.study.ask()  # empties the queue
        for frozen in self._all_running():
            if frozen.number not in self.numbers.values():
                fail(self.study, self._trial(frozen), FORGOTTEN)

    def _all_running(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=[TrialState.RUNNING])

    def _running(self, trial_id: str) -> FrozenTrial | None:
        number = self.numbers.get(trial_id)
        if number is None:
            return None
        storage, study_id = self.study._storage, self.study._study_id
        frozen = storage.get_trial(storage.get_trial_id_from_study_id_trial_number(study_id, number))
        return frozen if frozen.state == TrialState.RUNNING else None

    def _trial(self, frozen: FrozenTrial) -> optuna.Trial:
        return optuna.Trial(self.study, frozen._trial_id)


def probes_study(name: str) -> str:
    """The name of the study of a screen's probes, in a search of the space `name`."""
    return f"{name}: probes"


def _archs(space: Space) -> tuple[Any, ...]:
    """The architectures that the space searches, in its order: from cheap to expensive."""
    dimension = space.dimensions.get("arch")
    return dimension.values if isinstance(dimension, Choice) else ()


def _default_per_arch(space: Space, first: Sequence[Config]) -> list[Config]:
    """Trial 0 with each of the other architectures."""
    configs = [first[0] | {"arch": arch} for arch in _archs(space)]
    return [config for config in configs if config not in first]
