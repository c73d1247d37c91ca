"""`--leave-out`: images named in a CSV file, such as those with wrong labels, that a command does not use.

Imports no torch.
"""

import csv
import io
from collections.abc import Collection
from hashlib import sha256
from pathlib import Path

from trainables.data.labelled_images import DataError, ImageFolder, check_classes
from trainables.system.text import many, some

EXPECTED = "a CSV file with the column path, such as the suspects.csv of a run"


def read_left_out(file: Path | None) -> tuple[str, ...]:
    """The paths in the column `path` of a CSV file, sorted; none without a file. Raises `DataError`."""
    if file is None:
        return ()
    try:
        text = file.expanduser().read_text(encoding="utf-8-sig", errors="surrogateescape")
        rows = csv.DictReader(io.StringIO(text, newline=""))
        columns = rows.fieldnames or []
        paths = sorted({row["path"] for row in rows if row["path"]}) if "path" in columns else None
    except (OSError, csv.Error) as error:
        raise DataError(f"--leave-out {file} cannot be read ({error}). Give {EXPECTED}.") from error
    if paths is None:
        found = some(columns, "column", "columns") if columns else "no columns"
        raise DataError(f"--leave-out {file} has {found}, none of them called path. Give {EXPECTED}.")
    return tuple(paths)


def leave_out(images: ImageFolder, paths: Collection[str]) -> ImageFolder:
    """The images without those of `paths`. Raises `DataError` for paths that are none of theirs."""
    if unknown := sorted(set(paths) - set(images.paths)):
        raise DataError(
            f"--leave-out names {some(unknown, 'path', 'paths')} that no image in {images.root} has. Expected paths "
            f"relative to that folder, such as {images.paths[0]!r}. Correct these rows, or delete them."
        )
    return remaining(images, paths)


def leave_out_for_training(images: ImageFolder, paths: Collection[str]) -> ImageFolder:
    """The same, and raises `DataError` where a class keeps too few images to train on."""
    kept = leave_out(images, paths)
    if paths:
        check_classes(kept, f"{many(len(paths), 'image')} left out")
    return kept


def remaining(images: ImageFolder, paths: Collection[str]) -> ImageFolder:
    """The images without those of `paths`, whether or not there are such."""
    gone = frozenset(paths)
    return images.only(i for i, path in enumerate(images.paths) if path not in gone) if gone else images


def path_digest(path: str) -> str:
    """What stands for an image's path in a model's folder, which must not reveal names."""
    return sha256(ascii(path).encode()).hexdigest()[:16]


def without_digests(images: ImageFolder, digests: Collection[str]) -> ImageFolder:
    """The images without those whose `path_digest` is among `digests`."""
    return remaining(images, [path for path in images.paths if path_digest(path) in digests]) if digests else images
