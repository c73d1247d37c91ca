"""The searcher on a real Optuna study: the same proposals after a restart, and the truth about every trial."""

import math
import pickle
import warnings

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from search.searcher import OptunaSearcher
from search.space import Choice, Range, Space

SPACE = Space(
    name="small",
    doc="for tests",
    dataset="quickstart",
    settings={"arch": "resnet18", "epochs": 3, "lr_max": 1e-3, "flip": True},
    dimensions={
        "arch": Choice(("resnet18", "resnet34")),
        "epochs": Range(1, 6),
        "lr_max": Range(1e-4, 1e-2, log=True),
        "mixup_alpha": Range(0.0, 0.4),
        "flip": Choice((True, False)),
    },
    first=({"epochs": 6},),
)
DEFAULT = {"arch": "resnet18", "epochs": 3, "lr_max": 1e-3, "mixup_alpha": 0.0, "flip": True}


@pytest.fixture
def journal(tmp_path):
    return tmp_path / "study.journal"


@pytest.fixture
def searcher(journal):
    return made(journal)


def made(journal, *, sampler: str = "tpe", seed: int = 0) -> OptunaSearcher:
    return OptunaSearcher(SPACE, journal, sampler=sampler, seed=seed)


def result(epoch: int, total: int, error_rate: float, **more) -> dict:
    """As `FineTuneTrial` reports it, its first epoch being the frozen one."""
    progress = 100 * (epoch - 1) // (total - 1)
    return {"epoch": epoch, "epochs_total": total, "progress": progress, "error_rate": error_rate, "failure": ""} | more


def on_record(journal) -> list[optuna.trial.FrozenTrial]:
    """The trials as somebody else reads them from the journal."""
    return optuna.load_study(study_name="small", storage=JournalStorage(JournalFileBackend(str(journal)))).trials


def run_trial(searcher, trial_id: str) -> dict:
    """A whole trial as Tune tells it: the last result comes with the end only."""
    config = searcher.suggest(trial_id)
    searcher.on_trial_result(trial_id, result(1, 3, 0.9))
    searcher.on_trial_result(trial_id, result(2, 3, 0.5))
    searcher.on_trial_complete(trial_id, result=result(3, 3, abs(math.log10(config["lr_max"]) + 3) / 2))
    return config


def test_trial_0_is_the_default_and_the_spaces_own_recipes_follow(searcher):
    assert searcher.suggest("a") == DEFAULT
    assert searcher.suggest("b") == DEFAULT | {"epochs": 6}
    assert searcher.suggest("c") not in (DEFAULT, DEFAULT | {"epochs": 6})


def test_proposals_lie_in_the_space_and_have_its_types(searcher):
    for i in range(12):
        config = run_trial(searcher, f"t{i}")
        assert set(config) == set(SPACE.dimensions)
        assert all(dimension.clip(config[name]) == config[name] for name, dimension in SPACE.dimensions.items())
        assert (type(config["epochs"]), type(config["lr_max"]), type(config["flip"])) == (int, float, bool)


def test_a_finished_trial_is_complete_with_its_error_and_its_curve(searcher, journal):
    searcher.suggest("a")
    searcher.on_trial_result("a", result(1, 5, 0.9))
    searcher.on_trial_result("a", result(2, 5, 0.5))
    searcher.on_trial_result("a", result(3, 5, 0.4))
    searcher.on_trial_complete("a", result=result(5, 5, 0.25))
    [trial] = on_record(journal)
    assert (trial.state, trial.value) == (TrialState.COMPLETE, 0.25)
    assert trial.intermediate_values == {25: 0.5, 50: 0.4, 100: 0.25}  # none in the frozen stage
    assert trial.user_attrs["trial_id"] == "a"


def test_a_stopped_trial_is_pruned_with_the_value_that_stopped_it(searcher, journal):
    """Tune keeps the last result for the end; without it Optuna would know nothing about the trial."""
    searcher.suggest("a")
    searcher.on_trial_result("a", result(1, 3, 0.9))
    searcher.on_trial_complete("a", result=result(2, 3, 0.7))
    [trial] = on_record(journal)
    assert trial.state == TrialState.PRUNED
    assert trial.intermediate_values == {50: 0.7}


def test_a_failed_trial_has_failed_and_says_why(searcher, journal):
    searcher.suggest("a")
    failed = {"failure": "diverged: training loss is nan", "error_rate": math.nan, "done": True}
    searcher.on_trial_complete("a", result=failed)
    searcher.suggest("b")
    searcher.on_trial_complete("b", error=True)
    first, second = on_record(journal)
    assert (first.state, first.user_attrs["failure"]) == (TrialState.FAIL, "diverged: training loss is nan")
    assert (second.state, second.user_attrs["failure"]) == (TrialState.FAIL, "error")
    assert first.value is None


@pytest.mark.parametrize("nothing", [None, {}, {"trial_id": "a", "hostname": "here", "done": False}])
def test_a_trial_that_ends_before_its_first_epoch_counts_for_nothing(searcher, journal, nothing):
    searcher.suggest("a")
    searcher.on_trial_complete("a", result=nothing)
    [trial] = on_record(journal)
    assert trial.state == TrialState.FAIL


def test_trials_that_it_does_not_know_are_let_pass(searcher, journal):
    searcher.suggest("a")
    searcher.on_trial_result("stranger", result(2, 3, 0.5))
    searcher.on_trial_complete("stranger", result=result(3, 3, 0.5))
    searcher.on_trial_complete("stranger", error=True)
    [trial] = on_record(journal)
    assert trial.state == TrialState.RUNNING


def test_an_ended_trial_is_not_told_twice(searcher, journal):
    run_trial(searcher, "a")
    before = on_record(journal)
    searcher.on_trial_result("a", result(2, 3, 0.1))
    searcher.on_trial_complete("a", result=result(3, 3, 0.1))
    assert on_record(journal)[0].value == before[0].value


def test_an_epoch_that_is_repeated_after_a_crash_does_no_harm(searcher, journal):
    searcher.suggest("a")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):
            searcher.on_trial_result("a", result(2, 3, 0.5))
    searcher.on_trial_complete("a", result=result(3, 3, 0.4))
    assert on_record(journal)[0].intermediate_values == {50: 0.5, 100: 0.4}


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_the_seed_decides_the_proposals(tmp_path, sampler):
    def proposals(name: str, seed: int) -> list[dict]:
        searcher = made(tmp_path / name, sampler=sampler, seed=seed)
        return [run_trial(searcher, f"t{i}") for i in range(10)]

    assert proposals("a", 1) == proposals("b", 1)
    assert proposals("c", 2)[2:] != proposals("d", 1)[2:]


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_a_restored_searcher_goes_on_where_the_other_was(tmp_path, sampler):
    straight = made(tmp_path / "straight", sampler=sampler)
    expected = [run_trial(straight, f"t{i}") for i in range(14)]

    first = made(tmp_path / "cut", sampler=sampler)
    configs = [run_trial(first, f"t{i}") for i in range(8)]
    configs.append(first.suggest("t8"))
    first.on_trial_result("t8", result(1, 3, 0.9))
    first.save(str(tmp_path / "saved"))
    del first

    second = made(tmp_path / "cut", sampler=sampler, seed=99)
    second.restore(str(tmp_path / "saved"))
    second.on_trial_result("t8", result(2, 3, 0.5))
    second.on_trial_complete("t8", result=result(3, 3, abs(math.log10(configs[8]["lr_max"]) + 3) / 2))
    configs += [run_trial(second, f"t{i}") for i in range(9, 14)]
    assert configs == expected
    assert {trial.state for trial in on_record(tmp_path / "cut")} == {TrialState.COMPLETE}


def test_it_survives_pickling_in_mid_search(searcher):
    searcher.suggest("a")
    copy = pickle.loads(pickle.dumps(searcher))
    copy.on_trial_complete("a", result=result(3, 3, 0.1))
    assert copy.suggest("b") == DEFAULT | {"epochs": 6}


def test_a_search_that_learns_proposes_what_worked(journal):
    """TPE on an easy problem: the error is the distance of the rate from 1e-3."""
    searcher = made(journal)
    rates = [math.log10(run_trial(searcher, f"t{i}")["lr_max"]) for i in range(40)]
    late = [abs(rate + 3) for rate in rates[25:]]
    assert sum(late) / len(late) < 0.3  # at random it would be 0.5


def test_a_trial_that_tune_forgot_in_a_kill_does_not_stay_running(tmp_path, journal):
    searcher = made(journal)
    searcher.suggest("a")
    searcher.save(str(tmp_path / "state"))
    searcher.suggest("b")
    later = made(journal)
    later.restore(str(tmp_path / "state"))
    assert [trial.state.name for trial in later.study.trials] == ["RUNNING", "FAIL"]
    assert later.study.trials[1].user_attrs["failure"] == "forgotten when the search was killed"
