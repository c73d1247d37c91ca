"""Intervals of error rates, and whether a lead is more than noise."""

import numpy as np
import pytest
from scipy.stats import binomtest

from search.runs.statistics import describe_lead, difference_interval, wilson_interval


def test_wilson_intervals_stay_between_0_and_1():
    assert wilson_interval(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson_interval(1.0, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    with pytest.raises(ValueError, match="expected 0 to 1 of 1 or more images"):
        wilson_interval(0.5, 0)


@pytest.mark.parametrize(("wrong", "images", "level"), [(0, 7, 0.95), (3, 20, 0.9), (37, 120, 0.99), (60, 60, 0.95)])
def test_wilson_intervals_are_scipys(wrong, images, level):
    expected = binomtest(wrong, images).proportion_ci(level, method="wilson")
    assert wilson_interval(wrong / images, images, level) == pytest.approx((expected.low, expected.high))


def test_the_interval_of_a_difference_is_newcombes():
    """His example (b), 1998: 9 of 10 beside 3 of 10."""
    low, high = difference_interval(0.3, 0.9, 10)
    assert (low, high) == pytest.approx((0.1705, 0.8090), abs=1e-4)
    assert difference_interval(0.9, 0.3, 10) == pytest.approx((-high, -low))


def lead(error_rate, first, num_images, num_trials):
    """Of the best of that many trials over trial 0."""
    others = num_trials - 1
    return describe_lead(error_rate, first, num_images, among=f"{others} trials", count=others, than="trial 0")


def test_a_lead_says_whether_it_is_more_than_noise():
    assert lead(0.05, 0.30, 120, 8).endswith("corrected for the choice among 7 trials): more than noise")
    assert lead(0.05, 0.08, 120, 8).endswith("this may be noise")
    assert lead(0.05, 0.30, 120, 2).startswith("25.0 points better than trial 0 (95 % interval 15.")
    assert "corrected" not in lead(0.05, 0.30, 120, 2)
    assert lead(0.08, 0.05, 120, 8).startswith("3.0 points worse than trial 0 (95 % interval -")


def test_more_than_noise_is_rarely_said_where_there_is_nothing_but_noise():
    """Twenty trials that are all alike: the luckiest one beats trial 0 in 5 % of the searches at most."""
    rng = np.random.default_rng(0)
    errors = rng.binomial(120, 0.2, size=(400, 20)) / 120
    said = [lead(row.min(), row[0], 120, 20).endswith("more than noise") for row in errors]
    assert np.mean(said) <= 0.05
