"""What an epoch draws."""

from collections import Counter

import numpy as np
import pytest

from trainables.batches.epoch_plan import plan_epoch
from trainables.recipe import Recipe

INDICES = np.arange(100, 200)
LABELS = np.array([0] * 80 + [1] * 15 + [2] * 5)


def drawn(recipe: Recipe, epoch: int = 0, rows: slice = slice(None)) -> list[int]:
    steps = plan_epoch(recipe, INDICES, labels=LABELS, epoch=epoch, batch_size=20, rows=rows)
    return [int(i) for step in steps for i in step.indices[step.first]]


def test_a_uniform_epoch_has_every_image_once():
    assert sorted(drawn(Recipe())) == INDICES.tolist()


def test_a_balanced_epoch_has_as_many_images_of_each_class():
    counts = Counter(LABELS[np.array(drawn(Recipe(sampler="balanced"))) - 100].tolist())
    assert sorted(counts.values()) == [33, 33, 34]


def test_a_balanced_epoch_repeats_no_image_before_it_has_shown_all_of_the_class():
    counts = Counter(drawn(Recipe(sampler="balanced")))
    for label in range(3):
        own = [counts[int(i)] for i in INDICES[label == LABELS]]
        assert max(own) - min(own) <= 1


def test_balanced_epochs_differ_and_are_drawn_the_same_way_again():
    recipe = Recipe(sampler="balanced")
    assert drawn(recipe) == drawn(recipe) != drawn(recipe, epoch=1)


@pytest.mark.parametrize("sampler", ["uniform", "balanced"])
def test_two_workers_draw_the_batches_of_one(sampler):
    recipe = Recipe(sampler=sampler)
    halves = [drawn(recipe, rows=rows) for rows in (slice(0, 10), slice(10, 20))]
    whole = np.array(drawn(recipe)).reshape(-1, 20)
    assert whole[:, :10].ravel().tolist() == halves[0] and whole[:, 10:].ravel().tolist() == halves[1]
