"""Builds the presized image cache: each node decodes an image once, and every trial reads it from one shared file.

A cache is a folder (see `presized_images`) named by the content of the data set and the settings. It is written under a
temporary name and renamed at the end, under a lock, so that it is built once and no process sees a part of it.
"""

import errno
import io
import logging
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path

import numpy as np
from PIL import Image

from trainables.data import labelled_images
from trainables.data.image_file import Pixels, UnreadableImage, formats_of, read_image, resize
from trainables.data.labelled_images import MAX_UNREADABLE, DataError, ImageFolder
from trainables.data.presized_images import (
    JPEG,
    KEY_LENGTH,
    MEMORY_MAP,
    OFF,
    PIXEL_FILES,
    PresizedImages,
    unreadable_list,
    write_unreadable,
)
from trainables.system.cache import DamagedCache, cache_dir, flush, locked, new_folder, write_index
from trainables.system.machine import num_cpus, total_memory
from trainables.system.text import many

logger = logging.getLogger(__name__)

FORMAT_VERSION = 5
"""Raise it when the same settings give other pixels or another index."""
STORAGES = ("auto", MEMORY_MAP, JPEG, OFF)
JPEG_QUALITY = 95
MEMORY_SHARE = 0.5
"""A memory map larger than this share of the memory would be read from the disk repeatedly."""

Progress = Callable[[int, int], None]
"""Called with the number of images done and of all images."""
Stored = tuple[tuple[int, int], memoryview | bytes]
"""Height and width of a presized image, and the bytes to store."""


def presize(
    folder: ImageFolder,
    size: int,
    method: str = "crop",
    *,
    storage: str = "auto",
    max_unreadable: float = MAX_UNREADABLE,
    white_level: int | None = None,
    cache: Path | None = None,
    num_threads: int | None = None,
    progress: Progress = lambda done, total: None,
) -> PresizedImages:
    """Opens the cache of `folder` at `size` pixels; the first process on a node builds it.

    Args:
        folder: The labelled images, as `find_images` gives them.
        size: Pixels; the side that `method` names.
        method: The recipe's `resize_method`: crop makes the shorter side `size`, pad the longer side, squish both.
        storage: memory-map stores the pixels, jpeg compresses them (quality 95, so they differ a little), off stores
            nothing and decodes the data set's files each time. auto is memory-map if the pixels fit into half of the
            memory and the disk, else jpeg.
        max_unreadable: The share of the images that may be unreadable, 0 to 1. A file next to the cache lists them.
        white_level: What becomes white in images of more than 8 bits; by default that of `folder`.
        cache: The folder of all caches; by default `caches_folder()`.
        num_threads: Threads that decode; by default one per CPU.
        progress: The process that builds the cache calls it after each image.

    Returns:
        The images: `images[i]` is uint8 (height, width, 3).

    Raises:
        DataError: More images are unreadable, a class has fewer than two readable images, or the cache cannot be
            written.
        ValueError: An argument is out of range.

    Example:
        >>> images = presize(find_images("birds"), 128)
        >>> train, valid = images.split(seed=0)
    """
    job = _job(folder, size, method, storage, max_unreadable, white_level, cache, num_threads)
    images = _open(job) or _build_once(job, progress)
    _require_few(job, dict.fromkeys(images.unreadable, ""))  # an earlier search may have tolerated more
    if folder.groups is not None:
        group_of = dict(zip(folder.paths, folder.groups, strict=True))
        images.groups = tuple(group_of[path] for path in images.paths)
    return images


def presized_before(
    folder: ImageFolder, size: int, method: str = "crop", *, storage: str = "auto"
) -> PresizedImages | None:
    """The images that `presize` would open, without their groups; None where it would have to build them."""
    return _open(_job(folder, size, method, storage))


def _job(
    folder: ImageFolder, size: int, method: str, storage: str, max_unreadable: float = MAX_UNREADABLE,
    white_level: int | None = None, cache: Path | None = None, num_threads: int | None = None,
) -> "_Job":  # fmt: skip
    if size < 1:
        raise ValueError(f"size is {size}; expected pixels, such as 460.")
    if storage not in STORAGES:
        raise ValueError(f"storage is {storage!r}; expected one of {', '.join(STORAGES)}.")
    if not 0 <= max_unreadable <= 1:
        raise ValueError(f"max_unreadable is {max_unreadable}; expected a share from 0 to 1, such as 0.01.")
    caches = caches_folder() if cache is None else Path(cache)
    white_level = folder.white_level if white_level is None else white_level
    content = f"{labelled_images.fingerprint(folder)} {white_level} {size} {method} {FORMAT_VERSION}"
    key = sha256(content.encode()).hexdigest()[:KEY_LENGTH]
    return _Job(folder, size, method, white_level, storage, caches, key, num_threads or num_cpus(), max_unreadable)


def caches_folder() -> Path:
    return cache_dir() / "presized"


@dataclass(frozen=True)
class _Job:
    folder: ImageFolder
    size: int
    resize_method: str
    white_level: int
    storage: str
    """As requested, which may be auto, until one is chosen."""
    caches: Path
    key: str
    """A hash of the content and the settings."""
    num_threads: int
    max_unreadable: float

    @property
    def path(self) -> Path:
        # With storage off, the images are those at this very place.
        off, root = self.storage == OFF, ascii(self.folder.root.absolute())
        place = f"-{sha256(root.encode()).hexdigest()[:8]}" if off else ""
        return self.caches / f"{self.key}-{self.storage}{place}"


def _open(job: _Job) -> PresizedImages | None:
    """The cache, if it exists; auto takes any, so that all trials of a node read the same pixels."""
    for storage in (MEMORY_MAP, JPEG) if job.storage == "auto" else (job.storage,):
        path = replace(job, storage=storage).path
        if not path.exists():
            continue
        try:
            opened = PresizedImages(path)
        except DamagedCache as error:
            logger.warning("the presized cache is damaged and will be rebuilt: %s", error)
            continue
        with suppress(OSError):  # the time of last use, for `search.check --cache`
            os.utime(path)
        return opened
    return None


# --- Choosing the storage ---------------------------------------------------------------------------------------------


def _choose(job: _Job) -> str:
    """The storage to build. Raises `OSError` if it certainly does not fit on the disk."""
    needed, storage = estimated_bytes(job.folder, job.size, job.resize_method), job.storage
    memory, free = total_memory(), shutil.disk_usage(job.caches).free
    sizes = f"about {needed / 1e9:.2f} GB of pixels, {memory / 1e9:.0f} GB of memory, {free / 1e9:.0f} GB of disk free"
    if storage == "auto":
        fits = needed <= MEMORY_SHARE * memory and needed <= 0.9 * free
        storage = MEMORY_MAP if fits else JPEG
        logger.info("cache: %s chosen (%s)", storage, sizes)
    else:
        logger.info("cache: %s as requested (%s)", storage, sizes)
    # The estimate may be too large: refuse only what certainly does not fit.
    if {MEMORY_MAP: 0.8 * needed, JPEG: 0.05 * needed, OFF: 0}[storage] > free:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return storage


def estimated_bytes(folder: ImageFolder, size: int, method: str, *, samples: int = 200) -> int:
    """Bytes of all presized pixels, from the headers of about `samples` images spread over the data set."""
    step = max(1, len(folder.paths) // samples)
    areas = []
    for path in folder.paths[::step]:
        with suppress(Exception), Image.open(file := folder.root / path, formats=formats_of(file)) as image:
            ratio = max(image.size) / min(image.size)
            areas.append({"crop": min(ratio, 4), "squish": 1, "pad": 1 / ratio}[method])
    return round(3 * size * size * len(folder.paths) * float(np.mean(areas or [1])))


# --- Building it ------------------------------------------------------------------------------------------------------


def _build_once(job: _Job, progress: Progress) -> PresizedImages:
    """Builds the cache, unless another process builds it first."""
    try:
        job.caches.mkdir(parents=True, exist_ok=True)
        with locked(job.caches / f".{job.key}.lock", "for another process that presizes the same images"):
            if opened := _open(job):  # the other process has built it
                return opened
            job = replace(job, storage=_choose(job))
            _build(job, progress)
    except OSError as error:
        raise _cannot_write(job, error) from error
    return PresizedImages(job.path)


@dataclass
class _Built:
    """The result of a pass over the images; entry i of all lists describes the same image."""

    kept: list[int] = field(default_factory=list)
    heights: list[int] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)  # bytes stored
    unreadable: dict[str, str] = field(default_factory=dict)


def _build(job: _Job, progress: Progress) -> None:
    """Writes the cache to a temporary folder and renames it. The caller holds the lock."""
    started = time.perf_counter()
    logger.info("presizing %d images to %d px in %s", len(job.folder.paths), job.size, job.path)
    with new_folder(job.path) as temporary:
        built = _write_images(job, temporary, progress)
        _write_index(job, _readable(job, built), built, temporary)
    seconds = time.perf_counter() - started
    logger.info("presized %d images, %.0f MB, in %.1f s", len(built.kept), sum(built.lengths) / 1e6, seconds)


def _write_images(job: _Job, target: Path, progress: Progress) -> _Built:
    built, paths = _Built(), job.folder.paths
    with (target / PIXEL_FILES.get(job.storage, "nothing")).open("wb") as file:
        for index, image in enumerate(_stored(job)):
            if isinstance(image, UnreadableImage):
                built.unreadable[paths[index]] = str(image)
            else:
                (height, width), stored = image
                file.write(stored)
                built.kept.append(index)
                built.heights.append(height)
                built.widths.append(width)
                built.lengths.append(len(stored))
            progress(index + 1, len(paths))
        flush(file)
    return built


def _stored(job: _Job) -> Iterator[Stored | UnreadableImage]:
    """Each image in order; a few per thread are in memory at a time. Pillow releases the GIL."""

    def one(path: str) -> Stored | UnreadableImage:
        try:
            image = read_image(job.folder.root / path, job.size, job.white_level)
            image = resize(image, job.size, job.resize_method)
        except UnreadableImage as error:
            return error
        height, width = image.shape[:2]
        return (height, width), _encoded(image, job.storage)

    with ThreadPoolExecutor(job.num_threads, thread_name_prefix="presize") as pool:
        running: deque[Future[Stored | UnreadableImage]] = deque()
        try:
            for path in job.folder.paths:
                running.append(pool.submit(one, path))
                if len(running) >= 4 * job.num_threads:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _encoded(image: Pixels, storage: str) -> memoryview | bytes:
    if storage == MEMORY_MAP:
        return image.data.cast("B")
    stream = io.BytesIO()
    if storage == JPEG:  # without chroma subsampling, which would blur the colours of JPEGs a second time
        Image.fromarray(image).save(stream, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return stream.getvalue()


def _readable(job: _Job, built: _Built) -> ImageFolder:
    """The readable images; raises `DataError` if there are too few."""
    folder, num_bad = job.folder, len(built.unreadable)
    if num_bad == 0:
        return folder
    write_unreadable(unreadable_list(job.caches, job.key), built.unreadable)
    _require_few(job, built.unreadable)
    total, listed = len(folder.paths), _listed(job, built.unreadable)
    logger.warning("skipped %d of %d images that cannot be read: %s", num_bad, total, listed)
    readable = folder.only(built.kept)
    labelled_images.check_classes(readable, f"{many(num_bad, 'unreadable image')} skipped")
    return readable


def _require_few(job: _Job, unreadable: Mapping[str, str]) -> None:
    """Raises `DataError` if more images are `unreadable` (path -> reason, if known) than allowed."""
    num_bad, total = len(unreadable), len(job.folder.paths)
    if num_bad > job.max_unreadable * total:
        raise DataError(
            f"{num_bad} of {total} images in {job.folder.root} cannot be read, more than the "
            f"{100 * job.max_unreadable:g} % that --max-unreadable allows ({_listed(job, unreadable)}). Repair or "
            "remove them, or allow a larger share."
        )


def _listed(job: _Job, unreadable: Mapping[str, str]) -> str:
    """The first unreadable images, and where all of them are."""
    first = [f"{path!r}: {reason}" if reason else repr(path) for path, reason in list(unreadable.items())[:5]]
    return "; ".join([*first, f"all listed in {unreadable_list(job.caches, job.key)}"])


def _write_index(job: _Job, folder: ImageFolder, built: _Built, target: Path) -> None:
    index = {
        "format": FORMAT_VERSION,
        "root": str(folder.root.absolute()),
        **{name: getattr(job, name) for name in ("size", "white_level", "resize_method", "storage")},
        **{name: getattr(folder, name) for name in ("layout", "classes", "paths", "labels", "valid")},
        **{name: getattr(built, name) for name in ("heights", "widths", "lengths")},
        "nbytes": sum(built.lengths),
        "unreadable": list(built.unreadable),
    }
    if folder.label_sets is not None:
        index["label_sets"] = folder.label_sets
    write_index(target, index)


def _cannot_write(job: _Job, error: OSError) -> DataError:
    needed, free = len(job.folder.paths) * job.size * job.size * 3 * 1.4 / 1e9, ""
    with suppress(OSError):
        free = f", {shutil.disk_usage(job.caches).free / 1e9:.2f} GB are free"
    return DataError(
        f"The presized images cannot be written to {job.caches}: {error.strerror or error}. They take about "
        f"{needed:.2f} GB{free}. Make room, choose a smaller presize, keep JPEGs (--cache jpeg) or nothing (--cache "
        "off), or set FINETUNE_SEARCH_CACHE to a folder on another disk."
    )
