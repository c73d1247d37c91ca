"""Trains the mlp head on the features of a frozen backbone, without the backbone."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from trainables.network.loss import log_loss
from trainables.network.optimizer import adamw, set_position
from trainables.network.schedule import OneCycle
from trainables.recipe import Recipe

BATCH_SIZE = 64
EPOCHS, MIN_STEPS = 20, 300
"""Passes over the images, and more of them where they would be fewer steps than that: on small sets."""
LR_MAX = 2e-3
RECIPE = Recipe(weight_decay=0.01)
CYCLE = OneCycle(pct_start=0.25, div=25, div_final=1e5, mom_high=RECIPE.mom_high, mom_low=RECIPE.mom_low)


def fit_mlp(
    head: nn.Sequential,
    features: Tensor,
    labels: Tensor,
    *,
    class_weights: Tensor | None = None,
    offsets: Tensor | None = None,
    seed: int,
    device: torch.device | str,
    on_progress: Callable[[], None] = lambda: None,
) -> None:
    """Trains `head`, a `trainables.network.model.mlp_head`, in place on features (images, features) and labels
    (images,) or label sets (images, classes).

    AdamW in one cycle on batches of at most 64; `class_weights` (classes,) multiply the losses of their images, and
    `offsets` (classes,) are added to the logits in the loss. Order and dropout depend on `seed` alone; torch's own
    generators stay as they were, and so do the head's device and mode. Raises `ValueError` for fewer than two images,
    of which batch norm has no variance, and for features that are not finite.
    """
    if len(features) != len(labels) or len(labels) < 2:
        raise ValueError(
            f"there are {len(features)} features and {len(labels)} labels, expected as many of both, at least two: "
            "batch norm cannot train on one image. head=linear can."
        )
    if not features.isfinite().all():
        raise ValueError("some features are NaN or infinite, expected finite ones")
    device = torch.device(device)
    x, y = features.to(device, torch.float32), labels.to(device)
    weights = None if class_weights is None else class_weights.to(device)
    added = 0.0 if offsets is None else offsets.to(device)
    num_batches = math.ceil(len(y) / BATCH_SIZE)
    epochs = max(EPOCHS, math.ceil(MIN_STEPS / num_batches))
    home, training = next(head.parameters()).device, head.training
    head.to(device).train()
    optimizer = adamw([list(head.parameters())], [LR_MAX], RECIPE)
    order = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)  # dropout
        for epoch in range(epochs):
            # Batches of equal size, so that none has a single image.
            batches = torch.randperm(len(y), generator=order).tensor_split(num_batches)
            for step, batch in enumerate(batches, epoch * num_batches):
                set_position(optimizer, CYCLE, step / (epochs * num_batches))
                chosen = batch.to(device)
                log_loss(head(x[chosen]) + added, y[chosen], weights).backward()
                optimizer.step()
                optimizer.zero_grad()
            on_progress()
    head.to(home).train(training)
