"""What fetching and storing share: file systems by their URI, and what of a URI may be shown. Imports no torch."""

import re
import urllib.parse
from pathlib import Path, PurePosixPath

PATIENCE = {"gs": "retry_limit_seconds=60"}
"""Added to the query. Google's client would try for a quarter of an hour."""


class FetchError(ValueError):
    """It cannot be had; the message is for the user and holds no password, key or signature of the URI."""


def shown(uri: str) -> str:
    """The URI without user, password, query and checksum, for people and logs."""
    parts = urllib.parse.urlsplit(uri)
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def filesystem(address: str):
    """The `pyarrow.fs.FileSystem` of an s3, gs or file address, and the path there. Raises `FetchError`."""
    from pyarrow import ArrowException
    from pyarrow.fs import FileSystem

    parts = urllib.parse.urlsplit(address)
    added = PATIENCE.get(parts.scheme, "")
    query = "&".join(text for text in (parts.query, added) if text)  # of two, the first one counts
    try:
        return FileSystem.from_uri(parts._replace(query=query).geturl() if added else address)
    except (ArrowException, OSError) as error:
        raise FetchError(f"{shown(address)} is no address that can be used: {without_secrets(error)}") from error


def without_secrets(error: Exception) -> str:
    return re.sub(r"//[^/@\s]*@", "//", str(error)).partition("\n")[0]


def inside(folder: Path, name: str, address: str) -> Path:
    """The file `name` of `folder`; raises `FetchError` where it would lie elsewhere."""
    parts = PurePosixPath(name.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts:
        raise FetchError(f"{shown(address)} is refused, its files would not stay in their folder: {name!r}")
    return folder / parts
