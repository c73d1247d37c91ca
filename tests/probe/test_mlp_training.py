"""The mlp head, trained on features."""

import math

import pytest
import torch
from torch import nn

from trainables.network.model import mlp_head
from trainables.probe.mlp_training import BATCH_SIZE, fit_mlp
from trainables.recipe import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")


def drawn(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of three classes on two rings and in their centre: no linear head separates them."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % 3
    angle = 2 * math.pi * torch.rand(n, generator=generator)
    plane = torch.stack([angle.cos(), angle.sin()], 1) * labels[:, None]
    return (plane + 0.15 * torch.randn(n, 2, generator=generator)).half(), labels


def new_head() -> nn.Sequential:
    torch.manual_seed(0)
    return mlp_head(2, 3, Recipe(hidden=32))


def trained(n: int = 300, seed: int = 0) -> nn.Sequential:
    head = new_head()
    fit_mlp(head, *drawn(n), seed=seed, device="cpu")
    return head


def test_the_head_learns_what_no_linear_head_can():
    features, labels = drawn(1200)
    head = new_head()
    fit_mlp(head, features[:600], labels[:600], seed=0, device="cpu")
    wrong = head.eval()(features[600:].float()).argmax(1) != labels[600:]
    assert wrong.float().mean() < 0.1


def test_the_same_seed_gives_the_same_head_and_another_seed_another():
    first, again, other = trained(seed=0).state_dict(), trained(seed=0).state_dict(), trained(seed=1).state_dict()
    assert all(first[name].equal(again[name]) for name in first)
    assert not first["2.weight"].equal(other["2.weight"])


def test_the_random_numbers_of_others_stay_as_they_were():
    head = new_head()
    before = torch.get_rng_state()
    fit_mlp(head, *drawn(50), seed=3, device="cpu")
    assert torch.get_rng_state().equal(before)


@pytest.mark.parametrize("training", [True, False])
def test_the_head_keeps_its_mode(training):
    head = new_head().train(training)
    fit_mlp(head, *drawn(50), seed=0, device="cpu")
    assert all(module.training == training for module in head.modules())


@pytest.mark.parametrize("n", [2, BATCH_SIZE + 1, 2 * BATCH_SIZE + 1])
def test_no_batch_has_a_single_image(n):
    assert all(parameter.isfinite().all() for parameter in trained(n).parameters())


def test_progress_is_told_every_epoch():
    calls = []
    fit_mlp(new_head(), *drawn(50), seed=0, device="cpu", on_progress=lambda: calls.append(None))
    assert len(calls) >= 20


def test_one_image_is_refused():
    with pytest.raises(ValueError, match="at least two: batch norm cannot train on one image"):
        fit_mlp(new_head(), *drawn(1), seed=0, device="cpu")


def test_features_that_are_not_finite_are_refused():
    features, labels = drawn(20)
    features[3, 0] = math.inf
    with pytest.raises(ValueError, match="NaN or infinite"):
        fit_mlp(new_head(), features, labels, seed=0, device="cpu")


def test_it_learns_several_labels():
    features, ring = drawn(1200)
    truth = torch.stack([ring > 0, ring == 2, features[:, 0] > 0], 1)
    head = new_head()
    fit_mlp(head, features[:600], truth[:600], seed=0, device="cpu")
    wrong = (head.eval()(features[600:].float()) > 0) != truth[600:]
    assert wrong.float().mean() < 0.05
