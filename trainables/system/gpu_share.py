"""A share of a GPU: counted, said, and kept to in its memory."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

CONTEXT_BYTES = 0.6e9
"""Of a process on a GPU besides its tensors: the CUDA context with its kernels, an estimate."""


def num_sharing(gpus: float) -> int:
    """How many can share a GPU where each gets so much of one; 1 for whole GPUs, and for none."""
    return int(1 / gpus + 1e-9) if 0 < gpus < 1 else 1


def gpu_share(count: int) -> float:
    """Of each of so many, in Ray's steps of a ten-thousandth. Rounded up, one fewer would fit."""
    return 1 if count == 1 else 10_000 // count / 10_000


def reserved(cpus: float, gpus: float) -> str:
    """What a worker reserves, such as "4 CPUs and 1/2 of a GPU"."""
    share = f"1/{num_sharing(gpus)} of a GPU" if 0 < gpus < 1 else f"{gpus:g} GPUs"
    return f"{cpus:g} CPUs" + (f" and {share}" if gpus else "")


def memory_fraction(share: float, total: float) -> float:
    """The part of a GPU's `total` bytes that the tensors of a process may take which has this share of the GPU, at
    least half of the share."""
    return max(share - CONTEXT_BYTES / total, share / 2)


def limit_memory(share: float, device: "torch.device") -> None:
    """Let this process take no more than its share of the memory of its GPU. More is an out-of-memory error of its own,
    where it would else be one of whichever process asks next."""
    import torch

    if device.type == "cuda" and 0 < share < 1:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(memory_fraction(share, total), device)
