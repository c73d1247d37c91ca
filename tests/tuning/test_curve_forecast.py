"""Forecasts of learning curves: calibrated on curves of a known law, and honest about how little they know."""

import json
import math

import numpy as np
import pytest

from search.tuning.curve_forecast import (
    FEATURES,
    KNOTS,
    PRIOR_FILE,
    Curve,
    Forecast,
    Level,
    Prior,
    Regression,
    default_prior,
    rows,
)


def vague() -> Prior:
    size = len(KNOTS) * len(FEATURES)
    return Prior(np.zeros(size), np.full(size, 0.5), np.full(len(KNOTS), 0.02))


def curve(rng, epochs: int = 8, *, effect: float = 0.0) -> Curve:
    """The error halves until the end, with noise; `effect` is that of its only dimension."""
    place, start = rng.uniform(), rng.uniform(0.2, 0.6)
    end = start / 2 * math.exp(effect * (place - 0.5) + 0.1 * rng.normal())
    found = Curve([place], 1e-3, num_images=10_000)
    for epoch in range(1, epochs):
        error = math.exp(math.log(start) + (math.log(end) - math.log(start)) * epoch / epochs)
        found.add(epoch, 100 * epoch // epochs, error, 3 * error)
    found.final = (end, 3 * end)
    return found


def after(whole: Curve, epochs: int) -> Curve:
    return Curve(whole.point, whole.rate, whole.epochs[:epochs], whole.probe, whole.num_images)


def test_students_t_has_the_quantiles_of_its_table():
    forecast = Forecast(0.0, 1.0)
    for quantile, share in ((0.741, 0.75), (2.132, 0.95), (3.747, 0.99)):
        assert forecast.chance_below(quantile) == pytest.approx(share, abs=2e-4)
        assert forecast.chance_below(-quantile) == pytest.approx(1 - share, abs=2e-4)


def test_a_search_learns_how_its_own_trials_end():
    rng = np.random.default_rng(0)
    finished = [curve(rng) for _ in range(30)]
    level = Level.of(finished[0])
    before, fitted = Regression(vague(), [], level), Regression(vague(), finished, level)
    errors: dict[Regression, list[float]] = {before: [], fitted: []}
    for _ in range(50):
        asked = curve(rng)
        for regression, missed in errors.items():
            known = Curve([], *(getattr(after(asked, 2), n) for n in ("rate", "epochs", "probe", "num_images")))
            forecast = regression.forecast(after(asked, 2) if regression is fitted else known)
            missed.append(abs(forecast.mean - asked.log(asked.final_metric)))
    assert np.mean(errors[fitted]) < 0.15 < 0.3 < np.mean(errors[before])


def test_what_is_said_with_half_a_chance_comes_true_half_of_the_time():
    rng = np.random.default_rng(1)
    finished = [curve(rng) for _ in range(30)]
    regression = Regression(vague(), finished, Level.of(finished[0]))
    said, came = [], []
    for _ in range(400):
        asked, limit = curve(rng), math.log(rng.uniform(0.1, 0.3))
        said.append(regression.forecast(after(asked, 3)).chance_below(limit))
        came.append(asked.log(asked.final_metric) < limit)
    for low, high in ((0, 0.1), (0.1, 0.5), (0.5, 0.9), (0.9, 1)):
        inside = [low <= chance <= high for chance in said]
        assert np.mean(np.array(came)[inside]) == pytest.approx(np.mean(np.array(said)[inside]), abs=0.15)


def test_a_setting_that_decides_is_learned_from_the_search():
    rng = np.random.default_rng(2)
    finished = [curve(rng, effect=1.5) for _ in range(60)]
    regression = Regression(vague(), finished, Level.of(finished[0]))
    good, bad = ([Curve([place], 1e-3, [(1, 12, 0.3, 0.9)], None, 10_000)] for place in (0.0, 1.0))
    assert regression.forecast(good[0]).mean + 0.3 < regression.forecast(bad[0]).mean


def test_forecasts_are_surer_the_later_they_are_and_the_more_images_there_are():
    deviations = {}
    for num_images in (100, 10_000):
        regression = Regression(default_prior(), [], Level(math.log(0.1), math.log(0.4)))
        for progress in (0, 50, 90):
            asked = Curve([], 1e-3, [(1, progress, 0.2, 0.7)], None, num_images)
            deviations[num_images, progress] = regression.forecast(asked).deviation
    for num_images in (100, 10_000):
        assert deviations[num_images, 0] > deviations[num_images, 50] > deviations[num_images, 90] > 0
    assert all(deviations[100, progress] > deviations[10_000, progress] for progress in (0, 50, 90))


def test_no_error_and_no_loss_are_finite():
    perfect = Curve([None, 0.5], 1e-3, [(0, 0, 0.0, 0.0), (1, 50, 0.0, 0.0)], 0.0, 100, (0.0, 0.0))
    assert np.isfinite(rows(perfect, Level.of(perfect))).all()
    forecast = Regression(default_prior(), [perfect, perfect], Level.of(perfect)).forecast(perfect)
    assert 0 <= forecast.chance_below(perfect.log(0.0)) <= 1 and forecast.error > 0


def test_the_prior_says_where_it_comes_from():
    saved = json.loads(PRIOR_FILE.read_text())
    assert "bench/curve_prior.py" in saved["origin"] and "trainings" in saved["origin"]
    assert default_prior().mean.shape == default_prior().deviation.shape == (len(KNOTS) * len(FEATURES),)
    assert (default_prior().deviation > 0).all() and (default_prior().noise > 0).all()
