"""Early termination by complete short recipes: a config is trained anew for longer where it was good.

Half-way through a one-cycle schedule the rate is high and the metric says little. A short schedule that has run to its
end says more. Asynchronous successive halving (Li et al. 2020) over `epochs`, each rung from the pretrained weights.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import optuna

from search.searcher import OptunaSearcher, as_params, config_of, propose
from search.space import Dimension, ends

FACTOR = 3
"""From one length to the next, and one in so many goes on."""

Config = dict[str, Any]


def lengths(epochs: Dimension) -> list[int]:
    """Epochs of the rungs, shortest first: the most, and a third of it as long as that is in the dimension."""
    least, most = min(ends(epochs)), max(ends(epochs))
    found = [int(most)]
    while found[0] // FACTOR >= least and found[0] // FACTOR >= 1:
        found.insert(0, found[0] // FACTOR)
    return found


def promotion(done: Iterable[tuple[Config, float]], rungs: Sequence[int], taken: Iterable[Config]) -> Config | None:
    """The best config that is among the best third of its length and has not gone on, with the next length; or None.

    `done` are configs and errors of completed trials, `taken` the configs of all trials there have been.
    """
    done, taken = list(done), list(taken)
    for epochs, longer in reversed(list(pairwise(rungs))):
        here = sorted((error, i) for i, (config, error) in enumerate(done) if config["epochs"] == epochs)
        for _, i in here[: len(here) // FACTOR]:
            config = done[i][0] | {"epochs": longer}
            if config not in taken:
                return config
    return None


class AnnealedSearcher(OptunaSearcher):
    """Proposes the shortest length, and longer ones to configs that were good at it. Each is a trial of its own."""

    def _ask(self) -> tuple[optuna.Trial, Config]:
        if len(self.numbers) < len(self.first_configs):
            return super()._ask()
        rungs = lengths(self.space.dimensions["epochs"])
        trials = [(t, config_of(self.space, t.params)) for t in self.study.get_trials(deepcopy=False)]
        done = [(config, t.values[0]) for t, config in trials if t.state == optuna.trial.TrialState.COMPLETE]
        config = promotion(done, rungs, [config for _, config in trials]) or {"epochs": rungs[0]}
        self.study.enqueue_trial(as_params(self.space, config))
        trial = self.study.ask()
        return trial, propose(trial, self.space)
