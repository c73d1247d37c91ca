"""The cache of features on disk: a folder for each set, which appears whole or not at all. Imports no torch.

`features.f16` has one row per image, float16; `index.json` has its shape and its SHA-256.
"""

import os
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trainables.system.cache import DamagedCache, cache_dir, flush, new_folder, read_index, write_index

FEATURES_FILE = "features.f16"

Features = npt.NDArray[np.float16]
"""(images, features)"""


def features_folder() -> Path:
    return cache_dir() / "features"


def lock_file(path: Path) -> Path:
    """The lock of whoever builds or removes the features in `path`."""
    return path.with_name(f".{path.name}.lock")


@dataclass(frozen=True, kw_only=True)
class FeatureSet:
    """The features of all images of a data set, by their index there."""

    rows: Features
    seconds: float
    """How long the node that computed them took."""
    path: Path
    """Their folder, which is absent where the cache cannot be written."""


def open_features(path: Path) -> FeatureSet | None:
    """The features in `path`; None if there are none. Raises `DamagedCache` for any that are not as written."""
    if not path.exists():
        return None
    index = read_index(path)
    file = path / FEATURES_FILE
    try:
        status = file.stat()
        if _checksum(file, status.st_ino, status.st_mtime_ns, status.st_size) != index["sha256"]:
            raise ValueError(f"{FEATURES_FILE} does not match its checksum")
        rows = np.memmap(file, dtype=np.float16, mode="r", shape=(index["num_images"], index["num_features"]))
        seconds = float(index["seconds"])
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise DamagedCache(f"{path}: {error}") from error
    with suppress(OSError):  # the time of last use, for `search.check --cache`
        os.utime(path)
    return FeatureSet(rows=rows, seconds=seconds, path=path)


@lru_cache(maxsize=1024)
def _checksum(file: Path, inode: int, changed: int, size: int) -> str:
    """SHA-256 of a file. A process reads it once, until the file changes: several GB take seconds."""
    with file.open("rb") as content:
        return file_digest(content, "sha256").hexdigest()


def write_features(found: FeatureSet, described: dict[str, Any]) -> FeatureSet:
    """Writes a set and what describes it to its folder; the caller holds the folder's lock. Raises `OSError`."""
    rows = np.ascontiguousarray(found.rows)
    index = described | {
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
