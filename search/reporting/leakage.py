"""Near-duplicates across a split: what they may hide, in a sentence and as a table."""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from search.cli.messages import say
from trainables.data.near_duplicates import MAX_IMAGES, Pair, pairs_among, picture
from trainables.data.presized_images import MEMORY_MAP, PresizedImages
from trainables.system.text import many, percent

FILE = "near_duplicates.csv"
COLUMNS = ("likeness", "train", "train_class", "valid", "valid_class")
REMEDY = "--group duplicates keeps such images in one split"
REMEDY_OF_OWN_SPLIT = "remove them from one of the two folders"


@dataclass(frozen=True, kw_only=True)
class Across:
    """The near-duplicates of which one trains and the other validates, the most alike first."""

    rows: tuple[tuple[float, str, str, str, str], ...]
    """As `COLUMNS` calls them."""
    indices: tuple[tuple[int, int], ...]
    """The training and the validation image of each row."""
    num_valid: int
    own_split: bool = False
    """Whether the data set itself says which images validate."""

    @property
    def hidden(self) -> float:
        """The share of the validation images that look like a training image of their class.

        If the network knows them from there and would otherwise get all of them wrong, the error rate is too low by
        this. That is the most: what it would get wrong, nobody knows before it is trained on other images.
        """
        return len({valid for _, _, known, valid, truth in self.rows if known == truth}) / max(1, self.num_valid)

    def text(self, file: Path | str) -> str:
        """How many, where they are named, and by how much the error may be too low."""
        others = sum(known != truth for _, _, known, _, truth in self.rows)
        unlike = f"; {many(others, 'pair')} of two classes, which may be wrong labels" if others else ""
        return (
            f"{many(len(self.rows), 'near-duplicate pair')} across the split (named in {file}), with "
            f"{percent(self.hidden)} of the validation images: their error may be up to {100 * self.hidden:.1f} points "
            f"too low{unlike}"
        )

    @property
    def remedy(self) -> str:
        return REMEDY_OF_OWN_SPLIT if self.own_split else REMEDY

    def save(self, file: Path) -> None:
        with file.open("w", newline="", encoding="utf-8", errors="backslashreplace") as opened:
            writer = csv.writer(opened)
            writer.writerow(COLUMNS)
            writer.writerows((f"{likeness:.3f}", *names) for likeness, *names in self.rows)


def across(
    pairs: Iterable[Pair],
    paths: Sequence[str],
    labels: Sequence[int] | npt.NDArray[np.int64],
    classes: Sequence[str],
    valid: npt.NDArray[np.int64],
    *,
    own_split: bool = False,
) -> Across:
    """Those of the `pairs` that a split separates."""
    held = set(valid.tolist())
    rows, indices = [], []
    for pair in pairs:
        if (pair.first in held) != (pair.second in held):
            train, other = (pair.second, pair.first) if pair.first in held else (pair.first, pair.second)
            rows.append((pair.likeness, paths[train], classes[labels[train]], paths[other], classes[labels[other]]))
            indices.append((train, other))
    return Across(rows=tuple(rows), indices=tuple(indices), num_valid=len(held), own_split=own_split)


def say_near_duplicates(images: PresizedImages, seed: int, file: Path) -> None:
    """Name the near-duplicates across the split in a file, and say what they may hide; nothing where there are none."""
    found = in_presized(images, seed)
    if found and found.rows:
        file.parent.mkdir(parents=True, exist_ok=True)
        found.save(file)
        say(f"warning: {found.text(file)}; {found.remedy}")


def in_presized(images: PresizedImages, seed: int) -> Across | None:
    """The near-duplicates across the split of presized images; None where it would take long to look at all."""
    if images.storage != MEMORY_MAP or len(images) > MAX_IMAGES:
        return None
    pictures = np.stack([picture(images[index]) for index in range(len(images))])
    valid = images.split(seed=seed)[1]
    own = images.has_own_split
    return across(pairs_among(pictures), images.paths, images.labels, images.classes, valid, own_split=own)
