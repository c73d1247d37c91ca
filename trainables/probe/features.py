"""Pooled features of a frozen backbone: each node computes them once for its images, and all trainings share them.

A set of features is a folder of the cache, named by a digest of all that decides them. `features.f16` has one row per
image, float16; `index.json` has its shape and its SHA-256. Like presized images it appears whole or not at all.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from trainables.data.presized_images import PresizedImages
from trainables.network.model import Network, classifier_names
from trainables.recipe import Recipe
from trainables.system.cache import DamagedCache, cache_dir, flush, new_folder, read_index, write_index

FORMAT_VERSION = 1
"""Raise it when the same settings give other features."""
FEATURES_FILE = "features.f16"
LARGEST = 65504.0
"""The largest float16."""

Features = npt.NDArray[np.float16]
"""(images, features)"""


def features_folder() -> Path:
    return cache_dir() / "features"


@dataclass(frozen=True, kw_only=True)
class FeatureSet:
    """The features of all images of a data set, by their index there."""

    rows: Features
    seconds: float
    """How long the node that computed them took."""
    path: Path
    """Their folder, which is absent where the cache cannot be written."""


def feature_path(network: Network, images: PresizedImages, recipe: Recipe, dtype: torch.dtype | None) -> Path:
    """The folder of the features of `images` by this network's backbone, as validation computes them in `dtype`."""
    settings = recipe.arch, recipe.concat_pool, recipe.image_size, recipe.resize_method
    decisive = (FORMAT_VERSION, images.path.name, *settings, network.mean, network.std, str(dtype))
    digest = sha256(repr(decisive).encode())
    head = tuple(f"{name}." for name in classifier_names(network.model))
    for name, value in network.model.state_dict().items():
        if not name.startswith(head):
            digest.update(name.encode())
            digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return features_folder() / digest.hexdigest()[:32]


def open_features(path: Path) -> FeatureSet | None:
    """The features in `path`; None if there are none. Raises `DamagedCache` for any that are not as written."""
    if not path.exists():
        return None
    index = read_index(path)
    try:
        shape = index["num_images"], index["num_features"]
        rows = np.memmap(path / FEATURES_FILE, dtype=np.float16, mode="r", shape=shape)
        if sha256(rows.data).hexdigest() != index["sha256"]:
            raise ValueError(f"{FEATURES_FILE} does not match its checksum")
        seconds = float(index["seconds"])
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise DamagedCache(f"{path}: {error}") from error
    with suppress(OSError):  # the time of last use, for `search.check --cache`
        os.utime(path)
    return FeatureSet(rows=rows, seconds=seconds, path=path)


def write_features(found: FeatureSet, images: PresizedImages, recipe: Recipe) -> FeatureSet:
    """Writes a set to its folder and opens it; the caller holds the folder's lock. Raises `OSError`."""
    rows = np.ascontiguousarray(found.rows)
    index: dict[str, Any] = {
        "format": FORMAT_VERSION,
        "root": str(images.root),
        "size": images.size,
        "resize_method": images.method,
        "arch": recipe.arch,
        "image_size": recipe.image_size,
        "num_images": rows.shape[0],
        "num_features": rows.shape[1],
        "seconds": found.seconds,
        "sha256": sha256(rows.data).hexdigest(),
    }
    with new_folder(found.path) as folder:
        with (folder / FEATURES_FILE).open("wb") as file:
            file.write(rows.data)
            flush(file)
        write_index(folder, index)
    mapped = np.memmap(found.path / FEATURES_FILE, dtype=np.float16, mode="r", shape=rows.shape)
    return replace(found, rows=mapped)


@contextmanager
def pooled_features(network: Network) -> Iterator[list[torch.Tensor]]:
    """Within it, each forward pass of the network adds its classifier's input (images, features) to the list.

    Raises `ValueError` where the classifier is none that a probe can be computed for.
    """
    classifier = probed_classifier(network)
    found: list[torch.Tensor] = []
    hook = classifier.register_forward_pre_hook(lambda module, inputs: found.append(inputs[0]))
    try:
        yield found
    finally:
        hook.remove()


def probed_classifier(network: Network) -> nn.Module:
    """The one linear layer or mlp head that maps pooled features to classes; `ValueError` for other classifiers."""
    classifier = network.classifier
    if (isinstance(classifier, nn.Linear) and classifier.bias is not None) or isinstance(classifier, nn.Sequential):
        return classifier
    kind = f"{len(classifier)} classifiers" if isinstance(classifier, nn.ModuleList) else type(classifier).__name__
    raise ValueError(f"head_init=probe needs one linear classifier with a bias, found {kind}; expected head_init=zeros")


def as_float16(features: torch.Tensor) -> Features:
    """Pooled features (images, features) as they are kept. Raises `ValueError` where they are no vectors."""
    if features.ndim != 2:
        shape = tuple(features.shape[1:])
        raise ValueError(f"the classifier's input has the shape {shape} per image; expected head_init=zeros")
    kept: Features = features.float().clamp(-LARGEST, LARGEST).cpu().numpy().astype(np.float16)
    return kept
