"""The space for one's own images: its networks exist, may be used, and train; its epochs fit the images."""

import pytest
import timm

from search.spaces.builtin.images import LARGE, MEDIUM, SMALL, SPACE
from search.spaces.epochs import epochs_for, middle
from search.tuning.halving import lengths
from trainables.network.architecture import try_out
from trainables.network.model import check_architecture
from trainables.recipe import Recipe

ARCHS = SPACE.dimensions["arch"].values
LICENCES = {"apache-2.0"}
"""They allow commercial use without conditions beyond a notice."""


@pytest.mark.parametrize("arch", ARCHS)
def test_every_architecture_has_weights_in_timm_that_anyone_may_use(arch):
    check_architecture(arch)
    config = timm.get_pretrained_cfg(arch)
    assert config.tag == arch.partition(".")[2] and timm.is_model_pretrained(arch)
    assert config.license in LICENCES


def test_there_are_small_medium_and_large_ones_of_many_kinds():
    assert (*SMALL, *MEDIUM, *LARGE) == ARCHS and len(ARCHS) == 12
    for kind in ("resnet", "convnext_", "vit_", "efficientnetv2", "mobilenetv4"):
        assert sum(kind in arch for arch in ARCHS) >= 2, kind


def num_parameters(arch: str) -> int:
    import torch

    with torch.device("meta"):
        return sum(parameter.numel() for parameter in timm.create_model(arch, num_classes=2).parameters())


@pytest.mark.slow
def test_the_three_sizes_are_in_the_order_of_their_cost():
    sizes = [sum(map(num_parameters, group)) / len(group) for group in (SMALL, MEDIUM, LARGE)]
    assert sizes[0] * 2 < sizes[1] and sizes[1] * 2 < sizes[2]
    assert max(map(num_parameters, ARCHS)) < 100e6  # with batches of 32, one GPU is enough


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("arch", ARCHS)
def test_every_architecture_trains_at_every_size(arch):
    """`search.spaces.architectures` relies on it."""
    for size in SPACE.dimensions["image_size"].values:
        try_out(Recipe.from_dict(SPACE.settings | {"arch": arch, "image_size": size}))


def test_fewer_images_get_more_epochs_but_fewer_steps():
    counts = [10, 100, 250, 1000, 2000, 6000, 20_000, 100_000, 1_000_000]
    highs = [epochs_for(count).high for count in counts]
    assert highs == sorted(highs, reverse=True) and (highs[0], highs[-1]) == (40, 3)
    steps = [count * high for count, high in zip(counts, highs, strict=True)]
    assert steps == sorted(steps)
    assert [str(epochs_for(count)) for count in (250, 6000)] == ["10..40", "2..10"]


@pytest.mark.parametrize("count", [0, 1, 37, 700, 3000, 9999, 50_000, 10_000_000])
def test_epochs_are_whole_and_have_a_middle_and_two_lengths_for_halving(count):
    epochs = epochs_for(count)
    assert isinstance(epochs.low, int) and isinstance(epochs.high, int) and epochs.low >= 1
    assert epochs.low <= middle(epochs) <= epochs.high and isinstance(middle(epochs), int)
    assert len(lengths(epochs)) >= 2
