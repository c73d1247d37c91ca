"""The loss: class weights that leave its size as it is."""

import math

import pytest
import torch
import torch.nn.functional as F
from timm.loss import BinaryCrossEntropy

from trainables.network.loss import (
    binary_cross_entropy,
    class_weights,
    cross_entropy,
    log_loss,
    log_priors,
    soft_targets,
)

LABELS = torch.tensor([0] * 90 + [1] * 9 + [3])


@pytest.mark.parametrize("kind", ["inverse", "effective"])
def test_weights_favour_small_classes_and_their_mean_over_the_images_is_one(kind):
    weights = class_weights(kind, LABELS, 4)
    assert weights[3] > weights[1] > weights[0] > 0
    assert weights[2] == 0  # there is nothing to weigh
    assert weights[LABELS].mean() == pytest.approx(1, rel=1e-5)


def test_inverse_weights_give_every_class_the_same_part_of_the_loss():
    weights = class_weights("inverse", LABELS, 4)
    parts = [float(weights[label] * (label == LABELS).sum()) for label in (0, 1, 3)]
    assert parts == pytest.approx([100 / 3] * 3)


def test_effective_weights_no_longer_tell_very_large_classes_apart():
    labels = torch.arange(3).repeat_interleave(torch.tensor([100, 20_000, 80_000]))
    small, large, larger = class_weights("effective", labels, 3).tolist()
    assert larger == pytest.approx(large, rel=1e-6)
    assert small / large == pytest.approx(1 / (1 - 0.999**100), rel=1e-4)


def test_without_weights_there_are_none():
    assert class_weights("none", LABELS, 4) is None


def test_the_weighted_loss_is_torchs_for_hard_labels():
    torch.manual_seed(0)
    logits, weights = torch.randn(len(LABELS), 4), class_weights("inverse", LABELS, 4)
    expected = F.cross_entropy(logits, LABELS, weights, reduction="sum")
    assert cross_entropy(logits, soft_targets(LABELS, 4), 0.0, weights).item() == pytest.approx(expected.item())


# --- Several labels ---------------------------------------------------------------------------------------------------

SETS = torch.rand(50, 4, generator=torch.Generator().manual_seed(1)) < torch.tensor([0.5, 0.2, 0.1, 0.0])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_of_label_sets_is_timms_binary_cross_entropy_summed_over_the_classes(smoothing):
    torch.manual_seed(0)
    logits, weights = torch.randn(50, 4), torch.tensor([1.0, 2.0, 3.0, 4.0])
    options = {"smoothing": smoothing, "sum_classes": True, "smooth_dense": True, "pos_weight": weights}
    theirs = BinaryCrossEntropy(**options)(logits, SETS.float())
    ours = binary_cross_entropy(logits, soft_targets(SETS, 4), smoothing, weights)
    assert float(ours) / 50 == pytest.approx(float(theirs), rel=1e-6)


def test_its_gradient_is_probability_less_target_as_that_of_cross_entropy():
    logits = torch.zeros(50, 4, requires_grad=True)
    log_loss(logits, SETS, reduction="sum").backward()
    assert torch.allclose(logits.grad, 0.5 - SETS.float())


def test_inverse_weights_give_images_of_a_class_and_all_others_the_same_part():
    weights, positives = class_weights("inverse", SETS, 4), SETS.sum(0)
    assert (weights * positives)[:3].tolist() == pytest.approx((50 - positives)[:3].tolist())
    assert weights[3] == 1  # there is nothing to weigh
    effective = class_weights("effective", SETS.repeat(1000, 1), 4)
    assert effective[:3].tolist() == pytest.approx([1.0] * 3, abs=0.01)


def test_adjusted_logits_predict_as_if_classes_were_equally_frequent():
    """Two classes that cannot be told apart, one with nine times the other's images: the best logits are equal."""
    labels = torch.tensor([0] * 90 + [1] * 10)
    bias = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.LBFGS([bias], max_iter=50)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(bias.expand(100, 2) + log_priors(labels, 2, 1.0), labels)
        value.backward()
        return value

    optimizer.step(closure)
    assert bias[0].item() == pytest.approx(bias[1].item(), abs=1e-3)


def test_priors_are_of_the_images_and_a_class_without_any_counts_as_half_an_image():
    assert log_priors(torch.tensor([0, 0, 0, 1]), 3, 2.0).tolist() == pytest.approx(
        [2 * math.log(n / 4.5) for n in (3, 1, 0.5)]
    )
    assert log_priors(torch.tensor([0, 1]), 2, 0.0) is None
    assert log_priors(torch.tensor([[True, False]]), 2, 1.0) is None  # several labels
