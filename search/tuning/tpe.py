"""Optuna's TPE sampler, made faster for searches with many trials."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.samplers import TPESampler
from optuna.samplers._tpe.sampler import _split_trials, default_gamma, default_gamma_multiobjective
from optuna.trial import FrozenTrial, TrialState

Floats = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.int64]
UNSEEN = -np.inf
STATES = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)


class CachedTPESampler(TPESampler):
    """`TPESampler` for one parameter at a time, which proposes the same and computes shared results once.

    Optuna sorts all trials and converts their values again for each parameter of each proposal. After a thousand trials
    that is most of a proposal's time. This class sorts once per proposal and converts once per search. A trial must
    have all its parameters before the next one is proposed. It relies on private parts of Optuna, so a test compares
    it with the original.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, multivariate=False, group=False)
        self._split: tuple[list[FrozenTrial], list[FrozenTrial]] | None = None
        self._numbers: dict[int, Numbers] = {}  # of the trials in both lists of the split, by their identity
        self._values: dict[tuple[str, BaseDistribution], Floats] = {}  # by trial number

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_split": None, "_numbers": {}, "_values": {}}

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        super().before_trial(study, trial)
        self._split = None

    def _sample(self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict[str, Any]:
        if self._split is None:
            others = [t for t in study.get_trials(deepcopy=False, states=STATES) if t.number != trial.number]
            gamma = default_gamma if len(study.directions) == 1 else default_gamma_multiobjective
            ended = sum(t.state != TrialState.RUNNING for t in others)
            self._split = _split_trials(study, others, gamma(ended))
            self._numbers = {id(part): np.array([t.number for t in part], dtype=int) for part in self._split}
        below = self._build_parzen_estimator(study, search_space, self._split[0], handle_below=True)
        above = self._build_parzen_estimator(study, search_space, self._split[1], handle_below=False)
        samples = below.sample(self._rng.rng, self._n_ei_candidates)
        best = self._compare(samples, self._compute_acquisition_func(samples, below, above))
        return {name: each.to_external_repr(best[name]) for name, each in search_space.items()}

    def _get_internal_repr(
        self, trials: Sequence[FrozenTrial], search_space: dict[str, BaseDistribution], study: Study
    ) -> dict[str, npt.NDArray[np.float64]]:
        return {name: self._internal_values(trials, name, each) for name, each in search_space.items()}

    def _internal_values(
        self, trials: Sequence[FrozenTrial], name: str, distribution: BaseDistribution
    ) -> npt.NDArray[np.float64]:
        numbers = self._numbers[id(trials)]
        known = self._values.get((name, distribution), np.empty(0))
        if numbers.size and numbers.max() >= known.size:
            known = np.append(known, np.full(numbers.max() + 1, UNSEEN))  # about twice as many
        self._values[name, distribution] = known
        for place in np.flatnonzero(known[numbers] == UNSEEN).tolist():
            params = trials[place].params
            known[numbers[place]] = distribution.to_internal_repr(params[name]) if name in params else np.nan
        values = known[numbers]
        return values[~np.isnan(values)]
