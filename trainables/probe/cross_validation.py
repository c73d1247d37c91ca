"""The penalty of a logistic regression, and its out-of-fold predictions, by stratified cross-validation."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from trainables.network.loss import log_loss, several
from trainables.probe.folds import folds_of, halves
from trainables.probe.principal_axes import Axes
from trainables.probe.solver import L2_GRID, ROUGH, Solution, num_classes_of, solve

L2_WITHOUT_VALIDATION = 1e-2
"""For images of which no class has two, so that none can be held out."""
MIN_GAIN, MIN_SHARE = 1e-3, 0.08
"""Cross-validation ends at the first value whose log-loss is not lower by so much (nats, and a share of it): a weaker
penalty lowers it a little longer, without an error less, and takes much longer to fit."""
CHOOSING_SHARE = 0.95
"""Of the variance, which the axes have by which l2 is chosen for large problems: a third of the axes, and the same
choice in features of 100 classes."""
MAX_KEPT = 50_000_000
"""Images x classes up to which out-of-fold probabilities are kept, which take two bytes each."""
SMALL_SIZE = 50_000_000
"""Images x axes x classes below which a problem is small. One thread is quicker than two then: 1.8 s beside 2.9 s at
816 x 816 x 17."""


def cross_validated(
    data: Axes, y: Tensor, strata: Tensor, groups: Tensor | None, seed: int, on_progress: Callable[[], None]
) -> tuple[float, Solution | None, float | None, Tensor | None]:
    """The l2 with the lowest out-of-fold log-loss, the mean of its folds' solutions, and what `_out_of_fold` finds.
    `strata` (images,) are shared out evenly to the folds.

    By log-loss rather than by the number of errors, which is the same for many values and decides by chance between
    them. From strong to weak, each fold's fit starts from its last one.
    """
    folds = folds_of(strata.cpu(), seed, groups).to(y.device)
    held_out = [fold for fold in folds.unique().tolist() if fold >= 0]
    if not held_out or (not several(y) and int(y.max()) == 0):
        return L2_WITHOUT_VALIDATION, None, None, None
    large = data.coordinates.numel() * num_classes_of(y) >= SMALL_SIZE
    l2, fitted = _chosen(data.leading(CHOOSING_SHARE) if large else data, y, folds, held_out, on_progress)
    tried_on = [halves(strata, (folds == fold).nonzero().flatten(), groups) for fold in held_out]
    return l2, _mean(fitted), *_out_of_fold(data, y, tried_on, fitted, l2, on_progress)


def _chosen(
    data: Axes, y: Tensor, folds: Tensor, held_out: Sequence[int], on_progress: Callable[[], None]
) -> tuple[float, list[Solution]]:
    """The l2 with the lowest log-loss on the folds `held_out`, and the solutions without each of them.

    The search for it ends as soon as the first fold alone has gained nothing.
    """
    training = [(data.only(folds != k), y[folds != k]) for k in held_out]
    validation = [(data.coordinates[folds == k], y[folds == k]) for k in held_out]
    num_images = sum(len(targets) for _, targets in validation)
    best_losses, best_l2, best = [math.inf], L2_WITHOUT_VALIDATION, list[Solution]()
    for l2 in L2_GRID:
        losses: list[float] = []
        fitted: list[Solution] = []
        for fold, ((x, targets), (unseen, truth)) in enumerate(zip(training, validation, strict=True)):
            solution = solve(x, targets, l2, best[fold] if best else None, ROUGH, on_progress)
            logits = unseen @ solution.weight.T + solution.bias
            losses.append(float(log_loss(logits, truth, data.class_weights, reduction="sum")) / num_images)
            fitted.append(solution)
            if losses[0] >= best_losses[0]:
                return best_l2, best
        least = sum(best_losses)
        if best and sum(losses) > least - max(MIN_GAIN, MIN_SHARE * least):
            break
        best_losses, best_l2, best = losses, l2, fitted
    return best_l2, best


def _out_of_fold(
    data: Axes,
    y: Tensor,
    tried_on: Sequence[tuple[Tensor, Tensor]],
    starts: Sequence[Solution],
    l2: float,
    on_progress: Callable[[], None],
) -> tuple[float, Tensor | None]:
    """The share of images that fits get wrong which have seen all but half a fold, and the probabilities (images,
    classes), float16, that they give: NaN for images in no fold, and None above `MAX_KEPT` and of several labels.

    Fits on 2/3 or 4/5 of the images, which choose l2, are worse than the one on all of them, by 2 points of error where
    a class has 15 images. Each of these starts from its fold's, which has not seen the images that it is tried on.
    """
    shape = len(y), num_classes_of(y)
    is_kept = math.prod(shape) <= MAX_KEPT and not several(y)
    kept = torch.full(shape, math.nan, dtype=torch.float16, device=y.device) if is_kept else None
    wrong = count = 0
    for parts, start in zip(tried_on, starts, strict=True):
        for half in parts:
            if not len(half):
                continue
            seen = torch.ones(len(y), dtype=torch.bool, device=y.device)
            seen[half] = False
            solution = solve(data.only(seen), y[seen], l2, start, ROUGH, on_progress)
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


def _mean(solutions: list[Solution]) -> Solution:
    return Solution(
        torch.stack([s.weight for s in solutions]).mean(0),
        torch.stack([s.bias for s in solutions]).mean(0),
        sum(s.curvature for s in solutions) / len(solutions),
    )
