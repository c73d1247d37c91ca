"""What still fits into a time budget, and what that makes of a pair's promise."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest

from search.spaces.space import Range, Space
from search.tuning import pace
from search.tuning.pace import Pace
from search.tuning.screen import Probe
from search.tuning.time_left import GAIN, TimeLeft

SPACE = Space(
    name="small",
    doc="for tests",
    dataset="quickstart",
    settings={"arch": "a", "image_size": 96, "epochs": 8, "freeze_epochs": 0, "head_init": "probe", "tta_views": 0},
    dimensions={"epochs": Range(4, 16)},
)
IMAGES = {"train_images": 80, "valid_images": 20}


@pytest.fixture(autouse=True)
def training_costs_three_passes(monkeypatch):
    monkeypatch.setattr(pace, "TRAINING_COST", 3.0)


def probed(seconds: float) -> dict:
    return {"stage": "probe", "feature_seconds": seconds, "train_seconds": seconds, "valid_seconds": 0.0, **IMAGES}


def time_left(seconds: float, num_classes: int = 1, refit: float | None = None) -> TimeLeft:
    """Where a forward pass of 100 images takes 1 s with `quick` and 10 s with `slow`."""
    known_pace = Pace()
    for known, forward in (("quick", 1.0), ("slow", 10.0)):
        known_pace.add(SPACE.full_settings | {"arch": known, "probe_views": 0}, probed(forward))
    return TimeLeft(
        None if math.isinf(seconds) else SimpleNamespace(seconds_left=seconds), known_pace, num_classes, refit
    )


def promised(arch: str, error: float, *, seconds_left: float = math.inf) -> float:
    probe = Probe(objective=0.0, expected_objective=error, valid_loss=1.0, forward_seconds=0.1)
    return time_left(seconds_left).promised_error({"arch": arch, "image_size": 96}, probe, SPACE)


@pytest.mark.parametrize(("seconds", "most"), [(100, 17), (30, 5), (20, 6)])
def test_a_trial_takes_half_of_the_time_or_all_of_it_where_half_is_for_too_few_epochs(seconds, most):
    """An epoch of the quick pair is expected to take 2.6 s."""
    settings = SPACE.full_settings | {"arch": "quick", "probe_views": 0}
    assert int(time_left(seconds).most_epochs(settings)) == most


def test_a_trial_that_is_to_be_trained_again_on_all_images_leaves_time_for_it():
    """For 100 images instead of 80, and with some slack: 1.39 times its seconds."""
    settings = SPACE.full_settings | {"arch": "quick", "probe_views": 0}
    assert time_left(100, refit=0.0).most_epochs(settings) == pytest.approx(0.9 * 100 / 2.39 / 2.6, rel=0.01)


def test_a_refit_that_fits_is_counted_in_and_one_that_does_not_costs_nothing():
    assert time_left(100, refit=30.0).seconds == 70 and time_left(100, refit=30.0).for_refit
    assert time_left(100, refit=101.0).seconds == 100 and not time_left(100, refit=101.0).for_refit


def test_time_is_left_for_a_refit_with_all_epochs_where_one_with_fewer_fits():
    left = replace(time_left(100, refit=150.0), least_refit=80.0)
    assert left.seconds == 0 and left.for_refit
    left = replace(time_left(100, refit=150.0), least_refit=110.0)
    assert left.seconds == 100 and not left.for_refit


def test_without_a_limit_the_better_probe_promises_more():
    assert promised("slow", 0.19) < promised("quick", 0.2)


@pytest.mark.parametrize(("num_classes", "gain"), [(1, GAIN), (4, 0.69 * GAIN), (8, 0.17 * GAIN), (10, 0)])
def test_fewer_images_a_class_promise_less(num_classes, gain):
    """Of 80 images for training."""
    assert time_left(10, num_classes).gain == pytest.approx(gain, abs=0.01)


@pytest.mark.parametrize("seconds", [30, 60])
def test_with_little_time_a_quick_pair_does(seconds):
    """In 30 s there are 10 epochs of the quick pair, and one of the slow one."""
    assert promised("quick", 0.2, seconds_left=seconds) < promised("slow", 0.18, seconds_left=seconds)
    assert promised("slow", 0.09, seconds_left=seconds) < promised("quick", 0.2, seconds_left=seconds)


def test_more_time_than_the_recipe_takes_promises_no_more():
    assert promised("quick", 0.2, seconds_left=1000) == promised("quick", 0.2)
    assert promised("quick", 0.2, seconds_left=0) == 0.2
    assert 0.2 * (1 - GAIN) < promised("quick", 0.2) < 0.2 * (1 - 0.9 * GAIN)
