"""Test-time augmentation: what each view counts for."""

import pytest
import torch

from trainables.batches.augmentation import Augmentations
from trainables.batches.tta import predict
from trainables.recipe import Recipe

SURE = 100.0
"""A logit so much above the others that the probability is 1."""


@pytest.mark.parametrize(("beta", "centre", "others"), [(1.0, 1.0, 0.0), (0.25, 0.25, 0.75), (0.0, 0.0, 1.0)])
def test_the_centre_view_has_the_weight_of_the_recipe_and_the_others_share_the_rest(beta, centre, others):
    def logits(views: Augmentations) -> torch.Tensor:
        """Class 0 for the centre view, class 1 for all others."""
        changed = bool((views.lighting != torch.arange(256).numpy()).any())
        return torch.tensor([[0.0, SURE] if changed else [SURE, 0.0]]).expand(len(views.window), 2)

    recipe = Recipe(tta_beta=beta, lighting_p=1.0)
    found = predict(logits, recipe, 6, views=3)
    torch.testing.assert_close(found, torch.tensor([[centre, others]]).expand(6, 2))
