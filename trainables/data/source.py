"""Sources of images and pretrained weights: text that means the same on every node of a cluster.

A source is a folder, or for images also a table or archive (see `address`), that every node has at the same path; the
URI of an archive or a folder that every node fetches once (see `fetch`); or, for images, the name of a known data set
(see `datasets`). Imports no torch.
"""

import socket
from hashlib import sha256
from pathlib import Path

from trainables.data.address import split_level
from trainables.data.datasets import DATASETS, prepare
from trainables.data.fetch import fetch, is_uri, pinned
from trainables.data.held_out_images import ImageSource, WithoutTestImages, without_test_images
from trainables.data.labelled_images import DataError, ImageFolder
from trainables.data.layouts import find_images


def images_of(source: ImageSource, digest: str | None = None) -> ImageFolder:
    """The labelled images of a source; fetches, draws or downloads them if this node does not have them.

    Raises `DataError` if their `images_digest` is not `digest`, which another node has computed.
    """
    if isinstance(source, WithoutTestImages):
        images = without_test_images(
            images_of(source.source), source.share, source.seed, source.left_out, source.groups
        )
    else:
        images = find_images(prepare(source) if source in DATASETS else folder_of(source))
    if digest is not None and images_digest(images) != digest:
        raise DataError(
            f"The images on the node {socket.gethostname()} ({images.describe()}) are not those that the search "
            "started with: names, classes or file sizes differ. Every node needs the same files at this path; a URI, "
            "which each of them fetches, ensures that."
        )
    return images


def folder_of(source: str) -> Path:
    """The folder of a path or a URI on this node; keeps what follows it, see `address`."""
    address, stars = split_level(source)
    return Path(f"{fetch(address)}{stars}") if is_uri(source) else Path(source)


def pinned_source(uri: str) -> str:
    """The URI with the checksum of this node's copy, see `fetch.pinned`."""
    address, stars = split_level(uri)
    return f"{pinned(address)}{stars}"


def images_digest(images: ImageFolder, *, sizes: bool = True) -> str:
    """SHA-256 over classes, labels, relative paths and file sizes, which all nodes have in common (unlike times). An
    image that is edited without a change of size keeps the digest. Opens no images."""
    described = ascii((images.classes, images.labels, images.paths, images.valid, *filter(None, [images.label_sets])))
    if sizes:
        described += ascii([_size(images.root / path) for path in images.paths])
    return sha256(described.encode()).hexdigest()


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:  # a broken link
        return -1
