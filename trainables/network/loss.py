"""The loss: cross-entropy with label smoothing, on images and targets mixed by mixup."""

import torch
import torch.nn.functional as F


def soft_targets(labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    """One-hot float rows (n, num_classes) of labels (n,)."""
    return F.one_hot(labels, num_classes).float()


def mix(values: torch.Tensor, first: torch.Tensor, second: torch.Tensor, lam: torch.Tensor) -> torch.Tensor:
    """Mixup (Zhang et al. 2018): weight `lam` (n,) on rows `first` of `values` and 1 - `lam` on rows `second`."""
    return torch.lerp(values[second], values[first], lam.view(-1, *[1] * (values.ndim - 1)))


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Sum over rows; a label has weight 1 - smoothing + smoothing / N, every other class smoothing / N."""
    return F.cross_entropy(logits, targets, label_smoothing=smoothing, reduction="sum")
