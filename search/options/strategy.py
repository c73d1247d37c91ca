"""How a search works: who proposes trials, which ones end early, what is minimised, and what confirms the winner."""

from dataclasses import dataclass

SEARCHERS = ("tpe", "random", "gp", "cmaes")
SCHEDULERS = ("forecast", "rungs", "halving", "median", "none")
OBJECTIVES = ("error", "error,seconds")
CONFIRM_SEEDS = 3
"""How often each of the best configs is trained again with `--confirm`."""


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """Raises `ValueError` where its parts do not fit each other."""

    searcher: str = "tpe"
    scheduler: str = "forecast"
    objective: str = "error"
    target_seconds: float | None = None
    """Trials that train longer, validation included, are proposed only where nothing shorter is promising."""
    confirm: int = 0
    """How many of the best are trained again, with other seeds or in other folds."""
    folds: int = 0
    """How many folds the images have, in each of which the best are validated once; 0: they get other seeds."""

    def __post_init__(self) -> None:
        if self.num_objectives > 1 and self.searcher == "cmaes":
            raise ValueError(
                f"--objective {self.objective}: --searcher cmaes supports one objective only. Use tpe, gp or random."
            )
        if self.num_objectives > 1 and self.scheduler not in ("forecast", "none"):
            raise ValueError(
                f"--objective {self.objective}: --scheduler {self.scheduler} ends trials by their error, but a quick "
                "one with a higher error may be wanted. Use forecast or none."
            )
        if self.target_seconds and self.scheduler == "halving":
            raise ValueError(
                "--target-seconds: --scheduler halving trains the best short trials for longer, however long that "
                "takes. Use forecast, rungs, median or none."
            )
        if self.target_seconds and self.searcher not in ("tpe", "gp"):
            raise ValueError(f"--target-seconds: --searcher {self.searcher} cannot prefer quick trials. Use tpe or gp.")

    @property
    def num_objectives(self) -> int:
        return len(self.objective.split(","))

    @property
    def num_again(self) -> int:
        """How often each of the best is trained again."""
        return self.folds - 1 if self.folds else CONFIRM_SEEDS

    @property
    def num_retrainings(self) -> int:
        return self.num_again * self.confirm
