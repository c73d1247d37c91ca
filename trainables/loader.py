"""Batches of augmented images, made in background threads while the network trains on the ones before."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import cv2
import numpy as np
import torch

from trainables import augment

# One thread makes one image; OpenCV's own threads would fight ours for the cores.
cv2.setNumThreads(0)


class BatchLoader:
    """Reads, augments and stacks images: `images[i]` is (h, w, 3) uint8, batches (n, 3, size, size), channels-last."""

    def __init__(self, images: Sequence[np.ndarray], *, num_threads: int, prefetch: int = 2) -> None:
        self.images = images
        self.prefetch = prefetch
        self.pool = ThreadPoolExecutor(num_threads, thread_name_prefix="augment")

    def batches(
        self, plans: Iterable[tuple[np.ndarray, augment.Augmentations]], size: int, device: torch.device
    ) -> Iterator[torch.Tensor]:
        """One uint8 batch on `device` per plan (indices, augmentations), `prefetch` of them in the making."""
        waiting: deque[Callable[[], torch.Tensor]] = deque()
        for indices, augmentations in plans:
            waiting.append(self._start(indices, augmentations, size, pin=device.type == "cuda"))
            if len(waiting) > self.prefetch:
                yield waiting.popleft()().to(device, non_blocking=True)
        while waiting:
            yield waiting.popleft()().to(device, non_blocking=True)

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)

    def _start(
        self, indices: np.ndarray, augmentations: augment.Augmentations, size: int, *, pin: bool
    ) -> Callable[[], torch.Tensor]:
        batch = torch.empty((len(indices), size, size, 3), dtype=torch.uint8, pin_memory=pin)
        pixels = batch.numpy()

        def make(row: int) -> None:
            pixels[row] = augment.apply(self.images[indices[row]], augmentations[row], size)

        jobs: list[Future] = [self.pool.submit(make, row) for row in range(len(indices))]

        def finished() -> torch.Tensor:
            for job in jobs:
                job.result()
            return batch.permute(0, 3, 1, 2)  # channels-last in memory, as the network wants it

        return finished
