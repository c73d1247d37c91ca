"""What a training step gets: normalized images and soft targets on its device, mixup included."""

import itertools
from collections.abc import Iterable, Iterator

import numpy as np
import torch

from trainables.batches.epoch_plan import Step
from trainables.batches.loader import Plan, loader_for, normalized
from trainables.data.presized_images import PresizedImages
from trainables.network import loss


class Inputs:
    """From presized images to batches on `device`, normalized by `mean` and `std` per RGB channel (0..1)."""

    def __init__(
        self,
        images: PresizedImages,
        *,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        device: torch.device,
        num_threads: int,
    ) -> None:
        self.labels = torch.as_tensor(np.asarray(images.labels), dtype=torch.long)
        self.label_sets = None if images.label_sets is None else torch.as_tensor(images.truth)
        self.num_classes = len(images.classes)
        self.device = device
        self.mean = 255 * torch.tensor(mean, device=device).view(1, 3, 1, 1)
        self.std = 255 * torch.tensor(std, device=device).view(1, 3, 1, 1)
        self.loader = loader_for(images, device, num_threads)

    @property
    def truth(self) -> torch.Tensor:
        """What the network learns: the labels (images,), or the label sets (images, classes)."""
        return self.labels if self.label_sets is None else self.label_sets

    def batches(self, plans: Iterable[Plan], size: int) -> Iterator[torch.Tensor]:
        """Normalized images (n, 3, size, size) for each plan."""
        return map(self.normalized, self.loader.batches(plans, size, self.device))

    def steps(self, steps: Iterator[Step], size: int) -> Iterator[tuple[Step, torch.Tensor]]:
        """Each step and its uint8 images. The loader draws the `steps`, a few ahead."""
        steps, ahead = itertools.tee(steps)
        plans = ((step.indices, step.augmentations) for step in ahead)
        return zip(steps, self.loader.batches(plans, size, self.device), strict=True)

    def mixed(self, batch: torch.Tensor, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalized images and soft targets of this worker's rows, with mixup."""
        images = self.normalized(batch)
        targets = self._sent(loss.soft_targets(self.truth[step.indices], self.num_classes))
        if step.second is None:
            return images, targets
        first, second = (self._sent(torch.as_tensor(rows)) for rows in (step.first, step.second))
        lam = self._sent(torch.as_tensor(step.lam, dtype=torch.float32))
        mixed = loss.mix(images, first, second, lam).contiguous(memory_format=torch.channels_last)
        return mixed, loss.mix(targets, first, second, lam)

    def normalized(self, batch: torch.Tensor) -> torch.Tensor:
        return normalized(batch, self.mean, self.std)

    def close(self) -> None:
        self.loader.close()

    def _sent(self, values: torch.Tensor) -> torch.Tensor:
        """`values` on the device, without a wait for the steps before."""
        pinned = values.pin_memory() if self.device.type == "cuda" else values
        return pinned.to(self.device, non_blocking=True)
