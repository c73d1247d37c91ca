"""Whether this user began a run: resuming one executes its pickles."""

import hmac
import os
import secrets
import tempfile
from pathlib import Path

from search.runs.command import CommandRecord
from search.runs.paths import RunFolder

KEY_BYTES = 32


def signature(folder: RunFolder, run_id: str) -> str:
    """What only this user on this machine can compute for the run in this folder, wherever the folder is moved. Empty
    if the user's key can neither be read nor made."""
    base = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    try:
        key = _key(Path(base).expanduser() / "finetune-search" / "key")
        inode = folder.path.stat().st_ino  # a copy is another folder
    except OSError:
        return ""
    return hmac.digest(key, f"{run_id} {inode}".encode(), "sha256").hex() if len(key) == KEY_BYTES else ""


def _key(file: Path) -> bytes:
    """The user's key, made if there is none. The file appears complete or not at all."""
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, partial = tempfile.mkstemp(dir=file.parent)  # for its owner alone
        with os.fdopen(descriptor, "wb") as new:
            new.write(secrets.token_bytes(KEY_BYTES))
        try:
            os.link(partial, file)
        except FileExistsError:  # another search was quicker
            pass
        except OSError:  # a file system without links
            Path(partial).replace(file)
        Path(partial).unlink(missing_ok=True)
    return file.read_bytes()


def require_own(folder: RunFolder, *, trust: bool) -> None:
    """Raises `ValueError` for a run that this user did not begin here: Ray keeps its state in pickles, and loading
    them executes code."""
    command = CommandRecord.load(folder.path)
    mine = signature(folder, command.run_id)
    signed = mine and hmac.compare_digest(mine.encode(), str(command.signature).encode())
    if not (trust or (signed and _all_mine(folder))):
        raise ValueError(
            f"{folder}/ was not begun by you on this machine, and resuming it executes code in its files. If you trust "
            "its origin, add --trust. Reports and exports execute nothing and need no trust."
        )


def _all_mine(folder: RunFolder) -> bool:
    """Whether no other user owns any of the files that are executed."""
    return all(
        path.lstat().st_uid == os.geteuid()
        for path in (folder.path, folder.tune, *folder.tune.glob("*"))
        if path.exists()
    )
