"""The best configs of a search are trained again and ranked by the mean of these: with new seeds (`--confirm K`), or in
the other folds of the images (`--folds K`)."""

from collections.abc import Iterable
from typing import Any

from search.options.strategy import CONFIRM_SEEDS
from trainables.ray.trial import FOLD, RETRAINS


def retrainings(best: Iterable[tuple[str, dict[str, Any]]], seed: int, folds: int = 0) -> list[dict[str, Any]]:
    """Configs of all retrainings, the best trial's first. Their seeds are above `seed`, the highest of the search; with
    `folds`, they are the trial's own."""
    others = [{FOLD: fold} for fold in range(1, folds)]
    others = others or [{"seed": new} for new in range(seed + 1, seed + 1 + CONFIRM_SEEDS)]
    return [config | other | {RETRAINS: trial_id} for trial_id, config in best for other in others]


def key(config: dict[str, Any]) -> tuple[str, int]:
    """What tells a retraining from the others: the table's id of its trial, and its fold or seed."""
    return config[RETRAINS], config[FOLD] if FOLD in config else config["seed"]
