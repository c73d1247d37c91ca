"""Pooled features of a frozen backbone: each node computes them once for its images, and all trainings share them.

A set of features is a folder of the cache, see `feature_files`, named by a digest of all that decides them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import timm
import torch

from trainables.data.presized_images import PresizedImages
from trainables.network.model import Network, classifier_names
from trainables.probe.feature_files import Features, features_folder
from trainables.probe.views import View
from trainables.recipe import Recipe

FORMAT_VERSION = 3
"""Raise it when the same settings give other features."""
LARGEST = 65504.0
"""The largest float16."""


def backbone_digest(network: Network, device: torch.device, dtype: torch.dtype | None) -> str:
    """SHA-256 of all in a network that decides its features, and of what computes them, in `dtype`.

    GPUs augment and compute a little differently than CPUs do, and one version of timm may than another.
    """
    computing = network.mean, network.std, str(dtype), device.type, timm.__version__
    digest = sha256(repr(computing).encode())
    head = tuple(f"{name}." for name in classifier_names(network.model))
    for name, value in network.model.state_dict().items():
        if not name.startswith(head):
            digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def feature_path(backbone: str, images: PresizedImages, recipe: Recipe, view: View) -> Path:
    """The folder of the features of a view of `images` by the backbone with this digest.

    The name of the presized images says where they come from and how; their digest, which of them could be read.
    """
    settings = recipe.arch, recipe.concat_pool, recipe.image_size, recipe.resize_method
    decisive = FORMAT_VERSION, backbone, images.path.name, images.digest, *settings, *view.key
    return features_folder() / sha256(repr(decisive).encode()).hexdigest()[:32]


def description(images: PresizedImages, recipe: Recipe, view: View) -> dict[str, Any]:
    """What the index of a set says of it, for `search.check --cache`."""
    return {
        "format": FORMAT_VERSION,
        "root": str(images.root),
        "size": images.size,
        "resize_method": images.method,
        "arch": recipe.arch,
        "image_size": recipe.image_size,
        "augmented": view.is_augmented,
    }


@contextmanager
def pooled_features(network: Network) -> Iterator[list[torch.Tensor]]:
    """Within it, each forward pass of the network adds its classifier's input (images, features) to the list."""
    found: list[torch.Tensor] = []
    hook = network.classifier.register_forward_pre_hook(lambda module, inputs: found.append(inputs[0]))
    try:
        yield found
    finally:
        hook.remove()


def as_float16(features: torch.Tensor) -> Features:
    """Pooled features (images, features) as they are kept: finite ones beyond float16 as its largest, NaN and infinity
    as they are. Raises `ValueError` where they are no vectors."""
    if features.ndim != 2:
        shape = tuple(features.shape[1:])
        raise ValueError(f"the classifier's input has the shape {shape} per image; expected head_init=zeros")
    values = features.float()
    kept: Features = torch.where(values.isinf(), values, values.clamp(-LARGEST, LARGEST)).half().cpu().numpy()
    return kept
