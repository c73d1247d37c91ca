"""`--warm-start`: what earlier runs of the user's have found, for the searcher of a new one.

An error is worth something only beside others of the same images and split, with the same weights and settings, by the
same metric. Such trials become trials of the new study before its first proposal. Of all others only the configs count:
the best of a run are proposed after trial 0.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from search.options.search_options import SearchOptions
from search.options.strategy import Strategy
from search.runs.atomic_files import write_atomically
from search.runs.command import CommandRecord, FilesRecord, ImagesRecord
from search.runs.objective import Objective
from search.runs.paths import RunFolder
from search.runs.run_record import RunRecord, load
from search.runs.study_journal import WARM_START, own_trials
from search.spaces.space import Choice, Space
from search.tuning.study_configs import Config, config_of_names, distributions_of, params_of
from trainables.inference.model_folder import read_json
from trainables.ray.trial import text_id
from trainables.recipe import Recipe, has_effect
from trainables.system.text import many

NUM_CONFIGS = 3
"""Of each run, that are proposed where its errors cannot be used."""
LEARNING = ("tpe", "gp")
"""The searchers that learn from trials which they have not proposed."""


@dataclass(frozen=True, kw_only=True)
class EarlierTrial:
    """A completed or pruned trial."""

    number: int
    """In the study of its run."""
    recipe: dict[str, Any]
    """All of its settings."""
    values: list[float] | None
    """None if it was pruned."""
    curve: dict[str, float]
    """What it reported, by its progress in percent."""
    seconds: float | None

    def same_in(self, space: Space) -> Config | None:
        """Its config in the space, if the space could have proposed this very recipe; the seed may differ."""
        config = {name: self.recipe[name] for name in space.in_order() if has_effect(name, self.recipe)}
        if any(not _contains(space, name, value) for name, value in config.items()):
            return None
        return config if _decisive(space.full(config)) == _decisive(self.recipe) else None

    def nearest_in(self, space: Space) -> Config | None:
        """The config of the space that is most like it: numbers are clipped. None where the space lacks its choices."""
        if any(isinstance(d, Choice) and self.recipe[name] not in d.values for name, d in space.dimensions.items()):
            return None
        return {name: dimension.clip(self.recipe[name]) for name, dimension in space.dimensions.items()}


@dataclass(frozen=True, kw_only=True)
class EarlierRun:
    """What a run has found; its completed trials come first, best first."""

    path: str
    """As the user gave it."""
    differs: str
    """Why its errors cannot be used, in words; empty if they can."""
    trials: tuple[EarlierTrial, ...]

    def comparable(self, space: Space) -> list[tuple[EarlierTrial, Config]]:
        """The trials that count as if the search had made them, with their configs."""
        if self.differs:
            return []
        return [(trial, config) for trial in self.trials if (config := trial.same_in(space))]

    def configs(self, space: Space) -> list[Config]:
        """Of the best trials whose choices the space has: those that do not count as trials."""
        done = [trial for trial in self.trials if trial.values is not None]
        possible = [(trial, config) for trial in done if (config := trial.nearest_in(space))][:NUM_CONFIGS]
        comparable = {trial.number for trial, _ in self.comparable(space)}
        return [config for trial, config in possible if trial.number not in comparable]

    def line(self, space: Space) -> str:
        """Such as "34 trials of results/a (same images)"."""
        trials, configs = len(self.comparable(space)), len(self.configs(space))
        if not trials + configs:
            return f"nothing of {self.path} ({self.differs or 'another space'}, and none of its choices is in this one)"
        counts = [many(trials, "trial")] * bool(trials) + [many(configs, "config")] * bool(configs)
        return f"{' and '.join(counts)} of {self.path} ({self.differs or _same(trials)})"


def _same(trials: int) -> str:
    return "same images" if trials else "same images, but other settings"


@dataclass(frozen=True)
class WarmStart:
    """The earlier runs of a search, in the order in which the user gave them."""

    runs: tuple[EarlierRun, ...]

    @property
    def num_trials(self) -> int:
        return sum(len(run.trials) for run in self.runs)

    def configs(self, space: Space) -> list[Config]:
        """What is proposed after trial 0, each once."""
        found: list[Config] = []
        for run in self.runs:
            found += [config for config in run.configs(space) if config not in found]
        return found

    def trials(self, space: Space, strategy: Strategy) -> list[FrozenTrial]:
        """What the study has before the first proposal, marked as `WARM_START`."""
        return [
            _as_trial(trial, config, space, strategy, f"{run.path} trial {trial.number}")
            for run in self.runs
            for trial, config in run.comparable(space)
        ]

    def line(self, space: Space) -> str:
        return f"warm start: {', '.join(run.line(space) for run in self.runs)}"

    def save(self, folder: RunFolder) -> None:
        write_atomically(folder.warm_start, json.dumps(asdict(self)) + "\n")

    @classmethod
    def load(cls, folder: RunFolder) -> "WarmStart | None":
        """What a run was begun with; None if with nothing. Raises `ValueError` where the file is damaged."""
        if not folder.warm_start.is_file():
            return None
        try:
            return cls(
                tuple(
                    EarlierRun(**run | {"trials": tuple(EarlierTrial(**trial) for trial in run["trials"])})
                    for run in read_json(folder.warm_start)["runs"]
                )
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"{folder.warm_start} is damaged: {error!r}. Restore it from a copy.") from error


def _as_trial(trial: EarlierTrial, config: Config, space: Space, strategy: Strategy, mark: str) -> FrozenTrial:
    limit, seconds = strategy.target_seconds, trial.seconds
    return optuna.trial.create_trial(
        state=TrialState.PRUNED if trial.values is None else TrialState.COMPLETE,
        params=params_of(space, config),
        distributions=distributions_of(space, config),
        values=trial.values,
        intermediate_values={int(progress): value for progress, value in trial.curve.items()},
        user_attrs={WARM_START: mark},
        constraints={"seconds": seconds - limit} if limit and seconds is not None else None,
    )


def _contains(space: Space, name: str, value: Any) -> bool:
    dimension = space.dimensions[name]
    return value in dimension.values if isinstance(dimension, Choice) else bool(dimension.clip(value) == value)


def _decisive(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that decide what a training is expected to end with."""
    return {name: value for name, value in settings.items() if name != "seed" and has_effect(name, settings)}


# --- Reading runs -----------------------------------------------------------------------------------------------------


def new_warm_start(
    options: SearchOptions, space: Space, images: ImagesRecord, groups: str, files: FilesRecord
) -> WarmStart | None:
    """What `--warm-start` names, for a search with these options, images, groups and files; None without it.

    Raises `ValueError` where a path is no run, or where no trial of it has ended.
    """
    paths = {Path(path).resolve(): path for path in reversed(options.warm_start)}
    runs = []
    for path in reversed(paths.values()):
        try:
            run = load(path)
            trials = _trials_of(run)
        except ValueError as error:
            raise ValueError(f"--warm-start: {error}") from error
        differs = _difference(run.command, options, space, images, groups, files)
        runs.append(EarlierRun(path=str(run.folder), differs=differs, trials=trials))
    return WarmStart(tuple(runs)) if runs else None


def _trials_of(run: RunRecord) -> tuple[EarlierTrial, ...]:
    """The run's own trials that have completed, best first, then those that were pruned. Raises `ValueError`."""
    try:
        own = own_trials(run.study, TrialState.COMPLETE, TrialState.PRUNED)
    except (KeyError, ValueError):  # no journal yet, or one with the probes alone
        own = []
    place = {trial_id: place for place, trial_id in enumerate(run.whole["trial_id"])}
    if not own:
        raise ValueError(f"no trial of {run.folder} has completed or was stopped early: there is nothing to learn from")
    own.sort(key=lambda t: (t.state != TrialState.COMPLETE, place.get(_table_id(t), len(place)), t.values or []))
    return tuple(_earlier_trial(run, trial) for trial in own)


def _table_id(trial: FrozenTrial) -> str:
    return text_id(trial.user_attrs.get("trial_id", ""))


def _earlier_trial(run: RunRecord, trial: FrozenTrial) -> EarlierTrial:
    config = config_of_names(run.dimensions, trial.params)
    try:
        recipe = Recipe.from_dict(run.space.get("settings", {}) | config).to_dict()
    except ValueError as error:
        raise ValueError(f"trial {trial.number} of {run.folder} has settings of another version: {error}") from error
    return EarlierTrial(
        number=trial.number,
        recipe=recipe,
        values=trial.values if trial.state == TrialState.COMPLETE else None,
        curve={str(progress): value for progress, value in trial.intermediate_values.items()},
        seconds=trial.user_attrs.get("seconds"),
    )


def _difference(
    command: CommandRecord,
    options: SearchOptions,
    space: Space,
    images: ImagesRecord,
    groups: str,
    files: FilesRecord,
) -> str:
    """Why the errors of a run are not those of this search; empty if they are."""
    if command.images is None or command.images.digest != images.digest:
        return "other images"
    if (command.groups or "") != groups or command.split_seed != space.split_seed:
        return "same images, but another split"
    if (there := command.arguments.metric) != options.metric:
        return f"same images, but it minimised {Objective(there).name}, not {Objective(options.metric).name}"
    then, now = (command.strategy or command.arguments.strategy), options.strategy
    if then.num_objectives != now.num_objectives:
        return f"same images, but it has {many(then.num_objectives, 'objective')}, not {now.num_objectives}"
    if _differ(command.files.weights, files.weights):
        return "same images, but other weights"
    if now.searcher not in LEARNING:
        return f"same images, but --searcher {now.searcher} does not learn from them"
    return ""


def _differ(some: Mapping[str, str] | None, others: Mapping[str, str] | None) -> bool:
    """Whether two records of `--weights` differ in an architecture that both have."""
    if some is None or others is None:
        return some is not others
    return any(some[arch] != others[arch] for arch in set(some) & set(others))
