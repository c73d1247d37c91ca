"""How trials will end, forecast at a rung from the trials that have ended."""

import numpy as np
import pytest
from scipy.stats import kendalltau

from search.spaces.space import Choice, Range, Space
from search.tuning.forecast import AtRung, forecast

SPACE = Space(
    name="small",
    doc="for tests",
    dataset="quickstart",
    settings={"arch": "resnet18", "epochs": 2},
    dimensions={
        "arch": Choice(("resnet18", "resnet34")),
        "lr_max": Range(1e-4, 1e-2, log=True),
        "hidden": Choice((256, 512)),
    },
)


def trials(num: int, seed: int) -> tuple[list[AtRung], list[float]]:
    """Trials whose metric at the rung is that of their end, and more the higher their rate is."""
    rng = np.random.default_rng(seed)
    found, finals = [], []
    for _ in range(num):
        rate, final = rng.random(), 0.3 * rng.random()
        point = [float(rng.integers(2)), rate, None if rng.random() < 0.5 else float(rng.integers(2))]
        found.append(AtRung(final + 0.4 * rate + 0.02 * rng.random(), int(rng.choice([60, 66, 75])), point))
        finals.append(final)
    return found, finals


def metrics(found: list[AtRung]) -> list[float]:
    return [one.metric for one in found]


def test_before_any_trial_has_ended_the_forecast_is_what_is_seen():
    asked, _ = trials(5, seed=0)
    assert forecast(SPACE, [], [], asked).tolist() == metrics(asked)


@pytest.mark.parametrize("num", [1, 2])
def test_the_first_that_have_ended_change_no_ranking(num):
    (known, finals), (asked, _) = trials(num, seed=0), trials(20, seed=1)
    asked = [AtRung(one.metric, 66, [0.0, 0.5, None]) for one in asked]
    found = forecast(SPACE, known, finals, asked)
    assert np.argsort(found).tolist() == np.argsort(metrics(asked)).tolist()


@pytest.mark.parametrize(("num", "at_least"), [(8, 0.6), (30, 0.75)])
def test_a_rate_that_hides_what_was_learned_is_seen_through(num, at_least):
    known, asked = trials(num, seed=1), trials(200, seed=2)
    plain = kendalltau(metrics(asked[0]), asked[1]).statistic
    tau = kendalltau(forecast(SPACE, *known, asked[0]), asked[1]).statistic
    assert plain < 0.5 and at_least < tau


def test_where_a_rung_says_all_of_the_end_the_forecast_does_too():
    known, asked = ([AtRung(m, 66, [0.0, 0.5, None]) for m in np.linspace(low, 0.9, 12)] for low in (0.1, 0.12))
    found = forecast(SPACE, known, metrics(known), asked)
    assert found == pytest.approx(metrics(asked), abs=0.1) and (np.diff(found) > 0).all()


@pytest.mark.parametrize("arch", [0.0, 0.1, 1 / 3])
@pytest.mark.parametrize("num", [3, 6, 7, 11])
def test_a_setting_that_had_one_value_so_far_says_nothing(num, arch):
    known, finals = trials(num, seed=3)
    known = [AtRung(one.metric, 66, [arch, one.point[1], None]) for one in known]
    asked = [AtRung(0.3, 66, [other, 0.5, hidden]) for other, hidden in ((arch, None), (0.95, 1.0))]
    found = forecast(SPACE, known, finals, asked)
    assert found[0] == pytest.approx(found[1]) and 0 < found[0] < 0.5


def test_trials_that_are_all_alike_say_little_of_others():
    """As a sampler's are that has settled: their chance differences are not taken for the slope."""
    rng = np.random.default_rng(0)
    known = [AtRung(0.3, 66, [0.0, 0.62 + 0.01 * rng.standard_normal(), None]) for _ in range(4)]
    finals = (0.1 + 0.03 * rng.standard_normal(4)).tolist()
    [found] = forecast(SPACE, known, finals, [AtRung(0.3, 66, [1.0, 0.1, 1.0])])
    assert found == pytest.approx(np.mean(finals), abs=0.02)


def test_the_probe_that_a_trial_started_from_says_where_it_ends():
    rng = np.random.default_rng(0)

    def drawn(num: int) -> tuple[list[AtRung], list[float]]:
        probes = rng.random(num)
        found = [AtRung(0.5 + 0.1 * rng.random(), 66, [0.0, 0.5, None], probe) for probe in probes]
        return found, (0.8 * probes).tolist()

    (known, finals), (asked, expected) = drawn(20), drawn(200)
    assert kendalltau(forecast(SPACE, known, finals, asked), expected).statistic > 0.9
    blind = [AtRung(one.metric, one.progress, one.point) for one in asked]
    assert kendalltau(forecast(SPACE, known, finals, blind), expected).statistic < 0.2
