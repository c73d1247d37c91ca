"""Dropout of a batch that is shared out: the masks are those of the whole batch."""

from collections.abc import Callable

import pytest
import timm
import torch
from timm.layers import DropBlock2d, DropPath, PatchDropout
from torch import nn

from trainables.network.dropout import SharedDropout, WholeBatch, share_position_dropout

BATCH = torch.rand(7, 6, 8, 8, generator=torch.Generator().manual_seed(0)) + 1
TOKENS = BATCH.flatten(2)


def windows(x: torch.Tensor) -> torch.Tensor:
    """Dropout of the four quarters of each image, as rows of their own."""
    quarters = x.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(-1, 6, 4, 4)
    return nn.functional.dropout(quarters, 0.4).reshape(len(x), -1)


KINDS = {
    "dropout": (nn.Dropout(0.4), BATCH),
    "of whole channels": (nn.Dropout2d(0.4), BATCH),
    "of a head": (nn.Dropout(0.4), BATCH[:, :, 0, 0]),
    "in place": (nn.Dropout(0.4, inplace=True), BATCH),
    "as a function": (lambda x: nn.functional.dropout(x, p=0.4, training=True), BATCH),
    "stochastic depth": (DropPath(0.4), BATCH),
    "patches": (PatchDropout(0.4), TOKENS),
    "windows": (windows, BATCH),
}


def dropped(layer: Callable, x: torch.Tensor, rows: slice) -> torch.Tensor:
    torch.manual_seed(3)
    with WholeBatch(rows, 7):
        return layer(x[rows].clone())


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_of_a_batch_is_the_same_in_one_piece_or_shared_out(kind):
    layer, x = KINDS[kind]
    whole = dropped(layer, x, slice(0, 7))
    for rows in ([slice(0, 3), slice(3, 7)], [slice(i, i + 1) for i in range(7)]):
        assert torch.equal(torch.cat([dropped(layer, x, part) for part in rows]), whole)
    again = dropped(layer, x.roll(1, 0), slice(0, 7)).roll(-1, 0)
    assert not torch.equal(whole, again)  # each image has a mask of its own


def test_it_is_known_whether_a_network_drew_anything():
    for layer, drew in ((nn.Dropout(0.4), True), (nn.Dropout(0.0), False), (nn.Conv2d(6, 6, 1), False)):
        with WholeBatch(slice(0, 7), 7) as whole_batch:
            layer(BATCH)
        assert whole_batch.has_drawn == drew


def test_dropped_blocks_are_those_of_the_whole_batch():
    """What is kept is scaled by the part's share of it, so the values are others."""
    layer = DropBlock2d(0.3, block_size=3)
    whole = dropped(layer, BATCH, slice(0, 7)) == 0
    parts = [dropped(layer, BATCH, rows) == 0 for rows in (slice(0, 3), slice(3, 7))]
    assert whole.any() and torch.equal(torch.cat(parts), whole)


def test_dropout_drops_its_share_and_scales_the_rest():
    y = dropped(nn.Dropout(0.4), torch.ones(7, 2000), slice(0, 7))
    assert abs((y == 0).float().mean() - 0.4) < 0.02
    torch.testing.assert_close(y[y != 0], torch.full_like(y[y != 0], 1 / 0.6))
    assert torch.equal(dropped(nn.Dropout(0.4).eval(), BATCH, slice(0, 7)), BATCH)
    assert torch.equal(dropped(nn.Dropout(1.0), BATCH, slice(2, 7)), torch.zeros(5, 6, 8, 8))


def test_what_is_drawn_for_no_image_is_the_same_in_all_parts():
    """Also where there are as many positions as two parts have images."""
    model = timm.create_model("test_vit_relpos")
    share_position_dropout(model)
    shared = [module for module in model.modules() if isinstance(module, SharedDropout)]
    positions = torch.ones(6, 16)
    assert shared
    parts = slice(0, 7), slice(0, 3), slice(3, 6)
    whole, first, second = (dropped(lambda x: shared[0](positions), BATCH, rows) for rows in parts)
    assert (whole == 0).any()
    assert torch.equal(first, whole) and torch.equal(second, whole)
    first, second = (dropped(lambda x: torch.rand(()), BATCH, rows) for rows in parts[1:])
    assert first.shape == () and torch.equal(first, second)
