"""The expected error rate: a model's own one on the validation images, corrected by its probe's luck with them."""

import numpy as np
import pytest
import torch

from trainables.probe.expected_error import Reference, reference

IMAGES = torch.arange(200)


def wrong(*images: int) -> torch.Tensor:
    """Mistakes on 200 validation images."""
    return torch.isin(IMAGES, torch.tensor(images))


def test_that_of_the_probe_itself_is_its_error_on_all_images():
    probe = reference(wrong(*range(10)), 0.1, 800)
    assert probe.error_rate == pytest.approx((10 + 80) / 1000)
    assert probe.expected(0.05, 0.05) == pytest.approx(probe.error_rate)


@pytest.mark.parametrize(("both_wrong", "expected"), [(0.05, 0.1), (0.005, 0.05), (0.0, 0.05)], ids=str)
def test_a_model_is_corrected_as_far_as_it_makes_the_same_mistakes(both_wrong, expected):
    """It gets 10 of 200 images wrong, the probe 20; all of the 10 as well, as many as by chance, or none."""
    probe = Reference(wrong(*range(20)), error_rate=0.2)
    assert probe.expected(0.05, both_wrong) == pytest.approx(expected)


@pytest.mark.parametrize("mistakes", [0, 200])
def test_a_probe_without_mistakes_or_without_others_corrects_nothing(mistakes):
    assert Reference(wrong(*range(mistakes)), 0.5).expected(0.3, 0.3 * (mistakes > 0)) == 0.3


@pytest.mark.parametrize(("error_rate", "on_all", "expected"), [(0.01, 0.0, 0.0), (0.99, 1.0, 1.0)])
def test_it_is_a_share(error_rate, on_all, expected):
    probe = Reference(wrong(*range(100)), on_all)
    assert probe.expected(error_rate, min(error_rate, 0.5)) == pytest.approx(expected, abs=0.02)
    assert 0 <= probe.expected(error_rate, min(error_rate, 0.5)) <= 1


def test_it_is_nearer_to_the_truth_than_the_error_on_the_validation_images():
    """A probe gets 20 % of all images wrong, and a model 60 % of these and 2 % of the others: 13.6 %."""
    draws = np.random.default_rng(0)
    seen, expected = [], []
    for _ in range(400):
        of_probe = draws.random(1000) < 0.2
        of_model = draws.random(200) < np.where(of_probe[:200], 0.6, 0.02)
        probe = reference(torch.from_numpy(of_probe[:200]), float(of_probe[200:].mean()), 800)
        seen.append(of_model.mean())
        expected.append(probe.expected(float(of_model.mean()), float((of_model & of_probe[:200]).mean())))
    assert np.mean(expected) == pytest.approx(0.136, abs=0.003)
    assert np.std(expected) < 0.85 * np.std(seen)


def test_the_balanced_error_is_corrected_by_the_probes_as_far_as_they_share_mistakes():
    probe = reference(wrong(*range(20)), 0.1, 800, balanced=(0.3, 0.4))
    assert probe.expected_balanced(0.3, 0.1, both_wrong=0.1) == pytest.approx(0.4)  # of the probe itself
    assert probe.expected_balanced(0.2, 0.05, both_wrong=0.005) == pytest.approx(0.2)  # shared by chance alone
    assert 0.2 < probe.expected_balanced(0.2, 0.05, both_wrong=0.03) < 0.3
    assert reference(wrong(1), 0.1, 800).expected_balanced(0.2, 0.05, 0.0) is None
