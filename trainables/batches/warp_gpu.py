"""Augmentation of a whole batch in torch, for GPUs: the pixels of `warp_cpu`, for images of any sizes.

All images lie in one flat buffer on the device. Each output pixel is a weighted mean of `span` x `span` pixels gathered
from it: 2 x 2 for bilinear reading; if pixels are averaged first, all those in the bins that are read.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from trainables.batches.augmentation import Augmentations
from trainables.batches.sampling_grid import Reading, readings

Integers = npt.NDArray[np.int64]

STEP = 2**22
"""Output pixels times `span` of one step: few steps keep the GPU busy, and each needs about 160 MB."""


def apply(
    pixels: torch.Tensor, starts: Integers, shapes: Integers, augmentations: Augmentations, size: int
) -> torch.Tensor:
    """n images of the flat uint8 buffer `pixels` through `augmentations` to (n, 3, size, size) uint8, channels-last.

    Image i is (h, w, 3) with h, w = `shapes[i]` (n, 2), from byte `starts[i]` (n,) of the buffer on.
    """
    n = len(starts)
    reading = readings(shapes, augmentations, size)
    spans = _spans(reading)
    parts = _parts(spans, size)
    order = np.concatenate(parts)
    steps = np.stack([np.full(n, 3), 3 * shapes[:, 1]], axis=1)  # bytes to the next pixel
    pairs = np.concatenate([*reading[1:], shapes[:, ::-1], steps], axis=1)
    columns = [reading.maps.reshape(n, 9), pairs, starts[:, None], np.arange(n)[:, None]]
    table = _sent(np.concatenate(columns, axis=1)[order], pixels)  # float64, exact up to 2**53
    lighting = _sent(augmentations.lighting, pixels)
    batch = pixels.new_empty((n, size, size, 3))
    for part, rows in zip(parts, table.split([len(part) for part in parts]), strict=True):
        images = rows[:, -1].long()
        values = _warped(pixels, rows, int(spans[part[0]]), size, augmentations.pad).round_().long()
        batch[images] = lighting[images].gather(1, values.flatten(1)).view(values.shape)
    return batch.permute(0, 3, 1, 2)


# --- On the host: which images make a step ----------------------------------------------------------------------------


def _spans(reading: Reading) -> Integers:
    """The most pixels, (n,), that two neighbouring bins cover along a side."""
    length, bins = reading.length, reading.bins
    spans: npt.NDArray[np.float64] = np.ceil(2 * length / bins) + (length % bins > 0)
    most: npt.NDArray[np.float64] = spans.max(axis=1)
    return most.astype(int)


def _parts(spans: Integers, size: int) -> list[Integers]:
    """The numbers of the images, as sets of equal `spans` (n,) that fit into one step."""
    parts: list[Integers] = []
    for span in np.unique(spans):
        rows = np.flatnonzero(spans == span)
        steps = -(-len(rows) * span * size**2 // STEP)
        parts += np.array_split(rows, min(steps, len(rows)))
    return parts


def _sent(array: npt.NDArray[Any], like: torch.Tensor) -> torch.Tensor:
    """`array` on the device of `like`, without a wait."""
    tensor = torch.tensor(array)
    return tensor.pin_memory().to(like.device, non_blocking=True) if like.is_cuda else tensor.to(like.device)


# --- On the device ----------------------------------------------------------------------------------------------------


def _warped(pixels: torch.Tensor, table: torch.Tensor, span: int, size: int, pad: bool) -> torch.Tensor:
    """The pixels (n, size, size, 3) float32 of the images in the n rows of `table`, before lighting."""
    maps = table[:, :9].float().view(-1, 3, 3, 1, 1)
    start, length, bins, sides, steps = table[:, 9:19].int().view(-1, 5, 2, 1, 1).unbind(1)
    offset = table[:, 19].long().view(-1, 1, 1)
    axis = torch.arange(size, dtype=torch.float32, device=table.device)
    points = maps[:, :, 0] * axis + (maps[:, :, 1] * axis[:, None] + maps[:, :, 2])  # (n, 3, size, size)
    # Points on a horizon are not finite. They may show anything from inside the image.
    at = _reflected((points[:, :2] / points[:, 2:]).nan_to_num_(), bins - 1)
    reads = []
    for position, weight in _weights(at, length, bins, span):
        position = position + start
        reads.append(((_reflected(position, sides - 1) if pad else position) * steps, weight))
    triples = pixels.unfold(0, 3, 1)  # a view: the pixel that begins at each byte
    values = torch.zeros((len(table), size, size, 3), device=table.device)
    for down, weight_down in reads:
        row = offset + down[:, 1]
        for right, weight_right in reads:
            weight = weight_down[:, 1] * weight_right[:, 0]
            values.addcmul_(triples[row + right[:, 0]], weight[..., None])
    return values


def _weights(
    at: torch.Tensor, length: torch.Tensor, bins: torch.Tensor, span: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The `span` pixels along each side, 0 to length - 1, read for the point `at` of the bins, and their weights."""
    near = at.int()
    far, share = torch.minimum(near + 1, bins - 1), at - near
    if span == 2:  # every pixel is a bin
        yield from ((near, 1 - share), (far, share))
        return
    begin, end = near * length // bins, _ceil_div((near + 1) * length, bins)
    far_begin, far_end = far * length // bins, _ceil_div((far + 1) * length, bins)
    near_weight, far_weight = (1 - share) / (end - begin), share / (far_end - far_begin)
    for i in range(span):
        pixel = begin + i
        weight = near_weight * (pixel < end) + far_weight * ((pixel >= far_begin) & (pixel < far_end))
        yield torch.minimum(pixel, length - 1), weight


def _ceil_div(numbers: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    return -(-numbers // by)


def _reflected(at: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """Points as ones in 0..last, reflected about the first and last pixel centres as often as needed."""
    period = (2 * last).clamp(min=1)
    at = at % period
    return torch.minimum(at, period - at)
