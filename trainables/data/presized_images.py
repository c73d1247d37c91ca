"""Presized images as all modules read them: a folder with an index, and pixels in one of three storages.

`index.json` (sizes, labels, names) has its checksum in `index.sha256`. The pixels are in `pixels.u8` (memory-map: RGB
images one after another), in `images.jpeg` (jpeg: the same, compressed), or only in the data set itself (off).
"""

import io
import math
from collections.abc import Mapping
from functools import cached_property
from hashlib import sha256
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from trainables.data import labelled_images
from trainables.data.image_file import Pixels, UnreadableImage, read_image, resize
from trainables.data.label_sets import LabelSets, multi_hot
from trainables.data.splits import other_fold, train_and_valid
from trainables.system.cache import DamagedCache, read_index

KEY_LENGTH = 32  # of the name of a cache, before its storage
MEMORY_MAP, JPEG, OFF = "memory-map", "jpeg", "off"
PIXEL_FILES = {MEMORY_MAP: "pixels.u8", JPEG: "images.jpeg"}


def unreadable_list(caches: Path, key: str) -> Path:
    """The file that lists the images that a cache skips, each with its reason."""
    return caches / f"{key}.unreadable.txt"


def write_unreadable(file: Path, unreadable: Mapping[str, str]) -> None:
    """Lists unreadable images (path -> reason) in `file`, one on each line."""
    file.write_text("".join(f"{path!a}\t{' '.join(reason.split())}\n" for path, reason in unreadable.items()))


class PresizedImages:
    """All readable images of a data set, presized, read-only and shared by all processes that open the same folder.

    `images[i]` is uint8 (height, width, 3); from a memory map it is a view, not a copy. Pickles as its path
    and its groups. Raises `DamagedCache`.
    """

    def __init__(self, path: Path | str, groups: tuple[str, ...] | None = None) -> None:
        self.path = Path(path)
        self.groups = groups
        """As in `ImageFolder`. They are no part of the cache: the same images may be grouped in several ways."""
        index = read_index(self.path)
        try:
            shapes = zip(index["heights"], index["widths"], strict=True)
            self.shapes = [(height, width, 3) for height, width in shapes]
            """(height, width, 3) of each image."""
            self.labels = np.asarray(index["labels"], dtype=np.int64)
            found = index.get("label_sets")
            self.label_sets: LabelSets | None = None if found is None else tuple(map(tuple, found))
            """As in `ImageFolder`, and so are `labels` and `classes`."""
            self.paths: tuple[str, ...] = tuple(index["paths"])
            self.classes: tuple[str, ...] = tuple(index["classes"])
            self.unreadable: tuple[str, ...] = tuple(index["unreadable"])
            self.layout: str = index["layout"]
            self.root = Path(index["root"])
            self.size: int = index["size"]
            self.white_level: int = index["white_level"]
            """As in `ImageFolder`."""
            self.method: str = index["resize_method"]
            self.storage: str = index["storage"]
            self.nbytes: int = index["nbytes"]
            """Bytes of the pixels on disk."""
            self._valid = None if index["valid"] is None else np.asarray(index["valid"], dtype=bool)
            self.offsets = [0, *np.cumsum(index["lengths"], dtype=np.int64).tolist()]
            """Where the bytes of each image begin, and where those of the last one end."""
            stored = np.empty(0, dtype=np.uint8)
            if self.storage != OFF:
                stored = np.asarray(np.memmap(self.path / PIXEL_FILES[self.storage], dtype=np.uint8, mode="r"))
            self.bytes: Pixels = stored
            """All that is stored, flat; empty if the storage is off."""
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise DamagedCache(f"{self.path}: {error}") from error
        self._check_sizes()

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, index: int) -> Pixels:
        shape = self.shapes[index]
        index = index if index >= 0 else index + len(self)
        if self.storage == OFF:
            return self._decoded(index)
        stored = self.bytes[self.offsets[index] : self.offsets[index + 1]]
        return self._decompressed(index, stored) if self.storage == JPEG else stored.reshape(shape)

    def __reduce__(self) -> tuple[type["PresizedImages"], tuple[Path, tuple[str, ...] | None]]:
        return PresizedImages, (self.path, self.groups)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over what must be the same on all nodes of a training: paths, labels, classes and sizes."""
        labels = [self.labels.tolist(), *filter(None, [self.label_sets])]
        described = ascii((self.paths, *labels, self.classes, self.shapes, self.white_level))
        return sha256(described.encode()).hexdigest()

    @cached_property
    def truth(self) -> npt.NDArray[np.int64] | npt.NDArray[np.bool_]:
        """What a model learns: the label of each image (n,) or, where it may have several, of which class it is (n,
        classes)."""
        return self.labels if self.label_sets is None else multi_hot(self.label_sets, len(self.classes))

    def label_names(self, index: int) -> str:
        """The class of an image, or its classes."""
        own = [int(self.labels[index])] if self.label_sets is None else self.label_sets[index]
        return "; ".join(self.classes[label] for label in own)

    @property
    def has_own_split(self) -> bool:
        """Whether the data set itself says which images validate."""
        return self._valid is not None

    @property
    def unreadable_list(self) -> Path:
        """The file that lists the skipped images, each with its reason."""
        return unreadable_list(self.path.parent, self.path.name[:KEY_LENGTH])

    def split(
        self, seed: int = 0, valid_fraction: float = 0.2, fold: tuple[int, int] = (0, 1)
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Indices for training and validation, see `splits.train_and_valid`; or those of another `fold`, given as its
        number and how many there are, see `splits.other_fold`."""
        found = train_and_valid(self.labels, self._valid, self.groups, seed=seed, valid_fraction=valid_fraction)
        number, folds = fold
        return other_fold(found, self.labels, number, folds, seed=seed, groups=self.groups) if number else found

    def _check_sizes(self) -> None:
        stored = len(self.bytes)
        if not stored == self.nbytes == self.offsets[-1]:
            raise DamagedCache(f"{self.path}: the images take {stored} bytes, expected {self.offsets[-1]}")
        shapes_fit = self.storage != MEMORY_MAP or np.diff(self.offsets).tolist() == list(map(math.prod, self.shapes))
        if len(self.offsets) != len(self) + 1 or not shapes_fit:
            raise DamagedCache(f"{self.path}: the index gives other sizes than there are bytes")

    def _decompressed(self, index: int, stored: Pixels) -> Pixels:
        try:
            image = np.asarray(Image.open(io.BytesIO(stored.data), formats=("JPEG",)))
            if image.shape != self.shapes[index]:
                raise ValueError(f"its shape is {image.shape}, expected {self.shapes[index]}")
        except Exception as error:  # Pillow's decoders raise nearly anything on damaged bytes
            raise DamagedCache(
                f"{self.path}: the stored {self.paths[index]!r} cannot be decoded ({error}). Remove this folder: it "
                "will be rebuilt when it is needed."
            ) from error
        return image

    def _decoded(self, index: int) -> Pixels:
        file = self.root / self.paths[index]
        try:
            image = resize(read_image(file, self.size, self.white_level), self.size, self.method)
        except UnreadableImage as error:
            raise labelled_images.DataError(
                f"{file} was readable when the search began and no longer is: {error}"
            ) from error
        if image.shape != self.shapes[index]:
            raise labelled_images.DataError(
                f"The size of {file} has changed since the search began. Do not change the images during a search."
            )
        return image
