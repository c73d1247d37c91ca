"""Where labelled images lie on this machine, in one text that finds them again: a path, and how to read what is there.

`DIR/*` says at which level the classes lie (see `layouts`), `labels.csv?label=breed&images=DIR` which columns of a
table to use. The text is what a run's record keeps, and what every node of a cluster gets. Imports no torch.
"""

import argparse
import os
import re
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from trainables.data.fetch import is_uri
from trainables.data.labelled_images import DataError

COLUMNS = ("path", "label", "split", "group")
"""What a column of a table can say of an image."""
OPTIONS = (*COLUMNS, "images", "rows")
"""What may come behind a `?`: names of columns; the folder that the paths are relative to; the part of the split whose
rows are used, and no others."""
PARTS = ("train", "valid", "test")


@dataclass(frozen=True, kw_only=True)
class DataAddress:
    """A folder, a table of labels or an archive, and how to read it. Raises `DataError`."""

    path: Path
    stars: str = ""
    """The `/*` at the end of a folder's path."""
    options: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if unknown := [name for name in self.options if name not in OPTIONS]:
            raise DataError(
                f"{self.path}?{unknown[0]}=: expected {', '.join(f'{name}=' for name in OPTIONS)} behind the ?."
            )
        for name in ("path", "label", "images"):
            if not self.options.get(name, name).strip():
                raise DataError(f"{self.path}?{name}=: expected a name after {name}=.")
        if self.options.get("rows", "test") not in PARTS:
            raise DataError(f"{self.path}?rows={self.options['rows']}: expected one of {', '.join(PARTS)}.")
        if self.stars and self.options:
            raise DataError(f"{self}: {self.stars} takes the classes from folders, so there are no columns to name.")

    @classmethod
    def of(cls, text: str) -> "DataAddress":
        """The address in a text. What exists under the whole text as its name is that."""
        text = str(Path(text).expanduser())
        if os.path.exists(text):  # noqa: PTH110  (Path.exists raises where a name is too long)
            return cls(path=Path(text))
        bare, options = _split_options(text)
        path, stars = split_level(bare)
        return cls(path=Path(path), stars=stars, options=options)

    def __str__(self) -> str:
        query = "&".join(f"{name}={_quoted(name, self.options[name])}" for name in OPTIONS if name in self.options)
        return f"{self.path}{self.stars}{'?' if query else ''}{query}"

    @property
    def columns(self) -> dict[str, str]:
        """The named columns; a name is empty where the table's column for it is to be ignored."""
        return {name: self.options[name] for name in COLUMNS if name in self.options}

    def images_in(self, folder: Path) -> Path:
        """The folder that paths in a table are relative to, for a table in `folder`."""
        return folder / Path(self.options.get("images", "")).expanduser()


def split_level(text: str) -> tuple[str, str]:
    """A path or URI, and the `/*` at its end, if any."""
    bare = re.sub(r"(/\*)+$", "", text)
    return bare, text.removeprefix(bare)


def _split_options(text: str) -> tuple[str, dict[str, str]]:
    path, mark, query = text.rpartition("?")
    if not mark or not re.match(r"\w+=", query):
        return text, {}
    options: dict[str, str] = {}
    for part in query.split("&"):
        name, _, value = part.partition("=")
        if name in options:
            raise DataError(f"{path}?{query}: {name}= is there twice. Keep one of them.")
        options[name] = urllib.parse.unquote(value)
    return path, options


def _quoted(name: str, value: str) -> str:
    """A value that reads well. Slashes in the name of a column are quoted, too: `Path` would shorten them."""
    special = r"[%&?\x00-\x1f]" if name == "images" else r"[%&?/\x00-\x1f]"
    return re.sub(special, lambda found: urllib.parse.quote(found[0], safe=""), value)


# --- On the command line ----------------------------------------------------------------------------------------------


def add_table_options(parser: "argparse._ArgumentGroup | argparse.ArgumentParser") -> None:
    """`--columns` and `--images`, for all commands that take `--data`, which `with_table_options` adds to it."""
    parser.add_argument("--columns", type=_columns, metavar="ROLE=NAME,...", help=(
        "the columns of the table that --data names (.csv, .tsv, .jsonl, .parquet), where they do not have the usual "
        "names: path=file,label=breed, and split= or group= if there are such columns ('split=' alone ignores one)"
    ))  # fmt: skip
    parser.add_argument("--images", type=Path, metavar="DIR", help=(
        "the folder that the paths in the table are relative to; default: that of the table"
    ))  # fmt: skip


def with_table_options(
    data: Path | str | None, columns: Mapping[str, str] | None, images: Path | None
) -> Path | str | None:
    """`--data` with what `--columns` and `--images` say. Raises `ValueError` where they do not go together."""
    if columns is None and images is None:
        return data
    option = "--images" if columns is None else "--columns"
    if data is None:
        raise ValueError(f"{option} needs --data with a table of labels, such as --data labels.csv")
    if is_uri(str(data)):
        raise ValueError(
            f"{option} does not go with an address, whose tables are metadata.csv with the columns file_name and label"
        )
    address = DataAddress.of(str(data))
    said = dict(columns or {}) | ({} if images is None else {"images": str(images.expanduser().absolute())})
    if twice := sorted(said.keys() & address.options.keys()):
        raise ValueError(f"--data {data} says {twice[0]}= already. Omit one of the two")
    return Path(str(DataAddress(path=address.path, stars=address.stars, options={**address.options, **said})))


def _columns(text: str) -> dict[str, str]:
    parts = re.split(rf",(?=\s*(?:{'|'.join(COLUMNS)})=)", text)
    found: dict[str, str] = {}
    for part in parts:
        role, equals, name = part.partition("=")
        role = role.strip()
        if not equals or role not in COLUMNS or role in found:
            why = "is there twice" if role in found else f"is none of {', '.join(f'{each}=NAME' for each in COLUMNS)}"
            raise argparse.ArgumentTypeError(f"{part.strip()!r} {why}")
        found[role] = name.strip()
    return found
