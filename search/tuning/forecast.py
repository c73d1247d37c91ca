"""A trial's final metric, forecast late in its schedule from its metric so far and its config.

Under a one-cycle schedule the metric at a rung says as much about the rate there as about the trial: a high `lr_max`
hides what has been learned until the rate comes down. A ridge regression on the search's own finished trials takes that
out, after Baker et al. 2017, "Accelerating Neural Architecture Search using Performance Prediction", who regress on
configs and partial curves as well. While few have finished, trials keep the order that their metrics have at the rung.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from search.spaces.space import Space

TRUST = 0.5
"""Of a difference at the rung, the share that is there in the end, until finished trials say otherwise."""
PENALTY = 1.0
"""Of a squared slope, beside the squared errors of the regression: the higher, the more trials it takes to believe that
a setting makes a difference. Coordinates go from 0 to 1."""
LIGHT_PENALTY = 0.1
"""Of what is known beforehand to decide how much of a metric is the rate's."""
LIGHT = ("metric", "progress", "lr_max")


@dataclass(frozen=True)
class AtRung:
    """What a forecast is made from."""

    metric: float
    progress: int
    """Percent of the unfrozen stage."""
    point: Sequence[float | None]
    """The config's coordinates, see `Space.coordinates`."""


def forecast(space: Space, finished: Sequence[AtRung], finals: Sequence[float], asked: Sequence[AtRung]) -> np.ndarray:
    """The final metrics (asked,) to be expected, given those of finished trials, and what these were at the rung."""
    now = np.array([one.metric for one in asked])
    if not finished:
        return now
    known, wanted = _features(finished), _features(asked)
    middle = _mean(known)
    known, wanted = (np.nan_to_num(rows - middle) for rows in (known, wanted))  # what has no effect is in the middle
    left = np.asarray(finals) - TRUST * np.array([one.metric for one in finished])
    names = ("metric", "progress", *space.dimensions)
    penalties = np.diag([LIGHT_PENALTY if name in LIGHT else PENALTY for name in names])
    slopes = np.linalg.solve(known.T @ known + penalties, known.T @ (left - left.mean()))
    return TRUST * now + left.mean() + wanted @ slopes


def _features(trials: Sequence[AtRung]) -> np.ndarray:
    """(trials, 2 + dimensions); all of them 0 to 1, or NaN."""
    return np.array([(one.metric, one.progress / 100, *one.point) for one in trials], dtype=float)


def _mean(rows: np.ndarray) -> np.ndarray:
    """(columns,) over the rows that have a number there; 0 where none has."""
    given = ~np.isnan(rows)
    return np.where(given, rows, 0).sum(axis=0) / np.maximum(1, given.sum(axis=0))
