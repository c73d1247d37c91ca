"""Labelled images by a table: a file with a row for each image, or a folder with metadata.csv as Hugging Face has it.

Columns are found by their names, or named in the address (see `address`). Imports no torch.
"""

import posixpath
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple
from unicodedata import normalize

from trainables.data.address import COLUMNS, DataAddress
from trainables.data.folder_tree import Folder
from trainables.data.label_sets import have_several, labels_of
from trainables.data.labelled_images import DataError, ImageFolder, Unused
from trainables.data.readings import container, role_of
from trainables.data.row_files import RowFiles
from trainables.data.table_files import TABLES, columns_of, rows_of
from trainables.system.text import many

USUAL_NAMES = {
    "path": (
        "path", "file", "filename", "file_name", "filepath", "file_path", "image", "images", "image_path", "imagepath",
        "image_file", "image_filename", "image_name", "image_id", "img", "img_path", "img_name",
    ),
    "label": (
        "label", "labels", "label_name", "class", "classes", "class_name", "classname", "category", "category_name",
        "target", "breed", "species", "diagnosis", "dx",
    ),
    "split": ("split", "set", "subset", "fold", "partition", "is_valid"),
    "group": (
        "group", "groups", "group_id", "patient", "patient_id", "patientid", "subject", "subject_id", "person",
        "person_id", "individual", "individual_id",
    ),
}  # fmt: skip
"""The names of columns that say what a column is, in lower case and with _ for blanks and hyphens."""
NEEDED = ("path", "label")
TRUE_OR_FALSE = {"true": "valid", "1": "valid", "false": "train", "0": "train"}
"""What a column `is_valid` says, as fastai has it."""
METADATA = tuple(f"metadata{suffix}" for suffix in TABLES)
MAX_MISSING = 0.5
"""The share of the files that may be missing; up to it they count as unreadable images."""
MAX_NAMED = 3
"""Rows and files that are named for each reason."""


class Source(NamedTuple):
    """A table, and the folder that its paths are relative to, as a prefix of `Folder`."""

    file: Path
    prefix: str = ""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What a row says of an image."""

    place: str
    """Such as "line 5", with the name of the table if there are several."""
    path: str
    """POSIX, relative to the folder of the images, or absolute."""
    label: str
    part: str
    """train, valid or test; empty if the table has no split."""
    group: str


def in_table(address: DataAddress) -> ImageFolder:
    """The images that a table names. Raises `DataError`, with all rows that are wrong."""
    table = address.path.absolute()
    table = table.parent.resolve() / table.name
    root = address.images_in(table.parent)
    if not root.is_dir():
        raise DataError(f"There is no folder {root}, in which {table.name} should find its images.")
    return _image_folder(replace(address, path=table), root.resolve(), [Source(table)], "label table")


def in_metadata(top: Folder, address: DataAddress) -> ImageFolder | None:
    """The images that metadata tables in a folder, or in the folders in it, name; None if there are none with labels.

    The layout is `imagefolder` of Hugging Face's datasets: metadata.csv, .jsonl or .parquet with a column file_name.
    """
    folder: Folder | None = top
    while folder is not None and not (sources := _metadata_in(folder)):
        folder = container(folder) if not folder.images else None
    address = replace(address, path=top.path)
    if folder is None:
        if address.options:
            raise DataError(
                f"{address}: there is no table in {top.path} whose columns these could be. Give a table, such as "
                f"{top.path}/labels.csv, or add {METADATA[0]}."
            )
        return None
    if not address.options and not _has_labels(sources):
        return None
    listed = None if "images" in address.options else top
    return _image_folder(address, address.images_in(top.path), sources, "imagefolder", listed)


def _has_labels(sources: Sequence[Source]) -> bool:
    """Whether the tables have the usual columns; metadata may also be about something else."""
    try:
        known = _known_columns(sources)
    except DataError:
        return False
    return all(usual_columns(known, role) for role in NEEDED)


def _metadata_in(folder: Folder) -> list[Source]:
    sources = []
    for each in (folder, *folder.folders):
        found = [name for name in each.others if name in METADATA]
        if len(found) > 1:
            raise DataError(f"{each.path} has {' and '.join(found)}. Keep one of them there.")
        sources += [Source(each.path / name, each.prefix) for name in found]
    return sources


def _image_folder(
    address: DataAddress, root: Path, sources: Sequence[Source], layout: str, listed: Folder | None = None
) -> ImageFolder:
    """`listed` is the folder whose other images are counted as unused."""
    columns = chosen_columns(_known_columns(sources), address)
    files, problems, entries = RowFiles(root), [], []
    for source in sources:
        where = f"{source.prefix}{source.file.name}, " if len(sources) > 1 else ""
        for row in rows_of(source.file, list(columns.values())):
            said = dict(zip(columns, row.cells, strict=False))
            found = files.find(source.prefix, said.get("path", ""))
            if problem := row.problem or found.problem:
                problems.append(f"{where}{row.place} {problem}")
                continue
            label, group = normalize("NFC", said["label"]), said.get("group", "")
            entries.append(
                Entry(
                    place=f"{where}{row.place}", path=found.path, label=label, part=said.get("split", ""), group=group
                )
            )
    entries, columns = with_parts(entries, columns, address, problems)
    entries = _without_wrong(entries, columns, problems)
    if problems:
        raise DataError(
            f"{many(len(problems), 'row')} of {address.path} cannot be used: {first_of(problems, '; ')}. Correct or "
            "remove them."
        )
    _refuse_missing(address, root, entries, files.missing, columns)
    address = replace(address, options={**address.options, **columns})
    return of_entries(address, root, entries, layout, files.missing, listed)


# --- Columns ----------------------------------------------------------------------------------------------------------


def chosen_columns(known: Sequence[str], address: DataAddress) -> dict[str, str]:
    """What the columns `known` of a table say, by their usual names or as the address names them.

    Raises `DataError`, which lists the columns, where one is missing or two have usual names.
    """
    chosen, problems = {}, []
    for role in COLUMNS:
        found = usual_columns(known, role) if role not in address.columns else []
        if name := address.columns.get(role):
            found = [each for each in known if each == name] or [each for each in known if _plain(each) == _plain(name)]
            if not found:
                problems.append(f"it has no column {name!r}")
        elif not found and role in NEEDED:
            problems.append(f"none of its columns is called like the {role} ({', '.join(USUAL_NAMES[role][:5])}, ...)")
        if len(found) > 1:
            names = " or ".join(map(repr, found))
            off = "" if role in NEEDED else f" ('{role}=' alone ignores both)"
            problems.append(f"the {role} may be in its column {names}{off}")
        elif found:
            chosen[role] = found[0]
    if problems:
        raise DataError(
            f"{address.path}: {', and '.join(problems)}. Its columns are {', '.join(map(repr, known))}. Say which are "
            "meant, such as --columns path=file,label=breed."
        )
    return chosen


def _known_columns(sources: Sequence[Source]) -> list[str]:
    """Those of all tables; a table of test images may lack the labels."""
    first, *others = [columns_of(source.file) for source in sources]
    return [*first, *dict.fromkeys(name for other in others for name in other if name not in first)]


def usual_columns(known: Iterable[str], role: str) -> list[str]:
    """The names among `known` that usually say this of an image."""
    return [name for name in known if _plain(name) in USUAL_NAMES[role]]


def _plain(name: str) -> str:
    return name.strip().lower().replace(" ", "_").replace("-", "_")


# --- Rows -------------------------------------------------------------------------------------------------------------


def with_parts(
    entries: list[Entry], columns: dict[str, str], address: DataAddress, problems: list[str]
) -> tuple[list[Entry], dict[str, str]]:
    """The rows with train, valid or test as their part, which the column of the split says, or else the folders that
    the images lie in. A column that has the usual name but none of these words, such as a fold's number, is ignored.
    """
    if "split" not in columns:
        return by_folders(entries) if "split" not in address.columns else entries, columns
    parts = {text: _part(text, columns["split"]) for text in {entry.part for entry in entries}}
    if not any(parts.values()) and "split" not in address.columns:
        columns = {role: name for role, name in columns.items() if role != "split"}
        return by_folders([replace(entry, part="") for entry in entries]), columns
    for entry in entries:
        if not parts[entry.part]:
            problems.append(f"{entry.place} has the split {entry.part!r}, expected train, valid or test")
    return [replace(entry, part=part) for entry in entries if (part := parts[entry.part])], columns


def _part(text: str, column: str) -> str:
    if _plain(column) == "is_valid":
        return TRUE_OR_FALSE.get(text.lower(), "")
    part, _, rest = role_of(text)
    return part if not rest else ""


def by_folders(entries: list[Entry]) -> list[Entry]:
    """The parts by the first folders in which the paths differ, if all of these are parts of a split."""
    paths = [entry.path for entry in entries]
    absolute = {path.startswith("/") for path in paths}
    above = posixpath.commonpath(paths) + "/" if len(absolute) == 1 else ""
    folders = [path.removeprefix(above).rpartition("/")[0].partition("/")[0] for path in paths]
    parts = {folder: _part(folder, "") for folder in set(folders)}
    known = all(parts.values()) and {"train"} < set(parts.values())
    return [replace(entry, part=parts[folder] if known else "") for entry, folder in zip(entries, folders, strict=True)]


def _without_wrong(entries: list[Entry], columns: Mapping[str, str], problems: list[str]) -> list[Entry]:
    """Each image once. Rows without a label or a group, and such as contradict another one, become `problems`. Where
    some have several labels, others may have none."""
    kept: dict[str, Entry] = {}
    several = have_several(entry.label for entry in entries)
    for entry in entries:
        first = kept.setdefault(entry.path, entry)
        if not entry.label and entry.part != "test" and not several:
            problems.append(f"{entry.place} has no label")
        elif not entry.group and "group" in columns:
            problems.append(f"{entry.place} has no {columns['group']} ('group=' in --columns ignores that column)")
        elif changed := [name for name in ("label", "part", "group") if getattr(entry, name) != getattr(first, name)]:
            new, old = (getattr(each, changed[0]) for each in (entry, first))
            problems.append(f"{entry.place} gives {entry.path!r} the {changed[0]} {new!r}, and {first.place} {old!r}")
    return list(kept.values())


def _refuse_missing(
    address: DataAddress, root: Path, entries: Sequence[Entry], missing: set[str], columns: Mapping[str, str]
) -> None:
    if not entries:
        raise DataError(f"{address.path} names no images: it has no rows below the names of its columns.")
    rows = [f"{entry.place}: {entry.path!r}" for entry in entries if entry.path in missing]
    if len(rows) > MAX_MISSING * len(entries):
        raise DataError(
            f"{len(rows)} of {many(len(entries), 'file')} that the column {columns['path']!r} of {address.path} names "
            f"are not in {root} ({first_of(rows)}). Give the folder that the paths are relative to with --images DIR, "
            "or another column with --columns path=NAME."
        )


def first_of(texts: Sequence[str], separator: str = ", ") -> str:
    """The first of some texts, and how many more there are."""
    more = len(texts) - MAX_NAMED
    return separator.join(texts[:MAX_NAMED]) + (f"{separator}and {more} more" if more > 0 else "")


# --- As images --------------------------------------------------------------------------------------------------------


def of_entries(
    address: DataAddress,
    root: Path,
    entries: Sequence[Entry],
    layout: str,
    missing: Collection[str] = (),
    listed: Folder | None = None,
) -> ImageFolder:
    """The images of the `entries` that train or validate, or of those that the address asks for.

    Files that are `missing`, test images, and what lies in the folder `listed` without being named are counted.
    """
    wanted = address.options.get("rows")
    used = [e for e in entries if (e.part == wanted if wanted else e.part != "test")]
    used.sort(key=lambda entry: entry.path)
    if not used:
        raise DataError(f"{address.path} has no rows {f'for {wanted}' if wanted else 'to train on'}.")
    several = have_several(entry.label for entry in entries)
    try:
        cells, places = [entry.label for entry in used], [entry.place for entry in used]
        classes, labels, label_sets = labels_of(cells, places, several=several)
    except ValueError as error:
        raise DataError(f"{address.path}: {error}") from error
    has_valid = any(entry.part == "valid" for entry in used) and not wanted
    unused = [] if wanted else _unused(address, entries, used, missing, listed)
    return ImageFolder(
        root=root,
        layout=layout,
        paths=tuple(entry.path for entry in used),
        labels=labels,
        classes=classes,
        valid=tuple(entry.part == "valid" for entry in used) if has_valid else None,
        groups=tuple(entry.group for entry in used) if address.columns.get("group") else None,
        unused=tuple(unused),
        address=str(address),
        label_sets=label_sets,
    )


def _unused(
    address: DataAddress,
    entries: Sequence[Entry],
    used: Sequence[Entry],
    missing: Collection[str],
    listed: Folder | None,
) -> list[Unused]:
    found = []
    if test := [entry for entry in entries if entry.part == "test"]:
        advice = "they have no labels of these classes; search.predict labels them"
        if {entry.label for entry in test} == {entry.label for entry in used}:
            there = replace(address, options={**address.options, "rows": "test"})
            advice = f"--test-split {shlex.quote(str(there))} tests the winner on them"
        found.append(_named(many(len(test), "test image"), advice, [entry.path for entry in test]))
    if lost := [f"{entry.place}: {entry.path}" for entry in used if entry.path in missing]:
        found.append(_named(many(len(lost), "missing file"), "these count as unreadable images", lost))
    if listed is not None:
        known = {entry.path for entry in entries}
        if others := [path for path in listed.all_images if path not in known]:
            found.append(_named(f"{many(len(others), 'image')} that no table names", "", others))
    return found


def _named(what: str, advice: str, names: Sequence[str]) -> Unused:
    return Unused(what, advice, len(names), tuple(names[:MAX_NAMED]))
