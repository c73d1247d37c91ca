"""The learning-rate range test (Smith 2015) as fastai's `Learner.lr_find` runs it: sweep, suggestions and plot.

The rate grows exponentially while the network trains; the smoothed loss falls, flattens, then diverges. Numbers are
float32 where fastai's tensors are, so that comparisons of nearly equal losses agree. Imports no torch, which drawing or
reading a curve does not need.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating]

SKIPPED_LAST = 5
"""Points at the curve's end that are neither drawn nor searched, since the loss has diverged there."""
SLIDE_WIDTH = 15
"""Points between the two ends of the interval that `slide` moves along the curve."""
SLIDE_THRESHOLD = 0.005
"""The interval stops where the loss's gradients at its two ends (loss per step) differ by no more than this."""
MIN_POINTS = SLIDE_WIDTH + 1
"""Points that suggestions need."""
DIVERGED = 4.0
"""The sweep ends when the smoothed loss exceeds this multiple of the lowest so far."""


@dataclass(frozen=True, eq=False)
class Curve:
    """The record of a sweep, one element per step: shape (steps,) each."""

    lrs: Floats
    """Learning rate of the head (fastai records the last parameter group's), rising."""
    losses: Floats
    """Smoothed training loss after the step."""
    batch_losses: Floats | None = None
    """Loss of each batch; only drawn."""

    def __post_init__(self) -> None:
        lengths = {len(values) for values in (self.lrs, self.losses, self.batch_losses) if values is not None}
        if len(lengths) > 1:
            raise ValueError(f"a curve has one rate and one loss per step, not {sorted(lengths)} of them")


class SmoothedLoss:
    """Exponentially weighted mean of the batches' losses, corrected for its start at zero: fastai's `AvgSmoothLoss`."""

    def __init__(self, beta: float = 0.98) -> None:
        self._beta = beta
        self._count = 0
        self._mean = np.float32(0)

    def update(self, loss: float) -> float:
        """Adds a batch's loss and returns the mean so far.

        Rounds as `torch.lerp`: first the difference to float32, then product and sum together (fused multiply-add).
        """
        with np.errstate(over="ignore", invalid="ignore"):
            share = np.float32(1) - np.float32(self._beta)
            difference = self._mean - np.float32(loss)
            self._mean = np.float32(float(self._mean) - float(difference) * float(share))
            self._count += 1
            return float(self._mean / np.float32(1 - self._beta**self._count))


def rate_at(step: int, num_it: int, start: float = 1e-7, end: float = 10.0) -> float:
    """Learning rate of step 0..num_it - 1, geometric from `start` towards `end` (fastai's `SchedExp`)."""
    rate: float = start * (end / start) ** (step / num_it)
    return rate


def diverged(smoothed: float, best: float) -> bool:
    """Whether to stop, given the smoothed loss and its lowest so far. A NaN does not stop the sweep, as in fastai."""
    return smoothed > DIVERGED * best


class Sweep:
    """Records one range test: train a batch at `rate`, `record` its loss, until `finished`.

    fastai's `LRFinder`. All parameter groups get the same rate; momentum and weight decay do not change.
    """

    def __init__(self, num_it: int = 100, start: float = 1e-7, end: float = 10.0) -> None:
        self._num_it, self._start, self._end = num_it, start, end
        self._smoothed = SmoothedLoss()
        self._best = float("inf")
        self._points: list[tuple[float, float, float]] = []  # rate, smoothed loss, loss of the batch
        self._diverged = False

    @property
    def rate(self) -> float:
        """Learning rate for the next batch."""
        return rate_at(len(self._points), self._num_it, self._start, self._end)

    @property
    def finished(self) -> bool:
        return self._diverged or len(self._points) >= self._num_it

    def record(self, loss: float) -> None:
        """Records the mean loss of the batch that trained at `rate`."""
        smoothed = self._smoothed.update(loss)
        self._points.append((self.rate, smoothed, loss))
        if smoothed < self._best:  # false for NaN
            self._best = smoothed
        self._diverged = diverged(smoothed, self._best)

    def curve(self) -> Curve:
        lrs, losses, batch_losses = np.array(self._points, dtype=np.float64).reshape(-1, 3).T
        return Curve(lrs=lrs, losses=losses, batch_losses=batch_losses)


def suggestions(curve: Curve, num_it: int = 100) -> dict[str, float]:
    """Learning rates by name, those of `lr_find(num_it=num_it, suggest_funcs=(valley, steep, minimum, slide))`.

    valley: halfway down the longest descent, fastai's default; steep: where the loss falls fastest; minimum: a tenth of
    the rate with the lowest loss; slide: before the divergence, coming from the right. Raises `ValueError` if too few
    points are left without the first tenth, the last 5 points and all from the first NaN on.
    """
    searched = slice(num_it // 10, -SKIPPED_LAST)
    lrs = np.asarray(curve.lrs[searched], dtype=np.float32)
    with np.errstate(over="ignore"):
        losses = np.asarray(curve.losses[searched], dtype=np.float32)
    nan = np.flatnonzero(np.isnan(losses))
    left = int(nan[0]) if len(nan) else len(losses)
    if left < MIN_POINTS:
        raise ValueError(
            f"the curve has only {len(curve.losses)} points, of which {left} can be searched (without the first "
            f"{num_it // 10}, the last {SKIPPED_LAST} and all after a NaN); suggestions need {MIN_POINTS}"
        )
    lrs, losses = lrs[:left], losses[:left]
    return {
        "valley": float(lrs[_valley(losses)]),
        "steep": float(lrs[_steepest(lrs, losses)]),
        "minimum": float(lrs[losses.argmin()]) / 10,
        "slide": float(lrs[_slide(losses)]),
    }


def _valley(losses: Floats) -> int:
    """Index halfway down the longest descent: a third of its length, plus a sixth, each rounded down.

    As in fastai, a descent of n points starts n points before its last, even with gaps, which is one too early. A curve
    that falls only on its first step thus gives -1: its last point.
    """
    lengths = _descent_lengths(losses)
    last = int(lengths.argmax())
    length = int(lengths[last])
    return last - length + length // 3 + length // 6 if length > 1 else 0


def _descent_lengths(losses: Floats) -> npt.NDArray[np.int64]:
    """(points,) -> (points,): length of the longest strictly falling subsequence that ends at each point."""
    lengths = np.ones(len(losses), dtype=np.int64)
    for i, loss in enumerate(losses):
        lengths[i] += lengths[:i].max(where=losses[:i] > loss, initial=0)
    return lengths


def _steepest(lrs: Floats, losses: Floats) -> int:
    """Index of the point from which the loss falls most per unit of log rate to the next one.

    torch and numpy round float32 logarithms differently in the last bit, about 1e-5 of a step's difference; rounding
    from float64 is closest to both. It matters only for steps of equal steepness.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        log_lrs = np.log(lrs.astype(np.float64)).astype(np.float32)
        return int((np.diff(losses) / np.diff(log_lrs)).argmin())


def _slide(losses: Floats) -> int:
    """Left end of an interval of `SLIDE_WIDTH` steps that moves left from the curve's end while the gradients at its
    ends differ."""
    with np.errstate(invalid="ignore"):
        gradient = np.gradient(losses)
        differs = np.abs(gradient[SLIDE_WIDTH:] - gradient[:-SLIDE_WIDTH]) > SLIDE_THRESHOLD  # by the left end's index
    stops = np.flatnonzero(~differs)
    return min(int(stops[-1]) + 1, len(differs) - 1) if len(stops) else 0


def y_limits(losses: Floats, batch_losses: Floats | None = None) -> tuple[float, float]:
    """Bottom and top of the plot for smoothed losses in drawing order, and for those of batches if they are drawn.

    The descent to the lowest smoothed loss fits in, and every lower batch; of the rise that follows, only a third of
    the descent's height (at least a tenth of the lowest loss), so that a diverging end does not compress the rest.
    """
    finite = losses[np.isfinite(losses)]
    if not len(finite):
        return 0.0, 1.0
    lowest = float(finite.min())
    before = float(finite[: finite.argmin() + 1].max())
    top = min(float(finite.max()), before + max((before - lowest) / 3, abs(lowest) / 10))
    if batch_losses is not None:
        lowest = min(lowest, float(batch_losses.min(where=np.isfinite(batch_losses), initial=lowest)))
    margin = 0.06 * max(top - lowest, 1e-6)
    return lowest - margin, top + margin


STYLES = {  # name: marker, colour, label
    "valley": ("o", "#d1495b", "valley"),
    "steep": ("^", "#e09f1f", "steep"),
    "minimum": ("s", "#2e7d5b", "minimum / 10"),
    "slide": ("D", "#7353ba", "slide"),
}


def save_curve(path: Path, curve: Curve, suggestions: dict[str, float], title: str) -> None:
    """Draws the curve without its last 5 points, as fastai does, and the suggested rates as a PNG file."""
    from matplotlib.figure import Figure  # slow to import

    drawn = slice(None, -SKIPPED_LAST)
    lrs, losses = curve.lrs[drawn], curve.losses[drawn]
    dots = None if curve.batch_losses is None else curve.batch_losses[drawn]
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("log")
    if dots is not None:
        axes.plot(lrs, dots, ".", color="#9aa5b1", markersize=4, alpha=0.7, label="each batch")
    axes.plot(lrs, losses, color="#22577a", linewidth=2, label="smoothed")
    for name, rate in suggestions.items():
        marker, colour, label = STYLES.get(name, ("o", "#333333", name))
        height = np.interp(np.log(rate), np.log(lrs), losses)
        axes.axvline(rate, color=colour, linewidth=1, linestyle=(0, (4, 3)), alpha=0.6, zorder=1)
        style: dict[str, Any] = {"color": colour, "markeredgecolor": "white", "linestyle": "none"}
        axes.plot([rate], [height], marker, label=f"{label}: {rate:.1e}", markersize=9, zorder=4, **style)
    axes.set_ylim(*y_limits(losses, dots))
    axes.set_xlabel("learning rate")
    axes.set_ylabel("training loss")
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold")
    axes.grid(color="#e5e8eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, borderaxespad=0)
    figure.savefig(path, format="png")
