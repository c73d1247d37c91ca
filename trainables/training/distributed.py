"""Training shared by several workers so that the result does not depend on their number."""

import inspect
import os
import socket
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from trainables.data.labelled_images import DataError
from trainables.data.presized_images import PresizedImages


@dataclass(frozen=True)
class World:
    """This worker's rank among the workers of one trial."""

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> "World":
        """The initialized process group, or a world of one."""
        return cls(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else cls()

    def shard(self, count: int) -> slice:
        """This worker's contiguous part of `count` items."""
        return shard(count, self.rank, self.size)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of `values` over all workers; in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """The values of all workers, by rank."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def wrap(self, model: nn.Module, device: torch.device) -> nn.Module:
        """`model` with its gradients averaged over the workers after each backward pass."""
        if self.size == 1:
            return model
        device_ids = [device] if device.type == "cuda" else None
        # Workers share batch statistics, so their buffers agree without a broadcast before each step. torch 2.14
        # renamed the option.
        known = inspect.signature(DistributedDataParallel).parameters
        option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        options: dict[str, Any] = {"device_ids": device_ids, option: False}
        return DistributedDataParallel(model, **options)

    def gradients_later(self, wrapped: nn.Module, later: bool) -> AbstractContextManager[None]:
        """Within it, a backward pass of the `wrapped` model leaves averaging to a later one if `later`."""
        context: AbstractContextManager[None] = nullcontext()
        if later and isinstance(wrapped, DistributedDataParallel):
            context = wrapped.no_sync()
        return context


def shard(count: int, rank: int, size: int) -> slice:
    """Part `rank` of `count` items in `size` contiguous parts, whose lengths differ by at most one."""
    return slice(count * rank // size, count * (rank + 1) // size)


def require_same_images(images: PresizedImages, world: World) -> None:
    """Raises `DataError` if the workers have different images: one that a node cannot read would shift the others."""
    found = world.gather((socket.gethostname(), images.digest, len(images), images.unreadable[:3]))
    if len({digest for _, digest, _, _ in found}) > 1:
        nodes = (
            f"{node} (worker {rank}) has {count}" + (f" and cannot read {', '.join(map(repr, bad))}" if bad else "")
            for rank, (node, _, count, bad) in enumerate(found)
        )
        raise DataError(
            f"The nodes of this trial have different images: {'; '.join(nodes)}. Every node needs the same files with "
            "the same content."
        )


def init_from_environment() -> torch.device:
    """Joins the process group that `torchrun` describes in the environment, if any; returns this worker's device."""
    has_gpu = torch.cuda.is_available()
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("nccl" if has_gpu else "gloo")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if has_gpu else torch.device("cpu")
    if has_gpu:
        torch.cuda.set_device(device)
    return device


def share_batch_norm(model: nn.Module, device: torch.device) -> nn.Module:
    """`model` with batch norms that compute their statistics over the batch of all workers."""
    from timm.layers.norm_act import convert_sync_batchnorm

    model = convert_sync_batchnorm(model)
    if device.type == "cpu":
        for module in model.modules():
            if isinstance(module, nn.SyncBatchNorm):
                # torch's SyncBatchNorm refuses CPU tensors, and DistributedDataParallel refuses its subclasses on the
                # CPU. Parameters and buffers stay, forward changes.
                module.__class__ = CpuSyncBatchNorm  # type: ignore[assignment]
    return model


class CpuSyncBatchNorm(_BatchNorm):
    """Batch norm over all workers in plain differentiable operations, with timm's fused activation if it has one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            x = self._normalize_by_batch(x)
        else:
            x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        for name in ("drop", "act"):
            if hasattr(self, name):
                x = getattr(self, name)(x)
        return x

    def _normalize_by_batch(self, x: torch.Tensor) -> torch.Tensor:
        other_dims = [d for d in range(x.ndim) if d != 1]
        values = x.float()  # bf16 is too imprecise for sums over a batch
        count = values.new_tensor([x.numel() / x.shape[1]])
        count, total = all_reduce(torch.cat([count, values.sum(other_dims)])).split([1, x.shape[1]])
        shape = [1, -1] + [1] * (x.ndim - 2)
        centred = values - (total / count).view(shape)
        # Two passes: a variance from the sum of squares is imprecise if the mean is large.
        variance = all_reduce((centred * centred).sum(other_dims)) / count
        assert self.num_batches_tracked is not None and self.running_mean is not None  # all of timm's have them
        assert self.running_var is not None and self.momentum is not None
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(total / count, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        normalized: torch.Tensor = centred * scale.view(shape) + self.bias.view(shape)
        return normalized.to(x.dtype)
