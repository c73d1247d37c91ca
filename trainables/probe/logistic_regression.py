"""Multinomial logistic regression on the features of a frozen backbone, solved to convergence: the linear probe.

The objective is the mean cross-entropy plus l2 / 2 times the squared norm of the weights, on standardised features; the
bias is not penalised. It is that of scikit-learn's `LogisticRegression` with C = 1 / (images * l2); with two classes,
where scikit-learn has one row of weights instead of two, C = 2 / (images * l2).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from trainables.probe.folds import folds_of, halves

L2_GRID = tuple(10.0**-exponent for exponent in range(-1, 6))
"""What cross-validation tries, strongest first: 10 to 1e-5."""
L2_WITHOUT_VALIDATION = 1e-2
"""For images of which no class has two, so that none can be held out."""
MIN_GAIN, MIN_SHARE = 1e-3, 0.08
"""Cross-validation ends at the first value whose log-loss is not lower by so much (nats, and a share of it): a weaker
penalty lowers it a little longer, without an error less, and takes much longer to fit."""
ROUGH, EXACT = 5e-3, 1e-5
"""Largest gradient at the end of a fit, as a share of the objective at its start and in scaled coordinates: of one that
only compares or is only started from, and of the one that is returned."""
MAX_ITERATIONS = 1000
MAX_KEPT = 50_000_000
"""Images x classes up to which out-of-fold probabilities are kept, which take two bytes each."""
SMALL_SIZE = 50_000_000
"""Images x axes x classes below which one thread is quicker than two: 1.8 s beside 2.9 s at 816 x 816 x 17."""


@dataclass(frozen=True)
class LinearHead:
    """A linear layer from unstandardised features to classes."""

    weight: Tensor
    """(classes, features), float32, on the CPU."""
    bias: Tensor
    """(classes,), float32, on the CPU."""
    l2: float
    """Penalty of the weights on standardised features."""
    out_of_fold_error_rate: float | None = None
    """Share of the images, 0 to 1, that fits with this l2 get wrong without having seen them. They have seen nearly as
    many of the others, see `_out_of_fold`. A little too low, since l2 was chosen by the log-loss on the same images.
    None where nothing was held out."""
    out_of_fold: Tensor | None = None
    """(images, classes), float16, on the CPU: the probabilities that these fits give to the images, which have not
    seen them. NaN for an image that was never held out, the only one of its class. None where nothing was held out, and
    for more than `MAX_KEPT` numbers."""

    def logits(self, features: Tensor) -> Tensor:
        """(images, classes) of features (images, features) of any floating-point type, on the CPU."""
        return features.float() @ self.weight.T + self.bias


@dataclass(frozen=True)
class _Axes:
    """Standardised images in the coordinates of their principal axes.

    A rotation changes neither logits nor penalty. Along these axes the objective's curvature is nearly diagonal, so
    scaling each axis by its own makes L-BFGS need a tenth of the steps where l2 is weak. With fewer images than
    features there are no more axes than images, and the smaller problem has the same solution.
    """

    coordinates: Tensor  # (images, axes)
    variances: Tensor  # (axes,)
    axes: Tensor  # (features, axes), orthonormal
    class_weights: Tensor | None  # (classes,)

    def only(self, images: Tensor) -> "_Axes":
        """The same axes with some of the images."""
        return replace(self, coordinates=self.coordinates[images])

    def double(self) -> "_Axes":
        weights = None if self.class_weights is None else self.class_weights.double()
        return _Axes(self.coordinates.double(), self.variances.double(), self.axes.double(), weights)


@dataclass(frozen=True)
class _Solution:
    weight: Tensor  # (classes, axes)
    bias: Tensor  # (classes,)
    curvature: float  # mean over images and classes of p * (1 - p), which multiplies an axis's variance in the Hessian


def fit(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    l2: float | None = None,
    class_weights: Tensor | None = None,
    groups: Tensor | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    on_progress: Callable[[], None] = lambda: None,
) -> LinearHead:
    """The logistic regression of `labels` (images,), 0 to num_classes - 1, on `features` (images, features).

    Without `l2` it is the one of `L2_GRID` with the lowest log-loss in stratified cross-validation; `seed` shares the
    images out to the folds, where images of one of the `groups` (images,), numbers from 0, stay together.
    `class_weights` (classes,) multiply the losses of their images, of which the objective has the weighted mean:
    scikit-learn's `class_weight`, where their mean over the images is 1. `on_progress` is called several times a
    second. A class without an image is never predicted. Raises `ValueError` for features that are not finite, and for
    labels or an l2 that do not fit.
    """
    _check(features, labels, num_classes, l2)
    with _few_threads(min(features.shape) * len(features) * num_classes):
        return _fit(features, labels, num_classes, l2, class_weights, groups, seed, device, on_progress)


@contextmanager
def _few_threads(size: int) -> Iterator[None]:
    """One thread for small problems, whose products take less time than threads take to meet."""
    before = torch.get_num_threads()
    if size < SMALL_SIZE:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _fit(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    l2: float | None,
    class_weights: Tensor | None,
    groups: Tensor | None,
    seed: int,
    device: torch.device | str,
    on_progress: Callable[[], None],
) -> LinearHead:
    x = features.to(device, torch.float32)
    std, mean = torch.std_mean(x, 0, correction=0)
    varies = x.amax(0) > x.amin(0)
    std = torch.where(varies, std, 1.0)
    x = torch.where(varies, (x - mean) / std, 0.0)
    present, y = labels.to(device).unique(return_inverse=True)
    weights = None if class_weights is None else class_weights.to(device, torch.float32)[present]

    data = _principal_axes(x, weights)
    error_rate = unseen = None
    if l2 is None:
        l2, start, error_rate, unseen = _cross_validated(data, y, groups, seed, on_progress)
    else:
        start = _solve_path(data, y, [value for value in L2_GRID if value > l2], on_progress)
    # In float64: where all images are told well apart, float32 rounds their losses off by percents.
    data = data.double()
    solution = _solve(data, y, l2, start, EXACT, on_progress)

    weight = torch.zeros(num_classes, x.shape[1], dtype=torch.float64)
    weight[present.cpu()] = ((solution.weight @ data.axes.T) / std).cpu()
    # An absent class has the bias of half an image, and always less than the best of the others: the present classes'
    # logits have the mean of their biases, since their weights sum to zero at the optimum.
    bias = torch.full((num_classes,), float(solution.bias.mean()) - math.log(2 * len(y)), dtype=torch.float64)
    bias[present.cpu()] = solution.bias.cpu()
    bias -= weight @ mean.double().cpu()
    if unseen is not None and len(present) < num_classes:
        of_absent = torch.where(unseen[:, :1].isnan(), math.nan, 0.0)
        unseen = of_absent.repeat(1, num_classes).half().index_copy(1, present, unseen)
    return LinearHead(weight.float(), bias.float(), l2, error_rate, None if unseen is None else unseen.cpu())


def _check(features: Tensor, labels: Tensor, num_classes: int, l2: float | None) -> None:
    if features.ndim != 2 or labels.ndim != 1 or len(features) != len(labels) or not len(labels):
        raise ValueError(
            f"features have the shape {tuple(features.shape)} and labels {tuple(labels.shape)}, expected "
            "(images, features) and (images,) with the same number of images, at least one"
        )
    if labels.is_floating_point() or labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"labels are {labels.dtype} from {labels.min():g} to {labels.max():g}, expected whole numbers from 0 to "
            f"{num_classes - 1}, the last of {num_classes} classes"
        )
    wrong = (~features.isfinite()).any(1).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(
            f"{len(wrong)} of {len(features)} images have features that are NaN or infinite, expected finite ones; the "
            f"first is image {wrong[0]}, counted from 0. Weights that do not fit the backbone or an overflow of "
            "float16 make such features."
        )
    if l2 is not None and not 0 < l2 < math.inf:
        raise ValueError(f"l2={l2}, expected a number above 0")


def _principal_axes(x: Tensor, class_weights: Tensor | None) -> _Axes:
    n, d = x.shape
    if n < d:
        # In float64, since dividing by small singular values magnifies errors.
        wide = x.double()
        squares, left = torch.linalg.eigh(wide @ wide.T)
        kept = squares > max(float(squares[-1]) * 1e-10, 1e-30)
        squares, left = squares[kept], left[:, kept]
        parts = left * squares.sqrt(), squares / n, wide.T @ (left / squares.sqrt())
        coordinates, variances, axes = (part.float() for part in parts)
        return _Axes(coordinates, variances, axes, class_weights)
    variances, axes = torch.linalg.eigh(x.T @ x / n)
    return _Axes(x @ axes, variances.clamp(min=0), axes, class_weights)


def _cross_validated(
    data: _Axes, y: Tensor, groups: Tensor | None, seed: int, on_progress: Callable[[], None]
) -> tuple[float, _Solution | None, float | None, Tensor | None]:
    """The l2 with the lowest out-of-fold log-loss, the mean of its folds' solutions, and what `_out_of_fold` finds.

    By log-loss rather than by the number of errors, which is the same for many values and decides by chance between
    them. From strong to weak, each fold's fit starts from its last one.
    """
    folds = folds_of(y.cpu(), seed, groups).to(y.device)
    held_out = [fold for fold in folds.unique().tolist() if fold >= 0]
    if not held_out or int(y.max()) == 0:
        return L2_WITHOUT_VALIDATION, None, None, None
    training = [(data.only(folds != k), y[folds != k]) for k in held_out]
    validation = [(data.coordinates[folds == k], y[folds == k]) for k in held_out]
    num_images = sum(len(targets) for _, targets in validation)
    solutions: list[_Solution | None] = [None] * len(held_out)
    best: tuple[float, float, list[_Solution]] = (math.inf, L2_WITHOUT_VALIDATION, [])
    for l2 in L2_GRID:
        log_loss = 0.0
        fitted = []
        for (x, targets), (unseen, truth), start in zip(training, validation, solutions, strict=True):
            solution = _solve(x, targets, l2, start, ROUGH, on_progress)
            logits = unseen @ solution.weight.T + solution.bias
            log_loss += float(cross_entropy(logits, truth, data.class_weights, reduction="sum")) / num_images
            fitted.append(solution)
        solutions = [*fitted]
        if best[2] and log_loss > best[0] - max(MIN_GAIN, MIN_SHARE * best[0]):
            break
        best = (log_loss, l2, fitted)
    _, l2, fitted = best
    tried_on = [halves(y, (folds == fold).nonzero().flatten(), groups) for fold in held_out]
    return l2, _mean(fitted), *_out_of_fold(data, y, tried_on, fitted, l2, on_progress)


def _out_of_fold(
    data: _Axes,
    y: Tensor,
    tried_on: Sequence[tuple[Tensor, Tensor]],
    starts: Sequence[_Solution],
    l2: float,
    on_progress: Callable[[], None],
) -> tuple[float, Tensor | None]:
    """The share of images that fits get wrong which have seen all but half a fold, and the probabilities (images,
    classes), float16, that they give: NaN for images in no fold, and None above `MAX_KEPT`.

    Fits on 2/3 or 4/5 of the images, which choose l2, are worse than the one on all of them, by 2 points of error where
    a class has 15 images. Each of these starts from its fold's, which has not seen the images that it is tried on.
    """
    shape = len(y), int(y.max()) + 1
    kept = torch.full(shape, math.nan, dtype=torch.float16, device=y.device) if math.prod(shape) <= MAX_KEPT else None
    wrong = count = 0
    for parts, start in zip(tried_on, starts, strict=True):
        for half in parts:
            if not len(half):
                continue
            seen = torch.ones_like(y, dtype=torch.bool)
            seen[half] = False
            solution = _solve(data.only(seen), y[seen], l2, start, ROUGH, on_progress)
            found = (data.coordinates[half] @ solution.weight.T + solution.bias).softmax(1).half()
            wrong += int((found.argmax(1) != y[half]).sum())
            count += len(half)
            if kept is not None:
                kept[half] = found
    return wrong / count, kept


def _mean(solutions: list[_Solution]) -> _Solution:
    return _Solution(
        torch.stack([s.weight for s in solutions]).mean(0),
        torch.stack([s.bias for s in solutions]).mean(0),
        sum(s.curvature for s in solutions) / len(solutions),
    )


def _solve_path(data: _Axes, y: Tensor, values: Iterable[float], on_progress: Callable[[], None]) -> _Solution | None:
    """Rough fits from strong to weak, each started from the last: faster than one from zero to a weak l2."""
    solution = None
    for l2 in values:
        solution = _solve(data, y, l2, solution, ROUGH, on_progress)
    return solution


def _solve(
    data: _Axes, y: Tensor, l2: float, start: _Solution | None, tolerance: float, on_progress: Callable[[], None]
) -> _Solution:
    """Minimises the objective by L-BFGS with strong Wolfe line search, from `start` or from zeros."""
    x = data.coordinates
    num_classes = int(y.max()) + 1
    curvature = start.curvature if start else (1 - 1 / num_classes) / num_classes
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
        return cross_entropy(logits, y, data.class_weights) + l2 / 2 * scaled.square().sum()

    with torch.no_grad():
        size = objective().clamp(min=1e-30)  # makes tolerances relative: with a weak l2 the objective may be 1e-4

    def closure() -> Tensor:
        on_progress()
        optimizer.zero_grad()
        loss = objective() / size
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        result, intercept = weight * scale, bias * bias_scale
        p = (x @ result.T + intercept).softmax(1)
        return _Solution(result, intercept - intercept.mean(), float((p * (1 - p)).mean()))
