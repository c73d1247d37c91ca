"""Where images and pretrained weights come from, in a word that means the same on every node of a cluster.

A source is a folder that every node has at the same path, the URI of an archive or a folder that every node fetches
once (see `fetch`), or, of images, the name of a known data set (see `datasets`). Imports no torch.
"""

from hashlib import sha256
from pathlib import Path

from trainables.data import DataError, ImageFolder, find_images
from trainables.datasets import DATASETS, prepare
from trainables.fetch import fetch, is_uri
from trainables.held_out import Remaining, remaining


def images_of(source: str | Remaining, digest: str | None = None) -> ImageFolder:
    """The labelled images of a source, on this node; fetched, drawn or downloaded first where they are not here.

    Raises `DataError` where they are not those of `digest`, which another node got of `images_digest`.
    """
    if isinstance(source, Remaining):
        images = remaining(images_of(source.source), source.share, source.seed)
    else:
        images = find_images(prepare(source) if source in DATASETS else folder_of(source))
    if digest is not None and images_digest(images) != digest:
        raise DataError(
            f"The images in {images.root} on this node ({images.describe()}) are not those that the search was started "
            "with. Every node needs the same images at this path; a URI that each of them fetches makes sure of that."
        )
    return images


def folder_of(source: str) -> Path:
    """The folder of a source that is a path or a URI, on this node."""
    return fetch(source) if is_uri(source) else Path(source)


def images_digest(images: ImageFolder) -> str:
    """SHA-256 over classes, labels and relative paths: the same on all nodes, whose copies differ in their times."""
    described = ascii((images.classes, images.labels, images.paths, images.valid))
    return sha256(described.encode()).hexdigest()
