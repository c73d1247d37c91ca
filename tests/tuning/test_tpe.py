"""The sampler: Optuna's own proposals, for less work."""

import pickle

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.samplers import TPESampler
from optuna.trial import TrialState

from search.tuning import tpe
from search.tuning.tpe import CachedTPESampler

STARTUP = 5


def new_study(sampler, objectives: int = 1) -> optuna.Study:
    return optuna.create_study(sampler=sampler, directions=["minimize"] * objectives)


def propose(study: optuna.Study) -> optuna.Trial:
    """One of each kind of parameter, one of them not in all trials."""
    trial = study.ask()
    size = trial.suggest_int("size", 1, 8)
    rate = trial.suggest_float("rate", 1e-4, 1e-1, log=True)
    if trial.suggest_categorical("mixed > 0", (True, False)):
        trial.suggest_float("mixed", 0.1, 0.4)
    trial.set_user_attr("error", abs(size - 5) / 8 + abs(rate - 0.01))
    return trial


def end(study: optuna.Study, trial: optuna.Trial) -> None:
    """In all the ways in which trials end."""
    number, error = trial.number, trial.user_attrs["error"]
    if number % 4 == 1:
        trial.set_constraint("seconds", 0.1 - error)
    if number % 7 == 2 and len(study.directions) == 1:
        trial.report(error, step=60)
        study.tell(trial, state=TrialState.PRUNED)
    elif number % 7 == 4:
        study.tell(trial, state=TrialState.FAIL)
    else:
        study.tell(trial, [error, number % 5][: len(study.directions)])


def search(study: optuna.Study, num_trials: int) -> list[dict]:
    """Three trials at a time, that end in another order than they began."""
    running = []
    for _ in range(num_trials):
        running.append(propose(study))
        if len(running) == 3:
            end(study, running.pop(1))
    return [trial.params for trial in study.trials]


@pytest.mark.parametrize("objectives", [1, 2])
@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_it_proposes_what_optunas_own_proposes(objectives):
    options = {"seed": 3, "n_startup_trials": STARTUP}
    own, original = CachedTPESampler(**options), TPESampler(**options, multivariate=False)
    assert search(new_study(own, objectives), 60) == search(new_study(original, objectives), 60)


def test_a_sampler_that_was_saved_goes_on_as_if_it_had_not_been():
    studies = [new_study(CachedTPESampler(seed=3, n_startup_trials=STARTUP)) for _ in range(2)]
    assert search(studies[0], 20) == search(studies[1], 20)
    studies[0].sampler = pickle.loads(pickle.dumps(studies[0].sampler))
    assert search(studies[0], 20) == search(studies[1], 20)


def test_late_proposals_sort_trials_once_and_convert_no_value_again(monkeypatch):
    calls = {"sort": 0, "convert": 0}

    def counted(name, function):
        def count(*args):
            calls[name] += 1
            return function(*args)

        return count

    study = new_study(CachedTPESampler(seed=3, n_startup_trials=STARTUP))
    monkeypatch.setattr(tpe, "_split_trials", counted("sort", tpe._split_trials))
    convert = FloatDistribution.to_internal_repr
    monkeypatch.setattr(FloatDistribution, "to_internal_repr", counted("convert", convert))
    search(study, 40)
    monkeypatch.setitem(calls, "sort", 0)
    monkeypatch.setitem(calls, "convert", 0)
    search(study, 10)
    assert calls["sort"] == 10
    assert calls["convert"] <= 10 * 2 * 2 + 3 * 2  # two parameters: when one is set, and when it is first seen
