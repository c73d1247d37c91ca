"""Parameter groups with discriminative rates, and their position in the one-cycle schedule."""

import torch
from torch import nn

from trainables.network.schedule import OneCycle
from trainables.recipe import Recipe


def adamw(layer_groups: list[list[nn.Parameter]], rates: list[float], recipe: Recipe) -> torch.optim.AdamW:
    """AdamW with one peak rate per layer group, kept as each parameter group's `lr_max`.

    fastai's constants: eps 1e-5, second beta 0.99. Vectors (norms and biases) get no weight decay.
    """
    groups = []
    for parameters, lr_max in zip(layer_groups, rates, strict=True):
        for is_vector in (False, True):
            members = [p for p in parameters if p.requires_grad and (p.ndim <= 1) == is_vector]
            if members:
                decay = 0.0 if is_vector else recipe.weight_decay
                groups.append({"params": members, "lr": lr_max, "lr_max": lr_max, "weight_decay": decay})
    # fused: one kernel for all tensors of a group instead of a dozen small ones per tensor
    return torch.optim.AdamW(groups, betas=(recipe.mom_high, 0.99), eps=1e-5, fused=True)


def set_position(optimizer: torch.optim.Optimizer, cycle: OneCycle, position: float) -> None:
    """Set rate and momentum of all parameter groups for `position` of the cycle."""
    for group in optimizer.param_groups:
        group["lr"] = group["lr_max"] * cycle.lr_factor(position)
        group["betas"] = (cycle.momentum(position), group["betas"][1])


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """One rate for all parameter groups and fastai's constant momentum, for the learning-rate finder."""
    for group in optimizer.param_groups:
        group["lr"], group["betas"] = lr, (0.9, group["betas"][1])
