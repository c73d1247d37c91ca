"""How confident a probe's head is when fine-tuning starts from it.

A probe that tells its training images apart has large weights. The steps of Adam are as large whatever the gradients
are, and the larger the head's weights, the more each of them changes the logits: the first epoch undoes what the
backbone and the head have learned. A head whose weights are scaled down predicts the same classes, less confidently.
"""

import math

import torch
from torch import nn

from trainables.network.loss import log_loss, several

HALVINGS = 40


def softening(logits: torch.Tensor, labels: torch.Tensor, share: float) -> float:
    """The factor 0 to 1 of logits (images, classes) with which their mean cross-entropy is `share` of what guessing
    has, the logarithm of the number of classes; 1 where it is no less than that already.

    With label sets (images, classes), guessing knows how frequent each class is."""
    target = share * (_entropy(labels) if several(labels) else math.log(logits.shape[1]))
    if log_loss(logits, labels) >= target:
        return 1.0
    low, high = 0.0, 1.0  # the cross-entropy is convex in the factor, so it passes the target once
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if log_loss(middle * logits, labels) > target else (low, middle)
    return low


def _entropy(truth: torch.Tensor) -> float:
    """The sum over the classes, in nats, of the entropy of being of a class."""
    shares = truth.double().mean(0)
    return float((torch.special.entr(shares) + torch.special.entr(1 - shares)).sum())


@torch.no_grad()
def soften(head: nn.Module, factor: float) -> None:
    """Scales the logits of a linear or an mlp head by a factor, in place."""
    last = head[-1] if isinstance(head, nn.Sequential) else head
    for parameter in last.parameters():
        parameter.mul_(factor)
