"""How a search goes: who proposes trials, which ones end early, what is to be small, and what confirms the winner."""

from dataclasses import dataclass

SEARCHERS = ("tpe", "random", "gp", "cmaes")
SCHEDULERS = ("rungs", "halving", "median", "none")
OBJECTIVES = ("error", "error,seconds")
CONFIRM_SEEDS = 3
"""So often each of the best configs is trained again with `--confirm`."""


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """Raises `ValueError` where its parts do not fit each other."""

    searcher: str = "tpe"
    scheduler: str = "rungs"
    objective: str = "error"
    target_seconds: float | None = None
    """Trials that train longer, validation included, are proposed only where nothing shorter is promising."""
    confirm: int = 0
    """How many of the best are trained again with other seeds."""

    def __post_init__(self) -> None:
        if self.num_objectives > 1 and self.searcher == "cmaes":
            raise ValueError(
                f"--objective {self.objective}: --searcher cmaes knows one objective. Take tpe, gp or random."
            )
        if self.num_objectives > 1 and self.scheduler != "none":
            raise ValueError(
                f"--objective {self.objective}: --scheduler {self.scheduler} ends trials by their error, and a quick "
                "one of a higher error may be what is wanted. Leave --scheduler out."
            )
        if self.target_seconds and self.scheduler == "halving":
            raise ValueError(
                "--target-seconds: --scheduler halving trains what was good at first for longer, whatever it takes. "
                "Take rungs, median or none."
            )
        if self.target_seconds and self.searcher not in ("tpe", "gp"):
            raise ValueError(
                f"--target-seconds: --searcher {self.searcher} cannot prefer quick trials. Take tpe or gp."
            )

    @property
    def num_objectives(self) -> int:
        return len(self.objective.split(","))

    @property
    def num_retrainings(self) -> int:
        return CONFIRM_SEEDS * self.confirm
