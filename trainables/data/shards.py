"""Labelled images in WebDataset's archives: `key.jpg` beside `key.cls` or `key.json`, unpacked once into the cache.

Imports no torch.
"""

import csv
import json
import logging
import posixpath
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from unicodedata import normalize

from trainables.data.address import DataAddress
from trainables.data.fetch import CHUNK, DAMAGED
from trainables.data.folder_tree import Folder
from trainables.data.image_file import SUFFIXES
from trainables.data.label_tables import Entry, by_folders, first_of, of_entries, usual_columns
from trainables.data.labelled_images import DataError, ImageFolder
from trainables.data.readings import role_of
from trainables.data.table_files import rows_of
from trainables.system.cache import cache_dir, locked, new_folder
from trainables.system.text import many, some

logger = logging.getLogger(__name__)

SHARD = ".tar"
ARCHIVES = (SHARD, ".tar.gz", ".tgz")
"""What can be given itself. In a folder a compressed archive is not a shard: it may be what a data set came in."""
CLASS_NAMES = ("classnames.txt", "classes.txt")
"""Files beside the archives whose line i, counted from 0, is the name of class i."""
OPTIONS = ("label", "rows")
INDEX = "labels.csv"
"""The table of an unpacked folder, with these columns."""
COLUMNS = ("path", "label", "split")
FORMAT = 1
"""Raise it when the same archives give another folder."""
MAX_LABEL = 1 << 20
"""Bytes of a file that holds a label."""


@dataclass(frozen=True, kw_only=True)
class Shards:
    """The archives of a data set, with paths relative to its folder."""

    address: DataAddress
    folder: Path
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if other := [name for name in self.address.options if name not in OPTIONS]:
            raise DataError(
                f"{self.address}: {other[0]}= does not go with WebDataset's archives, which hold their images and "
                "labels. Only label= does, for the field of its JSON files."
            )

    @property
    def unpacked(self) -> Path:
        """Their folder in the cache, there or not. Other archives of the same names, sizes and times share it."""
        status = [(name, (file := (self.folder / name).stat()).st_size, file.st_mtime_ns) for name in self.names]
        content = ascii((FORMAT, status, _class_names(self.folder), self.address.options.get("label")))
        return cache_dir() / "shards" / sha256(content.encode()).hexdigest()[:20]


def is_archive(name: str) -> bool:
    return name.lower().endswith(ARCHIVES)


def in_archive(address: DataAddress) -> ImageFolder:
    """The images in one archive. Raises `DataError`."""
    return _images_of(_of_archive(address))


def in_folder(top: Folder, address: DataAddress) -> ImageFolder | None:
    """The images in the archives of a folder, or of the folders in it; None if it has none, or has images outside of
    them. Raises `DataError`."""
    shards = _of_folder(top, address)
    return None if shards is None else _images_of(shards)


def in_samples(top: Folder, address: DataAddress) -> ImageFolder | None:
    """The images of an archive that lies unpacked in a folder, as it does after it was fetched from a URI; None where
    no image has a .cls file beside it. Raises `DataError`."""
    samples: dict[str, _Sample] = {}
    for folder in (top, *top.folders):
        beside = {f"{folder.prefix}{name.removesuffix('.cls')}" for name in folder.others if name.endswith(".cls")}
        for name in folder.images if beside else ():
            key, _ = _split_key(f"{folder.prefix}{name}")
            sample = samples.setdefault(key, _Sample())
            sample.images.append(f"{folder.prefix}{name}")
            if key in beside:
                with (top.path / f"{key}.cls").open("rb") as file:
                    sample.texts["cls"] = file.read(MAX_LABEL)
    if not any(sample.texts for sample in samples.values()):
        return None
    rows = _rows([("", key, sample) for key, sample in samples.items()], address, _class_names(top.path))
    entries = [Entry(place=path, path=path, label=label, part="", group="") for path, label, _ in rows]
    address = DataAddress(path=top.path, options=address.options)
    return of_entries(address, top.path, by_folders(entries), "WebDataset")


def unpacked_folder(address: DataAddress) -> Path | None:
    """Where the archives of an address are unpacked, or will be; None if there are none."""
    if address.path.is_file() and is_archive(address.path.name):
        return _of_archive(address).unpacked
    if not address.path.is_dir() or address.stars:
        return None
    shards = _of_folder(Folder(address.path), address)
    return None if shards is None else shards.unpacked


def _of_archive(address: DataAddress) -> Shards:
    folder = address.path.parent.resolve()
    address = DataAddress(path=folder / address.path.name, options=address.options)
    return Shards(address=address, folder=folder, names=(address.path.name,))


def _of_folder(top: Folder, address: DataAddress) -> Shards | None:
    found = ((each, name) for each in (top, *top.folders) for name in each.others)
    names = tuple(f"{each.prefix}{name}" for each, name in found if name.lower().endswith(SHARD))
    if not names or top.holds_images:
        return None
    return Shards(address=DataAddress(path=top.path, options=address.options), folder=top.path, names=names)


def _images_of(shards: Shards) -> ImageFolder:
    parts = _parts(shards)
    target = _unpack_once(shards)
    entries = [
        Entry(place=row.place, path=row.cells[0], label=row.cells[1], part=parts[row.cells[2]], group="")
        for row in rows_of(target / INDEX, COLUMNS)
    ]
    return of_entries(shards.address, target, entries, "WebDataset")


def _parts(shards: Shards) -> dict[str, str]:
    """Archive -> train, valid or test, which its name or its folder's says; empty if they do not tell two parts."""
    found = {name: _part(name) for name in shards.names}
    if len({part for part, _ in found.values()}) < 2:
        return dict.fromkeys(found, "")
    if unclear := [name for name, (part, _) in found.items() if not part]:
        clear = next(name for name, (part, _) in found.items() if part)
        raise DataError(
            f"{shards.folder} has archives that are parts of a split, such as {clear!r}, and others, such as "
            f"{unclear[0]!r}. Call all of them such as train-000.tar, valid-000.tar and test-000.tar, or move the "
            "others out."
        )
    if len({rest for _, rest in found.values()}) > 1:  # cats-train.tar beside dogs-test.tar
        raise DataError(
            f"{shards.folder} has archives of several data sets: {first_of(list(map(repr, found)))}. Give a folder "
            "with those of one."
        )
    return {name: part for name, (part, _) in found.items()}


def _part(name: str) -> tuple[str, str]:
    """The part of a split that an archive belongs to, and the other words in its name."""
    folder, base = posixpath.split(name)
    for text in (_stem(base), folder):
        part, _, rest = role_of(text)
        if part:
            return part, rest
    return "", ""


def _stem(name: str) -> str:
    return next((name[: -len(suffix)] for suffix in ARCHIVES if name.lower().endswith(suffix)), name)


# --- Unpacking --------------------------------------------------------------------------------------------------------


def _unpack_once(shards: Shards) -> Path:
    """The unpacked folder; one process of a node makes it, whole or not at all."""
    target = shards.unpacked
    if target.is_dir():
        return target
    with _disk_errors():
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(target.with_suffix(".lock"), f"for another process that unpacks {shards.address.path}"):
            if not target.is_dir():
                logger.info("unpacking %s into %s", shards.address.path, target)
                with new_folder(target) as partial:
                    _unpack(shards, partial)
    return target


def _unpack(shards: Shards, target: Path) -> None:
    samples = [
        (name, key, sample)
        for name in shards.names
        for key, sample in _samples(shards.folder / name, target, _stem(name)).items()
    ]
    rows = _rows(samples, shards.address, _class_names(shards.folder))
    if not rows:
        raise DataError(f"There are no images in the archives of {shards.address.path}.")
    with (target / INDEX).open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([COLUMNS, *rows])


def _rows(
    samples: Iterable[tuple[str, str, "_Sample"]], address: DataAddress, known: Sequence[str]
) -> list[tuple[str, str, str]]:
    """Path, label and archive of each (archive, key, sample). Raises `DataError` with all that are wrong."""
    rows, problems = [], []
    for archive, key, sample in samples:
        try:
            rows.append((sample.image(), sample.label(address, known), archive))
        except ValueError as problem:
            problems.append(f"{key!r}{archive and f' in {archive}'} {problem}")
    if problems:
        raise DataError(
            f"{many(len(problems), 'sample')} of {len(rows) + len(problems)} in {address.path} cannot be used: "
            f"{first_of(problems, '; ')}. Expected WebDataset's layout: <key>.jpg with <key>.cls, or with <key>.json "
            "that has a label. An archive of another layout must be unpacked first."
        )
    return rows


def _class_names(folder: Path) -> list[str]:
    """The names of the classes by their numbers; empty without a file of them."""
    file = next((folder / name for name in CLASS_NAMES if (folder / name).is_file()), None)
    try:
        names = [] if file is None else [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text. Save it again, in UTF-8.") from error
    if twice := [name for name, count in Counter(filter(None, names)).items() if count > 1]:
        raise DataError(f"{file} gives {some(twice, 'name', 'names')} to several classes. Give each one of its own.")
    return names


def _split_key(path: str) -> tuple[str, str]:
    """The key of a file and its extension, which begins at the first dot of its name."""
    folder, base = posixpath.split(path)
    stem, _, extension = base.partition(".")
    return posixpath.join(folder, stem), extension.lower()


@dataclass
class _Sample:
    """The files of one key; methods raise `ValueError` with what is wrong, for a message."""

    images: list[str] = field(default_factory=list)
    """Paths in the unpacked folder."""
    texts: dict[str, bytes] = field(default_factory=dict)
    """Content by extension, cls or json."""

    def image(self) -> str:
        if len(self.images) != 1:
            raise ValueError(f"has {many(len(self.images), 'image')}, expected one")
        return self.images[0]

    def label(self, address: DataAddress, known: Sequence[str]) -> str:
        plain = "cls" in self.texts and "label" not in address.options
        text = _text(self.texts["cls"]) if plain else self._json_label(address)
        if not text:
            raise ValueError("has an empty label")
        if not known or not (text.isascii() and text.isdecimal()):
            return text
        if len(text) > 9 or int(text) >= len(known) or not known[int(text)]:
            raise ValueError(f"has the label {text[:20]}, for which the file of class names has no line")
        return known[int(text)]

    def _json_label(self, address: DataAddress) -> str:
        if "json" not in self.texts:
            raise ValueError("has no label")
        try:
            found = json.loads(_text(self.texts["json"]), parse_int=str, parse_float=str, parse_constant=str)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"has no JSON in its .json file: {error}") from None
        fields = list(found) if isinstance(found, dict) else []
        names = [address.options["label"]] if "label" in address.options else usual_columns(fields, "label")
        if len(names) != 1 or names[0] not in fields:
            raise ValueError(
                f"has no label, or several, among its fields {', '.join(map(repr, fields[:9]))}; --columns label=NAME "
                "says which it is"
            )
        if not isinstance(label := found[names[0]], str):
            raise ValueError(f"has no text or number as its {names[0]!r}")
        return label.strip()


def _text(content: bytes) -> str:
    try:
        return normalize("NFC", content.decode("utf-8-sig").strip())
    except UnicodeDecodeError:
        raise ValueError("has a label that is not UTF-8 text") from None


def _samples(file: Path, target: Path, folder: str) -> dict[str, _Sample]:
    """The samples of an archive by their keys; its images are unpacked into the folder `folder` of `target`."""
    found: dict[str, _Sample] = {}
    with _archive_errors(file), tarfile.open(file) as archive:
        for member in archive:
            name = posixpath.normpath(tarfile.data_filter(member, str(target / folder)).name)
            if member.isdir() or posixpath.basename(name).startswith("."):
                continue
            if not member.isfile():
                raise DataError(f"{file} is refused: {member.name!r} in it is a link, expected files.")
            key, extension = _split_key(name)
            sample = found.setdefault(key, _Sample())
            if f".{extension}" in SUFFIXES:
                sample.images.append(f"{folder}/{name}")
                archive.extract(member, target / folder, filter="data")
            elif extension in ("cls", "json") and (content := archive.extractfile(member)):
                sample.texts[extension] = content.read(MAX_LABEL)
        _require_end(archive)
    return {key: sample for key, sample in found.items() if sample.images or "cls" in sample.texts}


def _require_end(archive: tarfile.TarFile) -> None:
    """Raises `TarError` unless the archive ends as it should: tarfile takes any damaged header for the end."""
    stream = archive.fileobj
    assert stream is not None  # for it is open
    stream.seek(archive.offset)
    if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("it has no end, or something unreadable before it")
    while stream.read(CHUNK):  # to the checksum of a compressed archive
        pass


@contextmanager
def _archive_errors(file: Path) -> Iterator[None]:
    try:
        yield
    except tarfile.FilterError as error:
        raise DataError(f"{file} is refused: its files would be written outside of their folder ({error}).") from error
    except DAMAGED as error:
        reason = str(error).partition(":\n")[0]  # without what each kind of compression says
        raise DataError(f"The archive {file} is damaged: {reason}. Restore it from a copy.") from error


@contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"The archives cannot be unpacked into {cache_dir()} ({error}). Make room there, or name "
            "another folder with FINETUNE_SEARCH_CACHE."
        ) from error
