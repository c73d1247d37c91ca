"""Configs of a space as parameters of an Optuna study, and back."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from search.spaces.space import SWITCH, Choice, Dimension, Range, Space
from trainables.recipe import has_effect, spec_of

Config = dict[str, Any]
"""Values of dimensions by name."""


def propose(
    trial: optuna.Trial, space: Space, most_epochs: Callable[[Config], float] = lambda config: math.inf
) -> Config:
    """A value for each dimension that has an effect, given the values before it; a range of epochs ends at
    `most_epochs`."""
    config: Config = {}
    for name in space.in_order():
        if has_effect(name, space.full(config)):
            dimension = space.dimensions[name]
            if name == "epochs" and isinstance(dimension, Range) and (most := most_epochs(config)) < dimension.high:
                config[name] = trial.suggest_int(name, int(min(dimension.low, most)), int(most), log=dimension.log)
            else:
                config[name] = _suggest(trial, name, dimension)
    return config


def _suggest(trial: optuna.Trial, name: str, dimension: Dimension) -> Any:
    if isinstance(dimension, Choice):
        return trial.suggest_categorical(name, dimension.values)
    is_int = spec_of(name).type is int
    if dimension.off and not trial.suggest_categorical(name + SWITCH, (True, False)):
        return 0 if is_int else 0.0
    if is_int:
        return trial.suggest_int(name, int(dimension.low), int(dimension.high), log=dimension.log)
    return trial.suggest_float(name, float(dimension.low), float(dimension.high), log=dimension.log)


def params_of(space: Space, config: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters with which `propose` returns `config`."""
    params = {}
    for name, value in config.items():
        if not has_effect(name, space.full(config)):
            continue
        if getattr(space.dimensions[name], "off", False):
            params[name + SWITCH] = value != 0
            if value == 0:
                continue
        params[name] = value
    return params


def config_of(space: Space, params: Mapping[str, Any]) -> Config:
    """The config that `propose` returned with these parameters."""
    return config_of_names(space.dimensions, params)


def config_of_names(names: Iterable[str], params: Mapping[str, Any]) -> Config:
    """The same of a space whose dimensions have these names."""
    names = set(names)
    off = {name: 0 for name in names if params.get(name + SWITCH) is False}
    return off | {name: value for name, value in params.items() if name in names}


def distributions_of(space: Space, config: Mapping[str, Any]) -> dict[str, BaseDistribution]:
    """Of each of `params_of`, as `propose` draws it."""
    return {name: _distribution(space, name) for name in params_of(space, config)}


def _distribution(space: Space, name: str) -> BaseDistribution:
    if name.endswith(SWITCH):
        return CategoricalDistribution((True, False))
    dimension = space.dimensions[name]
    if isinstance(dimension, Choice):
        return CategoricalDistribution(dimension.values)
    if spec_of(name).type is int:
        return IntDistribution(int(dimension.low), int(dimension.high), log=dimension.log)
    return FloatDistribution(float(dimension.low), float(dimension.high), log=dimension.log)
