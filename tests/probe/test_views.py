"""The views that a probe learns from."""

import numpy as np
import pytest

from trainables.probe.views import augmented_view, centre_view
from trainables.recipe import Recipe

TRAIN = np.arange(0, 100, 2)


def test_the_centre_view_has_all_images_unchanged():
    view = centre_view(5, Recipe())
    assert view.indices.tolist() == [0, 1, 2, 3, 4]
    assert np.array_equal(view.augmentations.maps, np.broadcast_to(np.eye(3), (5, 3, 3)))


def test_augmented_views_crop_and_flip_the_training_images_and_differ():
    first, second = (augmented_view(number, TRAIN, Recipe()) for number in (1, 2))
    assert first.indices is TRAIN
    flipped = first.augmentations.maps[:, 0, 0] < 0
    assert 0.3 < flipped.mean() < 0.7
    assert (first.augmentations.crop**2 >= 0.75 - 1e-9).all() and first.augmentations.crop.std() > 0
    assert np.array_equal(first.augmentations.lighting, np.broadcast_to(np.arange(256), (50, 256)))
    assert not np.array_equal(first.augmentations.maps, second.augmentations.maps)
    assert first.key != second.key


@pytest.mark.parametrize("change", [{"max_rotate": 30.0}, {"lr_max": 1e-4}, {"min_scale": 0.1}, {"mixup_alpha": 0.4}])
def test_recipes_that_augment_otherwise_share_a_view(change):
    ours, theirs = augmented_view(1, TRAIN, Recipe()), augmented_view(1, TRAIN, Recipe(**change))
    assert ours.key == theirs.key
    assert np.array_equal(ours.augmentations.maps, theirs.augmentations.maps)


def test_a_recipe_without_flips_and_other_training_images_have_views_of_their_own():
    view = augmented_view(1, TRAIN, Recipe(flip=False))
    assert (view.augmentations.maps[:, 0, 0] > 0).all()
    assert len({view.key, augmented_view(1, TRAIN, Recipe()).key, augmented_view(1, TRAIN + 1, Recipe()).key}) == 3
