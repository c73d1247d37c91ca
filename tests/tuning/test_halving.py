"""Rungs that are complete short recipes: who goes on, and with how many epochs."""

from dataclasses import replace

import pytest
from test_searcher import SPACE, on_record, result

from search.options.strategy import Strategy
from search.spaces.space import Choice, Range
from search.tuning.halving import HalvingSearcher, check_lengths, lengths, promotion


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [
        (Range(1, 3), [1, 3]),
        (Range(3, 15), [5, 15]),
        (Range(1, 27), [1, 3, 9, 27]),
        (Range(0, 9), [1, 3, 9]),
        (Range(3, 8), [8]),
        (Choice((4, 8, 16)), [4, 16]),
    ],
)
def test_each_length_is_a_third_of_the_next(epochs, expected):
    assert lengths(epochs) == expected


def done(*errors: float, epochs: int = 1) -> list:
    return [({"epochs": epochs, "lr": i}, error) for i, error in enumerate(errors)]


def test_the_best_third_goes_on_once():
    configs = [config for config, _ in done(0.5, 0.2, 0.4)]
    assert promotion(done(0.5, 0.2), [1, 3], configs) is None
    assert promotion(done(0.5, 0.2, 0.4), [1, 3], configs) == {"epochs": 3, "lr": 1}
    assert promotion(done(0.5, 0.2, 0.4), [1, 3], [*configs, {"epochs": 3, "lr": 1}]) is None


def test_the_longest_goes_first():
    some = done(0.5, 0.2, 0.4, epochs=1) + done(0.3, 0.1, 0.2, epochs=3)
    assert promotion(some, [1, 3, 9], [config for config, _ in some]) == {"epochs": 9, "lr": 1}


def test_a_config_that_was_good_short_is_trained_long_from_the_start(tmp_path):
    space = replace(SPACE, first=())
    searcher = HalvingSearcher(space, tmp_path / "journal", seed=0, strategy=Strategy(scheduler="halving"))
    configs = [searcher.suggest("t0")]
    assert configs[0]["epochs"] == 3  # trial 0 is the space's own recipe as it is
    searcher.on_trial_complete("t0", result=result(3, 3, 0.3))
    for i, error in enumerate((0.5, 0.2, 0.4), start=1):
        configs.append(searcher.suggest(f"t{i}"))
        searcher.on_trial_complete(f"t{i}", result=result(3, 3, error))
    assert [config["epochs"] for config in configs[1:]] == [2, 2, 2]
    assert searcher.suggest("t4") == configs[2] | {"epochs": 6}
    assert searcher.suggest("t5")["epochs"] == 2
    assert len(on_record(tmp_path / "journal")) == 6


@pytest.mark.parametrize("text", ["epochs=2", "epochs=4,6", "epochs=3..8"])
def test_where_trials_cannot_begin_short_the_search_does_not_begin(text):
    with pytest.raises(ValueError, match=r"--scheduler halving: epochs (is|are) .*at least 3 times the minimum"):
        check_lengths(SPACE.with_settings([text]))
    check_lengths(SPACE)


def test_a_promotion_that_a_kill_made_forget_is_made_again(tmp_path):
    made = {"seed": 0, "strategy": Strategy(scheduler="halving")}
    searcher = HalvingSearcher(replace(SPACE, first=()), tmp_path / "journal", **made)
    searcher.suggest("t0")
    searcher.on_trial_complete("t0", result=result(3, 3, 0.3))
    for i, error in enumerate((0.5, 0.2, 0.4), start=1):
        searcher.suggest(f"t{i}")
        searcher.on_trial_complete(f"t{i}", result=result(3, 3, error))
    searcher.save(str(tmp_path / "state"))
    promoted = searcher.suggest("t4")
    restored = HalvingSearcher(replace(SPACE, first=()), tmp_path / "journal", **made)
    restored.restore(str(tmp_path / "state"))
    assert restored.suggest("t4") == promoted
