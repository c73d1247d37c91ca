"""Optuna's samplers, by the names of `--searcher`."""

import optuna
from optuna.samplers import BaseSampler

from search.options.strategy import Strategy
from search.tuning.tpe import CachedTPESampler

STARTUP_TRIALS = 5
"""Few random configs: most searches here are short, and trial 0 is already a good one."""


def new_sampler(strategy: Strategy, seed: int) -> BaseSampler:
    if strategy.searcher == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    if strategy.searcher == "gp":
        return optuna.samplers.GPSampler(seed=seed, n_startup_trials=STARTUP_TRIALS, warn_independent_sampling=False)
    if strategy.searcher == "cmaes":
        return optuna.samplers.CmaEsSampler(seed=seed, n_startup_trials=STARTUP_TRIALS, warn_independent_sampling=False)
    # One dimension at a time: measured to find more than Optuna 5's default, see results/bench/search_quality.md.
    return CachedTPESampler(seed=seed, n_startup_trials=STARTUP_TRIALS)
