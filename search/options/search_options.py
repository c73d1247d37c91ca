"""What a search is asked for: the command line of `search.run` as one object, and as a run's command.json keeps it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from search.options.strategy import Strategy
from search.spaces.space import space_name
from trainables.data.fetch import is_uri
from trainables.data.labelled_images import MAX_UNREADABLE
from trainables.system.gpu_share import num_sharing

OF_THIS_START = ("given", "describe", "dry_run", "resume", "trust")
"""Options that say how this command starts; a run does not keep them."""
MAX_TRIALS_PER_GPU = 48
"""The processes that CUDA's MPS serves on a GPU."""
CONFIRMED_IN_FOLDS = 3
"""With `--folds` and without `--confirm`."""
EARLIER = {"space": "", "metric": "error_rate", "refit": "off"}
"""What the record of a version means that did not know these options yet."""
OLD_SCHEDULERS = {"annealed": "halving"}
"""Names in the records of earlier versions."""


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """The options of `search.run`, each under its name there. Raises `ValueError` where they contradict each other."""

    space: str | None = None  # None: the one for `data`; only a resumed run knows its own
    set: tuple[str, ...] = ()
    data: Path | str | None = None  # a folder or a URI; None: the space's own
    weights: Path | str | None = None
    test_split: float | Path | None = None
    group: str | None = None  # parent, column, duplicates or a regular expression, see `groups.grouped`
    leave_out: Path | None = None  # a CSV file
    recipes: str | None = None
    warm_start: tuple[Path, ...] = ()  # the folders of earlier runs
    describe: bool = False
    dry_run: bool = False
    max_unreadable: float = MAX_UNREADABLE
    trials: int | None = None
    time_budget: float | None = None  # seconds
    searcher: str = "tpe"
    scheduler: str | None = None
    objective: str = "error"
    metric: str = "auto"  # one of `METRICS`; auto: by the balance of the classes
    target_seconds: float | None = None
    confirm: int = 0
    folds: int = 0  # 0: `confirm` trains with other seeds
    screen: str = "auto"  # how many architectures are fine-tuned after it, a number; auto: the best third; off
    lr_range: str = "space"
    seed: int | None = None
    address: str | None = None
    workers_per_trial: tuple[str, ...] = ()
    cpus_per_worker: float | None = None
    gpus_per_worker: float | None = None  # a whole number, or a share of one GPU
    trials_per_gpu: str = "1"  # how many share one, a number; auto: as many as pay
    max_concurrent: int | None = None  # None: as many as fit
    stall_timeout: float = 600.0
    cache: str = "auto"
    results: Path = Path("results")
    name: str | None = None
    storage: str | None = None
    keep: int = 3
    keep_epoch: str = "last"
    refit: str = "on"  # whether the winner is trained again on all images; off
    report: str = "full"
    resume: bool = False
    trust: bool = False
    given: frozenset[str] = field(default=frozenset(), compare=False)
    """The options that the command line names, even with their default."""

    def __post_init__(self) -> None:
        recipes = "--recipes runs each of the recipes once"
        if not self.resume:
            object.__setattr__(self, "space", space_name(self.space, self.data))
        if self.resume and self.name is None:
            raise ValueError("--resume requires --name, the folder of the run to resume")
        if self.dry_run and self.resume:
            raise ValueError("--dry-run plans a new search; it cannot be combined with --resume")
        if self.recipes and self.trials:
            raise ValueError(f"--trials cannot be combined with --recipes: {recipes}")
        if self.recipes and self.lr_range == "auto":
            raise ValueError("--lr-range auto has nothing to narrow: --recipes fixes the rates of every trial")
        if self.recipes and self.warm_start:
            raise ValueError(f"--warm-start cannot be combined with --recipes: {recipes}")
        if self.recipes and (self.target_seconds or self.objective != "error"):
            raise ValueError(f"--objective and --target-seconds cannot be combined with --recipes: {recipes}")
        self._check_sharing()
        _ = self.strategy  # checks that its parts fit each other

    def _check_sharing(self) -> None:
        """Raises `ValueError` where trials cannot share a GPU."""
        if self.trials_per_gpu != "1" and self.gpus_per_worker is not None:
            raise ValueError(
                f"--trials-per-gpu {self.trials_per_gpu} and --gpus-per-worker {self.gpus_per_worker:g} both say what "
                "a trial gets of a GPU: give one of them (--trials-per-gpu 4 is --gpus-per-worker 0.25)"
            )
        asked = f"--trials-per-gpu {self.trials_per_gpu}"
        if self.gpus_per_worker is not None:
            asked = f"--gpus-per-worker {self.gpus_per_worker:g}"
        if (self.max_trials_per_gpu or 0) > MAX_TRIALS_PER_GPU:
            raise ValueError(f"{asked}: at most {MAX_TRIALS_PER_GPU} trials can share a GPU")
        if self.max_trials_per_gpu == 1:
            return
        num_workers, by_arch = self.num_workers
        if max([num_workers, *by_arch.values()]) > 1:
            raise ValueError(
                f"{asked} cannot be combined with --workers-per-trial {' '.join(self.workers_per_trial)}: only trials "
                "of one worker can share a GPU, since NCCL refuses to run two workers on one. Omit either"
            )
        if self.max_trials_per_gpu is None and (self.target_seconds or "seconds" in self.objective):
            raise ValueError(
                f"{asked} changes how long trials take while the search compares them by it (--objective "
                "error,seconds and --target-seconds). Give a number of trials instead"
            )

    @property
    def max_trials_per_gpu(self) -> int | None:
        """How many trials share a GPU; None: the search finds out."""
        if self.gpus_per_worker is not None and 0 < self.gpus_per_worker < 1:
            return num_sharing(self.gpus_per_worker)
        return None if self.trials_per_gpu == "auto" else int(self.trials_per_gpu)

    @property
    def strategy(self) -> Strategy:
        """How the search proposes, stops and compares trials."""
        if self.recipes:  # all are proposed already, and none ends early
            return Strategy(searcher="random", scheduler="none", confirm=self.num_confirmed, folds=self.folds)
        return Strategy(
            searcher=self.searcher,
            scheduler=self.scheduler or ("forecast" if self.objective == "error" else "none"),
            objective=self.objective,
            target_seconds=self.target_seconds,
            confirm=self.num_confirmed,
            folds=self.folds,
        )

    @property
    def num_confirmed(self) -> int:
        """How many of the best are trained again."""
        return self.confirm or (CONFIRMED_IN_FOLDS if self.folds else 0)

    @property
    def num_workers(self) -> tuple[int, dict[str, int]]:
        """The workers of a trial, and those of some architectures by their pattern."""
        parts = [text.rpartition("=") for text in self.workers_per_trial]
        everywhere = [int(count) for pattern, _, count in parts if not pattern]
        return everywhere[-1] if everywhere else 1, {pattern: int(count) for pattern, _, count in parts if pattern}

    @property
    def held_out_share(self) -> float | None:
        """The share of every class that `--test-split` holds out; None without one, or for a folder."""
        return self.test_split if isinstance(self.test_split, float) else None

    @property
    def test_folder(self) -> Path | None:
        """The folder of test images that `--test-split` names, if it does."""
        return self.test_split if isinstance(self.test_split, Path) else None

    def to_record(self) -> dict[str, Any]:
        """The options as JSON can hold them, in a run's command.json."""
        values = {spec.name: getattr(self, spec.name) for spec in fields(self) if spec.name not in OF_THIS_START}
        return {name: _plain(value) for name, value in values.items()}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "SearchOptions":
        """The options in a record of this version or an earlier one, which may lack some. Raises `ValueError`."""
        names = [spec.name for spec in fields(cls) if spec.name in record and spec.name not in OF_THIS_START]
        kept = {name: record[name] for name in names if record[name] is not None}
        return cls(**EARLIER | {name: READERS[name](v) if name in READERS else v for name, v in kept.items()})


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value


def folder_or_uri(text: str) -> Path | str:
    """The absolute folder, because workers and a resumed search may be in another one; a URI as it is."""
    return text if is_uri(text) else absolute(text)


def absolute(text: str) -> Path:
    return Path(text).expanduser().absolute()


READERS: dict[str, Callable[[Any], Any]] = {
    "set": tuple,
    "workers_per_trial": tuple,
    "data": folder_or_uri,
    "weights": folder_or_uri,
    "test_split": lambda value: value if isinstance(value, float) else Path(value),
    "leave_out": Path,
    "warm_start": lambda paths: tuple(map(Path, paths)),
    "scheduler": lambda name: OLD_SCHEDULERS.get(name, name),
    "max_concurrent": lambda number: None if number == "auto" else number,
    "results": Path,
}
"""How options are read back that JSON holds in another form."""
