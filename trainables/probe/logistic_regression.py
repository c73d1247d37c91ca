"""Multinomial logistic regression on the features of a frozen backbone, solved to convergence: the linear probe.

The objective is the mean cross-entropy plus l2 / 2 times the squared norm of the weights, on standardised features; the
bias is not penalised. It is that of scikit-learn's `LogisticRegression` with C = 1 / (images * l2); with two classes,
where scikit-learn has one row of weights instead of two, C = 2 / (images * l2).

Of images with several labels, the mean of the binary cross-entropies' sum over the classes: that of scikit-learn's
`OneVsRestClassifier(LogisticRegression(C=1 / (images * l2)))`, all classes at once, with one l2.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from trainables.data.label_sets import rarest
from trainables.network.loss import log_loss, several
from trainables.probe.folds import folds_of, halves
from trainables.probe.principal_axes import Axes, principal_axes

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
    None where nothing was held out. Of several labels, the share of images of which any is wrong, at a probability of
    1/2."""
    out_of_fold: Tensor | None = None
    """(images, classes), float16, on the CPU: the probabilities that these fits give to the images, which have not
    seen them. NaN for an image that was never held out, the only one of its class. None where nothing was held out, for
    more than `MAX_KEPT` numbers, and for several labels."""

    def logits(self, features: Tensor) -> Tensor:
        """(images, classes) of features (images, features) of any floating-point type, on the CPU."""
        return features.float() @ self.weight.T + self.bias


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
    """The logistic regression of `labels` (images,), 0 to num_classes - 1, on `features` (images, features); where an
    image may have several labels, `labels` is (images, num_classes), bool.

    Without `l2` it is the one of `L2_GRID` with the lowest log-loss in stratified cross-validation; `seed` shares the
    images out to the folds, where images of one of the `groups` (images,), numbers from 0, stay together.
    `class_weights` (classes,) multiply the losses of their images, of which the objective has the weighted mean:
    scikit-learn's `class_weight`, where their mean over the images is 1. Of several labels, they multiply the losses of
    a class's own images: scikit-learn's {0: 1, 1: weight}. `on_progress` is called several times a second. A class
    without an image is never predicted. Raises `ValueError` for features that are not finite, and for labels or an l2
    that do not fit.
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
    differs = x.amax(0) > x.amin(0)
    std = torch.where(differs, std, 1.0)
    x = torch.where(differs, (x - mean) / std, 0.0)
    labels = labels.to(device)
    if several(labels):
        varies = labels.any(0) & ~labels.all(0)
        present = (varies | ~varies.any()).nonzero().flatten()
        y, strata = labels[:, present].to(x.dtype), torch.as_tensor(rarest(labels.cpu().numpy())).to(device)
    else:
        present, y = labels.unique(return_inverse=True)
        strata = y
    weights = None if class_weights is None else class_weights.to(device, torch.float32)[present]

    data = principal_axes(x, weights)
    error_rate = unseen = None
    if l2 is None:
        l2, start, error_rate, unseen = _cross_validated(data, y, strata, groups, seed, on_progress)
    else:
        start = _solve_path(data, y, [value for value in L2_GRID if value > l2], on_progress)
    # In float64: where all images are told well apart, float32 rounds their losses off by percents.
    data = data.double()
    solution = _solve(data, y, l2, start, EXACT, on_progress)

    weight = torch.zeros(num_classes, x.shape[1], dtype=torch.float64)
    weight[present.cpu()] = ((solution.weight @ data.axes.T) / std).cpu()
    # An absent class has the bias of half an image, and always less than the best of the others: the present classes'
    # logits have the mean of their biases, since their weights sum to zero at the optimum.
    absent, half_an_image = float(solution.bias.mean()), math.log(2 * len(y))
    bias = torch.full((num_classes,), absent - half_an_image, dtype=torch.float64)
    if several(labels):  # of half an image, or of all images but half of one
        bias = torch.where(labels.all(0), half_an_image, -half_an_image).double().cpu()
    bias[present.cpu()] = solution.bias.cpu()
    bias -= weight @ mean.double().cpu()
    if unseen is not None and len(present) < num_classes:
        of_absent = torch.where(unseen[:, :1].isnan(), math.nan, 0.0)
        unseen = of_absent.repeat(1, num_classes).half().index_copy(1, present, unseen)
    return LinearHead(weight.float(), bias.float(), l2, error_rate, None if unseen is None else unseen.cpu())


def _check(features: Tensor, labels: Tensor, num_classes: int, l2: float | None) -> None:
    if several(labels) and labels.dtype == torch.bool and labels.shape[1] == num_classes:
        labels = labels.any(1).long()  # there is nothing else about their values
    if features.ndim != 2 or labels.ndim != 1 or len(features) != len(labels) or not len(labels):
        raise ValueError(
            f"features have the shape {tuple(features.shape)} and labels {tuple(labels.shape)}, expected "
            f"(images, features) and (images,), or (images, {num_classes}) bool, with the same number of images, at "
            "least one"
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


def _cross_validated(
    data: Axes, y: Tensor, strata: Tensor, groups: Tensor | None, seed: int, on_progress: Callable[[], None]
) -> tuple[float, _Solution | None, float | None, Tensor | None]:
    """The l2 with the lowest out-of-fold log-loss, the mean of its folds' solutions, and what `_out_of_fold` finds.
    `strata` (images,) are shared out evenly to the folds.

    By log-loss rather than by the number of errors, which is the same for many values and decides by chance between
    them. From strong to weak, each fold's fit starts from its last one.
    """
    folds = folds_of(strata.cpu(), seed, groups).to(y.device)
    held_out = [fold for fold in folds.unique().tolist() if fold >= 0]
    if not held_out or (not several(y) and int(y.max()) == 0):
        return L2_WITHOUT_VALIDATION, None, None, None
    training = [(data.only(folds != k), y[folds != k]) for k in held_out]
    validation = [(data.coordinates[folds == k], y[folds == k]) for k in held_out]
    num_images = sum(len(targets) for _, targets in validation)
    solutions: list[_Solution | None] = [None] * len(held_out)
    best: tuple[float, float, list[_Solution]] = (math.inf, L2_WITHOUT_VALIDATION, [])
    for l2 in L2_GRID:
        total = 0.0
        fitted = []
        for (x, targets), (unseen, truth), start in zip(training, validation, solutions, strict=True):
            solution = _solve(x, targets, l2, start, ROUGH, on_progress)
            logits = unseen @ solution.weight.T + solution.bias
            total += float(log_loss(logits, truth, data.class_weights, reduction="sum")) / num_images
            fitted.append(solution)
        solutions = [*fitted]
        if best[2] and total > best[0] - max(MIN_GAIN, MIN_SHARE * best[0]):
            break
        best = (total, l2, fitted)
    _, l2, fitted = best
    tried_on = [halves(strata, (folds == fold).nonzero().flatten(), groups) for fold in held_out]
    return l2, _mean(fitted), *_out_of_fold(data, y, tried_on, fitted, l2, on_progress)


def _out_of_fold(
    data: Axes,
    y: Tensor,
    tried_on: Sequence[tuple[Tensor, Tensor]],
    starts: Sequence[_Solution],
    l2: float,
    on_progress: Callable[[], None],
) -> tuple[float, Tensor | None]:
    """The share of images that fits get wrong which have seen all but half a fold, and the probabilities (images,
    classes), float16, that they give: NaN for images in no fold, and None above `MAX_KEPT` and of several labels.

    Fits on 2/3 or 4/5 of the images, which choose l2, are worse than the one on all of them, by 2 points of error where
    a class has 15 images. Each of these starts from its fold's, which has not seen the images that it is tried on.
    """
    shape = len(y), _num_classes(y)
    is_kept = math.prod(shape) <= MAX_KEPT and not several(y)
    kept = torch.full(shape, math.nan, dtype=torch.float16, device=y.device) if is_kept else None
    wrong = count = 0
    for parts, start in zip(tried_on, starts, strict=True):
        for half in parts:
            if not len(half):
                continue
            seen = torch.ones(len(y), dtype=torch.bool, device=y.device)
            seen[half] = False
            solution = _solve(data.only(seen), y[seen], l2, start, ROUGH, on_progress)
            logits = data.coordinates[half] @ solution.weight.T + solution.bias
            found = logits if several(y) else logits.softmax(1).half()
            wrong += int(are_wrong(found, y[half]).sum())
            count += len(half)
            if kept is not None:
                kept[half] = found
    return wrong / count, kept


def are_wrong(logits: Tensor, labels: Tensor) -> Tensor:
    """(images,) whether the most probable class is not the label; of several labels, whether any is wrong."""
    return ((logits > 0) != labels).any(1) if several(labels) else logits.argmax(1) != labels


def _num_classes(y: Tensor) -> int:
    return y.shape[1] if several(y) else int(y.max()) + 1


def _mean(solutions: list[_Solution]) -> _Solution:
    return _Solution(
        torch.stack([s.weight for s in solutions]).mean(0),
        torch.stack([s.bias for s in solutions]).mean(0),
        sum(s.curvature for s in solutions) / len(solutions),
    )


def _solve_path(data: Axes, y: Tensor, values: Iterable[float], on_progress: Callable[[], None]) -> _Solution | None:
    """Rough fits from strong to weak, each started from the last: faster than one from zero to a weak l2."""
    solution = None
    for l2 in values:
        solution = _solve(data, y, l2, solution, ROUGH, on_progress)
    return solution


def _solve(
    data: Axes, y: Tensor, l2: float, start: _Solution | None, tolerance: float, on_progress: Callable[[], None]
) -> _Solution:
    """Minimises the objective by L-BFGS with strong Wolfe line search, from `start` or from zeros."""
    x = data.coordinates
    num_classes = _num_classes(y)
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
        logits = x @ result.T + intercept
        if several(y):
            p = logits.sigmoid()
            return _Solution(result, intercept, float((p * (1 - p)).mean()))
        p = logits.softmax(1)
        return _Solution(result, intercept - intercept.mean(), float((p * (1 - p)).mean()))
