"""Finds labelled images in a folder and splits them into training and validation.

Imports no torch: the search driver uses this module.
"""

import contextlib
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
PETS_NAME = re.compile(r"(.+)_\d+\.jpe?g", re.IGNORECASE | re.DOTALL)
VALID_NAMES = ("val", "valid", "validation", "test")
LAYOUTS = (
    "The layouts that are read: Oxford Pets (images/<breed>_<number>.jpg), class folders (<class>/*.jpg) and split "
    "folders (train/<class>/*.jpg with val/<class>/*.jpg), with JPEG, PNG or WebP images."
)


class DataError(ValueError):
    """The images cannot be used as they are; the message is one paragraph for the user."""


@dataclass(frozen=True)
class ImageFolder:
    """The labelled images of one folder; entry i of `paths`, `labels` and `valid` describes the same image."""

    root: Path
    layout: str
    """"Oxford Pets", "class folders" or "split folders"."""
    paths: tuple[str, ...]
    """POSIX paths relative to `root`, sorted."""
    labels: tuple[int, ...]
    classes: tuple[str, ...]
    """Class names, sorted; a label is an index into them."""
    valid: tuple[bool, ...] | None = None
    """Which images the folder itself sets aside for validation (split folders), or None."""

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def describe(self) -> str:
        given = ""
        if self.valid is not None:
            given = f" ({len(self.valid) - sum(self.valid)} for training, {sum(self.valid)} for validation)"
        return f"{self.layout} layout, {len(self.paths)} images{given}, {self.num_classes} classes"


def cache_dir() -> Path:
    """Where downloads and presized images are kept: FINETUNE_SEARCH_CACHE, or finetune-search in the user's cache."""
    if given := os.environ.get("FINETUNE_SEARCH_CACHE"):
        return Path(given).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().absolute() / "finetune-search"


def num_cpus() -> int:
    """How many CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --- Finding images ---------------------------------------------------------------------------------------------------


def find_images(root: Path | str) -> ImageFolder:
    """Detects the layout of `root` and labels its images; raises DataError where they cannot be used."""
    found = find_unchecked(root)
    check_classes(found)
    _warn_of_case(found.classes)
    logger.debug("%s: %s", found.root, found.describe())
    return found


def find_unchecked(root: Path | str) -> ImageFolder:
    """The same, whatever the number of images in a class."""
    try:
        root = _existing_folder(root)
        # A known data set as its archive unpacks lies one folder deeper.
        inner = [name for name in _folders(root) if name == "oxford-iiit-pet" or name.startswith("imagenette2")]
        for base in [*(f"{name}/" for name in inner), ""]:
            found = _oxford_pets(root, base) or _split_folders(root, base) or _class_folders(root, base)
            if found:
                return found
        raise _nothing_found(root)
    except OSError as error:
        raise DataError(
            f"The folder {error.filename or root} cannot be read ({error.strerror or error}). Every folder of a data "
            "set must be readable: change its permissions, or move it out of the data set."
        ) from error


def count_images(root: Path) -> int:
    """How many labelled images lie in `root`, 0 where it is missing or damaged."""
    try:
        return len(find_unchecked(root).paths)
    except DataError:
        return 0


def check_classes(folder: ImageFolder, left_out: int = 0) -> None:
    """Raises DataError unless there are two classes or more, each with two images or more and one for training."""
    after = f" ({left_out} unreadable left out)" if left_out else ""
    if folder.num_classes < 2:
        raise DataError(
            f"{folder.root} ({folder.layout} layout) has only one class, {folder.classes[0]!r}, and a classifier needs "
            f"two or more. If the class folders lie deeper, give the folder that holds them. {LAYOUTS}"
        )
    labels = np.asarray(folder.labels)
    counts = np.bincount(labels, minlength=folder.num_classes)
    if small := [name for name, count in zip(folder.classes, counts, strict=True) if count < 2]:
        raise DataError(
            f"{folder.root} has fewer than two images{after} in {some(small, 'class', 'classes')}, and each class "
            "needs one to train on and one to validate on. Add images to these classes or remove them."
        )
    if folder.valid is None:
        return
    valid = np.asarray(folder.valid)
    trained = np.bincount(labels[~valid], minlength=folder.num_classes)
    if missing := [name for name, count in zip(folder.classes, trained, strict=True) if count == 0]:
        raise DataError(
            f"{folder.root} has validation images but no training images{after} of "
            f"{some(missing, 'class', 'classes')}. Each class needs a folder of the same name, with images, in the "
            "training folder; class names are compared letter by letter."
        )
    if not valid.any():
        raise DataError(f"{folder.root} has no validation images{after}. Add images to its validation folder.")


def _existing_folder(root: Path | str) -> Path:
    root = Path(root).expanduser()
    if not root.exists():
        raise DataError(f"There is no folder {root.absolute()}. Expected a folder of labelled images. {LAYOUTS}")
    if not root.is_dir():
        raise DataError(f"{root.absolute()} is a file. Expected a folder of labelled images: unpack it if it is an "
                        f"archive. {LAYOUTS}")  # fmt: skip
    return root.resolve()


def _oxford_pets(root: Path, base: str) -> ImageFolder | None:
    """`images/<breed>_<number>.jpg`, or the same files directly in the folder."""
    for inside in (f"{base}images/", base):
        if not (root / inside).is_dir():
            continue
        names = [entry.name for entry in _entries(root / inside) if _is_image(entry)]
        matches = {name: match[1] for name in names if (match := PETS_NAME.fullmatch(name))}
        if len(set(matches.values())) < 2 or 2 * len(matches) <= len(names):
            continue
        if others := [name for name in names if name not in matches]:
            text = f"{some(others, 'image', 'images')} of {len(names)} in {root / inside} carry no label"
            if len(others) > 0.01 * len(names):
                raise DataError(
                    f"{text}: the others are named <breed>_<number>.jpg (Oxford Pets layout). Rename or remove them."
                )
            logger.warning("%s (expected <breed>_<number>.jpg): left out", text)
        return _image_folder(root, "Oxford Pets", ((inside + name, breed, None) for name, breed in matches.items()))
    return None


def _split_folders(root: Path, base: str) -> ImageFolder | None:
    """`train/<class>` and one of `val`, `valid`, `validation`, `test`, in this order; other folders are left alone."""
    by_lower = {name.lower(): name for name in reversed(_folders(root / base))}
    train = by_lower.get("train")
    if train is None or any(_is_image(entry) for entry in _entries(root / base / train)):
        return None  # a class may be called "train" too
    valid = next((by_lower[name] for name in VALID_NAMES if name in by_lower), None)
    train_images = list(_images_by_class(root, f"{base}{train}/"))
    if not train_images:
        return None
    if valid is None:
        if len(by_lower) > 1:
            return None
        raise DataError(
            f"{root / base} has a folder {train} but no validation folder beside it (one of {', '.join(VALID_NAMES)}). "
            f"Add one, or give {root / base / train} to have a part of its images set aside for validation."
        )
    valid_images = list(_images_by_class(root, f"{base}{valid}/"))
    if not valid_images:
        raise DataError(
            f"{root / base / valid} has no class folders with images. Expected {valid}/<class>/*.jpg, with the same "
            f"classes as in {train}. Fill it, or remove it and give {root / base / train}."
        )
    labelled = [(path, name, False) for path, name in train_images] + [
        (path, name, True) for path, name in valid_images
    ]
    return _image_folder(root, "split folders", labelled)


def _class_folders(root: Path, base: str) -> ImageFolder | None:
    labelled = [(path, name, None) for path, name in _images_by_class(root, base)]
    if {name for _, name, _ in labelled} <= {"images"}:  # the folder of the Pets layout, with names that do not label
        return None
    return _image_folder(root, "class folders", labelled)


def _image_folder(root: Path, layout: str, labelled: Iterable[tuple[str, str, bool | None]]) -> ImageFolder:
    paths, names, valid = zip(*sorted(labelled), strict=True)
    classes = tuple(sorted(set(names)))
    index = {name: label for label, name in enumerate(classes)}
    given = valid if layout == "split folders" else None
    return ImageFolder(root, layout, paths, tuple(index[name] for name in names), classes, given)


def _images_by_class(root: Path, base: str) -> Iterator[tuple[str, str]]:
    """(path relative to root, class) of the images below each sub-folder of `base`."""
    above = {_identity(folder) for folder in (root / base, root, *root.parents)}
    for name in _folders(root / base):
        for path in _images_below(root / base / name, set(above)):
            yield f"{base}{name}/{path}", name


def _images_below(folder: Path, seen: set[tuple[int, int]]) -> Iterator[str]:
    """Images in `folder` and its sub-folders, relative to it. Reads each real folder once, so that link loops end."""
    waiting = [(folder, "")]
    while waiting:
        path, prefix = waiting.pop()
        if (identity := _identity(path)) in seen:
            continue
        seen.add(identity)
        for entry in _entries(path):
            if _is_folder(entry):
                waiting.append((path / entry.name, f"{prefix}{entry.name}/"))
            elif _is_image(entry):
                yield prefix + entry.name


def _entries(folder: Path) -> list[os.DirEntry]:
    """What lies in `folder`, sorted, without hidden files and the __MACOSX folders of zip archives."""
    with os.scandir(folder) as entries:
        visible = [entry for entry in entries if not entry.name.startswith(".") and entry.name != "__MACOSX"]
    return sorted(visible, key=lambda entry: entry.name)


def _folders(folder: Path) -> list[str]:
    return [entry.name for entry in _entries(folder) if _is_folder(entry)]


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_image(entry: os.DirEntry) -> bool:
    """By its name; a broken link counts, to be reported as unreadable, a pipe or a folder does not."""
    if not entry.name.lower().endswith(IMAGE_SUFFIXES):
        return False
    try:
        return entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path))  # noqa: PTH110
    except OSError:
        return entry.is_symlink()


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _nothing_found(root: Path) -> DataError:
    for folder in (root / "images", root):
        if folder.is_dir() and (names := [entry.name for entry in _entries(folder) if _is_image(entry)]):
            return DataError(
                f"The {len(names)} images in {folder} do not tell two classes apart by their names (the first is "
                f"{names[0]!r}). Sort them into one folder per class, or name them <class>_<number>.jpg. {LAYOUTS}"
            )
    return DataError(f"There are no images in {root}. {LAYOUTS} Hidden files and other suffixes are ignored.")


def _warn_of_case(classes: Sequence[str]) -> None:
    folded: dict[str, list[str]] = {}
    for name in classes:
        folded.setdefault(name.casefold(), []).append(name)
    for names in folded.values():
        if len(names) > 1:
            logger.warning("classes %s differ only in case; each is a class of its own", ", ".join(map(repr, names)))


def some(names: Sequence[str], one: str, many: str) -> str:
    """ "3 classes ('a', 'b', 'c')", with at most five names."""
    shown = ", ".join(repr(name) for name in names[:5]) + (", ..." if len(names) > 5 else "")
    return f"{len(names)} {one if len(names) == 1 else many} ({shown})"


# --- Splitting and naming the content ---------------------------------------------------------------------------------


def split(
    labels: Sequence[int] | np.ndarray, *, valid_fraction: float = 0.2, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Sorted indices of the training and the validation images, drawn at random within each class.

    Validation gets round(valid_fraction * n) images, shared among the classes by largest remainder; the last image of a
    class always trains, so it gets fewer where most classes are tiny. The same on every machine: only PCG64's doubles
    and stable sorts are used.
    """
    if not 0 < valid_fraction < 1:
        raise ValueError(f"valid_fraction is {valid_fraction}; expected a number between 0 and 1, such as 0.2.")
    labels = np.asarray(labels, dtype=np.int64)
    rng = np.random.default_rng(seed)
    order = np.argsort(rng.random(len(labels)), kind="stable")
    counts = np.bincount(labels)
    most = np.maximum(counts - 1, 0)
    share = valid_fraction * counts
    quota = np.minimum(np.floor(share).astype(np.int64), most)
    # Ties between remainders are broken by the seed, so that no class is favoured for its name.
    by_remainder = np.lexsort((rng.random(len(counts)), quota - share))
    missing = min(round(valid_fraction * len(labels)), int(most.sum())) - int(quota.sum())
    while missing > 0:
        open_classes = [label for label in by_remainder if quota[label] < most[label]][:missing]
        quota[open_classes] += 1
        missing -= len(open_classes)
    in_class = labels[order]
    valid = [order[in_class == label][: quota[label]] for label in range(len(counts))]
    valid = np.sort(np.concatenate(valid)) if valid else np.empty(0, dtype=np.int64)
    return np.setdiff1d(np.arange(len(labels)), valid), valid


def fingerprint(folder: ImageFolder) -> str:
    """SHA-256 over classes, labels, relative paths, sizes and modification times of the images.

    The modification time stands in for the content: an edited image is noticed without reading every byte. `root` is
    left out, so a data set that moves with its times (mv, rsync -a, cp -p) keeps its fingerprint.
    """
    digest = sha256(ascii((folder.classes, folder.valid)).encode())
    for path, label in zip(folder.paths, folder.labels, strict=True):
        try:
            status = (folder.root / path).stat()
            size, changed = status.st_size, status.st_mtime_ns
        except OSError:  # a broken link: presize counts it as unreadable
            size, changed = -1, -1
        digest.update(f"{path!a} {label} {size} {changed}\n".encode())
    return digest.hexdigest()


@contextlib.contextmanager
def locked(path: Path, waiting_for: str) -> Iterator[None]:
    """Holds the file lock `path`, which ends with its process; logs a line where it must wait."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.info("waiting %s (lock %s)", waiting_for, path)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
