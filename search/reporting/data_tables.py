"""What `search.check` found in a data set, as tables and lines of text."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.table import Table
from rich.text import Text

from trainables.data.inspection import Copies, Inspection
from trainables.recipe import Recipe
from trainables.system.text import many, printable

MAX_CLASSES = 40  # of a table; with more, it has only the SMALLEST and the LARGEST
SMALLEST, LARGEST = 10, 5
MAX_UNREADABLE_SHOWN = 20
MAX_COPIES_SHOWN = 10
MAX_PATHS = 4  # of one image's copies


def class_table(inspection: Inspection) -> Table:
    """Images for training and validation, by class and in total; of many classes the smallest and the largest."""
    classes, counts = inspection.folder.classes, inspection.counts
    counts = np.column_stack([counts, counts.sum(axis=1)])
    table = _table("class", "train", "valid", "all")
    shown = list(range(len(classes)))
    num_hidden = len(classes) - SMALLEST - LARGEST if len(classes) > MAX_CLASSES else 0
    if num_hidden:
        by_size = np.argsort(counts[:, 2], kind="stable").tolist()
        shown = by_size[:SMALLEST] + by_size[-LARGEST:]
    for place, label in enumerate(shown):
        if num_hidden and place == SMALLEST:
            text = f"... {num_hidden} more classes (these are the {SMALLEST} smallest and the {LARGEST} largest)"
            table.add_row(Text(text, style="dim"))
        table.add_row(Text(printable(classes[label])), *map(str, counts[label]))
    table.add_row()
    for name, values in _ranges(counts):
        table.add_row(Text(f"{name} of a class", style="bold"), *(f"{value:g}" for value in values))
    table.add_row(Text(f"all {len(classes)} classes", style="bold"), *map(str, counts.sum(axis=0)))
    return table


def size_table(inspection: Inspection) -> Table:
    """Smallest, median and largest width, height and aspect ratio."""
    sides = inspection.sides
    ranges = _ranges(np.column_stack([sides, sides[:, 0] / sides[:, 1]]))
    table = _table("image size", *(name for name, _ in ranges))
    for column, (name, digits) in enumerate((("width, px", 0), ("height, px", 0), ("width / height", 2))):
        table.add_row(name, *(f"{values[column]:.{digits}f}" for _, values in ranges))
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _ranges(values: npt.NDArray[Any]) -> list[tuple[str, npt.NDArray[Any]]]:
    """Smallest, median and largest of each column of `values` (n, columns)."""
    return [("min", values.min(axis=0)), ("median", np.median(values, axis=0)), ("max", values.max(axis=0))]


def enlarged_line(inspection: Inspection, recipe: Recipe) -> str:
    """How many images have fewer pixels than presizing gives them."""
    longer = recipe.resize_method == "pad"
    sides = inspection.sides.max(axis=1) if longer else inspection.sides.min(axis=1)
    number, total = int((sides < recipe.presize).sum()), len(sides)
    which = f"{'longer' if longer else 'shorter'} side below presize={recipe.presize}"
    if number == 0:
        return f"no image has its {which}, so none is enlarged"
    return f"{number} of {total} ({number / total:.0%}) have their {which} and are enlarged"


def formats_line(inspection: Inspection) -> str:
    """Such as "formats: 60 JPEG, 2 PNG"."""
    counts = Counter(inspection.files[i].format for i in inspection.readable)
    return f"formats: {', '.join(f'{count} {name}' for name, count in counts.most_common())}"


def unreadable_lines(inspection: Inspection, listed: Path) -> list[str]:
    """The first unreadable images; the file `listed` has them all."""
    bad = inspection.unreadable
    lines = [f"unreadable: {len(bad)}, all listed in {listed}" if bad else "unreadable: none"]
    lines += [f"  {file.path!r}: {file.problem}" for file in bad[:MAX_UNREADABLE_SHOWN]]
    return lines + _more(len(bad) - MAX_UNREADABLE_SHOWN)


def copies_lines(inspection: Inspection) -> list[str]:
    """Images that occur more than once, the harmful ones first."""
    groups = sorted(inspection.copies, key=lambda copies: (len(copies.labels) == 1, not copies.across_splits))
    number = f"{many(len(groups), 'image')} more than once" if groups else "none"
    lines = [f"exact copies: {number}"]
    lines += [f"  {_same(inspection, copies)}" for copies in groups[:MAX_COPIES_SHOWN]]
    return lines + _more(len(groups) - MAX_COPIES_SHOWN)


def _same(inspection: Inspection, copies: Copies) -> str:
    valid = set(inspection.valid.tolist())
    names = [f"{inspection.files[i].path!r} ({'valid' if i in valid else 'train'})" for i in copies.indices[:MAX_PATHS]]
    left = len(copies.indices) - MAX_PATHS
    return " = ".join(names) + (f" = {left} more" if left > 0 else "")


def _more(number: int) -> list[str]:
    return [f"  ... and {number} more"] if number > 0 else []
