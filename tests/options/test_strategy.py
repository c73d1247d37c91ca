"""How a search goes: parts of a strategy that do not fit each other are refused by name."""

import pytest

from search.options.arguments import parse_arguments
from search.options.strategy import Strategy


def strategy(*words: str) -> Strategy:
    return parse_arguments(["--space", "pets", *words]).strategy


def test_the_default_is_tpe_with_forecasts():
    assert strategy() == Strategy(searcher="tpe", scheduler="forecast", objective="error")


def test_with_two_objectives_nothing_is_stopped_unless_it_is_asked_for():
    assert strategy("--objective", "error,seconds").scheduler == "none"
    assert strategy("--objective", "error,seconds", "--scheduler", "forecast").scheduler == "forecast"


def test_named_recipes_all_run_to_their_end():
    assert strategy("--recipes", "book", "--confirm", "2") == Strategy(searcher="random", scheduler="none", confirm=2)


def test_folds_validate_the_best_three_unless_another_number_is_given():
    assert (strategy("--folds", "5").confirm, strategy("--folds", "5").num_retrainings) == (3, 12)
    assert strategy("--folds", "4", "--confirm", "1").num_retrainings == 3
    assert strategy("--confirm", "2").num_retrainings == 6


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("--objective", "error,seconds", "--scheduler", "rungs"), "--scheduler rungs ends trials by their error"),
        (("--objective", "error,seconds", "--searcher", "cmaes"), "--searcher cmaes supports one objective"),
        (("--target-seconds", "60", "--searcher", "random"), "--searcher random cannot prefer quick trials"),
        (("--target-seconds", "60", "--searcher", "cmaes"), "Use tpe or gp"),
        (("--target-seconds", "60", "--scheduler", "halving"), "Use forecast, rungs, median or none"),
        (("--folds", "2"), "'2' is not a whole number from 3 to 20"),
    ],
)
def test_what_does_not_go_together_is_refused(words, problem, capsys):
    with pytest.raises(SystemExit):
        strategy(*words)
    assert problem in capsys.readouterr().err
