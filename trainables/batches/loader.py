"""Batches of augmented images, made in the background while the network trains on the batches before."""

import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from trainables.batches import warp_gpu
from trainables.batches.augmentation import Augmentations
from trainables.batches.sampling_grid import readings
from trainables.data.image_file import Images
from trainables.data.presized_images import MEMORY_MAP, PresizedImages

Indices = npt.NDArray[np.int64]
Plan = tuple[Indices, Augmentations]
"""The images of a batch, (n,) indices, and their augmentations."""
T = TypeVar("T")

RESIDENT_SHARE = 0.25
"""Data sets of up to this share of a GPU's free memory are kept on it."""


def loader_for(images: PresizedImages, device: torch.device, num_threads: int) -> "BatchLoader | GpuLoader":
    """The loader for a device."""
    kind = GpuLoader if device.type == "cuda" else BatchLoader
    return kind(images, num_threads=num_threads)


class BatchLoader:
    """Reads, augments and stacks `images` to batches (n, 3, size, size), channels-last.

    One thread makes one image. Threads suffice, since OpenCV releases the GIL.
    """

    def __init__(self, images: Images, *, num_threads: int, prefetch: int = 2) -> None:
        from trainables.batches import warp_cpu  # here, since training on a GPU does not need OpenCV

        self.images = images
        self.prefetch = prefetch
        self.warp = warp_cpu
        self.shapes: npt.NDArray[np.int64] | None = None  # unknown for files that are not decoded yet
        if isinstance(images, PresizedImages):
            self.shapes = np.asarray(images.shapes, dtype=np.int64)[:, :2]
        self.pool = ThreadPoolExecutor(num_threads, thread_name_prefix="augment")

    def batches(self, plans: Iterable[Plan], size: int, device: torch.device) -> Iterator[torch.Tensor]:
        """One uint8 batch on `device` per plan; `prefetch` further ones are in progress."""
        started = (self._start(*plan, size, pin=device.type == "cuda") for plan in plans)
        for finished in _ahead(started, self.prefetch):
            yield finished().to(device, non_blocking=True)

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)

    def _start(
        self, indices: Indices, augmentations: Augmentations, size: int, *, pin: bool
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

        jobs = [self.pool.submit(make, row) for row in range(len(indices))]

        def finished() -> torch.Tensor:
            for job in jobs:
                job.result()
            return batch.permute(0, 3, 1, 2)  # channels-last in memory

        return finished


class GpuLoader:
    """The same batches, augmented by the GPU. Small data sets stay on it, threads fetch batches of others."""

    def __init__(self, images: PresizedImages, *, num_threads: int, prefetch: int = 2) -> None:
        self.images = images
        self.prefetch = prefetch
        self.shapes = np.asarray(images.shapes, dtype=np.int64)[:, :2]
        self.offsets = np.asarray(images.offsets, dtype=np.int64)
        self.pool = ThreadPoolExecutor(num_threads, thread_name_prefix="fetch")

    def batches(self, plans: Iterable[Plan], size: int, device: torch.device) -> Iterator[torch.Tensor]:
        """One uint8 batch on `device` per plan; of data sets that are not on it, `prefetch` are fetched ahead."""
        if (pixels := _resident(self.images, device)) is not None:
            for indices, augmentations in plans:
                yield warp_gpu.apply(pixels, self.offsets[indices], self.shapes[indices], augmentations, size)
            return
        fetches = ((plan, self._fetch(plan[0], pin=device.type == "cuda")) for plan in plans)
        for (indices, augmentations), fetched in _ahead(fetches, self.prefetch):
            pixels, starts = fetched()
            pixels = pixels.to(device, non_blocking=True)
            yield warp_gpu.apply(pixels, starts, self.shapes[indices], augmentations, size)

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)

    def _fetch(self, indices: Indices, *, pin: bool) -> Callable[[], tuple[torch.Tensor, npt.NDArray[np.int64]]]:
        """The images concatenated in one buffer, and where each begins."""
        ends = np.cumsum(3 * self.shapes[indices].prod(axis=1))
        starts = np.concatenate([[0], ends[:-1]])
        buffer = torch.empty(int(ends[-1]), dtype=torch.uint8, pin_memory=pin)
        pixels = buffer.numpy()

        def copy(row: int) -> None:
            pixels[starts[row] : ends[row]] = self.images[int(indices[row])].reshape(-1)

        jobs = [self.pool.submit(copy, row) for row in range(len(indices))]

        def finished() -> tuple[torch.Tensor, npt.NDArray[np.int64]]:
            for job in jobs:
                job.result()
            return buffer, starts

        return finished


@lru_cache(maxsize=1)
def _resident(images: PresizedImages, device: torch.device) -> torch.Tensor | None:
    """All pixels on `device`, flat uint8, kept there for the next trial; None if they need too much memory."""
    if images.storage != MEMORY_MAP or images.nbytes > RESIDENT_SHARE * free_memory(device):
        return None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable")  # it is only read
        return torch.from_numpy(images.bytes).to(device)


def normalized(batch: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """A uint8 batch (n, 3, h, w) as (batch - mean) / std, for `mean` and `std` of shape (1, 3, 1, 1) in 0..255."""
    # In the batch's own layout: on CPUs, broadcasting over channels-last would take three times as long.
    alike = (each.expand(batch[:1].shape).contiguous(memory_format=torch.channels_last) for each in (mean, std))
    return (batch.float() - next(alike)).div_(next(alike))


def free_memory(device: torch.device) -> int:
    """Free bytes on a GPU."""
    return torch.cuda.mem_get_info(device)[0]


def _ahead(items: Iterable[T], number: int) -> Iterator[T]:
    """The `items`, of which `number` are always taken in advance."""
    waiting: deque[T] = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > number:
            yield waiting.popleft()
    yield from waiting
