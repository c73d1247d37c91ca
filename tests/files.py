"""Data sets of empty files, for tests to which only names matter."""

from pathlib import Path


def fill(root: Path, *names: str) -> Path:
    """Makes empty files in `root`, and the folders that they lie in."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root
