"""File systems by their URI, for fetching and storing, and URIs without their secrets. Imports no torch."""

import re
import urllib.parse
from pathlib import Path, PurePosixPath
from typing import Any

QUERIES = {"gs": "retry_limit_seconds=60"}
"""Added to a URI's query, by scheme. Google's client would retry for 15 minutes."""


class FetchError(ValueError):
    """Fetching failed; the message is for the user and has no password, key or signature of the URI."""


def shown(uri: str) -> str:
    """The URI without user, password, query and checksum, for messages and logs."""
    parts = urllib.parse.urlsplit(uri)
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def filesystem(address: str) -> tuple[Any, str]:
    """The `pyarrow.fs.FileSystem` of an s3, gs or file address, and the path there. Raises `FetchError`."""
    from pyarrow import ArrowException
    from pyarrow.fs import FileSystem

    parts = urllib.parse.urlsplit(address)
    added = QUERIES.get(parts.scheme, "")
    query = "&".join(text for text in (parts.query, added) if text)  # the first of two values counts
    try:
        found: tuple[Any, str] = FileSystem.from_uri(parts._replace(query=query).geturl() if added else address)
    except (ArrowException, OSError) as error:
        raise FetchError(f"{shown(address)} is not a usable address: {without_secrets(error)}") from error
    return found


def without_secrets(error: Exception) -> str:
    return re.sub(r"//[^/@\s]*@", "//", str(error)).partition("\n")[0]


def inside(folder: Path, name: str, address: str) -> Path:
    """The file `name` of `folder`; raises `FetchError` if it would lie elsewhere."""
    parts = PurePosixPath(name.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts:
        raise outside_folder(address, repr(name))
    return folder / parts


def outside_folder(address: str, what: object) -> FetchError:
    return FetchError(f"{shown(address)} is refused: its files would be written outside of their folder ({what})")
