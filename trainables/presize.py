"""The presized image cache: each node decodes an image once, and every trial reads it from one shared memory map.

A cache is a folder named by the content of the data set and the settings. It holds `pixels.u8` (RGB images one after
another), `index.json` (sizes, labels, names) and `index.sha256`. It is written beside its place and renamed at the end.
"""

import errno
import json
import logging
import math
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from trainables import data
from trainables.data import DataError, ImageFolder

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2  # raise it when the same settings would give other pixels or another index
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # whatever the suffix says; no format that runs programs
MAX_PIXELS = 178_956_970  # Pillow's own limit against decompression bombs
MAX_ASPECT = 4.0
MAX_UNREADABLE = 0.01


class UnreadableImage(ValueError):
    """A file that cannot be decoded; the message says why."""


class DamagedCache(ValueError):
    """A cache folder that does not hold what its index and checksum promise."""


# --- One image --------------------------------------------------------------------------------------------------------


def read_image(path: Path | str, size: int | None = None) -> np.ndarray:
    """Decodes an image to uint8 (height, width, 3) RGB, turned upright by its EXIF orientation.

    With `size`, a JPEG is decoded at 1/2, 1/4 or 1/8 of its scale as long as its shorter side stays `size` or more.
    Transparent images are laid on white, 16-bit ones scaled to 8 bits, and of animations the first frame is taken.
    Raises UnreadableImage for anything else, truncated files and decompression bombs included.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            if math.prod(image.size) > MAX_PIXELS:
                raise UnreadableImage(f"{image.size[0]} x {image.size[1]} pixels, at most {MAX_PIXELS} are read")
            if size is not None:
                image.draft(None, (size, size))
            image.load()
            return np.ascontiguousarray(_to_rgb(_upright(image)))
    except UnreadableImage:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise UnreadableImage(f"{type(error).__name__}: {error}") from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF data beside sound pixels
        return image


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):  # 16 bits a pixel; convert("RGB") would clip them to white
        gray = np.clip(np.asarray(image, dtype=np.int64), 0, 65535) // 257
        return np.repeat(gray.astype(np.uint8)[..., None], 3, axis=2)
    if "transparency" in image.info or image.mode in ("RGBA", "RGBa", "LA", "La", "PA"):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return np.asarray(image.convert("RGB"))


def resize_shorter_side(image: np.ndarray, size: int) -> np.ndarray:
    """Resizes uint8 (h, w, 3) so that its shorter side is `size`, the whole rectangle kept.

    Only of images longer than MAX_ASPECT times their width is a centre piece kept: a thin strip would otherwise take as
    much room as hundreds of images.
    """
    height, width = image.shape[:2]
    short = min(height, width)
    longest = round(MAX_ASPECT * short)
    top, left = max(0, height - longest) // 2, max(0, width - longest) // 2
    image = image[top : top + longest, left : left + longest]
    height, width = (max(size, round(side * size / short)) for side in image.shape[:2])
    return _resized(image, height, width)


def resize(image: np.ndarray, size: int, method: str = "crop") -> np.ndarray:
    """Resizes uint8 (h, w, 3) as fastai's `Resize` does, but for the cutting and padding, which augmentation does.

    `method` crop makes the shorter side `size`, pad the longer side, squish both.
    """
    if method == "crop":
        return resize_shorter_side(image, size)
    longer = max(image.shape[:2])
    sides = (size, size) if method == "squish" else tuple(max(1, round(s * size / longer)) for s in image.shape[:2])
    return _resized(image, *sides)


def _resized(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """By Pillow's bilinear filter, which fastai uses: it widens when shrinking, so that no pixel is skipped."""
    if image.shape[:2] == (height, width):
        return np.ascontiguousarray(image)
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


# --- The cache --------------------------------------------------------------------------------------------------------


class PresizedImages:
    """All readable images of a data set, presized, read-only and shared with every process that opens the same folder.

    `images[i]` is a uint8 view (height, width, 3) on the map, not a copy. Pickles as its path. Raises DamagedCache.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        index = _read_index(self.path)
        try:
            shapes = zip(index["heights"], index["widths"], strict=True)
            self._shapes = [(height, width, 3) for height, width in shapes]
            self._offsets = [0, *np.cumsum([math.prod(shape) for shape in self._shapes]).tolist()]
            self.labels = np.asarray(index["labels"], dtype=np.int64)
            self.paths: tuple[str, ...] = tuple(index["paths"])
            self.classes: tuple[str, ...] = tuple(index["classes"])
            self.unreadable: tuple[str, ...] = tuple(index["unreadable"])
            self.layout: str = index["layout"]
            self.size: int = index["size"]
            self.nbytes: int = index["nbytes"]
            self._valid = None if index["valid"] is None else np.asarray(index["valid"], dtype=bool)
            self._pixels = np.asarray(np.memmap(self.path / "pixels.u8", dtype=np.uint8, mode="r"))
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise DamagedCache(f"{self.path}: {error}") from error
        if not len(self._pixels) == self.nbytes == self._offsets[-1]:
            raise DamagedCache(f"{self.path}: pixels.u8 has {len(self._pixels)} bytes, expected {self._offsets[-1]}")

    def __len__(self) -> int:
        return len(self._shapes)

    def __getitem__(self, index: int) -> np.ndarray:
        shape = self._shapes[index]
        start = self._offsets[index if index >= 0 else index + len(self)]
        return self._pixels[start : start + shape[0] * shape[1] * 3].reshape(shape)

    def __reduce__(self):
        return PresizedImages, (self.path,)

    def split(self, seed: int = 0, valid_fraction: float = 0.2) -> tuple[np.ndarray, np.ndarray]:
        """Indices for training and validation: the data set's own split, or a random one within each class."""
        if self._valid is not None:
            return np.flatnonzero(~self._valid), np.flatnonzero(self._valid)
        return data.split(self.labels, valid_fraction=valid_fraction, seed=seed)


def presize(
    folder: ImageFolder,
    size: int,
    method: str = "crop",
    *,
    cache: Path | None = None,
    num_threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> PresizedImages:
    """Opens the cache of `folder` at `size` pixels; the first process on a node builds it.

    `method` is the recipe's `resize_method`: crop keeps whole images with shorter sides of `size`, see `resize`.

    `cache` is the folder of all caches (default: "presized" in cache_dir()); `progress` is called with (images done,
    images in all) by the process that builds. Raises DataError where more than 1 % of the images are unreadable, a
    class is left with fewer than two, or the cache cannot be written.
    """
    if size < 1:
        raise ValueError(f"size is {size}; expected pixels, such as 460.")
    caches = data.cache_dir() / "presized" if cache is None else Path(cache)
    key = sha256(f"{data.fingerprint(folder)} {size} {method} {FORMAT_VERSION}".encode()).hexdigest()[:32]
    path = caches / key
    if opened := _open(path):
        return opened
    try:
        caches.mkdir(parents=True, exist_ok=True)
        with data.locked(caches / f".{key}.lock", "for another process that presizes the same images"):
            if opened := _open(path):  # the other process has built it
                return opened
            _build(folder, size, method, path, num_threads or data.num_cpus(), progress)
    except OSError as error:
        raise _cannot_write(caches, folder, size, error) from error
    return PresizedImages(path)


def _open(path: Path) -> PresizedImages | None:
    if not path.exists():
        return None
    try:
        return PresizedImages(path)
    except DamagedCache as error:
        logger.warning("the presized cache is damaged and is built again: %s", error)
        return None


def _read_index(path: Path) -> dict:
    try:
        text = (path / "index.json").read_bytes()
        if sha256(text).hexdigest() != (path / "index.sha256").read_text():
            raise ValueError("index.json does not match its checksum")
        return json.loads(text)
    except (OSError, ValueError) as error:
        raise DamagedCache(f"{path}: {error}") from error


# --- Building it ------------------------------------------------------------------------------------------------------


@dataclass
class _Built:
    """What one pass over the images gave; entry i of `kept`, `heights` and `widths` describes the same image."""

    kept: list[int] = field(default_factory=list)
    heights: list[int] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)
    nbytes: int = 0


def _build(
    folder: ImageFolder, size: int, method: str, path: Path, num_threads: int, progress: Callable | None
) -> None:
    """Writes the cache to a temporary folder and renames it. The caller holds the lock."""
    started = time.perf_counter()
    logger.info("presizing %d images to %d px in %s", len(folder.paths), size, path)
    least = len(folder.paths) * size * size * 3 / (MAX_ASPECT if method == "pad" else 1)
    if least * (1 - MAX_UNREADABLE) > shutil.disk_usage(path.parent).free:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    temporary = path.with_name(f".{path.name}.partial")  # one name: what a killed process left is removed
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        built = _write_pixels(folder, size, method, temporary / "pixels.u8", num_threads, progress)
        remaining = _leave_out(folder, built)
        _write_index(remaining, size, built, temporary)
        shutil.rmtree(path, ignore_errors=True)  # a damaged one
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    seconds = time.perf_counter() - started
    logger.info("presized %d images, %.0f MB, in %.1f s", len(built.kept), built.nbytes / 1e6, seconds)


def _write_pixels(
    folder: ImageFolder, size: int, method: str, file: Path, num_threads: int, progress: Callable | None
) -> _Built:
    built = _Built()
    with file.open("wb") as pixels:
        for index, image in enumerate(_decoded(folder, size, method, num_threads)):
            if isinstance(image, UnreadableImage):
                built.unreadable[folder.paths[index]] = str(image)
            else:
                pixels.write(image.data)
                built.kept.append(index)
                built.heights.append(image.shape[0])
                built.widths.append(image.shape[1])
                built.nbytes += image.nbytes
            if progress:
                progress(index + 1, len(folder.paths))
        _flush(pixels)
    return built


def _decoded(folder: ImageFolder, size: int, method: str, num_threads: int) -> Iterator[np.ndarray | UnreadableImage]:
    """The presized images in order; a few per thread are in memory at a time. Pillow and OpenCV release the GIL."""

    def decode(path: str) -> np.ndarray | UnreadableImage:
        try:
            return resize(read_image(folder.root / path, size), size, method)
        except UnreadableImage as error:
            return error

    with ThreadPoolExecutor(num_threads, thread_name_prefix="presize") as pool:
        running: deque = deque()
        try:
            for path in folder.paths:
                running.append(pool.submit(decode, path))
                if len(running) >= 4 * num_threads:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _leave_out(folder: ImageFolder, built: _Built) -> ImageFolder:
    """The readable part of `folder`; raises DataError where too little is left."""
    num_bad, total = len(built.unreadable), len(folder.paths)
    if num_bad == 0:
        return folder
    reasons = "; ".join(f"{path!r}: {reason}" for path, reason in list(built.unreadable.items())[:5])
    more = "; ..." if num_bad > 5 else ""
    if num_bad > MAX_UNREADABLE * total:
        raise DataError(
            f"{num_bad} of {total} images in {folder.root} cannot be read, more than the 1 % that is tolerated "
            f"({reasons}{more}). Repair or remove them."
        )
    logger.warning("left out %d of %d images that cannot be read: %s%s", num_bad, total, reasons, more)
    remaining = replace(
        folder,
        paths=tuple(folder.paths[i] for i in built.kept),
        labels=tuple(folder.labels[i] for i in built.kept),
        valid=None if folder.valid is None else tuple(folder.valid[i] for i in built.kept),
    )
    data.check_classes(remaining, left_out=num_bad)
    return remaining


def _write_index(folder: ImageFolder, size: int, built: _Built, target: Path) -> None:
    index = {
        "format": FORMAT_VERSION,
        "size": size,
        "layout": folder.layout,
        "classes": folder.classes,
        "paths": folder.paths,
        "labels": folder.labels,
        "valid": folder.valid,
        "heights": built.heights,
        "widths": built.widths,
        "nbytes": built.nbytes,
        "unreadable": list(built.unreadable),
    }
    text = json.dumps(index).encode()
    for name, content in (("index.json", text), ("index.sha256", sha256(text).hexdigest().encode())):
        with (target / name).open("wb") as file:
            file.write(content)
            _flush(file)


def _flush(file) -> None:
    """To the disk itself: after a power cut a renamed folder must not hold empty pages."""
    file.flush()
    os.fsync(file.fileno())


def _cannot_write(caches: Path, folder: ImageFolder, size: int, error: OSError) -> DataError:
    needed = len(folder.paths) * size * size * 3 * 1.4 / 1e9
    free = ""
    with suppress(OSError):
        free = f", {shutil.disk_usage(caches).free / 1e9:.2f} GB are free"
    return DataError(
        f"The presized images cannot be written to {caches}: {error.strerror or error}. They take about {needed:.2f} GB"
        f"{free}. Make room, choose a smaller presize, or set FINETUNE_SEARCH_CACHE to a folder on another disk."
    )
