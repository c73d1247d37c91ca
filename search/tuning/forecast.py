"""A trial's final metric, forecast late in its schedule from its metric so far and its config.

Under a one-cycle schedule the metric at a rung depends as much on the learning rate there as on the trial: a high
`lr_max` hides progress until the rate decays. A ridge regression on the search's own finished trials corrects for that,
after Baker et al. 2017, "Accelerating Neural Architecture Search using Performance Prediction", who also regress on
configs and partial curves. While few trials have finished, the forecasts keep the order of the metrics at the rung.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from search.spaces.space import Space

PRIOR_SLOPE = 0.5
"""Prior of the final difference between two trials per difference at the rung."""
PENALTY = 1.0
"""Ridge penalty of a squared slope. The higher it is, the more trials it takes until a setting counts. Coordinates go
from 0 to 1."""
LIGHT_PENALTY = 0.1
"""Penalty of the features that are known to determine the effect of the learning rate."""
LIGHT = ("metric", "progress", "lr_max")

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class AtRung:
    """The input of a forecast: a trial at a rung."""

    metric: float
    progress: int
    """Percent of the unfrozen stage that is done."""
    point: Sequence[float | None]
    """The config's coordinates, see `Space.coordinates`."""
    probe: float | None = None
    """The metric of the probe that the trial started from, if it did."""


def forecast(space: Space, finished: Sequence[AtRung], finals: Sequence[float], asked: Sequence[AtRung]) -> Floats:
    """The expected final metrics (asked,), given finished trials at the rung and their final metrics."""
    now: Floats = np.array([trial.metric for trial in asked], dtype=float)
    if not finished:
        return now
    known, wanted = _features(finished), _features(asked)
    mean = _mean(known)
    known, wanted = (np.nan_to_num(rows - mean) for rows in (known, wanted))  # settings without effect count as average
    residuals = np.asarray(finals) - PRIOR_SLOPE * np.array([trial.metric for trial in finished])
    names = ("metric", "progress", "probe", *space.dimensions)
    penalties = np.diag([LIGHT_PENALTY if name in LIGHT else PENALTY for name in names])
    slopes = np.linalg.solve(known.T @ known + penalties, known.T @ (residuals - residuals.mean()))
    forecasts: Floats = PRIOR_SLOPE * now + residuals.mean() + wanted @ slopes
    return forecasts


def _features(trials: Sequence[AtRung]) -> Floats:
    """(trials, 3 + dimensions): 0 to 1, or NaN."""
    return np.array([(t.metric, t.progress / 100, t.probe, *t.point) for t in trials], dtype=float)


def _mean(rows: Floats) -> Floats:
    """(columns,): without NaN, which `np.nanmean` would warn about; 0 for a column of NaN."""
    given = ~np.isnan(rows)
    means: Floats = np.where(given, rows, 0).sum(axis=0) / np.maximum(1, given.sum(axis=0))
    return means
