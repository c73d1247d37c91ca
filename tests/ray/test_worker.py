"""A worker that runs out of memory: its batches go in smaller parts, and what does not fit at all fails its trial."""

import pytest
import torch
from torch import nn

from trainables.ray.messages import Command, TrialSpec
from trainables.ray.worker import _Slot
from trainables.recipe import Recipe
from trainables.training.fine_tune import FineTune

RECIPE = Recipe(
    arch="test_vit", pretrained=False, head="linear", presize=48, image_size=32, batch_size=8, freeze_epochs=0, epochs=1
)


class Scarce(nn.Module):
    """A model for which memory suffices while a batch has no more than `most` images. The error is torch's own."""

    def __init__(self, model: nn.Module, most: int) -> None:
        super().__init__()
        self.model, self.most = model, most

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > self.most:
            torch.empty(1 << 60, dtype=torch.uint8)
        return self.model(x)


@pytest.fixture
def slot(colour_images):
    """Runs the first epoch in so many parts, where memory suffices for `most` images."""
    slot = _Slot(host=None, num_threads=1)

    def run(most: int, batch_parts: int):
        def prepare(command: Command) -> FineTune:
            slot.training = FineTune(RECIPE, colour_images, batch_parts=command.batch_parts, num_threads=1)
            slot.training.parallel_model = Scarce(slot.training.network.model, most)
            return slot.training

        slot._prepare, slot._give_sign = prepare, lambda: None
        return slot.run(Command(1, TrialSpec(trial_id="t", recipe={}, data=""), 0, batch_parts))

    return run


def test_where_memory_runs_out_smaller_parts_are_asked_for_until_they_fit(slot):
    for parts in (1, 2):
        outcome, _ = slot(3, parts)
        assert outcome.split_batches and not outcome.failure
    outcome, reusable = slot(3, 4)
    assert (outcome.metrics["epoch"], outcome.metrics["batch_parts"], outcome.failure) == (1, 4, None)
    assert outcome.state and reusable


def test_a_trial_for_which_one_image_is_too_much_fails_with_the_reason_and_the_next_one_runs(slot):
    outcome, _ = slot(0, 8)
    assert outcome.failure.startswith("out of memory even with 1 image at a time: ") and not outcome.split_batches
    outcome, _ = slot(8, 1)
    assert outcome.metrics["epoch"] == 1
