"""The folds of a linear probe's cross-validation where images come in groups."""

import pytest
import torch

from trainables.probe.folds import folds_of, halves
from trainables.probe.logistic_regression import fit

pytestmark = pytest.mark.usefixtures("one_thread")


def views(num_photos: int, num_classes: int, each: int, distance: float = 0.25) -> tuple[torch.Tensor, ...]:
    """Features, labels and photos of images that are `each` views of a photo, which differ little."""
    generator = torch.Generator().manual_seed(num_photos)
    labels = torch.arange(num_photos) % num_classes
    centres = distance * torch.randn(num_classes, 40, generator=generator)
    photos = centres[labels] + torch.randn(num_photos, 40, generator=generator)
    features = photos.repeat_interleave(each, 0)
    features = features + 0.1 * torch.randn(features.shape, generator=generator)
    return features, labels.repeat_interleave(each), torch.arange(num_photos).repeat_interleave(each)


def test_images_of_a_group_are_in_one_fold_and_folds_are_equally_large():
    _, labels, groups = views(60, 3, 4)
    folds = folds_of(labels, 0, groups)
    assert all(len(folds[groups == group].unique()) == 1 for group in range(60))
    assert folds.bincount().tolist() == [48] * 5
    for label in range(3):
        assert folds[labels == label].bincount().tolist() == [16] * 5


def test_no_fold_holds_all_of_a_class():
    """In the first set the last group has its fewest images where the only other group of its class is."""
    others = [(label, group) for group in range(4) for label in (1, 2, 3, 4, 1, 2, 3, 4, 1, 2)]
    pairs = torch.tensor([*others, *[(0, 4)] * 6, *((label, 5) for label in range(5))])
    folds = folds_of(pairs[:, 0], 0, pairs[:, 1])
    assert folds[40] >= 0 and folds[46] >= 0 and folds[40] != folds[46]
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        labels = torch.randint(0, 6, (40,), generator=generator)
        groups = torch.randint(0, 9, (40,), generator=generator)
        folds = folds_of(labels, 0, groups)
        for fold in range(5):
            assert set(labels[folds != fold].tolist()) == set(labels.tolist())


def test_the_only_group_of_a_class_is_never_held_out():
    labels = torch.tensor([0] * 8 + [1] * 3)
    groups = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 4])
    folds = folds_of(labels, 0, groups)
    assert folds[8:].tolist() == [-1] * 3
    assert -1 not in folds[:8]


def test_halves_of_a_fold_have_whole_groups_of_every_class():
    _, labels, groups = views(40, 4, 3)
    one, other = halves(labels, torch.arange(120), groups)
    assert not set(groups[one].tolist()) & set(groups[other].tolist())
    assert labels[one].bincount().tolist() == labels[other].bincount().tolist() == [15] * 4
    alone = halves(labels, torch.arange(120), torch.arange(120))
    assert [half.tolist() for half in alone] == [half.tolist() for half in halves(labels, torch.arange(120))]


def test_with_groups_the_out_of_fold_error_rate_is_that_of_new_photos():
    features, labels, groups = views(160, 4, 4)
    known, new = groups < 80, groups >= 80
    heads = [fit(features[known], labels[known], 4, groups=each) for each in (None, groups[known])]
    true = float((heads[1].logits(features[new]).argmax(1) != labels[new]).float().mean())
    plain, grouped = (head.out_of_fold_error_rate for head in heads)
    assert plain < true - 0.2
    assert grouped == pytest.approx(true, abs=0.1)
