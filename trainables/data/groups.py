"""Groups: images that belong together, such as photos of one patient or copies of one file. No split separates them.

`grouped` finds them once, on the machine of the user. Other nodes and later commands get them as text, see `to_text`,
so that all of them split alike. Imports no torch.
"""

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from hashlib import file_digest
from pathlib import Path, PurePosixPath

import numpy as np

from trainables.data.labelled_images import DataError, ImageFolder
from trainables.data.splits import Indices, group_numbers, train_and_valid
from trainables.system.text import many, some

WAYS = PARENT, COLUMN, DUPLICATES = "parent", "column", "duplicates"
HELP = (
    "keep images of one group in one split: parent = by the folder below the class folder (<class>/<patient>/*.jpg), "
    "column = by the group column of the table of labels, duplicates = images that look the same, or a regular "
    "expression with one group in parentheses, which is searched in each path below the data folder, such as "
    "'(patient[0-9]+)_'; exact copies are always kept together"
)

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Grouping:
    """Images with their groups, and what there is to say about these."""

    images: ImageFolder
    lines: tuple[str, ...]


def checked_group(text: str) -> str:
    """A `--group`; raises `ValueError` unless it is one of the words or a regular expression with one group."""
    if text in WAYS:
        return text
    try:
        found = re.compile(text).groups
    except re.error as error:
        raise ValueError(f"{text!r} is not a regular expression: {error}") from None
    if found != 1:
        raise ValueError(
            f"{text!r} is neither {', '.join(WAYS)} nor a regular expression with one group in "
            "parentheses, such as '(patient[0-9]+)_'"
        )
    return text


def grouped(images: ImageFolder, how: str | None, progress: Progress = lambda done, total: None) -> Grouping:
    """The images with their groups by `how`, a `--group`, and with exact copies of a class together.

    Without `how` or with `duplicates`, images that have groups keep them. `progress` counts the images that
    `duplicates` opens. Raises `DataError` where images have no such groups.
    """
    names = named(images, how)
    links, lines = _of_copies(images)
    if names is not None:
        alone = len(set(names)) == len(names)
        what = "each image is a group of its own, so it changes nothing" if alone else "each is in one split alone"
        by = COLUMN if how in (None, DUPLICATES) else how
        lines = [f"groups: {len(set(names))} of {len(names)} images, by {by}; {what}", *lines]
    if how == DUPLICATES:
        from trainables.data.near_duplicates import find_duplicates

        pairs = [[pair.first, pair.second] for pair in find_duplicates(images, progress)]
        among = many(len({index for pair in pairs for index in pair}), "image")
        lines = [*lines, f"groups: {many(len(pairs), 'pair')} of near-duplicates among {among}; they stay in one split"]
        links = [*links, *pairs]
    found = replace(images, groups=joined(images.paths, names, links))
    return Grouping(found, (*lines, *_warnings(found, names)))


def _of_copies(images: ImageFolder) -> tuple[list[list[int]], list[str]]:
    """The exact copies of each class, and what there is to say about them and about those in several classes."""
    same = list(copies(images))
    links, lines = [part for copied in same for part in _by_label(images, copied)], []
    if links:
        extra = many(sum(map(len, links)) - len(links), "image")
        lines.append(f"copies: {extra} with the bytes of another, each is kept in the split of that one")
    if contradictions := [copied for copied in same if len({images.labels[i] for i in copied}) > 1]:
        first = " = ".join(repr(images.paths[i]) for i in contradictions[0][:3])
        number = many(len(contradictions), "image")
        lines.append(f"warning: {number} under more than one class, as exact copies (first: {first})")
    return links, lines


# --- Where groups come from -------------------------------------------------------------------------------------------


def named(images: ImageFolder, how: str | None) -> tuple[str, ...] | None:
    """The groups that names or a table give; None where there are none."""
    if how == PARENT:
        return _parents(images)
    if how not in (None, COLUMN, DUPLICATES):
        return _matches(images, how)
    if how == COLUMN and images.groups is None:
        raise DataError(f"--group {COLUMN}: {images.root} has no table of labels with a group column.")
    # An image with an empty cell is alone.
    return images.groups and tuple(group or path for group, path in zip(images.groups, images.paths, strict=True))


def _parents(images: ImageFolder) -> tuple[str, ...]:
    """The folder below the class folder, of one name for all classes; an image without one is alone."""
    names = [_below_class(path, images.classes[label]) for path, label in zip(images.paths, images.labels, strict=True)]
    by_class = defaultdict(list)
    for label, name in zip(images.labels, names, strict=True):
        by_class[label].append(name)
    whole = [images.classes[label] for label, own in sorted(by_class.items()) if len(own) > 1 and len(set(own)) == 1]
    if whole:
        raise DataError(
            f"--group {PARENT}: all images of {some(whole, 'class', 'classes')} in {images.root} lie in one folder, so "
            "that the group would be the class. It needs <class>/<group>/*.jpg; where the names of the files tell the "
            "groups, give a regular expression."
        )
    return tuple(name or path for name, path in zip(names, images.paths, strict=True))


def _below_class(path: str, name: str) -> str:
    folders = [unicodedata.normalize("NFC", part) for part in PurePosixPath(path).parent.parts]
    return "/".join(folders[folders.index(name) + 1 :] if name in folders else folders)


def _matches(images: ImageFolder, pattern: str) -> tuple[str, ...]:
    """What the group in a regular expression matches in each path."""
    expression = re.compile(checked_group(pattern))
    matches = [expression.search(path) for path in images.paths]
    names = [match[1] if match else None for match in matches]
    if missing := [path for path, name in zip(images.paths, names, strict=True) if name is None]:
        raise DataError(
            f"--group {pattern!r} does not match {some(missing, 'image', 'images')} of {len(names)} in {images.root}. "
            "It must match each path below that folder."
        )
    return tuple(map(str, names))


def copies(images: ImageFolder) -> Iterator[list[int]]:
    """The images of each content that several files share. Only files of the same size are read."""
    files = [images.root / path for path in images.paths]
    by_size = defaultdict(list)
    for index, file in enumerate(files):
        by_size[_size(file)].append(index)
    alike = [index for size, same in by_size.items() if size is not None and len(same) > 1 for index in same]
    with ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="copies") as pool:
        digests = list(pool.map(lambda index: _digest(files[index]), alike))
    by_content = defaultdict(list)
    for index, digest in zip(alike, digests, strict=True):
        if digest is not None:
            by_content[digest].append(index)
    return (sorted(same) for same in by_content.values() if len(same) > 1)


def _size(file: Path) -> int | None:
    """Bytes; None for an empty or missing file, which is an unreadable image."""
    try:
        return file.stat().st_size or None
    except OSError:
        return None


def _digest(file: Path) -> bytes | None:
    try:
        with file.open("rb") as content:
            return file_digest(content, "sha256").digest()
    except OSError:
        return None


def _by_label(images: ImageFolder, indices: Iterable[int]) -> list[list[int]]:
    """The images of each class, of those with several."""
    by_label = defaultdict(list)
    for index in indices:
        by_label[images.labels[index]].append(index)
    return [same for same in by_label.values() if len(same) > 1]


def joined(paths: Sequence[str], names: Sequence[str] | None, links: Sequence[Sequence[int]]) -> tuple[str, ...] | None:
    """The groups, each called as its first path, where linked images are in one; None if all images are alone."""
    numbers = np.arange(len(paths)) if names is None else group_numbers(names)
    if links:
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        pairs = np.array([(first, other) for first, *others in links for other in others]).reshape(-1, 2)
        rows, columns = numbers[pairs].T
        size = int(numbers.max()) + 1
        numbers = connected_components(coo_array((np.ones(len(rows)), (rows, columns)), (size, size)))[1][numbers]
    return _named(paths, numbers)


def _named(paths: Sequence[str], numbers: Indices) -> tuple[str, ...] | None:
    found, first, inverse = np.unique(numbers, return_index=True, return_inverse=True)
    return None if len(found) == len(paths) else tuple(paths[i] for i in first[inverse])


def _warnings(images: ImageFolder, names: Sequence[str] | None) -> Iterator[str]:
    """What a split of the images cannot do well; `names` are those of the groups, if they have some."""
    if images.groups is None:
        return
    if images.valid is not None:
        sides = defaultdict(set)
        for index, group in enumerate(images.groups):
            sides[group].add(images.valid[index])
        crossing = [group for group, parts in sides.items() if len(parts) > 1]
        if crossing:
            named_first = names[images.paths.index(crossing[0])] if names else crossing[0]
            yield (
                f"warning: {many(len(crossing), 'group')} (the first: {named_first!r}) on both sides of the data's own "
                "split, which stays as it is: the validation error looks better than it is"
            )
        return
    by_class = defaultdict(set)
    for label, group in zip(images.labels, images.groups, strict=True):
        by_class[label].add(group)
    if single := [images.classes[label] for label, own in sorted(by_class.items()) if len(own) == 1]:
        yield f"warning: {some(single, 'class', 'classes')} with a single group, which trains: none of them validates"
    if not len(train_and_valid(images.labels, None, images.groups)[1]):
        raise DataError(
            f"The groups of {images.root} leave no images to validate on: each class needs two groups or more. Give "
            "another --group, or none."
        )


# --- As text ----------------------------------------------------------------------------------------------------------


def to_text(groups: Sequence[str] | None) -> str:
    """Groups of two images or more, by their numbers from 0, such as "0-3;4 6-7"; empty if there are none."""
    if groups is None:
        return ""
    members: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    return ";".join(" ".join(_ranges(own)) for own in members.values() if len(own) > 1)


def _ranges(numbers: list[int]) -> Iterator[str]:
    start = last = numbers[0]
    for number in [*numbers[1:], -1]:
        if number != last + 1:
            yield str(start) if start == last else f"{start}-{last}"
            start = number
        last = number


def with_text(images: ImageFolder, text: str) -> ImageFolder:
    """The images with the groups that `to_text` has written. Raises `DataError` if there are fewer images."""
    if not text:
        return replace(images, groups=None)
    numbers = np.arange(len(images.paths))
    try:
        for group in text.split(";"):
            ends = [tuple(map(int, part.split("-"))) for part in group.split()]
            indices = [index for part in ends for index in range(part[0], part[-1] + 1)]
            numbers[indices] = indices[0]
    except (IndexError, ValueError):
        raise DataError(
            f"The images in {images.root} ({len(images.paths)}) are not those whose groups were found when the search "
            "began: some are gone."
        ) from None
    return replace(images, groups=_named(images.paths, numbers))
