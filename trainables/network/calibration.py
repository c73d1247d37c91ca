"""How far to trust a model's probabilities: temperature scaling, calibration error, abstaining. Imports no torch.

Temperature scaling divides all logits by one number, fitted on images that did not train the model. It changes no label
(Guo et al. 2017, "On Calibration of Modern Neural Networks", https://arxiv.org/abs/1706.04599).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]
Labels = npt.NDArray[np.integer[Any]]

LOWEST, HIGHEST = 0.05, 20.0
"""Temperatures."""
PRIOR = 1.0
"""Weight of the temperature 1 in a fit, see `fit_temperature`; about that of an image."""
MAX_FITTED = 10_000
"""Images of a fit, which tell the temperature to a percent."""
BINS = 15
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)


# --- The temperature --------------------------------------------------------------------------------------------------


def fit_temperature(logits: Floats, labels: Labels) -> float:
    """The temperature that minimises the cross-entropy of logits (n, classes) with labels (n,).

    The cross-entropy, summed over the images, is convex in the inverse b of the temperature. The penalty PRIOR * (b - 1
    - ln b) keeps b near 1 where few images say little, and finite where none is wrong; beside hundreds of images it
    weighs nothing. Of more than `MAX_FITTED` images, evenly spaced ones count.
    """
    from scipy.optimize import brentq  # takes long to import

    spaced = slice(None, None, max(1, math.ceil(len(labels) / MAX_FITTED)))
    logits, labels = logits[spaced].astype(np.float64), labels[spaced]
    below = logits - logits.max(axis=1, keepdims=True)
    actual = below[np.arange(len(labels)), labels]

    def slope(b: float) -> float:
        """The derivative by b of what is minimised."""
        weights = np.exp(b * below)
        expected = (weights * below).sum(axis=1) / weights.sum(axis=1)
        return float((expected - actual).sum() + PRIOR * (1 - 1 / b))

    if slope(1 / HIGHEST) >= 0:
        return HIGHEST
    if slope(1 / LOWEST) <= 0:
        return LOWEST
    return float(1 / brentq(slope, 1 / HIGHEST, 1 / LOWEST, xtol=1e-7))


def softmax(logits: Floats, temperature: float = 1.0) -> Floats:
    """Probabilities (n, classes), float64."""
    powers = np.exp((logits - logits.max(axis=1, keepdims=True)) / np.float64(temperature))
    shares: Floats = powers / powers.sum(axis=1, keepdims=True)
    return shares


def cross_fitted(logits: Floats, labels: Labels) -> Floats:
    """Probabilities (n, classes) of each image with the temperature of the other half of the images: judged on the
    images that it was fitted on, a temperature looks better than it is."""
    drawn = np.random.default_rng(0).permutation(len(labels))
    halves = np.array_split(drawn, 2)
    probabilities = np.empty(logits.shape)
    for mine, others in (halves, halves[::-1]):
        probabilities[mine] = softmax(logits[mine], fit_temperature(logits[others], labels[others]))
    return probabilities


def calibration_metrics(logits: Floats, labels: Labels) -> dict[str, float]:
    """The temperature of a model with these validation logits (n, classes) and labels (n,), and the expected
    calibration error before and after it, the latter cross-fitted."""
    return {
        "temperature": fit_temperature(logits, labels),
        "calibration_error_before": expected_calibration_error(softmax(logits), labels),
        "calibration_error": expected_calibration_error(cross_fitted(logits, labels), labels),
    }


# --- How good probabilities are ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Bin:
    """The images whose highest probability is above `low` and not above `high`."""

    low: float
    high: float
    images: int
    confidence: float
    """The mean of their highest probabilities."""
    accuracy: float
    """The share of them that is labelled correctly."""
    deviation: float
    """The standard deviation of that share by chance alone, if the probabilities are right."""


@dataclass(frozen=True, kw_only=True)
class Answered:
    """What a model answers that abstains where its highest probability is below a threshold."""

    threshold: float
    images: int
    wrong: int


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How far the probabilities of labelled images are to be trusted."""

    bins: tuple[Bin, ...]
    answered: tuple[Answered, ...]

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Calibration":
        """The one that `asdict` made `content` of. Raises `KeyError` or `TypeError` if it is not one."""
        bins, answered = content["bins"], content["answered"]
        return cls(bins=tuple(Bin(**each) for each in bins), answered=tuple(Answered(**each) for each in answered))

    @property
    def images(self) -> int:
        return sum(found.images for found in self.bins)

    @property
    def error(self) -> float:
        """The expected calibration error, 0 to 1: the mean over the images of the difference between accuracy and
        confidence in their bin (Naeini et al. 2015, "Obtaining Well Calibrated Probabilities Using Bayesian Binning").
        """
        return sum(found.images * abs(found.accuracy - found.confidence) for found in self.bins) / self.images

    @property
    def error_by_chance(self) -> float:
        """About the `error` that a model with right probabilities shows on so few images: the mean of the absolute
        value of a normally distributed difference is sqrt(2 / pi) deviations."""
        return sum(found.images * math.sqrt(2 / math.pi) * found.deviation for found in self.bins) / self.images


def calibration_of(probabilities: Floats, labels: Labels) -> Calibration:
    """Of probabilities (n, classes) with labels (n,), for n above 0."""
    return Calibration(bins=tuple(reliability(probabilities, labels)), answered=tuple(coverage(probabilities, labels)))


def reliability(probabilities: Floats, labels: Labels, bins: int = BINS) -> list[Bin]:
    """Images by their highest probability, in bins of equal width without the empty ones: what a reliability diagram
    shows. Takes probabilities (n, classes) and labels (n,)."""
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    places = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    found = []
    for place in np.unique(places).tolist():
        sure = confidence[places == place].astype(np.float64)
        found.append(
            Bin(
                low=place / bins,
                high=(place + 1) / bins,
                images=len(sure),
                confidence=float(sure.mean()),
                accuracy=float(right[places == place].mean()),
                deviation=math.sqrt((sure * (1 - sure)).clip(0).sum()) / len(sure),
            )
        )
    return found


def expected_calibration_error(probabilities: Floats, labels: Labels, bins: int = BINS) -> float:
    """See `Calibration.error`; by default with the usual 15 bins of equal width."""
    return Calibration(bins=tuple(reliability(probabilities, labels, bins)), answered=()).error


def coverage(probabilities: Floats, labels: Labels, thresholds: Iterable[float] = THRESHOLDS) -> list[Answered]:
    """How many images are answered at each threshold, and how many of the answers are wrong; takes probabilities
    (n, classes) and labels (n,). The trade-off between risk and coverage (El-Yaniv and Wiener 2010, "On the Foundations
    of Noise-free Selective Classification")."""
    confidence, wrong = probabilities.max(axis=1), probabilities.argmax(axis=1) != labels
    found = []
    for threshold in thresholds:
        sure = confidence >= threshold
        found.append(Answered(threshold=threshold, images=int(sure.sum()), wrong=int((sure & wrong).sum())))
    return found
