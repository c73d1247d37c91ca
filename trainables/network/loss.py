"""The loss: cross-entropy with label smoothing, on images and targets mixed by mixup; binary where an image may have
several labels.

Binary cross-entropy is summed over the classes. So each logit has the gradient that it has with cross-entropy, its
probability less its target, and rates keep their meaning whatever the number of classes; and the loss is again the
negative logarithm of the probability of what is true, an image's labels. (timm's `BinaryCrossEntropy` with
`sum_classes` and `smooth_dense`.)
"""

import torch
import torch.nn.functional as F

EFFECTIVE_BETA = 0.999
"""Of `class_weights` effective: from about a thousand images on, a class does not lose weight by having more."""


def soft_targets(truth: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Float rows (n, num_classes): one-hot of labels (n,), or those of label sets (n, num_classes)."""
    return truth.float() if several(truth) else F.one_hot(truth, num_classes).float()


def several(truth: torch.Tensor) -> bool:
    """Whether this is of images with several labels: (n, classes) bool. Others have a label each: (n,)."""
    return truth.ndim == 2


def mix(values: torch.Tensor, first: torch.Tensor, second: torch.Tensor, lam: torch.Tensor) -> torch.Tensor:
    """Mixup (Zhang et al. 2018): weight `lam` (n,) on rows `first` of `values` and 1 - `lam` on rows `second`."""
    return torch.lerp(values[second], values[first], lam.view(-1, *[1] * (values.ndim - 1)))


def cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, smoothing: float, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Sum over rows; a label has weight 1 - smoothing + smoothing / N, every other class smoothing / N. Each class's
    part is multiplied by its one of the `weights` (N,)."""
    return F.cross_entropy(logits, targets, weights, label_smoothing=smoothing, reduction="sum")


def binary_cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, smoothing: float, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Sum over rows and classes; targets (n, N) move by `smoothing` towards 1/2. The loss of an image of a class is
    multiplied by that one of the `weights` (N,), as far as it is of the class."""
    targets = targets * (1 - smoothing) + 0.5 * smoothing
    return F.binary_cross_entropy_with_logits(logits, targets, pos_weight=weights, reduction="sum")


def log_loss(
    logits: torch.Tensor, truth: torch.Tensor, weights: torch.Tensor | None = None, reduction: str = "mean"
) -> torch.Tensor:
    """Cross-entropy of logits (n, N) with labels (n,), or binary cross-entropy with label sets (n, N), over the rows;
    `weights` (N,) as above."""
    if not several(truth):
        return F.cross_entropy(logits, truth, weights, reduction=reduction)
    total = binary_cross_entropy(logits, truth.to(logits.dtype), 0.0, weights)
    return total / len(truth) if reduction == "mean" else total


def log_priors(labels: torch.Tensor, num_classes: int, strength: float) -> torch.Tensor | None:
    """`strength` times the logarithm of each class's share (N,) of training images with these labels (images,). A
    network whose logits get this added in the loss alone predicts as if all classes were equally frequent, at
    `strength` 1 (Menon et al. 2021, "Long-tail learning via logit adjustment"). A class without images counts as half
    an image. None where nothing is added, as with label sets.

    >>> log_priors(torch.tensor([0, 0, 0, 1]), 2, 1.0).exp().tolist()
    [0.75, 0.25]
    """
    if strength == 0 or several(labels):
        return None
    counts = torch.bincount(labels, minlength=num_classes).double().clamp(min=0.5)
    return (strength * (counts / counts.sum()).log()).float()


def class_weights(kind: str, labels: torch.Tensor, num_classes: int) -> torch.Tensor | None:
    """The weight of each class (N,) for training images with these labels (images,): `inverse` to its number of images,
    or to their effective number (Cui et al. 2019, "Class-Balanced Loss"). The mean over the images is 1, so that rates
    keep their meaning. None where all count the same.

    Of label sets (images, N): the weight of a class's images relative to that of all others, so that both have the same
    weight in the end.

    >>> class_weights("inverse", torch.tensor([0, 0, 0, 1]), 2).tolist()
    [0.6666666865348816, 2.0]
    """
    if kind == "none":
        return None
    if several(labels):
        positives = labels.double().sum(0)
        ratios = _numbers(kind, len(labels) - positives) / _numbers(kind, positives)
        return torch.where((positives > 0) & (positives < len(labels)), ratios, 1.0).float()
    counts = torch.bincount(labels, minlength=num_classes).double()
    weights = 1 / _numbers(kind, counts)
    weights[counts == 0] = 0.0
    return (weights * counts.sum() / (weights * counts).sum()).float()


def _numbers(kind: str, counts: torch.Tensor) -> torch.Tensor:
    """`counts` of images, or their effective number but for a factor."""
    return counts if kind == "inverse" else 1 - EFFECTIVE_BETA**counts
