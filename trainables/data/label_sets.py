"""Several labels for an image: read from the cells of a table, as numbers, and the class that stands for all of them.

Imports no torch.
"""

import json
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from trainables.system.text import many

LabelSets = tuple[tuple[int, ...], ...]
"""The labels of each image, sorted; an image may have none."""
MAX_SHOWN = 5


def have_several(cells: Iterable[str], separator: str = ";") -> bool:
    """Whether these are the cells of images with several labels: one has the separator, or is a JSON list."""
    return any(separator in cell or _is_json_list(cell) for cell in cells)


def _is_json_list(cell: str) -> bool:
    try:
        return cell.startswith("[") and isinstance(json.loads(cell), list)
    except ValueError:
        return False


def labels_of(
    cells: Sequence[str], places: Sequence[str], *, several: bool
) -> tuple[tuple[str, ...], tuple[int, ...], LabelSets | None]:
    """Classes, `labels` and `label_sets` of an `ImageFolder`, from cells of which each is a label unless they have
    `several`. Raises `ValueError`, see `from_cells`."""
    if several:
        return from_cells(cells, places=places)
    classes = tuple(sorted(set(cells)))
    label_of = {name: label for label, name in enumerate(classes)}
    return classes, tuple(label_of[cell] for cell in cells), None


def from_cells(
    cells: Sequence[str], separator: str = ";", *, places: Sequence[str] = ()
) -> tuple[tuple[str, ...], tuple[int, ...], LabelSets]:
    """Classes, `labels` and `label_sets` of an `ImageFolder`, from a table's cells: `cat;indoors` or, as JSON,
    `["cat", "indoors"]`. An empty cell, and `[]`, is an image of no class.

    Raises `ValueError` that lists all cells that are not like this, by their `places` or counted from 1.

    >>> from_cells(["cat;indoors", "dog", "", '["indoors", "dog"]'])
    (('cat', 'dog', 'indoors'), (0, 1, 1, 1), ((0, 2), (1,), (), (1, 2)))
    """
    names, problems = [], []
    for place, cell in zip(places or [f"cell {i + 1}" for i in range(len(cells))], cells, strict=True):
        try:
            names.append(_names(cell, separator))
        except ValueError as error:
            problems.append(f"{place}, {cell!r}, {error}")
    if problems:
        more = f"; and {len(problems) - MAX_SHOWN} more" if len(problems) > MAX_SHOWN else ""
        raise ValueError(
            f"{many(len(problems), 'cell')} cannot be read as labels: {'; '.join(problems[:MAX_SHOWN])}{more}. "
            f"Write labels as cat{separator}indoors or as a JSON list of texts, and leave a cell empty for none."
        )
    classes = tuple(sorted({name for own in names for name in own}))
    if not classes:
        raise ValueError(f"all {len(cells)} cells are empty, so there are no classes. Name the labels of the images.")
    label_of = {name: label for label, name in enumerate(classes)}
    label_sets = tuple(tuple(sorted(label_of[name] for name in own)) for own in names)
    return classes, tuple(rarest(multi_hot(label_sets, len(classes))).tolist()), label_sets


def _names(cell: str, separator: str) -> set[str]:
    """The labels in a cell, without blanks around them. Raises `ValueError`."""
    if not cell.lstrip().startswith("["):
        return {name.strip() for name in cell.split(separator)} - {""}
    try:
        found = json.loads(cell)
    except ValueError as error:
        raise ValueError(f"starts like a JSON list and is none ({error})") from None
    if not all(isinstance(name, str) and name.strip() for name in found):
        raise ValueError("is a JSON list of something else than texts")
    return {name.strip() for name in found}


def to_cell(names: Sequence[str], separator: str = ";") -> str:
    """The cell that `from_cells` reads as these labels: JSON where one of them contains the separator."""
    as_text = separator.join(names)
    needs_json = any(separator in name for name in names) or as_text.startswith("[")
    return json.dumps(list(names), ensure_ascii=False) if needs_json else as_text


def multi_hot(label_sets: Sequence[Iterable[int]], num_classes: int) -> npt.NDArray[np.bool_]:
    """(images, classes) whether an image is of a class."""
    truth = np.zeros((len(label_sets), num_classes), dtype=bool)
    for row, labels in zip(truth, label_sets, strict=True):
        row[list(labels)] = True
    return truth


def rarest(truth: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """(images,) the class of each row (images, classes) that has the fewest images, the first of several: splits that
    are stratified by it give every class its share, small ones first. For an image of no class, the largest class."""
    counts = truth.sum(0)
    found: npt.NDArray[np.int64] = np.where(truth, counts, len(truth) + 1).argmin(1)
    found[~truth.any(1)] = counts.argmax()
    return found
