"""Confidence intervals of error rates, and whether one error rate is lower than another by more than noise."""

import math
from collections.abc import Callable
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

Interval = tuple[float, float]


def wilson_interval(error_rate: float, num_images: int, level: float = 0.95) -> Interval:
    """The confidence interval of an error rate on `num_images` images (Wilson 1927), both ends in 0..1.

    Unlike `scipy.stats.binomtest`, it takes the mean error rate of several trainings, which is no whole number of
    images. Raises `ValueError` if there are no images or the rate is not in 0..1.
    """
    if num_images < 1 or not 0 <= error_rate <= 1:
        raise ValueError(f"error_rate is {error_rate} of {num_images} images; expected 0 to 1 of 1 or more images.")
    z = NormalDist().inv_cdf((1 + level) / 2)
    spread = z**2 / num_images
    centre = error_rate + spread / 2
    half = math.sqrt(error_rate * (1 - error_rate) * spread + spread**2 / 4)
    return max(0.0, (centre - half) / (1 + spread)), min(1.0, (centre + half) / (1 + spread))


def difference_interval(error_rate: float, other: float, num_images: int, level: float = 0.95) -> Interval:
    """The confidence interval of `other` - `error_rate`, each on `num_images` images (Newcombe 1998, method 10).

    It assumes different images. For the same images it is wider than necessary.
    """
    low, high = wilson_interval(error_rate, num_images, level)
    other_low, other_high = wilson_interval(other, num_images, level)
    difference = other - error_rate
    return (
        difference - math.hypot(other - other_low, high - error_rate),
        difference + math.hypot(other_high - other, error_rate - low),
    )


def bootstrap_interval(
    statistic: Callable[[npt.NDArray[np.int64]], float], count: int, *, level: float = 0.95, resamples: int = 1000
) -> Interval:
    """The percentile interval (Efron 1979) of a `statistic` of the indices of some of `count` images, with a fixed
    seed. Resamples for which it is NaN do not count; NaN where all are."""
    rng = np.random.default_rng(0)
    values = np.array([statistic(rng.integers(count, size=count)) for _ in range(resamples)])
    values = values[~np.isnan(values)]
    tails = ((1 - level) / 2, (1 + level) / 2)
    low, high = np.quantile(values, tails) if len(values) else (math.nan, math.nan)
    return float(low), float(high)


def describe_lead(error_rate: float, other: float, num_images: int, *, among: str, count: int, than: str) -> str:
    """Whether the lead of the best of `count` candidates over another one, `than`, is more than noise, in words.

    The luckiest of many looks better than it is. So each of them gets its share of the 5 % (Bonferroni). `among` says
    in words what the candidates are.
    """
    low, high = difference_interval(error_rate, other, num_images, 1 - 0.05 / max(1, count))
    chosen = f", corrected for the choice among {among}" if count > 1 else ""
    interval = f"95 % interval {100 * low:.1f} to {100 * high:.1f}{chosen}"
    verdict = "more than noise" if low > 0 else "this may be noise"
    points, side = 100 * abs(other - error_rate), "better" if error_rate <= other else "worse"
    return f"{points:.1f} points {side} than {than} ({interval}): {verdict}"
