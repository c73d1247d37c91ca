"""Who trains and who is tried out in the cross-validation of a linear probe: folds by class, and groups whole."""

from collections import Counter, defaultdict

import torch
from torch import Tensor

from trainables.data.splits import in_order

FEW_IMAGES = 1000
"""Up to so many images there are five folds, else three.

Five folds train on 4/5 of the images, which is nearer to all of them, and cost twice as much as three, which train on
2/3. With many images that difference does not move the choice.
"""


def folds_of(labels: Tensor, seed: int, groups: Tensor | None = None) -> Tensor:
    """The fold of each image; -1 for the only image or group of a class, which all folds' fits need.

    A class's images go round the folds, beginning where the last class ended, so that all folds are equally large.
    Images of one of the `groups` (images,) go to one fold, where there are fewest of their classes.
    """
    count = 5 if len(labels) <= FEW_IMAGES else 3
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    if groups is not None:
        return _folds_of_groups(labels, groups, order, count)
    order = order[labels[order].argsort(stable=True)]
    order = order[labels.bincount()[labels[order]] > 1]
    folds = torch.full_like(labels, -1)
    folds[order] = torch.arange(len(order)) % count
    return folds


def _folds_of_groups(labels: Tensor, groups: Tensor, order: Tensor, count: int) -> Tensor:
    """The same for whole groups, the large ones first, while they can be balanced by others."""
    of_group: dict[int, Counter[int]] = {}
    for group, label in zip(groups[order].tolist(), labels[order].tolist(), strict=True):
        of_group.setdefault(group, Counter())[label] += 1
    left = Counter(label for counts in of_group.values() for label in counts)  # groups of each class
    used: defaultdict[int, set[int]] = defaultdict(set)  # folds of each class
    held: list[Counter[int]] = [Counter() for _ in range(count)]  # images of each class in the folds
    folds: dict[int, int] = {}
    for group, counts in sorted(of_group.items(), key=lambda item: -item[1].total()):
        # A fold must not hold a whole class, which its fit would not know.
        whole = {fold for label in counts if left[label] == 1 and len(used[label]) == 1 for fold in used[label]}
        alone = any(left[label] == 1 and not used[label] for label in counts)
        allowed = [] if alone else [fold for fold in range(count) if fold not in whole]
        need = [(sum(held[fold][label] for label in counts), held[fold].total(), fold) for fold in allowed]
        folds[group] = chosen = min(need)[2] if need else -1
        for label in counts:
            left[label] -= 1
            used[label].add(chosen)
        if need:
            held[chosen] += counts
    return torch.tensor([folds[group] for group in groups.tolist()], dtype=labels.dtype)


def halves(labels: Tensor, fold: Tensor, groups: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The images of a `fold` (their indices) in two halves, by class, with groups whole."""
    fold = fold[labels[fold].argsort(stable=True)]
    if groups is None:
        return fold[::2], fold[1::2]
    numbers = groups[fold.cpu()]
    order = torch.from_numpy(in_order(numbers.numpy()))
    rank = torch.empty(int(order.max()) + 1, dtype=torch.long)
    rank[order] = torch.arange(len(order))
    odd = (rank[numbers] % 2 == 1).to(fold.device)
    return fold[~odd], fold[odd]
