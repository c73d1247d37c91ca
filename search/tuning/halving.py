"""Early termination by complete short trainings: configs that do well are trained again, for longer.

Half-way through a one-cycle schedule the rate is high and the metric says little. A short schedule that has run to its
end says more. So this is asynchronous successive halving (Li et al. 2020) over `epochs`, and each rung starts from the
pretrained weights.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import optuna

from search.options.strategy import Strategy
from search.spaces.space import Choice, Dimension, Space
from search.tuning.searcher import FORGOTTEN, OptunaSearcher
from search.tuning.study_configs import Config, config_of, params_of, propose

FACTOR = 3
"""The ratio of one length to the next, and of the trials that are promoted."""


def lengths(epochs: Dimension) -> list[int]:
    """Epochs of the rungs, shortest first: the maximum, and below each rung the largest number that is at most a third
    of it."""
    if isinstance(epochs, Choice):
        allowed = {value for value in epochs.values if value > 0}
    else:
        allowed = set(range(max(1, int(epochs.low)), int(epochs.high) + 1))
    found = [max(allowed)]
    while shorter := [length for length in allowed if length * FACTOR <= found[0]]:
        found.insert(0, max(shorter))
    return found


def check_lengths(space: Space) -> None:
    """Raises `ValueError` where trials cannot start short."""
    epochs = space.dimensions.get("epochs")
    if epochs is None or len(lengths(epochs)) < 2:
        given = f"epochs {'is ' + str(space.settings['epochs']) if epochs is None else 'are ' + str(epochs)}"
        raise ValueError(
            f"--scheduler halving: {given}, but trials start with a third of the longest. Search epochs "
            f"(--set epochs=2..6), the maximum at least {FACTOR} times the minimum, or use another --scheduler."
        )


def promotion(done: Iterable[tuple[Config, float]], rungs: Sequence[int], taken: Iterable[Config]) -> Config | None:
    """The best config that is in the best third of its length and was not promoted yet, with the next length; or None.

    `done` are the configs and errors of completed trials, `taken` the configs of all trials so far.
    """
    done, taken = list(done), list(taken)
    for epochs, longer in reversed(list(pairwise(rungs))):
        here = sorted((error, i) for i, (config, error) in enumerate(done) if config["epochs"] == epochs)
        for _, i in here[: len(here) // FACTOR]:
            config = done[i][0] | {"epochs": longer}
            if config not in taken:
                return config
    return None


class HalvingSearcher(OptunaSearcher):
    """Proposes the shortest length, and the next length for configs that did well. Each is a trial of its own."""

    def _ask(self) -> tuple[optuna.Trial, Config]:
        if len(self.numbers) < len(self.first_configs):
            return super()._ask()
        rungs = lengths(self.space.dimensions["epochs"])
        known = (t for t in self.study.get_trials(deepcopy=False) if t.user_attrs.get("failure") != FORGOTTEN)
        trials = [(t, config_of(self.space, t.params)) for t in known]
        done = [(config, t.values[0]) for t, config in trials if t.state == optuna.trial.TrialState.COMPLETE]
        config = promotion(done, rungs, [config for _, config in trials]) or {"epochs": rungs[0]}
        self.study.enqueue_trial(params_of(self.space, config))
        trial = self.study.ask()
        return trial, propose(trial, self.space, self._most_epochs)


def new_searcher(space: Space, journal: Path, *, seed: int, strategy: Strategy, **options: Any) -> OptunaSearcher:
    """The searcher of a strategy; `options` are those of `OptunaSearcher`."""
    kind = HalvingSearcher if strategy.scheduler == "halving" else OptunaSearcher
    return kind(space, journal, seed=seed, strategy=strategy, **options)
