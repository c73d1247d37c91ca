"""Means of the weights of one network: between where a training began and where it ended, and of several trainings.

The way back from the end to the start often passes through a lower validation loss, most of all where few images were
trained on at a high rate (Wortsman et al. 2022, "Robust fine-tuning of zero-shot models", arXiv:2109.01903). Trainings
that begin with the same weights end near each other, and the mean of where they end errs less than most of them
(Wortsman et al. 2022, "Model soups", arXiv:2203.05482). The mean is one network: it costs no more than any of them.
"""

import math
from collections.abc import Sequence
from typing import Protocol

import safetensors.torch
import torch

from trainables.network.model import Network
from trainables.recipe import WISE_ALPHAS

Weights = dict[str, torch.Tensor]
"""By name, as in a network's `state_dict`."""


class Training(Protocol):
    """What is needed of a `FineTune`."""

    network: Network
    device: torch.device
    temperature: float

    def valid_logits(self) -> torch.Tensor: ...
    def calibrated_loss(self, logits: torch.Tensor) -> tuple[float, float]: ...
    def evaluate(self) -> dict[str, float]: ...


def mean(models: Sequence[Weights]) -> Weights:
    """The mean of models of the same names and shapes; of what is no fraction, such as counters, the last one's.

    >>> mean([{"a": torch.tensor([1.0, 3.0])}, {"a": torch.tensor([2.0, 3.0])}])
    {'a': tensor([1.5000, 3.0000])}
    """
    return {
        name: torch.stack([model[name] for model in models]).mean(0) if value.is_floating_point() else value
        for name, value in models[-1].items()
    }


def between(start: Weights, end: Weights, share: float) -> Weights:
    """The weights at a share of the way from the start to the end; counters are those of the end.

    >>> between({"a": torch.tensor([1.0])}, {"a": torch.tensor([2.0])}, 0.75)
    {'a': tensor([1.7500])}
    """
    return {
        name: torch.lerp(start[name], value, share) if value.is_floating_point() else value
        for name, value in end.items()
    }


def pull_back(training: Training, start: Weights, logits: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Move the network of a training that has ended back towards its start, as far as that lowers the validation loss.

    Args:
        training: It has made all its epochs.
        start: The weights with which it began.
        logits: Of the network as it is, from `FineTune.valid_logits`.

    Returns:
        The share of the way at which the network is now, 1 for the end itself, and its logits there.
    """
    end = weights_of(training)
    best, lowest = 1.0, training.calibrated_loss(logits)[0]
    for share in WISE_ALPHAS:
        training.network.model.load_state_dict(between(start, end, share))
        tried = training.valid_logits()
        if not (loss := training.calibrated_loss(tried)[0]) < lowest:
            break
        best, lowest, logits = share, loss, tried
    training.network.model.load_state_dict(end if best == 1 else between(start, end, best))
    return best, logits


def stir_in(training: Training, earlier: Sequence[bytes]) -> dict[str, float]:
    """Average the network of a training on all images with those of earlier trainings, which have not seen the images
    for validation. So these can say which of the earlier ones, best first, belong into the mean: each one that does not
    raise its validation loss.

    Args:
        training: It has made all its epochs. Its temperature becomes that of the mean of the earlier ones.
        earlier: The content of their `WEIGHTS_FILE`. Those of other shapes are left out.

    Returns:
        The metrics of the mean, and `averaged`: how many models it is of.
    """
    own = weights_of(training)
    shapes = {name: value.shape for name, value in own.items()}
    chosen: list[Weights] = []
    lowest = math.inf
    for model in map(safetensors.torch.load, earlier):
        if {name: value.shape for name, value in model.items()} != shapes:
            continue
        tried = [*chosen, {name: value.to(training.device) for name, value in model.items()}]
        training.network.model.load_state_dict(mean(tried))
        loss, temperature = training.calibrated_loss(training.valid_logits())
        if loss <= lowest:
            chosen, lowest, training.temperature = tried, loss, temperature
    training.network.model.load_state_dict(mean([*chosen, own]))
    return training.evaluate() | {"averaged": 1 + len(chosen)}


def weights_of(training: Training) -> Weights:
    """A copy of the network's."""
    return {name: value.clone() for name, value in training.network.model.state_dict().items()}
