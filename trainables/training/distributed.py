"""Training shared by several workers so that the result does not depend on how many there are."""

import inspect
import os
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


@dataclass(frozen=True)
class World:
    """This worker's place among the workers of one trial."""

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> "World":
        """The initialized process group, or a world of one."""
        return cls(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else cls()

    def share(self, count: int) -> slice:
        """This worker's contiguous part of `count` things; parts differ by one at most."""
        return share(count, self.rank, self.size)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of `values` over all workers; in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """What each of the workers has, by rank."""
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
        # Batch statistics are shared already, so the buffers agree without a broadcast before each step. torch 2.14
        # renamed the option.
        known = inspect.signature(DistributedDataParallel).parameters
        option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        return DistributedDataParallel(model, device_ids=device_ids, **{option: False})

    def gradients_later(self, wrapped: nn.Module, later: bool) -> AbstractContextManager:
        """Within it, a backward pass of the `wrapped` model leaves averaging to a later one, if `later`."""
        return wrapped.no_sync() if later and self.size > 1 else nullcontext()


def share(count: int, rank: int, size: int) -> slice:
    """The contiguous part number `rank` of `count` things in `size` parts, which differ by one at most."""
    return slice(count * rank // size, count * (rank + 1) // size)


def init_from_environment() -> torch.device:
    """Join the process group that `torchrun` describes in the environment, if there is one; this worker's device."""
    has_gpu = torch.cuda.is_available()
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("nccl" if has_gpu else "gloo")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if has_gpu else torch.device("cpu")
    if has_gpu:
        torch.cuda.set_device(device)
    return device


def share_batch_norm(model: nn.Module, device: torch.device) -> nn.Module:
    """`model` with batch norms that take their statistics over the batch of all workers."""
    from timm.layers import convert_sync_batchnorm

    model = convert_sync_batchnorm(model)
    if device.type == "cpu":
        for module in model.modules():
            if isinstance(module, nn.SyncBatchNorm):
                # torch's SyncBatchNorm refuses CPU tensors, and DistributedDataParallel refuses its subclasses on the
                # CPU. Same parameters and buffers, another forward.
                module.__class__ = CpuSyncBatchNorm
    return model


class CpuSyncBatchNorm(_BatchNorm):
    """Batch norm over all workers in plain differentiable operations, with timm's fused activation where it has one."""

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
        values = x.float()  # bf16 has too few digits for sums over a batch
        count = values.new_tensor([x.numel() / x.shape[1]])
        count, total = all_reduce(torch.cat([count, values.sum(other_dims)])).split([1, x.shape[1]])
        shape = [1, -1] + [1] * (x.ndim - 2)
        centred = values - (total / count).view(shape)
        # Two passes: a variance from the sum of squares loses its digits where the mean is large.
        variance = all_reduce((centred * centred).sum(other_dims)) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(total / count, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale.view(shape) + self.bias.view(shape)).to(x.dtype)
