"""Batches of augmented images, made in the background while the network trains on the ones before."""

import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch

from trainables.batches import warp_gpu
from trainables.batches.augmentation import Augmentations
from trainables.batches.sampling_grid import readings
from trainables.data.presized_images import MEMORY_MAP, PresizedImages

Plan = tuple[np.ndarray, Augmentations]
"""Which images make a batch, (n,) indices, and what happens to each."""

RESIDENT_SHARE = 0.25
"""Images that take no more than this share of a GPU's free memory are kept on it."""


def loader_for(images: PresizedImages, device: torch.device, num_threads: int) -> "BatchLoader | GpuLoader":
    kind = GpuLoader if device.type == "cuda" else BatchLoader
    return kind(images, num_threads=num_threads)


class BatchLoader:
    """Reads, augments and stacks images: `images[i]` is (h, w, 3) uint8, batches (n, 3, size, size), channels-last.

    One thread makes one image. Threads suffice: OpenCV releases the GIL.
    """

    def __init__(self, images: Sequence[np.ndarray], *, num_threads: int, prefetch: int = 2) -> None:
        from trainables.batches import warp_cpu  # here, since training on a GPU does not need OpenCV

        self.images = images
        self.prefetch = prefetch
        self.warp = warp_cpu
        known = isinstance(images, PresizedImages)  # of files that are yet to be decoded the sizes are not
        self.shapes = np.asarray(images.shapes, dtype=np.int64)[:, :2] if known else None
        self.pool = ThreadPoolExecutor(num_threads, thread_name_prefix="augment")

    def batches(self, plans: Iterable[Plan], size: int, device: torch.device) -> Iterator[torch.Tensor]:
        """One uint8 batch on `device` per plan, `prefetch` of them in the making."""
        starts = (lambda plan=plan: self._start(*plan, size, pin=device.type == "cuda") for plan in plans)
        for finished in _ahead(starts, self.prefetch):
            yield finished().to(device, non_blocking=True)

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)

    def _start(
        self, indices: np.ndarray, augmentations: Augmentations, size: int, *, pin: bool
    ) -> Callable[[], torch.Tensor]:
        batch = torch.empty((len(indices), size, size, 3), dtype=torch.uint8, pin_memory=pin)
        pixels, lighting = batch.numpy(), augmentations.lighting
        reading = None if self.shapes is None else readings(self.shapes[indices], augmentations, size)

        def make(row: int) -> None:
            image = self.images[indices[row]]
            if reading is None:
                pixels[row] = self.warp.apply(image, augmentations[row], size)
            else:
                pixels[row] = self.warp.read(image, reading.of(row), lighting[row], size)

        jobs: list[Future] = [self.pool.submit(make, row) for row in range(len(indices))]

        def finished() -> torch.Tensor:
            for job in jobs:
                job.result()
            return batch.permute(0, 3, 1, 2)  # channels-last in memory, as the network wants it

        return finished


class GpuLoader:
    """The same batches, augmented by the GPU. Small sets stay on it; of others, threads fetch each batch's images."""

    def __init__(self, images: PresizedImages, *, num_threads: int, prefetch: int = 2) -> None:
        self.images = images
        self.prefetch = prefetch
        self.shapes = np.asarray(images.shapes, dtype=np.int64)[:, :2]
        self.offsets = np.asarray(images.offsets, dtype=np.int64)
        self.pool = ThreadPoolExecutor(num_threads, thread_name_prefix="fetch")

    def batches(self, plans: Iterable[Plan], size: int, device: torch.device) -> Iterator[torch.Tensor]:
        """One uint8 batch on `device` per plan; of sets that are not on it, `prefetch` are fetched ahead."""
        if (pixels := _resident(self.images, device)) is not None:
            for indices, augmentations in plans:
                yield warp_gpu.apply(pixels, self.offsets[indices], self.shapes[indices], augmentations, size)
            return
        fetches = (lambda plan=plan: (plan, self._fetch(plan[0], pin=device.type == "cuda")) for plan in plans)
        for (indices, augmentations), fetched in _ahead(fetches, self.prefetch):
            pixels, starts = fetched()
            pixels = pixels.to(device, non_blocking=True)
            yield warp_gpu.apply(pixels, starts, self.shapes[indices], augmentations, size)

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)

    def _fetch(self, indices: np.ndarray, *, pin: bool) -> Callable[[], tuple[torch.Tensor, np.ndarray]]:
        """The images one after another in one buffer, and where each begins."""
        ends = np.cumsum(3 * self.shapes[indices].prod(axis=1))
        starts = np.concatenate([[0], ends[:-1]])
        buffer = torch.empty(int(ends[-1]), dtype=torch.uint8, pin_memory=pin)
        pixels = buffer.numpy()

        def copy(row: int) -> None:
            pixels[starts[row] : ends[row]] = self.images[int(indices[row])].reshape(-1)

        jobs = [self.pool.submit(copy, row) for row in range(len(indices))]

        def finished() -> tuple[torch.Tensor, np.ndarray]:
            for job in jobs:
                job.result()
            return buffer, starts

        return finished


@lru_cache(maxsize=1)
def _resident(images: PresizedImages, device: torch.device) -> torch.Tensor | None:
    """All pixels on `device`, flat uint8, kept there for the next trial; None where they take too much room."""
    if images.storage != MEMORY_MAP or images.nbytes > RESIDENT_SHARE * free_memory(device):
        return None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable")  # nobody writes to it
        return torch.from_numpy(images.bytes).to(device)


def normalized(batch: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """A uint8 batch (n, 3, h, w) as (batch - mean) / std, for `mean` and `std` of shape (1, 3, 1, 1) in 0..255."""
    # In the batch's own layout; on CPUs broadcasting over channels-last would be three times as slow.
    alike = (each.expand(batch[:1].shape).contiguous(memory_format=torch.channels_last) for each in (mean, std))
    return (batch.float() - next(alike)).div_(next(alike))


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a GPU."""
    return torch.cuda.mem_get_info(device)[0]


def _ahead(starts: Iterable[Callable], number: int) -> Iterator:
    """What each of `starts` returns, with `number` of them started ahead of the one that is given out."""
    waiting: deque = deque()
    for start in starts:
        waiting.append(start())
        if len(waiting) > number:
            yield waiting.popleft()
    yield from waiting
