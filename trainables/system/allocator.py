"""Freed memory stays with the process, so that the next tensor of its size need not ask the system for it again.

By default glibc maps each block above 32 MiB anew, and unmaps it when it is freed. So in each step the kernel hands out
and zeroes the pages of most activations again: on two CPU cores that took up to half the time of a forward pass, and a
quarter of a training step's. A thread that is not the first one has an arena of its own, which holds no block above
64 MiB; so all threads share one.
"""

import ctypes
import os

LARGEST_KEPT = 2**30
"""Bytes of a block from which it is still given back at once: data sets, no activations."""
NEVER = -1
SETTINGS = {
    "MALLOC_MMAP_THRESHOLD_": (-3, LARGEST_KEPT),
    "MALLOC_TRIM_THRESHOLD_": (-1, NEVER),
    "MALLOC_ARENA_MAX": (-8, 1),
}
"""By its variable, each parameter of glibc's `mallopt` as in malloc.h, with our value."""
ENVIRONMENT = {variable: str(value) for variable, (_, value) in SETTINGS.items()}
"""For processes that begin with these variables."""


def keep_freed_memory() -> None:
    """For this process and those that it starts, unless the environment says otherwise. Does nothing where the C
    library is not glibc."""
    if any(name in os.environ for name in ENVIRONMENT):
        return  # set by the user, or by the process that started this one
    os.environ.update(ENVIRONMENT)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    for parameter, value in SETTINGS.values():
        mallopt(parameter, value)
