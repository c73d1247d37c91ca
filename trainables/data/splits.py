"""Which images train and which validate: drawn within each class, and groups stay whole. Imports no torch.

`train_and_valid` makes this decision for all commands, nodes and checks.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


def train_and_valid(
    labels: Sequence[int] | Indices,
    valid: Sequence[bool] | Mask | None,
    groups: Sequence[str] | None,
    *,
    seed: int = 0,
    valid_fraction: float = 0.2,
) -> tuple[Indices, Indices]:
    """Sorted indices of the training and the validation images: the data set's own split, which is `valid`, or one
    drawn by `split`."""
    if valid is not None:
        mask = np.asarray(valid, dtype=bool)
        return np.flatnonzero(~mask), np.flatnonzero(mask)
    return split(labels, valid_fraction=valid_fraction, seed=seed, groups=groups)


def split(
    labels: Sequence[int] | Indices,
    *,
    valid_fraction: float = 0.2,
    seed: int = 0,
    groups: Sequence[str] | None = None,
) -> tuple[Indices, Indices]:
    """Sorted indices of the training and the validation images, drawn at random within each class.

    Validation gets round(valid_fraction * n) images, distributed over the classes by largest remainder; it gets fewer
    if most classes are tiny, since each keeps an image to train on. Images of one group stay together, so then the
    numbers are as near to that as `take_groups` comes. The split is the same on all machines: it uses only PCG64's
    doubles, integers and stable sorts.
    """
    if not 0 < valid_fraction < 1:
        raise ValueError(f"valid_fraction is {valid_fraction}; expected a number between 0 and 1, such as 0.2.")
    labels = np.asarray(labels, dtype=np.int64)
    rng = np.random.default_rng(seed)
    order = np.argsort(rng.random(len(labels)), kind="stable")
    counts = np.bincount(labels)
    most = np.maximum(counts - 1, 0)
    share = valid_fraction * counts
    quota = np.minimum(np.floor(share).astype(np.int64), most)
    # The seed breaks ties between remainders, so that no class is favoured for its name.
    by_remainder = np.lexsort((rng.random(len(counts)), quota - share))
    missing = min(round(valid_fraction * len(labels)), int(most.sum())) - int(quota.sum())
    while missing > 0:
        open_classes = [label for label in by_remainder if quota[label] < most[label]][:missing]
        quota[open_classes] += 1
        missing -= len(open_classes)
    if groups is None or len(set(groups)) == len(groups):
        in_class = labels[order]
        drawn = [order[in_class == label][: quota[label]] for label in range(len(counts))]
        valid = np.sort(np.concatenate([np.empty(0, dtype=np.int64), *drawn]))
    else:
        numbers = group_numbers(groups)
        valid = np.flatnonzero(take_groups(labels, numbers, in_order(numbers[order]), quota, most))
    return np.setdiff1d(np.arange(len(labels)), valid), valid


def other_fold(
    split_of: tuple[Indices, Indices],
    labels: Indices,
    number: int,
    folds: int,
    *,
    seed: int = 0,
    groups: Sequence[str] | None = None,
) -> tuple[Indices, Indices]:
    """The split of fold `number`, 1 to `folds` - 1: its part of the training images of a split validates, and all other
    images train. The images that validate in the split itself are fold 0, so each image validates in one fold.

    Images of a class that would have no others to train on validate in none. Raises `ValueError` where there is no such
    fold.
    """
    if not 1 <= number < folds:
        raise ValueError(f"fold {number} of {folds}: expected 1 to {folds - 1}")
    rest, parts = split_of[0], []
    for left in range(folds - 1, 1, -1):
        own = None if groups is None else [groups[i] for i in rest]
        train, taken = split(labels[rest], valid_fraction=1 / left, seed=seed, groups=own)
        parts.append(rest[taken])
        rest = rest[train]
    valid, every = [*parts, rest][number - 1], np.concatenate(split_of)
    valid = valid[np.isin(labels[valid], labels[np.setdiff1d(every, valid)])]
    return np.setdiff1d(every, valid), valid


# --- Groups -----------------------------------------------------------------------------------------------------------


def group_numbers(groups: Sequence[str]) -> Indices:
    """The groups of the images as numbers from 0."""
    return np.unique(np.asarray(groups), return_inverse=True)[1].astype(np.int64)


def some_of_each_class(labels: Indices, count: int, *, seed: int = 0) -> Indices:
    """Sorted indices of `count` images: the classes take turns, each with its images in random order."""
    order = np.random.default_rng(seed).permutation(len(labels))
    turn = np.empty(len(labels), dtype=np.int64)
    for of_class in np.unique(labels):
        own = order[labels[order] == of_class]
        turn[own] = np.arange(len(own))
    taken: Indices = np.sort(order[np.argsort(turn[order], kind="stable")][:count])
    return taken


def in_order(numbers: Indices) -> Indices:
    """Each number once, in the order of its first place."""
    found, first = np.unique(numbers, return_index=True)
    return found[np.argsort(first, kind="stable")]


def take_groups(labels: Indices, numbers: Indices, order: Indices, quota: Indices, most: Indices) -> Mask:
    """Whether each image is taken, such that the number of images of each class is near its `quota` and at most `most`.

    Takes the groups in `order` that exceed no quota, which for groups of one image are the first of each class. Then
    it adds the group that helps most, one after another: one of a class that has none so far, or one that brings the
    numbers nearer to the quotas (by squares, relative to the quota). In integers, for the same result everywhere.

    Args:
        labels: (images,) their classes.
        numbers: (images,) their groups; each is in `order`.
        order: (groups,) the groups, those to prefer first.
        quota: (classes,) images to take.
        most: (classes,) images that may be taken.
    """
    rank = np.empty(int(order.max(initial=-1)) + 1, dtype=np.int64)
    rank[order] = np.arange(len(order))
    keys, counts = np.unique(rank[numbers] * len(quota) + labels, return_counts=True)
    places, classes = np.divmod(keys, len(quota))  # a part of a group is its images of one class
    starts = np.searchsorted(places, np.arange(len(order)))
    chosen = _first_fit(classes, counts, starts, quota)
    taken = np.bincount(classes[chosen[places]], counts[chosen[places]], len(quota)).astype(np.int64)
    weight, missed = (1 << 16) // np.maximum(quota, 1), (1 << 61) // len(quota)
    while len(order):
        change = weight[classes] * counts * (2 * (taken - quota)[classes] + counts)
        change -= np.where((taken == 0) & (quota > 0), missed, 0)[classes]
        change = np.add.reduceat(change, starts)
        allowed = np.logical_and.reduceat(taken[classes] + counts <= most[classes], starts) & ~chosen
        best = int(np.argmin(np.where(allowed, change, 0)))
        if not allowed[best] or change[best] >= 0:
            break
        chosen[best] = True
        taken[classes[places == best]] += counts[places == best]
    return chosen[rank[numbers]]


def _first_fit(classes: Indices, counts: Indices, starts: Indices, quota: Indices) -> Mask:
    """Whether each group, in order, is among the first that fit into the quotas together."""
    room, parts = quota.tolist(), list(zip(classes.tolist(), counts.tolist(), strict=True))
    chosen = np.zeros(len(starts), dtype=bool)
    for place, (start, end) in enumerate(zip(starts.tolist(), [*starts.tolist()[1:], len(parts)], strict=True)):
        if all(room[label] >= count for label, count in parts[start:end]):
            chosen[place] = True
            for label, count in parts[start:end]:
                room[label] -= count
    return chosen
