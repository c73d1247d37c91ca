"""Multinomial logistic regression on the features of a frozen backbone, solved to convergence: the linear probe.

The objective is the mean cross-entropy plus l2 / 2 times the squared norm of the weights, on standardised features; the
bias is not penalised. It is that of scikit-learn's `LogisticRegression` with C = 1 / (images * l2); with two classes,
where scikit-learn has one row of weights instead of two, C = 2 / (images * l2).

Of images with several labels, the mean of the binary cross-entropies' sum over the classes: that of scikit-learn's
`OneVsRestClassifier(LogisticRegression(C=1 / (images * l2)))`, all classes at once, with one l2.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trainables.data.label_sets import rarest
from trainables.network.loss import several
from trainables.probe.cross_validation import SMALL_SIZE, cross_validated
from trainables.probe.principal_axes import Axes, principal_axes
from trainables.probe.solver import EXACT, L2_GRID, NEAR, Solution, curvature_of, objective_of, solve, solve_path

SURE = 1e-2
"""The objective from which float32 is exact enough: its losses are rounded by some 1e-7."""


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
    many of the others, see `cross_validated`. A little too low, since l2 was chosen by the log-loss on the same images.
    None where nothing was held out. Of several labels, the share of images of which any is wrong, at a probability of
    1/2."""
    out_of_fold: Tensor | None = None
    """(images, classes), float16, on the CPU: the probabilities that these fits give to the images, which have not
    seen them. NaN for an image that was never held out, the only one of its class. None where nothing was held out, for
    more than `MAX_KEPT` numbers, and for several labels."""

    def logits(self, features: Tensor) -> Tensor:
        """(images, classes) of features (images, features) of any floating-point type, on the CPU."""
        return features.float() @ self.weight.T + self.bias


def fit(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    l2: float | None = None,
    start: LinearHead | None = None,
    class_weights: Tensor | None = None,
    groups: Tensor | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    on_progress: Callable[[], None] = lambda: None,
) -> LinearHead:
    """The logistic regression of `labels` (images,), 0 to num_classes - 1, on `features` (images, features); where an
    image may have several labels, `labels` is (images, num_classes), bool.

    Without `l2` it is the one of `L2_GRID` with the lowest log-loss in stratified cross-validation; `seed` shares the
    images out to the folds, where images of one of the `groups` (images,), numbers from 0, stay together. With `start`,
    the head of similar images, it has that one's l2 and takes fewer steps.
    `class_weights` (classes,) multiply the losses of their images, of which the objective has the weighted mean:
    scikit-learn's `class_weight`, where their mean over the images is 1. Of several labels, they multiply the losses of
    a class's own images: scikit-learn's {0: 1, 1: weight}. `on_progress` is called several times a second. A class
    without an image is never predicted. Raises `ValueError` for features that are not finite, and for labels or an l2
    that do not fit.
    """
    _check(features, labels, num_classes, l2)
    l2 = start.l2 if start else l2
    with _few_threads(min(features.shape) * len(features) * num_classes):
        return _fit(features, labels, num_classes, l2, start, class_weights, groups, seed, device, on_progress)


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
    start: LinearHead | None,
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
    before: Solution | None
    error_rate = unseen = None
    if l2 is None:
        l2, before, error_rate, unseen = cross_validated(data, y, strata, groups, seed, on_progress)
    elif start:
        before = _solution_of(start, data, y, present, mean, std)
    else:
        before = solve_path(data, y, [value for value in L2_GRID if value > l2], on_progress)
    solution = solve(data, y, l2, before, NEAR, on_progress)
    if start is None or objective_of(data, y, l2, solution) < SURE:
        # Where all images are told well apart, float32 rounds their losses off by percents.
        data = data.double()
        solution = solve(data, y, l2, solution, EXACT, on_progress)

    weight = torch.zeros(num_classes, x.shape[1], dtype=torch.float64)
    weight[present.cpu()] = (solution.weight.double() @ data.axes.T.double() / std).cpu()
    # An absent class has the bias of half an image, and always less than the best of the others: the present classes'
    # logits have the mean of their biases, since their weights sum to zero at the optimum.
    absent, half_an_image = float(solution.bias.mean()), math.log(2 * len(y))
    bias = torch.full((num_classes,), absent - half_an_image, dtype=torch.float64)
    if several(labels):  # of half an image, or of all images but half of one
        bias = torch.where(labels.all(0), half_an_image, -half_an_image).double().cpu()
    bias[present.cpu()] = solution.bias.double().cpu()
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


def _solution_of(head: LinearHead, data: Axes, y: Tensor, present: Tensor, mean: Tensor, std: Tensor) -> Solution:
    """A head in the coordinates of these images, of which the classes `present` are among its own."""
    weight, bias = (part.to(std.device)[present] for part in (head.weight, head.bias))
    bias = bias + weight @ mean
    solution = Solution((weight * std) @ data.axes, bias, 0.0)
    return replace(solution, curvature=curvature_of(data.coordinates @ solution.weight.T + bias, y))
