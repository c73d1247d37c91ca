"""Heads that are kept beside the features that they were fitted on. A damaged one counts as none."""

import os
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

import safetensors.torch
import torch

from trainables.system.cache import flush

State = dict[str, torch.Tensor]


def read_head(file: Path) -> State | None:
    """A kept head; None if there is none, or none that is as it was written."""
    try:
        content = file.read_bytes()
    except OSError:
        return None
    digest, state = content[:32], content[32:]
    return safetensors.torch.load(state) if sha256(state).digest() == digest else None


def write_head(file: Path, state: State) -> None:
    """Keeps a head beside its features, if that is possible: it is quick to compute."""
    content = safetensors.torch.save({name: value.contiguous() for name, value in state.items()})
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    with suppress(OSError):
        try:
            with partial.open("wb") as opened:
                opened.write(sha256(content).digest() + content)
                flush(opened)
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)
