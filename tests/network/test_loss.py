"""The loss: class weights that leave its size as it is."""

import pytest
import torch
import torch.nn.functional as F

from trainables.network.loss import class_weights, cross_entropy, soft_targets

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
