"""The loss: cross-entropy with label smoothing, on images and targets mixed by mixup."""

import torch
import torch.nn.functional as F

EFFECTIVE_BETA = 0.999
"""Of `class_weights` effective: from about a thousand images on, a class does not lose weight by having more."""


def soft_targets(labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    """One-hot float rows (n, num_classes) of labels (n,)."""
    return F.one_hot(labels, num_classes).float()


def mix(values: torch.Tensor, first: torch.Tensor, second: torch.Tensor, lam: torch.Tensor) -> torch.Tensor:
    """Mixup (Zhang et al. 2018): weight `lam` (n,) on rows `first` of `values` and 1 - `lam` on rows `second`."""
    return torch.lerp(values[second], values[first], lam.view(-1, *[1] * (values.ndim - 1)))


def cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, smoothing: float, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Sum over rows; a label has weight 1 - smoothing + smoothing / N, every other class smoothing / N. Each class's
    part is multiplied by its one of the `weights` (N,)."""
    return F.cross_entropy(logits, targets, weights, label_smoothing=smoothing, reduction="sum")


def class_weights(kind: str, labels: torch.Tensor, num_classes: int) -> torch.Tensor | None:
    """The weight of each class (N,) for training images with these labels (images,): `inverse` to its number of images,
    or to their effective number (Cui et al. 2019, "Class-Balanced Loss"). The mean over the images is 1, so that rates
    keep their meaning. None where all count the same.

    >>> class_weights("inverse", torch.tensor([0, 0, 0, 1]), 2).tolist()
    [0.6666666865348816, 2.0]
    """
    if kind == "none":
        return None
    counts = torch.bincount(labels, minlength=num_classes).double()
    weights = 1 / counts if kind == "inverse" else 1 / (1 - EFFECTIVE_BETA**counts)
    weights[counts == 0] = 0.0
    return (weights * counts.sum() / (weights * counts).sum()).float()
