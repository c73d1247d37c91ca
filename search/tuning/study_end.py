"""How a study learns of trials that do not end by themselves."""

from pathlib import Path

import optuna
from optuna.trial import TrialState

from search.runs.study_journal import open_journal

ENDED = "the search ended"


def end_study(journal: Path, name: str) -> None:
    """Record the end of the trials that were running when a time budget or failures ended the search: Tune does not
    report them."""
    if not Path(journal).is_file():
        return
    storage = open_journal(Path(journal))
    if name not in optuna.get_all_study_names(storage):  # the screen was not over
        return
    study = optuna.load_study(study_name=name, storage=storage)
    for frozen in study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
        trial = optuna.Trial(study, frozen._trial_id)
        if frozen.intermediate_values:
            study.tell(trial, state=TrialState.PRUNED)
        else:
            fail(study, trial, ENDED)


def fail(study: optuna.Study, trial: optuna.Trial, reason: str) -> None:
    trial.set_user_attr("failure", reason)
    study.tell(trial, state=TrialState.FAIL)
