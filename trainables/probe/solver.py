"""Minimises the objective of a logistic regression, in the coordinates of the images' principal axes."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trainables.network.loss import log_loss, several
from trainables.probe.principal_axes import Axes

L2_GRID = tuple(10.0**-exponent for exponent in range(-1, 6))
"""What cross-validation tries, strongest first: 10 to 1e-5."""
ROUGH, NEAR, EXACT = 5e-3, 3e-4, 1e-5
"""Largest gradient at the end of a fit, as a share of the objective at its start and in scaled coordinates: of one that
only compares or is only started from, of the last one in float32, and of the one in float64."""
MAX_ITERATIONS = 1000


@dataclass(frozen=True)
class Solution:
    weight: Tensor  # (classes, axes)
    bias: Tensor  # (classes,)
    curvature: float  # mean over images and classes of p * (1 - p), which multiplies an axis's variance in the Hessian

    def on(self, data: Axes) -> "Solution":
        """The same with zeros for the axes that it lacks, which have less variance than its own."""
        missing = data.coordinates.shape[1] - self.weight.shape[1]
        return replace(self, weight=torch.nn.functional.pad(self.weight, (missing, 0)))


def solve_path(data: Axes, y: Tensor, values: Iterable[float], on_progress: Callable[[], None]) -> Solution | None:
    """Rough fits from strong to weak, each started from the last: faster than one from zero to a weak l2."""
    solution = None
    for l2 in values:
        solution = solve(data, y, l2, solution, ROUGH, on_progress)
    return solution


def solve(
    data: Axes, y: Tensor, l2: float, start: Solution | None, tolerance: float, on_progress: Callable[[], None]
) -> Solution:
    """Minimises the objective by L-BFGS with strong Wolfe line search, from `start` or from zeros."""
    x = data.coordinates
    num_classes = num_classes_of(y)
    start = start and start.on(data)
    even = 0.5 if several(y) else 1 / num_classes
    curvature = start.curvature if start else (1 - even) * even
    curvature = max(curvature, 1e-6)
    scale, bias_scale = (curvature * data.variances + l2) ** -0.5, curvature**-0.5
    weight, bias = x.new_zeros(num_classes, x.shape[1]), x.new_zeros(num_classes)
    if start:
        weight, bias = start.weight.to(x.dtype) / scale, start.bias.to(x.dtype) / bias_scale
    weight.requires_grad_()
    bias.requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=MAX_ITERATIONS,
        tolerance_grad=tolerance,
        tolerance_change=1e-9,
        history_size=10,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        scaled = weight * scale
        logits = x @ scaled.T + bias * bias_scale
        return log_loss(logits, y, data.class_weights) + l2 / 2 * scaled.square().sum()

    with torch.no_grad():
        size = objective().clamp(min=1e-30)  # makes tolerances relative: with a weak l2 the objective may be 1e-4
        if several(y):  # to what a class has
            size /= num_classes

    def closure() -> Tensor:
        on_progress()
        optimizer.zero_grad()
        loss = objective() / size
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        result, intercept = weight * scale, bias * bias_scale
        curvature = curvature_of(x @ result.T + intercept, y)
        return Solution(result, intercept if several(y) else intercept - intercept.mean(), curvature)


def curvature_of(logits: Tensor, y: Tensor) -> float:
    p = logits.sigmoid() if several(y) else logits.softmax(1)
    return float((p * (1 - p)).mean())


def objective_of(data: Axes, y: Tensor, l2: float, solution: Solution) -> float:
    logits = data.coordinates @ solution.weight.T + solution.bias
    return float(log_loss(logits, y, data.class_weights) + l2 / 2 * solution.weight.square().sum())


def num_classes_of(y: Tensor) -> int:
    return y.shape[1] if several(y) else int(y.max()) + 1
