"""The learning-rate range test: the sweep, its suggestions and its plot, by themselves and against fastai's."""

import contextlib
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from trainables.training.lr_finder import (
    MIN_POINTS,
    Curve,
    SmoothedLoss,
    Sweep,
    rate_at,
    save_curve,
    suggestions,
    y_limits,
)

NAMES = ("valley", "steep", "minimum", "slide")


def rates(num_it: int, steps: int) -> np.ndarray:
    return np.array([rate_at(step, num_it) for step in range(steps)])


def valley_sweep(seed: int, num_it: int = 100, noise: float = 0.1) -> Curve:
    """Losses as a network gives them: level, down around a rate of 3e-3, then diverging from 1e-1 on."""
    rng = np.random.default_rng(seed)
    middle, turn = rng.uniform(-4, -2), rng.uniform(-1.5, 0)
    sweep = Sweep(num_it)
    while not sweep.finished:
        x = np.log10(sweep.rate)
        loss = 1 + 3 / (1 + np.exp(2.5 * (x - middle))) + np.exp(min(3 * (x - turn), 40))
        sweep.record(loss + noise * rng.normal())
    return sweep.curve()


def curve_of(losses, num_it: int = 100) -> Curve:
    """A curve whose searched part has these losses: 10 points before it at the first loss, 5 after at the last."""
    padded = np.concatenate([np.full(num_it // 10, losses[0]), losses, np.full(5, losses[-1])]).astype(np.float32)
    return Curve(lrs=rates(num_it, len(padded)), losses=padded)


def index_of(rate: float, curve: Curve, num_it: int = 100) -> int:
    """Which of the searched points has this rate."""
    return int(np.abs(np.log(curve.lrs / rate)).argmin()) - num_it // 10


# The sweep


def test_the_rate_grows_by_equal_factors_and_ends_one_short_of_its_end():
    swept = rates(100, 100)
    assert swept[0] == 1e-7
    assert swept[1:] / swept[:-1] == pytest.approx(np.full(99, 1e8**0.01))
    assert swept[-1] * 1e8**0.01 == pytest.approx(10)
    assert rate_at(5, 10, start=1e-4, end=1.0) == pytest.approx(1e-2)


def test_the_smoothed_loss_is_a_weighted_mean_from_the_first_batch_on():
    smoothed = SmoothedLoss(beta=0.9)
    assert [smoothed.update(3.0) for _ in range(20)] == pytest.approx([3.0] * 20)
    losses = np.random.default_rng(0).random(50) + 1
    smoothed = SmoothedLoss()
    values = [smoothed.update(loss) for loss in losses]
    weights = 0.98 ** np.arange(49, -1, -1)
    assert values[-1] == pytest.approx(np.average(losses, weights=weights))


def test_the_sweep_ends_when_the_loss_is_over_four_times_its_best():
    sweep = Sweep(num_it=100)
    for _ in range(30):
        sweep.record(1.0)
    assert not sweep.finished
    for loss, finished in ((60.0, False), (150.0, True)):  # smoothed: 3.5, then 9.7
        sweep.record(loss)
        assert sweep.finished == finished
    assert len(sweep.curve().lrs) == 32


def test_the_sweep_ends_after_its_steps():
    sweep = Sweep(num_it=40)
    for step in range(40):
        assert not sweep.finished
        assert sweep.rate == rate_at(step, 40)
        sweep.record(1.0)
    assert sweep.finished
    assert sweep.curve().lrs == pytest.approx(rates(40, 40))
    assert sweep.curve().batch_losses == pytest.approx(np.ones(40))


@pytest.mark.parametrize(("loss", "steps"), [(float("inf"), 11), (1e300, 11), (float("nan"), 50)])
def test_an_infinite_loss_ends_the_sweep_and_a_nan_does_not(loss, steps, recwarn):
    sweep = Sweep(num_it=50)
    for _ in range(10):
        sweep.record(1.0)
    while not sweep.finished:
        sweep.record(loss)
    assert len(sweep.curve().lrs) == steps
    assert not list(recwarn)


# Its suggestions


def test_suggestions_lie_on_the_descent():
    for seed in range(20):
        curve = valley_sweep(seed, noise=0.03)
        found = suggestions(curve)
        assert tuple(found) == NAMES
        lowest = curve.lrs[10:-5][curve.losses[10:-5].argmin()]
        assert found["minimum"] == pytest.approx(lowest / 10)
        assert 1e-6 < found["valley"] < lowest
        assert 1e-6 < found["steep"] <= lowest
        assert 1e-6 < found["slide"] <= lowest


def test_valley_is_half_way_down_the_longest_descent():
    losses = np.concatenate([np.linspace(1.8, 2, 20), np.linspace(2.1, 0.5, 30), np.linspace(0.6, 2, 25)])
    curve = curve_of(losses)
    assert index_of(suggestions(curve)["valley"], curve) == 49 - 30 + 10 + 5


def test_of_two_equally_long_descents_valley_takes_the_first():
    descent = np.linspace(2, 1, 12)
    curve = curve_of(np.concatenate([descent, descent + 2]))
    assert index_of(suggestions(curve)["valley"], curve) == 11 - 12 + 4 + 2


def test_a_curve_that_never_falls_suggests_its_first_rate():
    for losses in (np.linspace(1, 2, 40), np.ones(40)):
        curve = curve_of(losses)
        found = suggestions(curve)
        assert index_of(found["valley"], curve) == 0
        assert found["minimum"] == pytest.approx(curve.lrs[10] / 10)


def test_steep_is_where_the_loss_falls_fastest():
    losses = np.linspace(3, 2.5, 60)
    losses[37:] -= 0.5
    curve = curve_of(losses)
    assert index_of(suggestions(curve)["steep"], curve) == 36


def test_slide_stays_left_of_the_divergence():
    curve = curve_of(np.concatenate([np.ones(40), 1 + 0.02 * np.arange(1, 31) ** 2]))
    # The gradients at the interval's ends differ until its right end is at the last level point but one, 38.
    assert index_of(suggestions(curve)["slide"], curve) == 39 - 15


def test_slide_of_a_level_curve_is_one_interval_from_its_end():
    curve = curve_of(np.ones(40))
    assert index_of(suggestions(curve)["slide"], curve) == 40 - 16


def test_all_from_the_first_nan_on_is_ignored():
    curve = valley_sweep(3)
    until = np.where(np.arange(len(curve.losses)) < 70, curve.losses, np.nan)
    cut = Curve(lrs=curve.lrs[:75], losses=curve.losses[:75])
    assert suggestions(Curve(lrs=curve.lrs, losses=until)) == suggestions(cut)


@pytest.mark.parametrize("points", [0, 3, 16, 30])
def test_a_short_curve_is_refused_with_its_length(points):
    with pytest.raises(ValueError, match=f"the curve has only {points} points"):
        suggestions(Curve(lrs=rates(100, points), losses=np.ones(points)))


def test_the_shortest_curve_has_suggestions():
    assert len(suggestions(curve_of(np.linspace(2, 1, MIN_POINTS)))) == 4


def test_an_early_nan_is_refused_with_what_is_left():
    losses = np.ones(100)
    losses[20:] = np.nan
    with pytest.raises(ValueError, match="only 100 points, of which 10 can be searched"):
        suggestions(Curve(lrs=rates(100, 100), losses=losses))


def test_rates_and_losses_belong_together():
    with pytest.raises(ValueError, match="one rate and one loss per step"):
        Curve(lrs=np.ones(3), losses=np.ones(4))


# Its plot


def test_a_diverging_end_leaves_the_picture_and_the_descent_fills_it():
    curve = valley_sweep(0)
    bottom, top = y_limits(np.append(curve.losses, [50.0, np.inf, np.nan]))
    assert bottom < curve.losses.min()
    assert curve.losses[: curve.losses.argmin()].max() < top < 1.5 * curve.losses[: curve.losses.argmin()].max()
    assert y_limits(np.array([1.0, 1.05, 9.0]))[1] < 2
    assert y_limits(np.array([2.0, 1.5]), np.array([2.0, 0.5]))[0] < 0.5


@pytest.mark.parametrize("losses", [[], [np.nan], [1.0], [0.0, 0.0]])
def test_the_picture_has_some_height_whatever_the_losses(losses):
    bottom, top = y_limits(np.array(losses))
    assert bottom < top


def test_the_plot_is_a_png(tmp_path):
    curve = valley_sweep(0)
    save_curve(tmp_path / "a.png", curve, suggestions(curve), "resnet18")
    save_curve(tmp_path / "b.png", Curve(lrs=curve.lrs, losses=curve.losses), {"chosen": 1e-3}, "without batches")
    save_curve(tmp_path / "c.png", Curve(lrs=curve.lrs[:4], losses=curve.losses[:4]), {}, "too short")
    for name in ("a.png", "b.png", "c.png"):
        with Image.open(tmp_path / name) as image:
            assert image.format == "PNG"
            assert image.width > 1000
            assert len(image.convert("RGB").getcolors(1 << 20)) > 5


def test_importing_the_finder_imports_neither_torch_nor_matplotlib():
    code = (
        "import sys, trainables.training.lr_finder as _; print(sys.modules.keys() & {'torch', 'matplotlib', 'fastai'})"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


# fastai's own


def fastai_suggestions(lrs, losses, num_it: int) -> dict[str, float]:
    """What `Learner.lr_find` makes of these records: the method itself, on a learner whose `fit` does nothing."""
    from fastai.basics import Learner
    from fastai.callback.schedule import minimum, slide, steep, valley

    learner = SimpleNamespace(
        dls=SimpleNamespace(train=[None]),
        no_logging=contextlib.nullcontext,
        fit=lambda *args, **kwargs: None,
        recorder=SimpleNamespace(lrs=[float(lr) for lr in lrs], losses=[torch.tensor(float(loss)) for loss in losses]),
    )
    functions = (valley, steep, minimum, slide)
    return Learner.lr_find(learner, num_it=num_it, show_plot=False, suggest_funcs=functions)._asdict()


def oracle_curves():
    """(name, curve, num_it): shapes that a sweep can take, and shapes that show every index and comparison."""
    rng = np.random.default_rng(0)
    for seed in range(24):
        num_it = (100, 100, 60, 150)[seed % 4]
        yield f"sweep {seed}", valley_sweep(seed, num_it, noise=(0.02, 0.1, 0.4)[seed % 3]), num_it
    for length in (31, 32, 47, 64, 100):
        for kind, losses in {
            "walk": 3 + 0.1 * rng.normal(size=length).cumsum(),
            "noise": rng.random(length),
            "falling": np.linspace(3, 1, length) ** 2,
            "rising": np.linspace(1, 3, length) ** 2,
            "convex": 1 + np.linspace(-1, 2, length) ** 2,
            "one early fall": np.concatenate([np.linspace(5, 4, 12), np.linspace(4.1, 9, length - 12)]),
            "exploding": np.exp(np.linspace(0, 60, length)),
        }.items():
            yield f"{kind} {length}", Curve(lrs=rates(100, length), losses=losses), 100
    for length in (60, 97):
        losses = 3 + 0.1 * rng.normal(size=length).cumsum()
        for nans in (2, 5, 6, 20):
            ending = np.where(np.arange(length) < length - nans, losses, np.nan)
            yield f"{nans} nan at the end of {length}", Curve(lrs=rates(100, length), losses=ending), 100
    infinite = np.append(3 + 0.1 * rng.normal(size=80).cumsum(), np.full(10, np.inf))
    yield "infinite end", Curve(lrs=rates(100, 90), losses=infinite), 100
    for num_it, length in ((5, 21), (9, 30), (10, 30), (25, 23), (200, 140), (200, 200)):
        yield f"{length} of {num_it}", Curve(lrs=rates(num_it, length), losses=rng.random(length)), num_it


def tied_curves():
    """Losses on a coarse grid, and differences that float32 does not see."""
    rng = np.random.default_rng(1)
    for seed in range(12):
        coarse = np.round(valley_sweep(seed).losses * 8) / 8
        yield f"coarse sweep {seed}", Curve(lrs=rates(100, len(coarse)), losses=coarse), 100
        near = 2 + rng.integers(0, 6, size=80) * 4e-8
        yield f"near ties {seed}", Curve(lrs=rates(100, 80), losses=near), 100
    yield "level", Curve(lrs=rates(100, 80), losses=np.full(80, 2.0)), 100


@pytest.mark.oracle
def test_suggestions_are_fastais():
    for name, curve, num_it in oracle_curves():
        expected = fastai_suggestions(curve.lrs, curve.losses, num_it)
        assert suggestions(curve, num_it) == expected, name


@pytest.mark.oracle
def test_suggestions_of_equal_losses_are_fastais():
    """`steep` may take another point of the same steepness: the last bit of the rates' logarithms decides."""
    for name, curve, num_it in tied_curves():
        expected = fastai_suggestions(curve.lrs, curve.losses, num_it)
        found = suggestions(curve, num_it)
        falls = np.diff(curve.losses.astype(np.float32))[num_it // 10 :]
        at = {kind: index_of(rate["steep"], curve) for kind, rate in (("ours", found), ("fastai", expected))}
        assert falls[at["ours"]] == falls[at["fastai"]], name
        assert {**found, "steep": 0} == {**expected, "steep": 0}, name


def fastai_learner(folder, gain: float):
    """A small network on random classes; a large `gain` of the inputs makes it diverge early."""
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader
    from fastai.learner import Learner
    from torch import nn

    torch.manual_seed(0)
    inputs = torch.randn(256, 8) * gain
    data = torch.utils.data.TensorDataset(inputs, (inputs[:, 0] > 0).long() + 2 * (inputs[:, 1] > 0).long())
    loaders = DataLoaders(DataLoader(data, bs=16, shuffle=True, num_workers=0), DataLoader(data, bs=16, num_workers=0))
    network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    return Learner(loaders, network, loss_func=nn.CrossEntropyLoss(), path=folder)


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("gain", "num_it", "end", "stops"), [(1, 100, 0.1, False), (30, 100, 10, True), (3, 130, 10, True)]
)
def test_a_sweep_is_fastais_lr_find(tmp_path, gain, num_it, end, stops):
    from fastai.callback.core import Callback
    from fastai.callback.schedule import minimum, slide, steep, valley

    batch_losses = []

    class Collect(Callback):
        def after_loss(self):
            batch_losses.append(self.learn.loss.item())

    learner = fastai_learner(tmp_path, gain)
    learner.add_cb(Collect())
    functions = (valley, steep, minimum, slide)
    with learner.no_bar():
        expected = learner.lr_find(end_lr=end, num_it=num_it, show_plot=False, suggest_funcs=functions)

    sweep = Sweep(num_it, end=end)
    for loss in batch_losses:
        assert not sweep.finished
        sweep.record(loss)
    assert sweep.finished
    curve, recorder = sweep.curve(), learner.recorder
    assert len(batch_losses) == len(recorder.losses)
    assert (len(batch_losses) < num_it) == stops
    assert curve.lrs.tolist() == [float(lr) for lr in recorder.lrs]
    assert curve.losses == pytest.approx(np.array([float(loss) for loss in recorder.losses]), rel=1e-6)

    recorded = Curve(lrs=np.array(recorder.lrs), losses=np.array([float(loss) for loss in recorder.losses]))
    assert suggestions(recorded, num_it) == expected._asdict()
    assert suggestions(curve, num_it) == expected._asdict()
