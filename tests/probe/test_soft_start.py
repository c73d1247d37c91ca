"""The head that fine-tuning starts from predicts what the probe does, less confidently."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from trainables.network.loss import log_loss
from trainables.network.model import mlp_head
from trainables.probe.soft_start import soften, softening
from trainables.recipe import Recipe


@pytest.fixture
def confident():
    """Logits and labels of a head that tells nearly all images apart."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 5
    return 20 * nn.functional.one_hot(labels, 5) + 3 * torch.randn(200, 5, generator=generator), labels


def test_the_start_has_the_wanted_loss_whatever_the_heads_weights_are(confident):
    logits, labels = confident
    for scale in (0.5, 1, 10):
        factor = softening(scale * logits, labels, 0.7)
        assert 0 < factor < 1
        assert cross_entropy(factor * scale * logits, labels).item() == pytest.approx(0.7 * math.log(5), rel=1e-4)


def test_a_head_that_is_unsure_already_stays_as_it_is(confident):
    logits, labels = confident
    assert softening(1e-3 * logits, labels, 0.7) == 1
    assert softening(-logits, labels, 0.7) == 1  # and so does one that is mostly wrong
    assert softening(logits, labels, 0) == 1


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_softening_scales_all_logits(kind):
    torch.manual_seed(0)
    head = nn.Linear(8, 3) if kind == "linear" else mlp_head(8, 3, Recipe(hidden=16, head="mlp")).eval()
    images = torch.randn(10, 8)
    before = head(images)
    soften(head, 0.25)
    assert torch.allclose(head(images), 0.25 * before, atol=1e-6)


def test_with_several_labels_guessing_knows_how_frequent_they_are():
    truth = torch.rand(400, 6, generator=torch.Generator().manual_seed(0)) < 0.1
    shares = truth.double().mean(0)
    guessing = log_loss(shares.logit().float().expand(400, 6), truth)
    sure = 20 * (truth.float() - 0.5)
    factor = softening(sure, truth, 0.5)
    assert log_loss(factor * sure, truth) == pytest.approx(0.5 * float(guessing), rel=1e-3)
    assert softening(0.01 * sure, truth, 0.5) == 1
