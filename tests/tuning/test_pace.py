"""How many epochs fit into the time that is left."""

import math
from types import SimpleNamespace

import pytest

from search.tuning.pace import SLACK, TRAINING_COST, Pace

RECIPE = {"arch": "a", "image_size": 100, "tta_views": 0, "wise_ft": False, "freeze_epochs": 0, "probe_views": 0}
RECIPE |= {"frozen_layers": 0.0}
IMAGES = {"train_images": 80, "valid_images": 20}


def probed(seconds: float = 10.0, fitting: float = 0.0) -> Pace:
    pace = Pace()
    spent = {"feature_seconds": seconds, "train_seconds": seconds + fitting - 1, "valid_seconds": 1.0}
    pace.add(RECIPE, {"stage": "probe", **spent, **IMAGES})
    return pace


def test_a_probe_is_expected_to_take_its_features_and_what_a_fit_has_taken():
    screen = SimpleNamespace(expected_seconds=lambda place: 0.2, last=7)
    assert probed().probe_seconds(screen, 3) == pytest.approx(0.2 * 100)
    assert probed(fitting=5.0).probe_seconds(screen, 3) == pytest.approx(0.2 * 100 + 5)
    assert probed(fitting=5.0).probe_seconds(screen, 7) == pytest.approx(0.2 * 80 + 5)


def test_after_a_probe_of_some_images_its_refit_is_expected_to_begin_anew():
    pace = Pace()
    spent = {"feature_seconds": 5.0, "train_seconds": 7.0, "valid_seconds": 1.0}
    pace.add(RECIPE, {"stage": "probe", **spent, "train_images": 30, "valid_images": 20, "skipped_images": 50})
    assert pace.images == (80, 20) and pace.forward["a", 100] == pytest.approx(0.1)
    assert pace.fitting == pytest.approx(3.0 * 80 / 30 + 0.1 * 100)


def test_without_a_probe_any_number_of_epochs_fits():
    assert Pace().epochs_within(1.0, RECIPE) == math.inf


def test_after_a_probe_training_is_expected_to_take_so_many_forward_passes():
    epoch = 0.1 * (TRAINING_COST * 80 + 20)
    assert probed().epochs_within(epoch / SLACK, RECIPE) == pytest.approx(1)
    assert probed().epochs_within(0, RECIPE) == 0


def test_another_size_is_expected_to_take_what_its_pixels_do_and_another_architecture_is_unknown():
    pace = probed()
    assert pace.epochs_within(1e3, RECIPE | {"image_size": 200}) == pytest.approx(pace.epochs_within(1e3, RECIPE) / 4)
    assert pace.epochs_within(1e3, RECIPE | {"arch": "b"}) == math.inf


def test_measured_epochs_replace_the_guess():
    pace = probed()
    pace.add(RECIPE, {"stage": "unfrozen", "train_seconds": 80 * 0.1 * 6, **IMAGES})
    pace.add(RECIPE, {"stage": "unfrozen", "train_seconds": 80 * 0.1 * 5, **IMAGES})  # the slowest counts
    assert pace.epochs_within(50 / SLACK, RECIPE) == pytest.approx(1)


def test_frozen_layers_have_a_forward_pass_alone():
    half = RECIPE | {"frozen_layers": 0.5}
    more = (TRAINING_COST * 80 + 20) / ((TRAINING_COST + 1) / 2 * 80 + 20)
    assert probed().epochs_within(50, half) == pytest.approx(more * probed().epochs_within(50, RECIPE))
    pace = probed()
    pace.add(half, {"stage": "unfrozen", "train_seconds": 80 * 0.1 * 3, **IMAGES})
    assert pace.epochs_within(50 / SLACK, RECIPE) == pytest.approx(50 / (0.1 * (5 * 80 + 20)))
    assert pace.epochs_within(50 / SLACK, half) == pytest.approx(50 / (0.1 * (3 * 80 + 20)))


def test_test_time_augmentation_wise_ft_frozen_epochs_and_a_probes_views_need_their_share():
    more = RECIPE | {"tta_views": 4, "wise_ft": True, "freeze_epochs": 1, "probe_views": 2}
    left = probed().epochs_within(100 / SLACK, more)
    assert left == pytest.approx((100 - 0.1 * ((4 + 2) * 20 + 3 * 80)) / (0.1 * (TRAINING_COST * 80 + 20)))


def test_views_of_a_pair_whose_features_are_cached_need_no_time():
    pace, views = probed(), RECIPE | {"probe_views": 2}
    before = pace.epochs_within(50, views)
    pace.add(views, {"stage": "probe", "feature_seconds": 10.0, "train_seconds": 30.0, "valid_seconds": 0.0, **IMAGES})
    assert before < pace.epochs_within(50, views) == pace.epochs_within(50, RECIPE)
