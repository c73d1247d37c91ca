"""How a search goes: parts of a method that do not fit each other are refused by name."""

import pytest

from search.options.arguments import method_of, parse_arguments
from search.options.strategy import Method


def method(*words: str) -> Method:
    return method_of(parse_arguments(["--space", "pets", *words]))


def test_the_default_is_tpe_with_rungs():
    assert method() == Method(searcher="tpe", scheduler="rungs", objective="error")


def test_with_two_objectives_nothing_is_stopped():
    assert method("--objective", "error,seconds").scheduler == "none"


def test_named_recipes_all_run_to_their_end():
    assert method("--recipes", "book", "--confirm", "2") == Method(searcher="random", scheduler="none", confirm=2)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("--objective", "error,seconds", "--scheduler", "rungs"), "--scheduler rungs ends trials by their error"),
        (("--objective", "error,seconds", "--searcher", "cmaes"), "--searcher cmaes knows one objective"),
        (("--target-seconds", "60", "--searcher", "random"), "--searcher random cannot prefer quick trials"),
        (("--target-seconds", "60", "--searcher", "cmaes"), "Take tpe or gp"),
        (("--target-seconds", "60", "--scheduler", "annealed"), "Take rungs, median or none"),
    ],
)
def test_what_does_not_go_together_is_refused(words, problem):
    with pytest.raises(ValueError, match=problem):
        method(*words)
