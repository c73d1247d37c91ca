"""How a trial will end, from its learning curve so far: a forecast with its uncertainty.

Bayesian linear regression of the logarithm of the final metric, on what a trial shows after an epoch: its metric, its
best one, its probe's, its validation loss and its trend, against the search's incumbent, and its config. How much each
of these counts changes with the progress through the one-cycle schedule. The prior comes from whole learning curves of
several sets of images, see bench/curve_prior.py, so there are forecasts from the first epochs of a search on; its own
finished trials adapt them. After Baker et al. 2017, "Accelerating Neural Architecture Search using Performance
Prediction", Swersky et al. 2014, "Freeze-Thaw Bayesian Optimization", and Adriaensen et al. 2023, "Efficient Bayesian
Learning Curve Extrapolation using Prior-Data Fitted Networks", all of which forecast from partial curves.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

KNOTS = (0, 25, 50, 75)
"""Percent of the schedule, between which all coefficients are interpolated; at 100 nothing is left to forecast."""
FEATURES = ("constant", "metric", "best", "probe", "loss", "trend", "rate")
REFERENCE_RATE = 1e-3
POINT_DEVIATION = 0.15
"""Prior standard deviation of what a whole dimension of the space changes in the logarithm of the final metric."""
ROWS_PER_TRIAL = 2.0
"""All epochs of a trial have the same end: together they count as so many trials."""
PRIOR_TRIALS = 2.0
"""How many trials the prior's noise counts as."""
PRIOR_FILE = Path(__file__).with_name("curve_prior.json")
LEAST_NOISE = 1e-4
LARGEST = 3.0
"""Limit of each feature, for the regression is local."""

Floats = npt.NDArray[np.float64]


@dataclass
class Curve:
    """A trial so far."""

    point: list[float | None]
    """The config's coordinates, see `Space.coordinates`."""
    rate: float
    """Its peak learning rate."""
    epochs: list[tuple[int, int, float, float]] = field(default_factory=list)
    """Number, progress in percent, metric and validation loss of each epoch, the probe and frozen ones among them."""
    probe: float | None = None
    """The metric of the probe that it started from, if it did."""
    num_images: int = 1000
    """For validation."""
    final: tuple[float, float] | None = None
    """Metric and validation loss at the end, if it was trained to its end."""
    seconds: float = 0.0
    """That the whole training takes."""

    @property
    def final_metric(self) -> float:
        assert self.final is not None, "the trial has not finished"
        return self.final[0]

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> "Curve":
        """Of what `dataclasses.asdict` made of it."""
        curve = cls(**saved)
        curve.epochs = [(number, progress, metric, loss) for number, progress, metric, loss in curve.epochs]
        curve.final = curve.final and (curve.final[0], curve.final[1])
        return curve

    def add(self, number: int, progress: int, metric: float, loss: float) -> bool:
        """Record an epoch. Returns False if it was recorded before."""
        if self.epochs and number <= self.epochs[-1][0]:
            return False
        self.epochs.append((number, progress, metric, loss))
        return True

    def log(self, metric: float) -> float:
        """Finite where no image was wrong, too."""
        return math.log(max(metric, 0.0) + 0.5 / self.num_images)


@dataclass(frozen=True)
class Level:
    """Logarithms of the incumbent's metric and validation loss, to which trials are compared."""

    metric: float
    loss: float

    @classmethod
    def of(cls, curve: Curve) -> "Level":
        """That of a finished trial."""
        assert curve.final is not None
        metric, loss = curve.final
        return cls(curve.log(metric), log_loss(loss))


@dataclass(frozen=True)
class Prior:
    """Of the coefficients, (knots x features,): mean and standard deviation; and of the noise, (knots,)."""

    mean: Floats
    deviation: Floats
    noise: Floats

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> "Prior":
        assert saved["knots"] == list(KNOTS) and saved["features"] == list(FEATURES)
        return cls(*(np.array(saved[name], dtype=float) for name in ("mean", "deviation", "noise")))


@cache
def default_prior() -> Prior:
    """That of all published tables."""
    return Prior.from_json(json.loads(PRIOR_FILE.read_text()))


@dataclass(frozen=True)
class Forecast:
    """Of the logarithm of the final metric: Student's t distribution with 4 degrees of freedom, because some trials end
    far from where most of their kind do."""

    mean: float
    deviation: float

    @property
    def expected(self) -> float:
        """The median of the final metric."""
        return math.exp(self.mean)

    @property
    def error(self) -> float:
        """Half the width of the interval that holds two thirds of the probability."""
        return math.exp(self.mean) * math.sinh(min(self.deviation, LARGEST))

    def chance_below(self, log_metric: float) -> float:
        """Of the final metric."""
        distance = (log_metric - self.mean) / self.deviation
        square = 1 + distance**2 / 4
        return 0.5 + 0.375 * distance / math.sqrt(square) * (1 - distance**2 / square / 12)


class Regression:
    """What the prior and a search's finished trials say of the others. Fitted once, asked often."""

    def __init__(self, prior: Prior, finished: Sequence[Curve], level: Level) -> None:
        """`finished` are trials with epochs; a fit takes 0.1 ms for each."""
        self.prior, self.level = prior, level
        dimensions = len(finished[0].point) if finished else 0
        self.mean = np.append(prior.mean, np.zeros(dimensions))
        deviation = np.append(prior.deviation, np.full(dimensions, POINT_DEVIATION))
        self.covariance = np.diag(deviation**2)
        self.scale = np.ones(len(KNOTS))
        """How many times the prior's noise this search has, at each knot."""
        if finished:
            self._fit(finished, deviation)

    def _fit(self, finished: Sequence[Curve], deviation: Floats) -> None:
        x = np.concatenate([rows(curve, self.level) for curve in finished])
        y = np.concatenate([targets(curve) for curve in finished])
        noise = [self._noise(progress_of(curve), curve.final_metric, curve.num_images) for curve in finished]
        shares = [np.full(len(curve.epochs), ROWS_PER_TRIAL / len(curve.epochs)) for curve in finished]
        weights = np.concatenate(shares) / np.concatenate(noise)
        self.covariance = np.linalg.inv(x.T @ (x * weights[:, None]) + np.diag(deviation**-2))
        self.mean = self.mean + self.covariance @ (x.T @ (weights * (y - x @ self.mean)))
        misses = np.square(y - x @ self.mean) + np.einsum("ij,jk,ik->i", x, self.covariance, x)
        hats = hats_at(np.concatenate([progress_of(curve) for curve in finished])) / ROWS_PER_TRIAL
        trials = np.concatenate(shares) @ hats
        self.scale = (PRIOR_TRIALS + (weights * misses) @ hats) / (PRIOR_TRIALS + trials)

    def forecast(self, curve: Curve) -> Forecast:
        """From the last of its epochs."""
        asked = rows(curve, self.level)[-1]
        mean = curve.log(curve.epochs[-1][2]) + float(asked @ self.mean)
        progress = progress_of(curve)[-1:]
        noise = self._noise(progress, math.exp(mean), curve.num_images) * np.interp(progress, KNOTS, self.scale)
        return Forecast(mean, math.sqrt(float(asked @ self.covariance @ asked) + float(noise[0])))

    def _noise(self, progress: Floats, final: float, num_images: int) -> Floats:
        """(epochs,) variance that no regression explains; part of it is that of an error rate on so many images."""
        own = np.interp(progress, (*KNOTS, 100), (*self.prior.noise, 0.0))
        noise: Floats = own + redrawn(progress) * binomial(final, num_images) + LEAST_NOISE
        return noise


def binomial(metric: float, num_images: int) -> float:
    """Variance of the logarithm of an error rate on so many images, about."""
    return max(0.0, 1 - metric) / (max(metric, 0.5 / num_images) * num_images)


def redrawn(progress: Floats) -> Floats:
    """(epochs,) how much of the chance in an error rate is still open: at the end of a schedule, few answers change."""
    share: Floats = (3 * (1 - progress / 100)).clip(0, 1)
    return share


def progress_of(curve: Curve) -> Floats:
    """(epochs,) percent."""
    return np.array([progress for _, progress, _, _ in curve.epochs], dtype=float)


def targets(curve: Curve) -> Floats:
    """(epochs,) how much the logarithm of the metric then changed until the end."""
    return curve.log(curve.final_metric) - np.array([curve.log(metric) for _, _, metric, _ in curve.epochs])


def rows(curve: Curve, level: Level) -> Floats:
    """(epochs, knots x features + dimensions) what each epoch of a curve says of how much its metric will change."""
    progress = progress_of(curve)
    now = np.array([curve.log(metric) for _, _, metric, _ in curve.epochs])
    loss = np.array([log_loss(loss) for *_, loss in curve.epochs])
    metric = now - level.metric
    probe = np.zeros_like(now) if curve.probe is None else curve.log(curve.probe) - now
    features = np.stack([
        np.ones_like(now),
        metric,
        np.minimum.accumulate(now) - now,
        probe,
        loss - level.loss - metric,
        np.diff(now, prepend=now[:1]),
        np.full_like(now, math.log10(curve.rate / REFERENCE_RATE)),
    ], axis=1).clip(-LARGEST, LARGEST)  # fmt: skip
    hats = hats_at(progress)
    point = [0.0 if place is None else place - 0.5 for place in curve.point]
    left = (1 - progress / 100)[:, None]
    by_knot = (hats[:, :, None] * features[:, None, :]).reshape(len(now), -1)
    return np.concatenate([by_knot, left * point], axis=1) if point else by_knot


def hats_at(progress: Floats) -> Floats:
    """(epochs, knots) the weights of the knots in an interpolation."""
    found: Floats = (1 - np.abs(progress[:, None] - np.array(KNOTS)) / KNOTS[1]).clip(0)
    return found


def log_loss(loss: float) -> float:
    return math.log(max(loss, 1e-4))
