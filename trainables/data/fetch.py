"""Fetches images or weights from a URI into the cache, once per node for all its processes.

A URI is the address of an archive (tar, compressed or not, or zip) or of one `.safetensors` file, by http, https, s3,
gs or file; or of a folder, by s3, gs or file. What was fetched is not updated. `#sha256=<hex>` at its end demands a
checksum: of the archive or file as it was sent, or of a folder as in `_digest_of_folder`. Imports no torch.
"""

import gzip
import http.client
import json
import logging
import lzma
import re
import shutil
import ssl
import string
import tarfile
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any

from trainables.system import file_systems
from trainables.system.cache import cache_dir, locked
from trainables.system.file_systems import FetchError, inside, outside_folder, shown, without_secrets

logger = logging.getLogger(__name__)

SCHEMES = ("https", "http", "s3", "gs", "file")
SILENT_SECONDS = 20.0
"""How long a web server may be silent."""
PAUSES = (1, 2, 4)
"""Seconds between tries, for servers that are busy or break off."""
CHUNK = 1 << 20
LOG_SECONDS = 10.0
DAMAGED = (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, lzma.LZMAError, zlib.error, EOFError, RuntimeError)
"""What unpacking raises; the last one if an archive needs a password or an unknown compression."""
FILES_AT_ONCE = 16
"""Small files wait for the network, not for the CPU."""


class _Busy(Exception):
    """Worth another try."""


def is_uri(text: str) -> bool:
    return "://" in text


def fetch(uri: str) -> Path:
    """The folder with the content of `uri`, which is fetched if this node does not have it. Raises `FetchError`."""
    target = _fetched(uri)
    content = target / "content"
    while len(inside := _visible(content)) == 1 and inside[0].is_dir():
        content = inside[0]  # an archive of one folder stands for that folder
    return content


def pinned(uri: str) -> str:
    """The URI with the checksum of this node's copy, so that all nodes have the same. Fetches it first."""
    return f"{_split(uri)[0]}#sha256={_record(_fetched(uri))['sha256']}"


def _fetched(uri: str) -> Path:
    address, demanded = _split(uri)
    target = _target(address, demanded)
    if target.is_dir():
        return target
    with _disk_errors():
        target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target.with_suffix(".lock"), f"for another process that fetches {shown(uri)}"):
        if not target.is_dir():
            _fetch_to(target, address, demanded)
    return target


def _target(address: str, demanded: str | None) -> Path:
    """The folder of a complete copy."""
    folder = cache_dir() / "fetched"
    plain = folder / sha256(address.encode()).hexdigest()[:20]
    if demanded is None or (plain.is_dir() and _record(plain)["sha256"] == demanded):
        return plain
    return folder / sha256(f"{address}#{demanded}".encode()).hexdigest()[:20]


def _record(target: Path) -> dict[str, str]:
    record: dict[str, str] = json.loads((target / "source.json").read_text())
    return record


def _split(uri: str) -> tuple[str, str | None]:
    """Address and demanded checksum."""
    address, _, fragment = uri.partition("#")
    scheme = address.partition("://")[0].lower()
    if scheme not in SCHEMES:
        raise FetchError(f"{shown(uri)}: expected an address that begins with {', '.join(f'{s}://' for s in SCHEMES)}")
    if fragment and not re.fullmatch(r"sha256=[0-9a-f]{64}", fragment):
        raise FetchError(f"{shown(uri)}: expected sha256= and 64 hexadecimal digits after #")
    return address, fragment.removeprefix("sha256=") or None


def _fetch_to(target: Path, address: str, demanded: str | None) -> None:
    """Makes all of `target`, under its lock, or raises and leaves nothing."""
    partial = target.with_suffix(".partial")  # a fixed name, to remove what a killed process left
    with _disk_errors():
        shutil.rmtree(partial, ignore_errors=True)
        try:
            content = partial / "content"
            content.mkdir(parents=True)
            started = time.monotonic()
            logger.info("fetching %s", shown(address))
            found = _get(address, partial, content)
            if demanded not in (None, found):
                raise FetchError(
                    f"{shown(address)} has SHA-256 {found}, expected {demanded}. It has changed since the search "
                    "began, or is another file."
                )
            (partial / "source.json").write_text(json.dumps({"uri": shown(address), "sha256": found}) + "\n")
            partial.rename(target)
            logger.info("fetched %s in %.0f s, SHA-256 %s", shown(address), time.monotonic() - started, found)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise FetchError(
            f"Nothing can be fetched into {cache_dir()} ({error.strerror or error}). Make room there, or name another "
            "folder with FINETUNE_SEARCH_CACHE."
        ) from error


def _get(address: str, partial: Path, content: Path) -> str:
    """Fills `content` from `address`; the SHA-256 of what came."""
    sent = partial / "sent"
    if address.lower().startswith(("http://", "https://")):
        digest = _with_retries(lambda: _download(address, sent))
    else:
        filesystem, path = file_systems.filesystem(address)
        from pyarrow.fs import FileType

        with _object_store_errors(address):
            kind = filesystem.get_file_info(path).type
            if kind == FileType.Directory:
                return _copy_folder(filesystem, path, address, content)
            if kind == FileType.File:
                with filesystem.open_input_stream(path) as stream:
                    digest = _store(stream.read, sent, address)
        if kind != FileType.File:
            raise FetchError(f"There is nothing at {shown(address)}.")
    _unpack(address, sent, content)
    return digest


# --- The web ----------------------------------------------------------------------------------------------------------


def _with_retries(get: Callable[[], str]) -> str:
    for pause in (*PAUSES, None):
        try:
            return get()
        except _Busy as error:
            if pause is None:
                advice = "Try again later, or give a folder that every node has."
                raise FetchError(f"{error}, {1 + len(PAUSES)} times. {advice}") from error
            logger.info("%s; trying again in %d s", error, pause)
            time.sleep(pause)
    raise AssertionError


def _download(address: str, file: Path) -> str:
    ascii_address = urllib.parse.quote(address, safe=string.punctuation)  # keeps what is quoted
    request = urllib.request.Request(ascii_address, headers={"User-Agent": "finetune-search"})
    try:
        with urllib.request.urlopen(request, timeout=SILENT_SECONDS) as response:
            length = response.headers.get("Content-Length")
            digest = _store(response.read, file, address, int(length) if length else None)
    except urllib.error.HTTPError as error:
        text = f"{shown(address)}: the server answers {error.code} {error.reason}"
        if error.code >= 500 or error.code in (408, 429):
            raise _Busy(text) from error
        raise FetchError(f"{text}.") from error
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError, ssl.SSLError) as error:
        raise _Busy(f"{shown(address)}: {getattr(error, 'reason', error)}") from error
    if length and file.stat().st_size != int(length):
        raise _Busy(f"{shown(address)}: the server broke off after {file.stat().st_size} of {length} bytes")
    return digest


def _store(read: Callable[[int], bytes], file: Path, address: str, length: int | None = None) -> str:
    """Writes what is read to `file`; its SHA-256."""
    digest, done, logged = sha256(), 0, time.monotonic()
    with file.open("wb") as out:
        while chunk := read(CHUNK):
            digest.update(chunk)
            out.write(chunk)
            done += len(chunk)
            if time.monotonic() - logged > LOG_SECONDS:
                logged = time.monotonic()
                of = f" of {length / 1e6:.0f}" if length else ""
                logger.info("fetching %s: %.0f%s MB", shown(address), done / 1e6, of)
    return digest.hexdigest()


# --- Archives ---------------------------------------------------------------------------------------------------------


def _unpack(address: str, sent: Path, content: Path) -> None:
    name = PurePosixPath(urllib.parse.unquote(urllib.parse.urlsplit(address).path)).name
    try:
        if tarfile.is_tarfile(sent):
            with tarfile.open(sent) as archive:
                archive.extractall(content, filter="data")
        elif zipfile.is_zipfile(sent):
            with zipfile.ZipFile(sent) as archive:
                for member in archive.namelist():
                    inside(content, member, address)
                archive.extractall(content)
        elif name.endswith(".safetensors"):
            sent.rename(content / name)
        else:
            with sent.open("rb") as file:
                start = file.read(24)
            raise FetchError(
                f"{shown(address)} is neither a tar nor a zip archive nor .safetensors: it begins with {start!r}."
            )
    except tarfile.FilterError as error:
        raise outside_folder(address, error) from error
    except DAMAGED as error:
        raise FetchError(f"The archive {shown(address)} is damaged: {error}") from error
    sent.unlink(missing_ok=True)


# --- Object stores and local folders ----------------------------------------------------------------------------------


@contextmanager
def _object_store_errors(address: str) -> Iterator[None]:
    """Turns errors of the object store into `FetchError`; those of the disk have a number and pass."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and not address.startswith("file:"):
            raise
        raise FetchError(f"{shown(address)} cannot be read: {without_secrets(error)}") from error


def _copy_folder(filesystem: Any, path: str, address: str, content: Path) -> str:
    from pyarrow.fs import FileSelector, FileType

    base = path.rstrip("/") + "/"
    found = filesystem.get_file_info(FileSelector(path, recursive=True))
    names = sorted(info.path.removeprefix(base) for info in found if info.type == FileType.File)
    if not names:
        raise FetchError(f"There are no files in {shown(address)}.")

    def copy(name: str) -> str:
        file = inside(content, name, address)
        file.parent.mkdir(parents=True, exist_ok=True)
        with filesystem.open_input_stream(base + name) as stream:
            return _store(stream.read, file, address)

    digests, logged = {}, time.monotonic()
    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        for name, digest in zip(names, pool.map(copy, names), strict=True):
            digests[name] = digest
            if time.monotonic() - logged > LOG_SECONDS:
                logged = time.monotonic()
                logger.info("fetching %s: %d of %d files", shown(address), len(digests), len(names))
    return _digest_of_folder(digests)


def _digest_of_folder(digests: dict[str, str]) -> str:
    """SHA-256 over the lines that `sha256sum` prints for the files, sorted by name."""
    return sha256("".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items())).encode()).hexdigest()


def _visible(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if not path.name.startswith(".") and path.name != "__MACOSX"]
