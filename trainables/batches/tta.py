"""Test-time augmentation as fastai's `Learner.tta`: probabilities averaged over augmented views and the centre view."""

from collections.abc import Callable

import numpy as np
import torch

from trainables.batches import augmentation
from trainables.recipe import Recipe


def average(views: torch.Tensor, centre: torch.Tensor, beta: float) -> torch.Tensor:
    """Probabilities (n, classes) from augmented `views` (v, n, classes) and the `centre` view (n, classes).

    `beta` is the weight of the centre view; the mean of the others has the rest.
    """
    return torch.lerp(views.mean(dim=0), centre, beta)


def probabilities(logits: torch.Tensor, several_labels: bool) -> torch.Tensor:
    """Probabilities (n, classes) of logits; each class's by itself where an image may have several labels."""
    return logits.sigmoid() if several_labels else logits.softmax(dim=1)


def predict(
    logits: Callable[[augmentation.Augmentations], torch.Tensor],
    recipe: Recipe,
    n: int,
    *,
    views: int,
    rows: slice = slice(None),
    several_labels: bool = False,
) -> torch.Tensor:
    """Averaged probabilities (rows, classes) of n images; `logits` predicts `rows` of them for each view.

    The views are drawn for all n images from the recipe's seed, so that each worker can predict its own rows.
    """
    rng = np.random.default_rng([recipe.seed, recipe.total_epochs, n])
    drawn = (augmentation.draw(rng, n, recipe)[rows] for _ in range(views))
    augmented = [probabilities(logits(view), several_labels) for view in drawn]
    centre = probabilities(logits(augmentation.centre(n, recipe.resize_method)[rows]), several_labels)
    return average(torch.stack(augmented), centre, recipe.tta_beta)
