"""What a search is asked for: options that contradict each other are refused by name."""

import pytest

from search.options.arguments import parse_arguments
from search.options.search_options import SearchOptions


def asked(*words: str) -> SearchOptions:
    return parse_arguments(["--space", "pets", *words])


@pytest.mark.parametrize(
    ("words", "count"),
    [
        ((), 1),
        (("--gpus-per-worker", "2"), 1),
        (("--trials-per-gpu", "4"), 4),
        (("--gpus-per-worker", "0.25"), 4),
        (("--gpus-per-worker", "0.3"), 3),
        (("--trials-per-gpu", "auto"), None),
        (("--trials-per-gpu", "2", "--workers-per-trial", "resnet101*=1"), 2),
    ],
)
def test_trials_share_a_gpu_by_their_number_or_by_their_share(words, count):
    options = asked(*words)
    assert options.max_trials_per_gpu == count
    assert SearchOptions.from_record(options.to_record()).max_trials_per_gpu == count


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("--trials-per-gpu", "2", "--workers-per-trial", "4"), "NCCL refuses to run two workers on one. Omit either"),
        (("--gpus-per-worker", "0.5", "--workers-per-trial", "resnet101*=4"),
         "--gpus-per-worker 0.5 cannot be combined with --workers-per-trial resnet101*=4"),
        (("--trials-per-gpu", "auto", "--workers-per-trial", "2"), "only trials of one worker can share a GPU"),
        (("--trials-per-gpu", "2", "--gpus-per-worker", "0.5"), "give one of them"),
        (("--trials-per-gpu", "auto", "--gpus-per-worker", "0"), "give one of them"),
        (("--trials-per-gpu", "99"), "--trials-per-gpu 99: at most 48 trials can share a GPU"),
        (("--gpus-per-worker", "0.001"), "--gpus-per-worker 0.001: at most 48"),
        (("--trials-per-gpu", "auto", "--objective", "error,seconds"), "Give a number of trials instead"),
        (("--trials-per-gpu", "auto", "--target-seconds", "60"), "Give a number of trials instead"),
        (("--trials-per-gpu", "0"), "'0' is not a whole number above 0"),
        (("--gpus-per-worker", "1.5"), "'1.5' is neither a whole number, 0 or more, nor a share of one GPU"),
    ],
)  # fmt: skip
def test_what_cannot_share_a_gpu_is_refused_with_what_to_do(words, problem, capsys):
    with pytest.raises(SystemExit):
        asked(*words)
    assert problem in capsys.readouterr().err.replace("\n", " ")
