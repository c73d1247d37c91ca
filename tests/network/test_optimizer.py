"""Discriminative rates, parameter groups and the one-cycle schedule, as in fastai."""

import math

import pytest
import torch
from torch import nn

from trainables.network.optimizer import adamw, set_position
from trainables.network.schedule import discriminative_rates, stage_cycle
from trainables.recipe import Recipe

RECIPE = Recipe(pct_start=0.3, div=5, div_final=1e5, mom_high=0.95, mom_low=0.85, weight_decay=0.02)
CYCLE = stage_cycle(RECIPE, frozen=False)


def layers() -> list[list[nn.Parameter]]:
    """Three layer groups with matrices, norms and biases."""
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    body = nn.Sequential(nn.Conv2d(4, 4, 3, bias=False), nn.LayerNorm([4, 2, 2]))
    head = nn.Linear(4, 2)
    return [list(module.parameters()) for module in (stem, body, head)]


def test_the_cycle_starts_at_a_fraction_peaks_at_pct_start_and_ends_near_zero():
    assert CYCLE.lr_factor(0) == pytest.approx(1 / 5)
    assert CYCLE.lr_factor(0.3) == pytest.approx(1)
    assert CYCLE.lr_factor(1) == pytest.approx(1e-5)
    factors = [CYCLE.lr_factor(i / 100) for i in range(101)]
    assert factors[:31] == sorted(factors[:31])
    assert factors[30:] == sorted(factors[30:], reverse=True)
    assert max(factors) == factors[30]


@pytest.mark.parametrize("position", [0, 0.1, 0.15, 0.29, 0.3, 0.5, 0.65, 0.9, 1])
def test_the_cycle_follows_fastai_formula(position):
    """Two of its `SchedCos(start, end)(pos) = start + (1 + cos(pi * (1 - pos))) * (end - start) / 2`, combined."""
    start, end, place = (1 / 5, 1, position / 0.3) if position < 0.3 else (1, 1e-5, (position - 0.3) / 0.7)
    assert CYCLE.lr_factor(position) == pytest.approx(start + (1 + math.cos(math.pi * (1 - place))) * (end - start) / 2)


def test_the_cycle_is_half_way_up_in_the_middle_of_its_rise():
    assert CYCLE.lr_factor(0.15) == pytest.approx((1 / 5 + 1) / 2)
    assert CYCLE.lr_factor(0.65) == pytest.approx(0.5, abs=1e-4)


def test_momentum_is_low_where_the_rate_is_high():
    assert [CYCLE.momentum(p) for p in (0, 0.3, 1)] == pytest.approx([0.95, 0.85, 0.95])
    for i in range(101):
        lowest = 1 / 5 if i < 30 else 1e-5
        height = (CYCLE.lr_factor(i / 100) - lowest) / (1 - lowest)  # 0 at the cycle's foot, 1 at its peak
        assert CYCLE.momentum(i / 100) == pytest.approx(0.95 - 0.1 * height)


def test_each_stage_has_the_cycle_that_its_settings_describe():
    recipe = Recipe(pct_start_frozen=0.9, pct_start=0.2, div_frozen=50, div=4, div_final=100)
    frozen, unfrozen = stage_cycle(recipe, frozen=True), stage_cycle(recipe, frozen=False)
    assert [frozen.lr_factor(p) for p in (0, 0.9, 1)] == pytest.approx([1 / 50, 1, 1 / 100])
    assert [unfrozen.lr_factor(p) for p in (0, 0.2, 1)] == pytest.approx([1 / 4, 1, 1 / 100])


def test_rates_rise_geometrically_from_the_earliest_layers_to_the_head():
    rates = discriminative_rates(1e-5, 1e-2, 4)
    assert rates == pytest.approx([1e-5, 1e-4, 1e-3, 1e-2])
    assert discriminative_rates(1e-3, 1e-3, 3) == pytest.approx([1e-3] * 3)
    assert discriminative_rates(1e-5, 1e-2, 1) == [1e-2]


def test_every_parameter_is_in_one_group_with_the_rate_of_its_layer():
    groups = layers()
    optimizer = adamw(groups, [1e-4, 1e-3, 1e-2], RECIPE)
    rate_of = {id(p): group["lr_max"] for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(rate_of) == sum(map(len, groups))
    for parameters, rate in zip(groups, [1e-4, 1e-3, 1e-2], strict=True):
        assert {rate_of[id(p)] for p in parameters} == {rate}


def test_norms_and_biases_do_not_decay():
    stem, body, head = layers()
    optimizer = adamw([stem, body, head], [1e-4, 1e-3, 1e-2], RECIPE)
    decay_of = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for matrix in (stem[0], body[0], head[0]):
        assert decay_of[id(matrix)] == 0.02
    for vector in (*stem[1:], head[1]):
        assert decay_of[id(vector)] == 0


def test_frozen_parameters_are_left_out():
    groups = layers()
    for parameter in groups[0]:
        parameter.requires_grad_(False)
    optimizer = adamw(groups, [1e-4, 1e-3, 1e-2], RECIPE)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held.isdisjoint(map(id, groups[0]))
    assert held == {id(p) for parameters in groups[1:] for p in parameters}


def test_a_position_sets_rate_and_momentum_of_every_group():
    optimizer = adamw(layers(), [1e-4, 1e-3, 1e-2], RECIPE)
    set_position(optimizer, CYCLE, 0.3)
    assert {group["lr"] for group in optimizer.param_groups} == {1e-4, 1e-3, 1e-2}
    set_position(optimizer, CYCLE, 0)
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(group["lr_max"] / 5)
        assert group["betas"] == pytest.approx((0.95, 0.99))


def test_the_optimizer_has_fastai_constants():
    for group in adamw(layers(), [1e-4, 1e-3, 1e-2], RECIPE).param_groups:
        assert (group["eps"], group["betas"][1]) == (1e-5, 0.99)
