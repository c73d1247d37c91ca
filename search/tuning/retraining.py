"""`--confirm K`: the best K configs of a search are trained again with new seeds, and ranked by the mean of these."""

from collections.abc import Iterable
from typing import Any

from search.options.strategy import CONFIRM_SEEDS
from trainables.ray.trial import RETRAINS


def retrainings(best: Iterable[tuple[str, dict[str, Any]]], seed: int) -> list[dict[str, Any]]:
    """Configs of all retrainings, the best trial's first. Their seeds are above `seed`, the highest of the search."""
    seeds = range(seed + 1, seed + 1 + CONFIRM_SEEDS)
    return [config | {"seed": new, RETRAINS: trial_id} for trial_id, config in best for new in seeds]
