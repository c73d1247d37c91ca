"""The searcher on a real Optuna study: the same proposals after a restart, and the truth about every trial."""

import math
import os
import pickle
import time
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from ray.tune.search import Searcher

from search.cluster.concurrency import Capacity
from search.cluster.resources import Node
from search.options.strategy import SEARCHERS, Strategy
from search.runs import time_budget
from search.runs.kinds import PROBE, TRIAL
from search.runs.paths import RunFolder
from search.runs.time_budget import TimeBudget
from search.spaces.space import Choice, Range, Space
from search.tuning import pace
from search.tuning.screen import new_screen
from search.tuning.searcher import OptunaSearcher
from search.tuning.study_configs import config_of, params_of
from search.tuning.study_end import end_study
from search.tuning.tuner import Resumable
from trainables.ray.trial import DEADLINE, text_id
from trainables.ray.worker_group import GroupSize

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


def made(
    journal, *, seed=0, space=SPACE, num_trials=None, screen=None, budget=None, winner=None, **method
) -> OptunaSearcher:
    more = {"num_trials": num_trials, "screen": screen, "budget": budget, "winner": winner}
    return OptunaSearcher(space, journal, strategy=Strategy(**method), seed=seed, **more)


def test_a_proposal_is_on_the_disk_when_it_is_made_and_waits_for_it_once(searcher, journal, monkeypatch):
    for number in range(8):
        searcher.suggest(f"t{number}")
        searcher.on_trial_complete(f"t{number}", result(3, 3, 0.1 * number))
    waited, sync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: [sync(file), waited.append(os.fstat(file).st_size)])
    assert len(searcher.suggest("next")) == len(SPACE.dimensions)
    assert waited == [journal.stat().st_size]
    searcher.on_trial_complete("next", result(3, 3, 0.1))
    assert waited[-1] == journal.stat().st_size


def result(epoch: int, total: int, error_rate: float, **more) -> dict:
    """As `FineTuneTrial` reports it, its first epoch being the frozen one."""
    progress = 100 * (epoch - 1) // (total - 1)
    cost = {"seconds": 10.0 * epoch, "valid_loss": 2 * error_rate, "failure": ""}
    errors = {"error_rate": error_rate, "objective": error_rate}
    return {"epoch": epoch, "epochs_total": total, "progress": progress} | errors | cost | more


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


def test_a_trial_that_stops_before_its_unfrozen_stage_is_pruned_with_what_it_had(searcher, journal):
    searcher.suggest("a")
    searcher.on_trial_result("a", result(1, 3, 0.9) | {"progress": 0})
    searcher.on_trial_complete("a", result=result(2, 3, 0.8) | {"progress": 0})
    [trial] = on_record(journal)
    assert (trial.state, trial.intermediate_values) == (TrialState.PRUNED, {0: 0.8})


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


@pytest.mark.slow
@pytest.mark.parametrize("searcher", SEARCHERS)
def test_the_seed_decides_the_proposals(tmp_path, searcher):
    def proposals(name: str, seed: int) -> list[dict]:
        some = made(tmp_path / name, searcher=searcher, seed=seed)
        return [run_trial(some, f"t{i}") for i in range(8)]

    assert proposals("a", 1) == proposals("b", 1)
    assert proposals("c", 2)[2:] != proposals("d", 1)[2:]


@pytest.mark.parametrize("searcher", SEARCHERS)
def test_a_restored_searcher_goes_on_where_the_other_was(tmp_path, searcher):
    straight = made(tmp_path / "straight", searcher=searcher)
    expected = [run_trial(straight, f"t{i}") for i in range(11)]

    first = made(tmp_path / "cut", searcher=searcher)
    configs = [run_trial(first, f"t{i}") for i in range(8)]
    configs.append(first.suggest("t8"))
    first.on_trial_result("t8", result(1, 3, 0.9))
    first.save(str(tmp_path / "saved"))
    del first

    second = made(tmp_path / "cut", searcher=searcher, seed=99)
    second.restore(str(tmp_path / "saved"))
    second.on_trial_result("t8", result(2, 3, 0.5))
    second.on_trial_complete("t8", result=result(3, 3, abs(math.log10(configs[8]["lr_max"]) + 3) / 2))
    configs += [run_trial(second, f"t{i}") for i in range(9, 11)]
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


def test_what_a_kill_left_in_the_queue_is_nobodys_turn(tmp_path, journal):
    searcher = made(journal)
    searcher.suggest("a")
    searcher.save(str(tmp_path / "state"))
    searcher.study.enqueue_trial({"lr_max": 2e-3})
    later = made(journal)
    later.restore(str(tmp_path / "state"))
    assert [trial.state.name for trial in later.study.trials] == ["RUNNING", "FAIL"]
    later.suggest("b")
    assert later.study.trials[-1].params["lr_max"] != 2e-3


def test_a_kill_before_tune_saved_anything_leaves_no_trial_running(journal):
    made(journal).suggest("a")
    later = made(journal)
    later.suggest("a")
    assert [trial.state.name for trial in later.study.trials] == ["FAIL", "RUNNING"]


def test_trials_of_which_tune_told_nobody_have_ended_with_their_search(searcher, journal):
    for name in "ab":
        searcher.suggest(name)
    searcher.on_trial_result("a", result(2, 4, 0.5))
    end_study(journal, searcher.space.name)
    trials = made(journal).study.trials
    assert [trial.state.name for trial in trials] == ["PRUNED", "FAIL"]
    assert trials[1].user_attrs["failure"] == "the search ended"


# --- Dimensions that have no effect at some values of others ----------------------------------------------------------

CONDITIONAL = Space(
    name="small",
    doc="for tests",
    dataset="quickstart",
    settings={"arch": "resnet18", "mixup_alpha": 0.2},
    dimensions={
        "hidden": Range(64, 1024, log=True),
        "head": Choice(("linear", "mlp")),
        "mixup_alpha": Range(0.1, 0.4, off=True),
        "start_size": Choice((0, 64)),
        "start_share": Range(0.1, 0.6),
    },
    first=({"head": "mlp", "hidden": 100, "mixup_alpha": 0.0},),
)


def test_settings_without_effect_are_neither_proposed_nor_learned_from(journal):
    searcher = made(journal, space=CONDITIONAL)
    configs = [searcher.suggest(f"t{i}") for i in range(30)][2:]
    for config in configs:
        assert ("hidden" in config) == (config["head"] == "mlp")
        assert ("start_share" in config) == (config["start_size"] > 0)
        assert config["mixup_alpha"] == 0 or 0.1 <= config["mixup_alpha"] <= 0.4
    for name, value in (("head", "mlp"), ("head", "linear"), ("start_size", 64), ("mixup_alpha", 0.0)):
        assert any(config[name] == value for config in configs)
    linear = next(trial for trial in on_record(journal) if trial.params["head"] == "linear")
    assert "hidden" not in linear.params


def test_recipes_tried_first_are_proposed_as_they_are_where_dimensions_depend_on_each_other(journal):
    searcher = made(journal, space=CONDITIONAL)
    first, second = (searcher.suggest(name) for name in "ab")
    assert first == CONDITIONAL.first_configs()[0] and first["mixup_alpha"] == 0.2
    assert second == CONDITIONAL.first_configs()[1] and (second["hidden"], second["mixup_alpha"]) == (100, 0.0)
    known = on_record(journal)[1].params
    assert known == {"head": "mlp", "hidden": 100, "mixup_alpha > 0": False, "start_size": 0}


def test_a_config_is_found_again_in_its_study(journal):
    searcher = made(journal, space=CONDITIONAL)
    for i in range(20):
        config = searcher.suggest(f"t{i}")
        again = config_of(CONDITIONAL, on_record(journal)[i].params)
        assert again == config or i < 2
        assert params_of(CONDITIONAL, again) == on_record(journal)[i].params


# --- Two objectives, and trials that are to be quick ------------------------------------------------------------------


def test_with_two_objectives_the_study_has_errors_and_seconds(journal):
    searcher = made(journal, objective="error,seconds", scheduler="none")
    run_trial(searcher, "a")
    searcher.suggest("b")
    searcher.on_trial_complete("b", result=result(2, 3, 0.7))
    searcher.suggest("c")
    searcher.on_trial_complete("c", result={"failure": "diverged"})
    done, stopped, failed = on_record(journal)
    assert done.values == [pytest.approx(0.0), 30.0]
    assert (stopped.state, failed.state) == (TrialState.PRUNED, TrialState.FAIL)


def test_with_two_objectives_cheap_trials_are_found_too(journal):
    """The error falls with the epochs and the seconds rise with them: short trainings are as good as long ones."""
    searcher = made(journal, objective="error,seconds", scheduler="none")
    lengths = []
    for i in range(25):
        epochs = searcher.suggest(f"t{i}")["epochs"]
        lengths.append(epochs)
        searcher.on_trial_complete(f"t{i}", result=result(3, 3, 1 / epochs, seconds=10.0 * epochs))
    assert min(lengths[10:]) <= 2 and max(lengths[10:]) >= 5


THREE = replace(SPACE, dimensions=SPACE.dimensions | {"arch": Choice(("resnet18", "resnet34", "resnet50"))}, first=())


def archs_of(searcher, seconds: dict[str, float], count: int) -> list[str]:
    found = []
    for i in range(count):
        found.append(searcher.suggest(f"t{i}")["arch"])
        searcher.on_trial_complete(f"t{i}", result=result(3, 3, 0.5, seconds=seconds[found[-1]]))
    return found


def test_with_a_target_each_architecture_is_tried_up_to_the_first_slow_one(tmp_path):
    quick, slow = (
        dict.fromkeys(THREE.dimensions["arch"].values, 20.0),
        {"resnet18": 20, "resnet34": 90, "resnet50": 300},
    )
    all_of_them = archs_of(made(tmp_path / "quick", space=THREE, target_seconds=60), quick, 3)
    assert all_of_them == ["resnet18", "resnet34", "resnet50"]
    searcher = made(tmp_path / "slow", space=THREE, target_seconds=60)
    archs_of(searcher, slow, 2)
    assert len(searcher.first_configs) == 3
    searcher.suggest("next")
    assert len(searcher.first_configs) == 2


def test_a_slow_trial_0_leaves_the_cheaper_architectures(tmp_path):
    space = replace(THREE, settings=THREE.settings | {"arch": "resnet34"})
    searcher = made(tmp_path / "journal", space=space, target_seconds=60)
    found = archs_of(searcher, {"resnet18": 20.0, "resnet34": 90.0, "resnet50": 300.0}, 2)
    assert found == ["resnet34", "resnet18"]
    searcher.suggest("next")
    assert len(searcher.first_configs) == 2


@pytest.mark.parametrize("searcher", ["tpe", "gp"])
def test_slow_trials_are_proposed_less_where_a_target_is_given(tmp_path, searcher):
    seconds = {"resnet18": 20, "resnet34": 90, "resnet50": 300}
    late = archs_of(made(tmp_path / "journal", space=THREE, target_seconds=60, searcher=searcher), seconds, 18)[10:]
    assert late.count("resnet18") > 5


def test_the_seconds_of_a_trial_that_was_stopped_are_those_of_its_whole_training(searcher, journal):
    searcher.suggest("a")
    searcher.on_trial_complete("a", result=result(2, 4, 0.7, seconds=20.0))
    assert on_record(journal)[0].user_attrs["seconds"] == 40


# --- The best once more -----------------------------------------------------------------------------------------------


def confirming(journal) -> OptunaSearcher:
    """A search of four trials, of which the second and the fourth were the best."""
    searcher = made(journal, num_trials=4, confirm=2)
    for i, error in enumerate((0.4, 0.1, 0.3, 0.2)):
        searcher.suggest(f"t{i}")
        if i < 3:
            searcher.on_trial_complete(f"t{i}", result=result(3, 3, error))
    return searcher


def test_the_best_are_trained_again_with_new_seeds_when_all_have_ended(journal):
    searcher = confirming(journal)
    assert searcher.suggest("early") is None  # the fourth trial goes on
    searcher.on_trial_complete("t3", result=result(3, 3, 0.2))
    again = [searcher.suggest(f"again{i}") for i in range(6)]
    assert [config["retrains"] for config in again] == ["tt1"] * 3 + ["tt3"] * 3
    assert [config["seed"] for config in again] == [1, 2, 3] * 2
    assert searcher.suggest("no more") == Searcher.FINISHED
    originals = [trial.params for trial in on_record(journal)]
    assert len(originals) == 4  # Optuna learns nothing of them
    assert all({**originals[1], "seed": seed, "retrains": "tt1"} in again for seed in (1, 2, 3))
    searcher.on_trial_result("again0", result(2, 3, 0.5))
    searcher.on_trial_complete("again0", result=result(3, 3, 0.5))
    assert [trial.state for trial in on_record(journal)] == [TrialState.COMPLETE] * 4


def test_with_folds_the_best_are_trained_again_with_their_own_seed_in_each_of_the_others(journal):
    searcher = made(journal, num_trials=1, confirm=1, folds=4)
    config = searcher.suggest("a")
    searcher.on_trial_complete("a", result(3, 3, 0.2))
    again = [searcher.suggest(f"again{number}") for number in range(3)]
    assert again == [config | {"retrains": "ta", "fold": fold} for fold in (1, 2, 3)]
    for number in range(3):
        searcher.on_trial_complete(f"again{number}", result(3, 3, 0.3))
    assert searcher.suggest("no more") == Searcher.FINISHED


def test_a_restored_searcher_goes_on_with_the_retrainings(tmp_path, journal):
    searcher = confirming(journal)
    searcher.on_trial_complete("t3", result=result(3, 3, 0.2))
    expected = [searcher.suggest(f"again{i}") for i in range(2)]
    searcher.save(str(tmp_path / "saved"))
    later = made(journal, num_trials=4, confirm=2)
    later.restore(str(tmp_path / "saved"))
    assert set(later.live) == {"again0", "again1"}
    expected += [searcher.suggest(f"again{i}") for i in range(2, 6)]
    assert expected[2:] == [later.suggest(f"again{i}") for i in range(2, 6)]


# --- Extended ---------------------------------------------------------------------------------------------------------


FOLDER = RunFolder(Path("results/extended"))


def generator_of(journal, num_trials: int, *, time_budget: float | None = None, confirm: int = 0) -> Resumable:
    """As `new_tuner` and Tune make it for a search."""
    searcher = made(journal, num_trials=num_trials, confirm=confirm)
    generator = Resumable(searcher, TimeBudget(FOLDER, time_budget))
    generator._total_samples = num_trials + searcher.strategy.num_retrainings
    return generator


def resumed(tmp_path, generator: Resumable) -> Resumable:
    """`generator` as it is after a restart."""
    generator.restore_from_dir(str(tmp_path))
    return generator


def trained(generator: Resumable, trial_id: str, error: float | None = None) -> dict | str:
    """The config of a whole trial; Tune's own part of its proposal is to count it."""
    generator._counter += 1
    if error is None:
        return run_trial(generator.searcher, trial_id)
    config = generator.searcher.suggest(trial_id)
    generator.searcher.on_trial_complete(trial_id, result=result(3, 3, error))
    return config


def test_a_search_that_has_had_all_its_trials_is_extended_as_if_it_had_begun_with_more(tmp_path):
    whole, ended = generator_of(tmp_path / "whole.journal", 9), generator_of(tmp_path / "journal", 7)
    expected = [trained(whole, f"t{i}") for i in range(9)]
    assert [trained(ended, f"t{i}") for i in range(7)] == expected[:7]
    assert ended.is_finished() and ended.searcher.suggest("no more") == Searcher.FINISHED
    ended.save_to_dir(str(tmp_path), "first")
    assert resumed(tmp_path, generator_of(tmp_path / "journal", 7)).is_finished()
    extended = resumed(tmp_path, generator_of(tmp_path / "journal", 9))
    assert not extended.is_finished()
    assert [trained(extended, f"t{i}") for i in (7, 8)] == expected[7:]
    assert extended.is_finished() and len(on_record(tmp_path / "journal")) == 9


def test_an_extended_search_trains_again_only_those_of_the_best_that_were_not(tmp_path, journal):
    generator = generator_of(journal, 2, confirm=2)
    for i, error in enumerate((0.1, 0.2, *[0.3] * 6)):
        trained(generator, f"t{i}", error)
    assert generator.searcher.suggest("no more") == Searcher.FINISHED
    generator.save_to_dir(str(tmp_path), "first")
    later = resumed(tmp_path, generator_of(journal, 3, confirm=2))
    assert trained(later, "t8", 0.15).keys() >= {"arch", "epochs"}  # between the two that were the best
    assert not later.is_finished()
    again = [trained(later, f"again{i}", 0.3) for i in range(3)]
    assert [(config["retrains"], config["seed"]) for config in again] == [("tt8", 1), ("tt8", 2), ("tt8", 3)]
    assert later.searcher.suggest("no more") == Searcher.FINISHED


def test_a_retraining_that_the_time_budget_cut_off_is_done_once_more_with_a_longer_one(tmp_path, journal):
    generator = generator_of(journal, 1, time_budget=60, confirm=1)
    expected = [trained(generator, f"t{i}", 0.1) for i in range(2)][1:]
    expected.append(generator.searcher.suggest("cut off"))
    generator._counter += 1
    generator.set_finished()
    generator.save_to_dir(str(tmp_path), "first")
    later = resumed(tmp_path, generator_of(journal, 1, time_budget=600, confirm=1))
    assert not later.searcher.live
    assert trained(later, "again", 0.1) == expected[1]
    assert not later.is_finished()
    assert trained(later, "last", 0.1)["seed"] == 3
    assert later.searcher.suggest("no more") == Searcher.FINISHED


def test_a_search_whose_time_is_over_proposes_nothing_when_it_is_started_again(tmp_path, journal):
    generator = generator_of(journal, 9, time_budget=60)
    trained(generator, "t0")
    generator.save_to_dir(str(tmp_path), "first")
    later = generator_of(journal, 9, time_budget=60)
    later.budget.spent = 60.0
    assert resumed(tmp_path, later).is_finished() and later.next_trial() is None
    assert len(on_record(journal)) == 1
    assert not resumed(tmp_path, generator_of(journal, 9, time_budget=600)).is_finished()


# --- The screen, and time --------------------------------------------------------------------------------------------

PROBED = replace(
    SPACE,
    settings=SPACE.settings | {"head_init": "probe", "freeze_epochs": 0, "image_size": 96},
    dimensions=SPACE.dimensions | {"arch": Choice(("resnet18", "resnet34", "resnet50", "resnet101"))},
)
ERRORS = {"resnet18": 0.5, "resnet34": 0.1, "resnet50": 0.3, "resnet101": 0.2}


def probe(searcher, trial_id: str, config: dict, seconds: float = 10.0, error: float | None = None) -> None:
    """A probe as Tune tells it: its only result comes with its end."""
    error = ERRORS[config["arch"]] if error is None else error
    metrics = {"stage": "probe", "feature_seconds": seconds, "train_images": 80, "valid_images": 20}
    metrics |= {"train_seconds": seconds, "valid_seconds": 0.0}
    searcher.on_trial_complete(trial_id, result(0, 2, error, **metrics) | {"epochs_total": 0})


def screened(searcher) -> list[str]:
    """Run the whole screen; the architectures in their order."""
    order = []
    while searcher.screen.next_place is not None:
        config = searcher.suggest(f"probe{len(order)}")
        probe(searcher, f"probe{len(order)}", config)
        order.append(config["arch"])
    return order


def test_the_screen_comes_first_and_trial_0_is_the_recipe_at_the_best_probe(journal):
    searcher = made(journal, space=PROBED, screen=new_screen(PROBED, 2, None), num_trials=2)
    assert searcher.max_remaining() == 6
    assert screened(searcher) == ["resnet18", "resnet34", "resnet50", "resnet101"]
    assert searcher.suggest("t0") == DEFAULT | {"arch": "resnet34"}
    searcher.on_trial_complete("t0", result(3, 3, 0.1))
    assert searcher.suggest("t1") == DEFAULT | {"arch": "resnet34", "epochs": 6}
    searcher.on_trial_complete("t1", result(3, 3, 0.1))
    assert searcher.suggest("t2") == Searcher.FINISHED
    assert len(on_record(journal)) == 2


def test_only_the_best_architectures_are_proposed_after_the_screen(journal):
    searcher = made(journal, space=PROBED, screen=new_screen(PROBED, 2, None))
    screened(searcher)
    assert {run_trial(searcher, f"t{i}")["arch"] for i in range(12)} == {"resnet34", "resnet101"}


def test_fine_tunings_wait_for_probes_that_still_run(journal):
    searcher = made(journal, space=PROBED, screen=new_screen(PROBED, None, None))
    configs = {f"probe{i}": searcher.suggest(f"probe{i}") for i in range(4)}
    assert searcher.suggest("t0") is None
    for trial_id, config in configs.items():
        probe(searcher, trial_id, config)
    assert searcher.suggest("t0")["arch"] == "resnet34"


def test_probes_are_finished_trials_of_a_study_of_their_own(journal):
    searcher = made(journal, space=PROBED, screen=new_screen(PROBED, None, None))
    screened(searcher)
    study = optuna.load_study(study_name="small: probes", storage=JournalStorage(JournalFileBackend(str(journal))))
    assert [(t.state, t.value, t.params["arch"]) for t in study.trials] == [
        (TrialState.COMPLETE, error, arch) for arch, error in ERRORS.items()
    ]


def test_a_failed_probe_takes_its_architecture_out_of_the_search(journal):
    searcher = made(journal, space=PROBED, screen=new_screen(PROBED, 4, None))
    for i in range(4):
        config = searcher.suggest(f"probe{i}")
        if config["arch"] == "resnet34":
            searcher.on_trial_complete(f"probe{i}", {"failure": "no weights"})
        else:
            probe(searcher, f"probe{i}", config)
    assert "resnet34" not in {run_trial(searcher, f"t{i}")["arch"] for i in range(8)}


def test_a_restored_screen_goes_on_where_it_was(journal, tmp_path):
    searcher = made(journal, space=PROBED, screen=new_screen(PROBED, 2, None))
    first = [searcher.suggest(f"probe{i}") for i in range(2)]
    probe(searcher, "probe0", first[0])
    searcher.save(str(tmp_path / "saved"))
    later = made(journal, space=PROBED, screen=new_screen(PROBED, 2, None))
    later.restore(str(tmp_path / "saved"))
    assert later.live == {"probe1": 1}
    probe(later, "probe1", first[1])
    for i in (2, 3):
        probe(later, f"probe{i}", later.suggest(f"probe{i}"))
    assert later.suggest("t0")["arch"] == "resnet34"
    later.save(str(tmp_path / "again"))
    last = made(journal, space=PROBED, screen=new_screen(PROBED, 2, None))
    last.restore(str(tmp_path / "again"))
    assert {run_trial(last, f"t{i}")["arch"] for i in range(1, 9)} == {"resnet34", "resnet101"}


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when a test says so."""
    now = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(time_budget.time, "monotonic", lambda: now.seconds)
    monkeypatch.setattr(pace, "TRAINING_COST", 3.0)
    return now


def budgeted(journal, limit: float, keep: int | None = None, **more) -> OptunaSearcher:
    budget = TimeBudget(RunFolder(journal.parent), limit, since=1000.0)
    return made(journal, space=PROBED, screen=new_screen(PROBED, keep, None), budget=budget, **more)


def test_the_screen_leaves_time_for_fine_tuning_where_some_epochs_fit(journal, clock):
    searcher = budgeted(journal, 200.0)
    config = searcher.suggest("probe0")
    clock.seconds += 95
    probe(searcher, "probe0", config)  # an epoch is expected to take 0.1 * (3 * 80 + 20) = 26 s
    assert searcher.suggest("t0")["arch"] == "resnet18"
    assert searcher.screen.skipped == {1, 2, 3}


def test_without_time_for_fine_tuning_all_of_it_is_for_probes(journal, clock):
    searcher = budgeted(journal, 80.0)
    config = searcher.suggest("probe0")
    clock.seconds += 60
    probe(searcher, "probe0", config)
    assert searcher.suggest("probe1")["epochs"] == 0  # it is expected to take 13 s
    clock.seconds += 15
    probe(searcher, "probe1", {"arch": "resnet34"})
    assert searcher.suggest("t0") == Searcher.FINISHED


def test_until_a_probe_has_succeeded_the_next_one_must_end_in_time(journal, clock):
    searcher = budgeted(journal, 300.0)
    first = searcher.suggest("probe0")
    assert first[DEADLINE] == pytest.approx(time.time() + 300, abs=30)
    searcher.on_trial_complete("probe0", result(0, 2, math.nan) | {"failure": "diverged"})
    second = searcher.suggest("probe1")
    assert DEADLINE in second
    probe(searcher, "probe1", second)
    assert DEADLINE not in searcher.suggest("probe2")
    assert DEADLINE not in budgeted(journal, None).suggest("probe0")


def test_a_trial_has_no_more_epochs_than_fit_into_the_time_that_is_left(journal, clock):
    searcher = budgeted(journal, 300.0)
    screened(searcher)
    clock.seconds += 200
    epochs = 0.9 * 100 - 0.1 * 20 * 4  # of 26 s each
    assert searcher.suggest("t0")["epochs"] == epochs // 26 == 3
    searcher.on_trial_complete("t0", result(3, 3, 0.1))
    assert searcher.suggest("t1")["epochs"] == 3  # its recipe has 6
    searcher.on_trial_complete("t1", result(3, 3, 0.1))
    assert all(run_trial(searcher, f"t{i}")["epochs"] <= 3 for i in range(2, 12))
    clock.seconds += 65
    assert searcher.suggest("last") == Searcher.FINISHED


def test_trial_0_is_at_a_cheaper_pair_where_the_best_one_leaves_no_time_for_its_epochs(journal, clock):
    searcher = budgeted(journal, 200.0, keep=1)
    for seconds, error, arch in ((10.0, 0.22, "resnet18"), (80.0, 0.2, "resnet34")):
        assert searcher.suggest(arch)["arch"] == arch
        clock.seconds += seconds
        probe(searcher, arch, {"arch": arch}, seconds, error)
    config = searcher.suggest("t0")  # 100 s are left, for 3 epochs of 26 s or 0 of 208 s
    assert (config["arch"], config["epochs"]) == ("resnet18", 3)
    assert searcher.space.dimensions["arch"].values == ("resnet18", "resnet34")


def test_time_is_left_for_the_second_probe_of_the_best_pair(journal, clock):
    space = replace(PROBED, settings=PROBED.settings | {"probe_views": 2})
    budget = TimeBudget(RunFolder(journal.parent), 60.0, since=1000.0)
    searcher = made(journal, space=space, screen=new_screen(space, None, None), budget=budget)
    config = searcher.suggest("probe0")
    del config[DEADLINE]
    clock.seconds += 35
    probe(searcher, "probe0", config)  # another pair is expected to take 13 s, and its views 2 * 80 images * 0.1 s
    assert searcher.suggest("probe1") == config | {"probe_views": 2, "screens": -1}


def test_a_search_that_ended_in_its_screen_has_no_study_to_end(journal):
    searcher = made(journal, space=PROBED, screen=new_screen(PROBED, None, None))
    probe(searcher, "probe0", searcher.suggest("probe0"))
    end_study(journal, "small")
    assert optuna.get_all_study_names(JournalStorage(JournalFileBackend(str(journal)))) == ["small: probes"]


# --- The refit --------------------------------------------------------------------------------------------------------

PROBED_IN_30_S = {"stage": "probe", "feature_seconds": 29.0, "train_seconds": 30.0, "valid_seconds": 0.0}
PROBED_IN_30_S |= {"train_images": 80, "valid_images": 20}


def row(trial_id: str, kind: str = TRIAL, number: int = 0, seconds: float = 20.0) -> dict:
    """The winner's in the table."""
    return {"trial_id": text_id(trial_id), "kind": kind, "number": number, "seconds": seconds}


def test_the_winner_comes_again_when_all_others_have_ended(journal):
    searcher = made(journal, num_trials=2, winner=lambda: row("b"))
    configs = {trial_id: searcher.suggest(trial_id) for trial_id in ("a", "b")}
    searcher.on_trial_complete("a", result(3, 3, 0.3))
    assert searcher.suggest("c") is None  # the other may be better
    searcher.on_trial_complete("b", result(3, 3, 0.1))
    assert searcher.suggest("c") == configs["b"] | {"refits": "tb"}
    assert searcher.suggest("d") is None
    searcher.on_trial_complete("c", result(3, 3, 0.0))
    assert searcher.suggest("d") == Searcher.FINISHED


def test_a_probe_that_wins_is_fitted_again(journal):
    searcher = made(journal, space=PROBED, screen=new_screen(PROBED, 2, None), num_trials=0,
                    winner=lambda: row("probe1", PROBE, number=-3))  # fmt: skip
    assert screened(searcher)[1] == "resnet34"
    config = searcher.suggest("again")
    assert config["refits"] == "tprobe1" and "screens" not in config
    assert (config["arch"], config["epochs"], config["freeze_epochs"]) == ("resnet34", 0, 0)


def test_a_search_without_a_winner_has_nothing_to_train_again(journal):
    searcher = made(journal, num_trials=1, winner=lambda: None)
    searcher.suggest("a")
    searcher.on_trial_complete("a", {"failure": "diverged", "error_rate": math.nan})
    assert searcher.suggest("b") == Searcher.FINISHED


def test_a_restored_searcher_does_not_train_the_winner_twice(tmp_path, journal):
    searcher = made(journal, num_trials=1, winner=lambda: row("a"))
    searcher.suggest("a")
    searcher.on_trial_complete("a", result(3, 3, 0.1))
    assert "refits" in searcher.suggest("b")
    searcher.save(tmp_path / "state")
    later = made(journal, num_trials=1, winner=lambda: row("a"))
    later.restore(tmp_path / "state")
    assert later.suggest("c") is None  # the refit is still running
    later.on_trial_complete("b", result(3, 3, 0.0))
    assert later.suggest("c") == Searcher.FINISHED


def test_an_extended_search_trains_a_new_winner_again(journal):
    best = {"id": "a"}
    searcher = made(journal, num_trials=1, winner=lambda: row(best["id"]))
    searcher.suggest("a")
    searcher.on_trial_complete("a", result(3, 3, 0.3))
    searcher.suggest("again")
    searcher.on_trial_complete("again", result(3, 3, 0.2))
    searcher.num_trials, best["id"] = 2, "b"
    searcher.suggest("b")
    searcher.on_trial_complete("b", result(3, 3, 0.1))
    assert searcher.suggest("once more")["refits"] == "tb"


def test_a_refit_for_which_the_time_does_not_suffice_is_left_out(journal, clock):
    """The trial takes 60 s on 80 images, and its probe is fitted in a second: 85 s for all 100 images, with some
    slack; 43 s with half of its epochs."""
    for seconds_left, refits in ((90.0, "ta"), (50.0, "ta"), (42.0, None)):
        searcher = budgeted(journal.with_name(f"{seconds_left}.journal"), 1000.0, winner=lambda: row("a", seconds=60.0))
        searcher.screen = None
        searcher.pace.add(PROBED.full_settings | {"probe_views": 0}, PROBED_IN_30_S)
        searcher.suggest("a")
        searcher.on_trial_complete("a", result(3, 3, 0.1))
        searcher.num_trials = 1
        clock.seconds += 1000.0 - seconds_left
        proposal = searcher.suggest("b")
        assert proposal == Searcher.FINISHED if refits is None else proposal["refits"] == refits
        clock.seconds = 1000.0


def test_a_refit_has_as_many_epochs_as_there_is_time_for(journal, clock):
    for seconds_left, epochs in ((90.0, 3), (66.0, 2), (50.0, 1)):
        searcher = budgeted(journal.with_name(f"{seconds_left}.journal"), 1000.0, winner=lambda: row("a", seconds=60.0))
        searcher.screen = None
        searcher.pace.add(PROBED.full_settings | {"probe_views": 0}, PROBED_IN_30_S)
        first = searcher.suggest("a")
        searcher.on_trial_complete("a", result(3, 3, 0.1))
        searcher.num_trials = 1
        clock.seconds += 1000.0 - seconds_left
        assert (first["epochs"], (first | searcher.suggest("b"))["epochs"]) == (3, epochs)
        clock.seconds = 1000.0


def test_a_refit_takes_the_models_that_it_is_averaged_with_and_time_to_validate_them(journal, clock):
    searcher = budgeted(journal, 1000.0, winner=lambda: row("a", seconds=60.0) | {"averages": [0, 2]})
    searcher.screen = None
    searcher.pace.add(PROBED.full_settings | {"probe_views": 0}, PROBED_IN_30_S)
    assert searcher._refit_seconds() == pytest.approx((1.0 + 60.0) * 1.25 / 0.9 + 3 * 0.29 * 20)
    searcher.suggest("a")
    searcher.on_trial_complete("a", result(3, 3, 0.1))
    searcher.num_trials = 1
    assert searcher.suggest("b")["averages"] == [0, 2]


def test_a_probe_is_fitted_again_where_there_is_no_time_for_its_features(journal, clock):
    searcher = budgeted(journal, 100.0, winner=lambda: row("probe0", PROBE, number=-4, seconds=30.0))
    searcher.pace.add(PROBED.full_settings | {"probe_views": 0}, PROBED_IN_30_S)
    assert searcher._refit_seconds() == pytest.approx(1.0 * 1.25 / 0.9)


def test_a_proposal_says_how_many_trials_share_a_gpu_and_the_study_does_not_know(journal, monkeypatch):
    monkeypatch.setattr("search.cluster.concurrency.present_nodes", lambda: [Node(16, 1)])
    sizes = {1: GroupSize(gpus_per_worker=1), 2: GroupSize(gpus_per_worker=0.5)}
    capacity = Capacity("shares", sizes[2], {}, shared_sizes=sizes)
    searcher = OptunaSearcher(SPACE, journal, seed=0, capacity=capacity)
    first = searcher.suggest("a")
    assert first.keys() == {*SPACE.dimensions, "trials_per_gpu"} and first["trials_per_gpu"] == 2
    assert capacity.learn("a", first, {"failure": "out of memory even with 1 image at a time", "done": True})
    assert searcher.suggest("b") is None  # the GPU is the first one's until it has ended
    searcher.on_trial_complete("a", {"failure": "out of memory"})
    assert searcher.suggest("c")["trials_per_gpu"] == 1
    assert all(t.params.keys() <= SPACE.dimensions.keys() for t in searcher.study.trials)
