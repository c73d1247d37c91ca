"""The split: the same as ever without groups, and whole groups where there are some."""

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from trainables.data.held_out_images import set_aside
from trainables.data.labelled_images import DataError, ImageFolder
from trainables.data.splits import other_fold, some_of_each_class, split, take_groups, train_and_valid

UNEQUAL = np.repeat(np.arange(4), [17, 9, 3, 2])


def patients(num_classes: int, each: int, photos: int) -> tuple[np.ndarray, list[str]]:
    """Labels and groups of `each` patients of a class, with so many photos each."""
    labels = np.repeat(np.arange(num_classes), each * photos)
    return labels, [f"patient {i // photos}" for i in range(len(labels))]


def sides(groups: list[str], valid: np.ndarray) -> dict[str, set[bool]]:
    held = set(valid.tolist())
    found: dict[str, set[bool]] = {}
    for index, group in enumerate(groups):
        found.setdefault(group, set()).add(index in held)
    return found


@pytest.mark.parametrize(
    ("labels", "seed", "fraction", "expected"),
    [
        (UNEQUAL, 0, 0.2, [3, 11, 13, 20, 21, 28]),
        (UNEQUAL, 1, 0.2, [2, 9, 16, 18, 19, 28]),
        (
            np.random.default_rng(5).integers(0, 6, 60),
            4,
            0.3,
            [3, 5, 7, 11, 12, 15, 18, 23, 25, 34, 39, 42, 44, 45, 46, 49, 51, 59],
        ),
    ],
)
def test_without_groups_the_split_is_that_of_earlier_versions(labels, seed, fraction, expected):
    assert split(labels, seed=seed, valid_fraction=fraction)[1].tolist() == expected
    alone = [str(i) for i in range(len(labels))]
    assert split(labels, seed=seed, valid_fraction=fraction, groups=alone)[1].tolist() == expected


def test_groups_of_one_image_are_taken_as_the_images_alone_are():
    for seed in range(20):
        valid = split(UNEQUAL, seed=seed)[1]
        quota, most = np.bincount(UNEQUAL[valid], minlength=4), np.bincount(UNEQUAL) - 1
        order = np.argsort(np.random.default_rng(seed).random(len(UNEQUAL)), kind="stable")
        taken = take_groups(UNEQUAL, np.arange(len(UNEQUAL)), order, quota, most)
        assert np.flatnonzero(taken).tolist() == valid.tolist()


@pytest.mark.parametrize("seed", range(10))
def test_a_group_is_on_one_side_and_a_fifth_of_every_class_validates(seed):
    labels, groups = patients(4, 20, 5)
    train, valid = split(labels, seed=seed, groups=groups)
    assert sorted([*train, *valid]) == list(range(400))
    assert all(len(side) == 1 for side in sides(groups, valid).values())
    assert np.bincount(labels[valid]).tolist() == [20] * 4


def test_the_split_of_groups_is_the_same_on_every_machine():
    labels, groups = patients(2, 5, 3)
    assert split(labels, seed=7, groups=groups)[1].tolist() == PINNED
    assert split(labels, seed=9, groups=groups)[1].tolist() != PINNED


PINNED = [6, 7, 8, 24, 25, 26]


def test_large_and_small_groups_come_near_to_a_fifth():
    rng = np.random.default_rng(0)
    for seed in range(20):
        sizes = rng.integers(1, 30, 60)
        groups = np.repeat([f"scene {i}" for i in range(60)], sizes).tolist()
        labels = np.repeat(np.arange(60) % 3, sizes)
        valid = split(labels, seed=seed, groups=groups)[1]
        assert all(len(side) == 1 for side in sides(groups, valid).values())
        share = np.bincount(labels[valid], minlength=3) / np.bincount(labels)
        assert (abs(share - 0.2) < 0.05).all()


def test_groups_of_several_classes_are_whole_and_every_class_is_on_both_sides():
    rng = np.random.default_rng(1)
    for seed in range(20):
        groups = [f"camera {i}" for i in rng.integers(0, 40, 600)]
        labels = rng.integers(0, 5, 600)
        train, valid = split(labels, seed=seed, groups=groups)
        assert all(len(side) == 1 for side in sides(groups, valid).values())
        assert set(labels[train]) == set(labels[valid]) == set(range(5))
        assert 0.17 < len(valid) / 600 < 0.23


def test_a_few_copies_move_only_a_few_images():
    labels = np.repeat(np.arange(5), 40)
    groups = [str(i) for i in range(200)]
    groups[3] = groups[17] = groups[30]
    before, after = (set(split(labels, seed=2, groups=each)[1].tolist()) for each in (None, groups))
    assert len(before ^ after) <= 6


def test_two_groups_of_a_class_are_one_for_each_side():
    labels = np.repeat([0, 1], 10)
    groups = ["a"] * 5 + ["b"] * 5 + ["c"] * 7 + ["d"] * 3
    train, valid = split(labels, groups=groups)
    assert np.bincount(labels[valid]).tolist() == [5, 3]
    assert np.bincount(labels[train]).tolist() == [5, 7]


def test_the_only_group_of_a_class_trains():
    labels = np.repeat([0, 1], 20)
    train, valid = split(labels, groups=["one"] * 20 + [str(i // 2) for i in range(20)])
    assert np.bincount(labels[train]).tolist() == [20, 16]
    assert np.bincount(labels[valid]).tolist() == [0, 4]


def test_a_split_that_the_data_have_stays_whatever_the_groups_are():
    given = [False, True, False, True]
    train, valid = train_and_valid([0, 0, 1, 1], given, ["a", "a", "b", "b"])
    assert (train.tolist(), valid.tolist()) == ([0, 2], [1, 3])


# --- Test images ------------------------------------------------------------------------------------------------------


def folder_of(labels: np.ndarray, groups: list[str] | None, valid: list[bool] | None = None) -> ImageFolder:
    paths = tuple(f"{label}/{i:04}.jpg" for i, label in enumerate(labels))
    classes = tuple(map(str, range(int(labels.max()) + 1)))
    found = ImageFolder(Path("/images"), "class folders", paths, tuple(labels.tolist()), classes)
    return replace(found, groups=groups and tuple(groups), valid=valid and tuple(valid))


@pytest.mark.parametrize("seed", range(5))
def test_a_group_is_among_the_test_images_or_among_the_others(seed):
    labels, groups = patients(3, 10, 4)
    kept, test = set_aside(folder_of(labels, groups), 0.2, seed)
    assert not set(kept.groups) & set(test.groups)
    assert Counter(test.labels) == {0: 8, 1: 8, 2: 8}
    assert sorted(kept.paths + test.paths) == sorted(folder_of(labels, groups).paths)
    train, valid = train_and_valid(kept.labels, None, kept.groups, seed=seed)
    assert not {kept.groups[i] for i in train} & {kept.groups[i] for i in valid}


def test_which_groups_are_held_out_is_told_by_the_seed_and_not_by_the_order():
    labels, groups = patients(2, 8, 3)
    images = folder_of(labels, groups)
    shuffled = images.only(random.Random(1).sample(range(48), 48))
    expected = set(set_aside(images, 0.25, 0)[1].paths)
    assert set(set_aside(shuffled, 0.25, 0)[1].paths) == expected
    assert set(set_aside(images, 0.25, 1)[1].paths) != expected


def test_test_images_leave_a_group_to_train_and_one_to_validate_on():
    labels, groups = patients(2, 3, 10)
    kept, test = set_aside(folder_of(labels, groups), 0.2, 0)
    assert Counter(test.labels) == {0: 10, 1: 10}
    assert len(set(kept.groups)) == 4
    labels, groups = patients(2, 2, 10)
    with pytest.raises(DataError, match=r"--test-split 0.2 leaves too few images in 2 classes .*, in another group,"):
        set_aside(folder_of(labels, groups), 0.2, 0)


def test_both_parts_of_a_split_that_the_data_have_give_test_groups():
    labels, groups = patients(2, 20, 2)
    valid = [int(group.split()[1]) % 2 == 0 for group in groups]
    kept, test = set_aside(folder_of(labels, groups, valid), 0.25, 3)
    assert not set(kept.groups) & set(test.groups)
    assert set(test.valid) == {True, False}
    assert Counter(test.labels) == {0: 10, 1: 10}


# --- Folds ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folds", [3, 5, 10])
def test_every_image_validates_in_one_fold_and_each_fold_has_its_share_of_each_class(folds):
    labels = np.repeat(np.arange(3), [100, 50, 25])
    first = split(labels, seed=2)
    found = [first, *(other_fold(first, labels, number, folds, seed=2) for number in range(1, folds))]
    assert sorted(np.concatenate([valid for _, valid in found])) == list(range(len(labels)))
    for train, valid in found:
        assert sorted([*train, *valid]) == list(range(len(labels)))
    for _, valid in found[1:]:
        assert np.abs(np.bincount(labels[valid]) - np.array([80, 40, 20]) / (folds - 1)).max() <= 1


def test_a_class_always_has_images_to_train_on():
    labels = np.repeat(np.arange(4), [30, 20, 2, 1])
    first = split(labels, seed=0)
    for number in range(1, 5):
        assert set(labels[other_fold(first, labels, number, 5)[0]]) == {0, 1, 2, 3}


def test_groups_stay_in_one_fold():
    labels, groups = patients(3, 10, 4)
    first = split(labels, groups=groups)
    folds = [first[1], *(other_fold(first, labels, number, 5, groups=groups)[1] for number in range(1, 5))]
    assert sorted(np.concatenate(folds)) == list(range(len(labels)))
    of_image = {int(i): fold for fold, valid in enumerate(folds) for i in valid}
    assert all(len({of_image[i] for i in range(start, start + 4)}) == 1 for start in range(0, len(labels), 4))


def test_there_is_no_fold_beyond_the_last():
    with pytest.raises(ValueError, match="fold 5 of 5: expected 1 to 4"):
        other_fold(split(UNEQUAL), UNEQUAL, 5, 5)


def test_classes_take_turns_when_some_images_are_taken():
    labels = np.array([0] * 50 + [1] * 5 + [2] * 2)
    taken = some_of_each_class(labels, 9)
    assert taken.tolist() == sorted(set(taken.tolist())) and np.bincount(labels[taken]).tolist() == [4, 3, 2]
    assert some_of_each_class(labels, 99).tolist() == list(range(57))
    assert some_of_each_class(labels, 9, seed=1).tolist() != taken.tolist()
