"""How much each searched setting matters: Optuna's PED-ANOVA (Watanabe et al. 2023), as shares of 1."""

import warnings

from optuna import Study, create_study
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, TrialState

from search.runs.run_record import RunRecord
from search.runs.study_journal import own_trials
from search.spaces.space import SWITCH

MIN_TRIALS = 5  # completed; fewer say nothing
BEST_SHARE = 0.5
"""Of the completed trials, those that are compared with all. Optuna's default, a tenth, is a single one of ten trials,
for which all settings seem to matter alike: bench/search_quality.py compares both."""


def importances(run: RunRecord) -> dict[str, float]:
    """Share of each dimension, largest first, summing to 1; empty if there are too few trials to tell."""
    if len(run.whole) < MIN_TRIALS or not run.folder.journal.is_file():
        return {}
    try:
        return study_importances(_own(run.study))
    except (ValueError, RuntimeError):  # for example, all trials are alike
        return {}


def _own(study: Study) -> Study:
    """A study without the trials of earlier runs."""
    own = create_study(directions=study.directions)
    own.add_trials(own_trials(study, *TrialState))
    return own


def study_importances(study: Study, best_share: float = BEST_SHARE) -> dict[str, float]:
    """How much each dimension tells the best trials from all, as shares of 1, largest first.

    If many trials share the worst error, fewer of them count as the best: with all of them, all shares would be equal.
    Raises `ValueError` or `RuntimeError` if the trials do not tell.
    """
    errors = [_error(trial) for trial in study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])]
    num_better = sum(error < max(errors) for error in errors)
    if not num_better:
        raise ValueError("All trials have the same error.")
    share = min(best_share, (num_better - 0.5) / len(errors))  # Optuna rounds the number of trials up
    evaluator = PedAnovaImportanceEvaluator(target_quantile=share)
    with warnings.catch_warnings():  # Optuna warns that it takes a lower target for the better one, as it should
        warnings.simplefilter("ignore", UserWarning)
        found = get_param_importances(study, evaluator=evaluator, target=_error)
    shares: dict[str, float] = {}
    for param, value in found.items():
        name = param.removesuffix(SWITCH)  # whether a setting is off is part of its importance
        shares[name] = shares.get(name, 0.0) + value
    return dict(sorted(shares.items(), key=lambda item: (-item[1], item[0])))


def _error(trial: FrozenTrial) -> float:
    return float(trial.values[0])
