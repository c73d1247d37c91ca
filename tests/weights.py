"""Weights of tiny networks of timm's, drawn at random, as files that a recipe with `pretrained` loads."""

from pathlib import Path

import safetensors.torch
import timm
import torch


def draw_weights(folder: Path, *archs: str) -> Path:
    """Writes `<arch>.safetensors` for each architecture; the same weights each time. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        for arch in archs:
            torch.manual_seed(7)
            safetensors.torch.save_file(timm.create_model(arch).state_dict(), folder / f"{arch}.safetensors")
    return folder
