"""What a run left, for a notebook, the report and the comparison: tables as pandas frames, study, best recipe."""

import io
import math
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from search.runs.command import CommandRecord
from search.runs.csv_file import Parser, Row, as_csv, read_table
from search.runs.kept_models import REFIT
from search.runs.kinds import PROBE, TRIAL, how_many, name_of
from search.runs.objective import Objective
from search.runs.paths import RunFolder
from search.runs.result_rows import (
    COMPLETED,
    EPOCH_NEEDED,
    EPOCH_PARSERS,
    OF_OBJECTIVE,
    SCORES,
    TRIAL_NEEDED,
    TRIAL_PARSERS,
    expected_objective,
    leaders,
    pareto_front,
)
from search.runs.statistics import describe_lead, wilson_interval
from search.runs.trained_model import require_run
from trainables.inference.model_folder import METRICS_FILE, read_json, read_model
from trainables.recipe import Recipe
from trainables.system.text import duration, shell_command


def load(path: Path | str) -> "RunRecord":
    """See `search.load`."""
    path = Path(path).expanduser()
    require_run(path)
    return RunRecord(path)


class RunRecord:
    """What a run has found. The tables are those at the time of loading.

    Args:
        path: The folder of the run, such as `results/<name>`.

    Attributes:
        trials: One row per trial, by its number; `results/README.md` explains the columns.
        epochs: One row per epoch.
        dimensions: The names of the searched settings.
        command: What the run was asked for, with versions and hardware.

    Raises:
        ValueError: There is no run, a file of it is damaged, or a later version wrote it.

    Example:
        >>> run = RunRecord("results/pets")
        >>> run.trials.groupby("arch")["error_rate"].min().to_dict()
        {'resnet18': 0.25, 'resnet34': 0.3}
    """

    def __init__(self, path: Path | str) -> None:
        self.folder = RunFolder(Path(path))
        self.path = self.folder.path
        self.command = CommandRecord.load(self.path)
        self.space: dict[str, Any] = read_json(self.folder.space)
        self.dimensions = list(self.space["dimensions"])
        trials = _read_table(self.folder.trials, TRIAL_PARSERS, TRIAL_NEEDED, key="number")
        if "kind" not in trials:  # an earlier version knew no probes
            trials.insert(2, "kind", TRIAL)
        self.trials = trials.set_index("number", drop=False).rename_axis(None)
        """One row per trial, by its number."""
        self.epochs = _read_table(self.folder.epochs, EPOCH_PARSERS, EPOCH_NEEDED)
        """One row per epoch; `number` is its trial's."""
        self.stops = self.folder.stop_reasons()
        """Why trials were stopped early, by Tune's trial id."""
        self.stop_rungs = self.folder.stop_rungs()
        """The rung, in percent, at which they were."""

    def is_log(self, dimension: str) -> bool:
        """Whether a dimension is a logarithmic range; runs of earlier versions do not tell."""
        saved = self.space["dimensions"][dimension]
        return isinstance(saved, dict) and saved.get("log", False)

    @cached_property
    def completed(self) -> pd.DataFrame:
        """The completed trials and, by their last epoch, the unfinished ones, best first, see `result_rows.rank`."""
        return self._rows_of(leaders(self._records))

    @property
    def objective(self) -> Objective:
        """What the search minimises."""
        return Objective(self.command.arguments.metric)

    @property
    def expected(self) -> pd.Series:
        """The expected objective of each trial by itself, see `result_rows.expected_alone`."""
        seen = self.trials[self.objective.column]
        return self.trials.get(self.objective.expected_column, seen).fillna(seen)

    @cached_property
    def _records(self) -> list[Row]:
        return records(self.trials)

    def _rows_of(self, records: Iterable[Row]) -> pd.DataFrame:
        return self.trials.loc[[row["number"] for row in records]]

    @property
    def best(self) -> pd.Series | None:
        """The winner's row, or None before a trial has completed."""
        return None if self.completed.empty else self.completed.iloc[0]

    @property
    def first(self) -> pd.Series | None:
        """The row of trial 0, the space's own recipe, or None unless it completed."""
        at = self.completed["number"] == 0
        return self.completed[at].iloc[0] if at.any() else None

    @cached_property
    def tuned(self) -> pd.DataFrame:
        """Those of `completed` that were fine-tuned."""
        return self.completed[self.completed["kind"] == TRIAL]

    @cached_property
    def whole(self) -> pd.DataFrame:
        """Those of `tuned` that have made all their epochs: what the study has learned from."""
        return self.tuned[self.tuned["status"] == COMPLETED]

    @property
    def probe(self) -> pd.Series | None:
        """The row of the best probe, or None without one."""
        probes = self.completed[self.completed["kind"] == PROBE]
        return None if probes.empty else probes.iloc[0]

    @cached_property
    def pareto_front(self) -> pd.DataFrame:
        """The completed trials that no other one beats in both objective and seconds, cheapest first."""
        return self._rows_of(pareto_front(self._records))

    @property
    def refit(self) -> dict[str, Any] | None:
        """Of the model in `best/`, if it was trained again on all images: the `number` of its trial, its
        `train_images`, and its `error_rate` on those for validation among them."""
        found = read_json(self.folder.best / METRICS_FILE) if self.folder.best.is_dir() else {}
        return {"number": found["number"]} | found[REFIT] if REFIT in found else None

    @property
    def best_recipe(self) -> Recipe | None:
        """Every hyperparameter of the winner."""
        return read_model(self.folder.best).recipe if self.folder.best.is_dir() else None

    @property
    def later_commands(self) -> list[str]:
        """The commands that have changed the run since it was begun, such as one for more trials."""
        return [shell_command("search.run", *resume.argv) for resume in self.command.resumes if resume.changed]

    @property
    def labels(self) -> list[str]:
        """Class names; none before a trial has completed."""
        return list(read_model(self.folder.best).labels) if self.folder.best.is_dir() else []

    @property
    def num_train(self) -> int | None:
        """Training images, or None before the first epoch."""
        return self._num_images("train_images")

    @property
    def num_valid(self) -> int | None:
        """Validation images, or None before the first epoch."""
        return self._num_images("valid_images")

    def _num_images(self, column: str) -> int | None:
        return int(self.epochs[column].iloc[-1]) if column in self.epochs and len(self.epochs) else None

    def interval(self, row: pd.Series) -> tuple[float, float] | None:
        """The 95 % Wilson interval of a trial's validation error rate; None where it has none."""
        error = row["error_rate"]
        return wilson_interval(error, self.num_valid) if self.num_valid and not math.isnan(error) else None

    @property
    def lead(self) -> str:
        """What the winner's lead on trial 0 is worth, in words; empty without both. Where one was trained again, that
        mean counts instead of the one training."""
        best, first = self.best, self.first
        if best is None or first is None or best.name == first.name or not self.num_valid:
            return ""
        others = self.completed.drop(index=first.name)
        return self._lead_of(best, first, others, than=name_of(0))

    @property
    def fine_tuning(self) -> str:
        """Whether the best fine-tuned trial is better than the best probe, in words; empty without both. As the best of
        its kind, the probe's error is a little too low as well, which the interval leaves out."""
        tuned, probe = self.tuned, self.probe
        if tuned.empty or probe is None or not self.num_valid:
            return ""
        best = tuned.iloc[0]
        if expected_objective(best) >= expected_objective(probe):
            return f"no better than the best probe, which trained in {duration(probe['seconds'])}"
        return self._lead_of(best, probe, tuned, than="the best probe")

    def _lead_of(self, row: pd.Series, other: pd.Series, candidates: pd.DataFrame, *, than: str) -> str:
        """What the lead of a row, the best of the candidates, over another is worth, in words."""
        assert self.num_valid  # see the callers
        among, count = how_many(candidates["kind"]), len(candidates)
        errors = expected_objective(row), expected_objective(other)
        if not self.objective.is_error_rate:
            return self.objective.lead(*errors, than=than)
        return describe_lead(*errors, self.num_valid, among=among, count=count, than=than)

    def setting(self, row: Mapping[str, Any] | pd.Series, name: str) -> Any:
        """A row's value of a setting, searched or not; empty where it is not known."""
        return row[name] if name in row else self.space.get("settings", {}).get(name, "")

    @cached_property
    def study(self) -> optuna.Study:
        """The Optuna study as it is in the run's journal. Raises `ValueError` where there is none yet."""
        if not self.folder.journal.is_file():  # Optuna would create one
            raise ValueError(f"{self.folder} has no study yet: no trial has started.")
        storage = JournalStorage(JournalFileBackend(str(self.folder.journal)))
        return optuna.load_study(study_name=self.space["name"], storage=storage)


def records(table: pd.DataFrame) -> list[Row]:
    """Its rows; a row of pandas takes a hundred times as long to make."""
    names = list(map(str, table.columns))
    return [dict(zip(names, row, strict=True)) for row in table.itertuples(index=False, name=None)]


def _read_table(path: Path, parsers: dict[str, Parser], needed: Iterable[str], key: str | None = None) -> pd.DataFrame:
    """Only an empty field is missing; `none` is the name of a setting's value. Raises `ValueError`."""
    if not path.is_file():
        raise ValueError(f"{path.parent} has no {path.name} yet: its first trial has not started.")
    columns, rows = read_table(path, parsers, needed, key)
    table = pd.read_csv(io.StringIO(as_csv(columns, rows)), keep_default_na=False, na_values=[""])
    # pandas cannot infer the type of a column without values.
    table = table.astype({name: float for name in (*SCORES, *OF_OBJECTIVE) if name in table})
    return table.assign(reason=table["reason"].astype(object).fillna("")) if "reason" in table else table
