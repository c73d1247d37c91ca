"""Builds the presized image cache: each node decodes an image once, and every trial reads it from one shared file.

A cache is a folder (see `presized_images`) named by the content of the data set and the settings. It is written beside
its place and renamed at the end, under a lock, so that many processes build it once and none sees half of it.
"""

import errno
import io
import json
import logging
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path

import numpy as np
from PIL import Image

from trainables.data import labelled_images
from trainables.data.image_file import UnreadableImage, formats_of, read_image, resize
from trainables.data.labelled_images import MAX_UNREADABLE, DataError, ImageFolder
from trainables.data.presized_images import (
    CHECKSUM_FILE,
    INDEX_FILE,
    JPEG,
    KEY_LENGTH,
    MEMORY_MAP,
    OFF,
    PIXEL_FILES,
    DamagedCache,
    PresizedImages,
    unreadable_list,
    write_unreadable,
)
from trainables.system.cache import cache_dir, locked
from trainables.system.machine import num_cpus

logger = logging.getLogger(__name__)

FORMAT_VERSION = 5  # raise it when the same settings would give other pixels or another index
STORAGES = ("auto", MEMORY_MAP, JPEG, OFF)
JPEG_QUALITY = 95
JPEG_SHARE = 0.25  # of the bytes of the pixels, at most; photographs take about 0.15
MEMORY_SHARE = 0.5
"""A memory map that takes more of the memory than this would be read from the disk again and again."""


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
    progress: Callable[[int, int], None] | None = None,
) -> PresizedImages:
    """Opens the cache of `folder` at `size` pixels; the first process on a node builds it.

    `method` is the recipe's `resize_method`: crop keeps whole images with shorter sides of `size`, see `resize`.

    `storage` memory-map keeps the pixels as they are, jpeg compresses them (quality 95, so they differ a little), off
    keeps none and decodes the data set's own files each time; auto takes the memory map while it fits half of the
    memory and the disk, and jpeg beyond.

    `white_level` is the value that becomes white in images of more than 8 bits, where it is not to be that of `folder`.
    `max_unreadable` is the share of the images that may be unreadable, 0 to 1; all of them are listed in a file beside
    the cache. `cache` is the folder of all caches (default: `caches_folder()`); `progress` is called with (images done,
    images in all) by the process that builds. Raises DataError where more images are unreadable, a class is left with
    fewer than two, or the cache cannot be written.
    """
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
    job = _Job(folder, size, method, white_level, storage, caches, key, num_threads or num_cpus(), max_unreadable)
    images = _open(job) or _build_once(job, progress)
    _require_few(job, dict.fromkeys(images.unreadable, ""))  # an earlier search may have tolerated more
    return images


def caches_folder() -> Path:
    return cache_dir() / "presized"


@dataclass(frozen=True)
class _Job:
    folder: ImageFolder
    size: int
    method: str
    white_level: int
    storage: str
    """What was asked for, auto included, until one is chosen."""
    caches: Path
    key: str
    """What the content and the settings are called."""
    num_threads: int
    max_unreadable: float

    @property
    def path(self) -> Path:
        # Where nothing is stored the images are those at this very place.
        off, root = self.storage == OFF, ascii(self.folder.root.absolute())
        place = f"-{sha256(root.encode()).hexdigest()[:8]}" if off else ""
        return self.caches / f"{self.key}-{self.storage}{place}"


def _open(job: _Job) -> PresizedImages | None:
    """What is there already; auto takes what an earlier choice made, so that all trials of a node read the same."""
    for storage in (MEMORY_MAP, JPEG) if job.storage == "auto" else (job.storage,):
        path = replace(job, storage=storage).path
        if not path.exists():
            continue
        try:
            opened = PresizedImages(path)
        except DamagedCache as error:
            logger.warning("the presized cache is damaged and is built again: %s", error)
            continue
        with suppress(OSError):  # when it was last used, for `search.check --cache`
            os.utime(path)
        return opened
    return None


# --- Choosing the storage ---------------------------------------------------------------------------------------------


def _choose(job: _Job) -> str:
    """The storage to build. Raises OSError where the disk surely has no room for it."""
    needed, storage = estimated_bytes(job.folder, job.size, job.method), job.storage
    memory, free = total_memory(), shutil.disk_usage(job.caches).free
    sizes = f"about {needed / 1e9:.2f} GB of pixels, {memory / 1e9:.0f} GB of memory, {free / 1e9:.0f} GB of disk free"
    if storage == "auto":
        fits = needed <= MEMORY_SHARE * memory and needed <= 0.9 * free
        storage = MEMORY_MAP if fits else JPEG
        logger.info("cache: %s chosen (%s)", storage, sizes)
    else:
        logger.info("cache: %s as asked for (%s)", storage, sizes)
    # The estimate may be too large; only what is certain not to fit is refused before it is tried.
    least = {MEMORY_MAP: 0.8 * needed, JPEG: 0.05 * needed, OFF: 0}[storage]
    if least > free:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return storage


def estimated_bytes(folder: ImageFolder, size: int, method: str, *, samples: int = 200) -> int:
    """Bytes of all presized pixels, from the headers of at most `samples` images spread over the data set."""
    step = max(1, len(folder.paths) // samples)
    areas = []
    for path in folder.paths[::step]:
        with suppress(Exception), Image.open(file := folder.root / path, formats=formats_of(file)) as image:
            ratio = max(image.size) / min(image.size)
            areas.append({"crop": min(ratio, 4), "squish": 1, "pad": 1 / ratio}[method])
    return round(3 * size * size * len(folder.paths) * float(np.mean(areas or [1])))


def total_memory() -> int:
    """Bytes of memory that this machine, or the container that this process runs in, has."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # absent, or "max"
            memory = min(memory, int(Path(limit).read_text()))
    return memory


# --- Building it ------------------------------------------------------------------------------------------------------


def _build_once(job: _Job, progress: Callable | None) -> PresizedImages:
    """Builds the cache, unless another process does it meanwhile."""
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
    """What one pass over the images gave; entry i of all lists but `unreadable` describes the same image."""

    kept: list[int] = field(default_factory=list)
    heights: list[int] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)  # bytes stored
    unreadable: dict[str, str] = field(default_factory=dict)


def _build(job: _Job, progress: Callable | None) -> None:
    """Writes the cache to a temporary folder and renames it. The caller holds the lock."""
    started = time.perf_counter()
    logger.info("presizing %d images to %d px in %s", len(job.folder.paths), job.size, job.path)
    temporary = job.path.with_name(f".{job.path.name}.partial")  # one name: what a killed process left is removed
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        built = _write_images(job, temporary, progress)
        _write_index(job, _leave_out(job, built), built, temporary)
        shutil.rmtree(job.path, ignore_errors=True)  # a damaged one
        temporary.rename(job.path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    seconds = time.perf_counter() - started
    logger.info("presized %d images, %.0f MB, in %.1f s", len(built.kept), sum(built.lengths) / 1e6, seconds)


def _write_images(job: _Job, target: Path, progress: Callable | None) -> _Built:
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
            if progress:
                progress(index + 1, len(paths))
        _flush(file)
    return built


def _stored(job: _Job) -> Iterator[tuple[tuple[int, int], memoryview | bytes] | UnreadableImage]:
    """Height, width and the bytes to keep of each image in order; a few per thread are in memory at a time.

    Pillow releases the GIL.
    """

    def one(path: str) -> tuple[tuple[int, int], memoryview | bytes] | UnreadableImage:
        try:
            image = read_image(job.folder.root / path, job.size, job.white_level)
            image = resize(image, job.size, job.method)
        except UnreadableImage as error:
            return error
        return image.shape[:2], _encoded(image, job.storage)

    with ThreadPoolExecutor(job.num_threads, thread_name_prefix="presize") as pool:
        running: deque = deque()
        try:
            for path in job.folder.paths:
                running.append(pool.submit(one, path))
                if len(running) >= 4 * job.num_threads:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _encoded(image: np.ndarray, storage: str) -> memoryview | bytes:
    if storage == MEMORY_MAP:
        return image.data.cast("B")
    stream = io.BytesIO()
    if storage == JPEG:  # without chroma subsampling, which a second time would blur the colours
        Image.fromarray(image).save(stream, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return stream.getvalue()


def _leave_out(job: _Job, built: _Built) -> ImageFolder:
    """The readable part of the images; raises DataError where too little is left."""
    folder, num_bad = job.folder, len(built.unreadable)
    if num_bad == 0:
        return folder
    write_unreadable(unreadable_list(job.caches, job.key), built.unreadable)
    _require_few(job, built.unreadable)
    listed = _listed(job, built.unreadable)
    logger.warning("left out %d of %d images that cannot be read: %s", num_bad, len(folder.paths), listed)
    remaining = replace(
        folder,
        paths=tuple(folder.paths[i] for i in built.kept),
        labels=tuple(folder.labels[i] for i in built.kept),
        valid=None if folder.valid is None else tuple(folder.valid[i] for i in built.kept),
    )
    labelled_images.check_classes(remaining, left_out=num_bad)
    return remaining


def _require_few(job: _Job, unreadable: Mapping[str, str]) -> None:
    """Raises DataError where more images are unreadable (path -> reason, if known) than is tolerated."""
    num_bad, total = len(unreadable), len(job.folder.paths)
    if num_bad > job.max_unreadable * total:
        raise DataError(
            f"{num_bad} of {total} images in {job.folder.root} cannot be read, more than the "
            f"{100 * job.max_unreadable:g} % that --max-unreadable tolerates ({_listed(job, unreadable)}). Repair or "
            "remove them, or tolerate a larger share."
        )


def _listed(job: _Job, unreadable: Mapping[str, str]) -> str:
    """The first unreadable images, and where all of them are."""
    first = [f"{path!r}: {reason}" if reason else repr(path) for path, reason in list(unreadable.items())[:5]]
    return "; ".join([*first, f"all listed in {unreadable_list(job.caches, job.key)}"])


def _write_index(job: _Job, folder: ImageFolder, built: _Built, target: Path) -> None:
    index = {
        "format": FORMAT_VERSION,
        "root": str(folder.root.absolute()),
        "size": job.size,
        "white_level": job.white_level,
        "resize_method": job.method,
        "storage": job.storage,
        "layout": folder.layout,
        "classes": folder.classes,
        "paths": folder.paths,
        "labels": folder.labels,
        "valid": folder.valid,
        "heights": built.heights,
        "widths": built.widths,
        "lengths": built.lengths,
        "nbytes": sum(built.lengths),
        "unreadable": list(built.unreadable),
    }
    text = json.dumps(index).encode()
    for name, content in ((INDEX_FILE, text), (CHECKSUM_FILE, sha256(text).hexdigest().encode())):
        with (target / name).open("wb") as file:
            file.write(content)
            _flush(file)


def _flush(file) -> None:
    """To the disk itself: after a power cut a renamed folder must not hold empty pages."""
    file.flush()
    os.fsync(file.fileno())


def _cannot_write(job: _Job, error: OSError) -> DataError:
    needed = len(job.folder.paths) * job.size * job.size * 3 * 1.4 / 1e9
    free = ""
    with suppress(OSError):
        free = f", {shutil.disk_usage(job.caches).free / 1e9:.2f} GB are free"
    return DataError(
        f"The presized images cannot be written to {job.caches}: {error.strerror or error}. They take about "
        f"{needed:.2f} GB{free}. Make room, choose a smaller presize, keep JPEGs (--cache jpeg) or nothing (--cache "
        "off), or set FINETUNE_SEARCH_CACHE to a folder on another disk."
    )
