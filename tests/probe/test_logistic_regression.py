"""The linear probe: scikit-learn's optimum, its l2 by cross-validation, and sets with few images of some classes."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from trainables.network.loss import class_weights
from trainables.probe import cross_validation
from trainables.probe.cross_validation import L2_WITHOUT_VALIDATION
from trainables.probe.folds import folds_of
from trainables.probe.logistic_regression import LinearHead, fit
from trainables.probe.solver import L2_GRID

pytestmark = pytest.mark.usefixtures("one_thread")


def drawn(n: int, d: int, num_classes: int, distance: float = 0.5) -> tuple[torch.Tensor, torch.Tensor]:
    """Features as a backbone makes them, not negative and correlated; `distance` of the classes' centres in noise."""
    generator = torch.Generator().manual_seed(n + d)
    labels = torch.arange(n) % num_classes
    hidden = distance * torch.randn(num_classes, 16, generator=generator)[labels]
    hidden += torch.randn(n, 16, generator=generator)
    mixed = hidden @ torch.randn(16, d, generator=generator) + torch.randn(n, d, generator=generator)
    return (mixed.relu() * 0.3).half(), labels


def objective(
    head: LinearHead, features: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None = None
) -> float:
    """What is minimised, in float64."""
    x, weights = features.double(), None if weights is None else weights.double()
    loss = cross_entropy(x @ head.weight.double().T + head.bias.double(), labels, weights)
    return float(loss + head.l2 / 2 * (head.weight.double() * x.std(0, correction=0)).square().sum())


def error_rate(head: LinearHead, features: torch.Tensor, labels: torch.Tensor) -> float:
    return float((head.logits(features).argmax(1) != labels).float().mean())


@pytest.mark.oracle
@pytest.mark.parametrize("l2", [1e-1, 1e-3, 1e-5])
@pytest.mark.parametrize(
    ("n", "d", "num_classes", "weights"),
    [
        *((40, 100, 5, None), (300, 20, 5, None), (120, 30, 2, None), (150, 20, 50, None), (12, 80, 12, None)),
        *((300, 20, 5, "balanced"), (40, 100, 5, "balanced")),
    ],
)
def test_the_head_is_scikit_learns_optimum(n, d, num_classes, weights, l2):
    linear_model = pytest.importorskip("sklearn.linear_model")
    features, labels = drawn(n, d, num_classes)
    if weights:
        labels = labels.minimum(labels.flip(0))  # imbalanced, without images of the last classes
        num_classes = int(labels.max()) + 1
    x = features.double().numpy()
    mean, std = x.mean(0), x.std(0)
    # with two classes, scikit-learn has one row of weights, whose penalty is twice that of our two opposite rows
    c = (2 if num_classes == 2 else 1) / (n * l2)
    solver = linear_model.LogisticRegression(C=c, class_weight=weights, tol=1e-9, max_iter=20_000)
    with pytest.importorskip("threadpoolctl").threadpool_limits(1):
        theirs = solver.fit((x - mean) / std, labels)
    rows, bias = torch.from_numpy(theirs.coef_ / std), torch.from_numpy(theirs.intercept_)
    if num_classes == 2:
        rows, bias = torch.cat([-rows, rows]) / 2, torch.cat([-bias, bias]) / 2
    optimum = LinearHead(rows, bias - rows @ torch.from_numpy(mean), l2)

    of_classes = class_weights("inverse" if weights else "none", labels, num_classes)
    head = fit(features, labels, num_classes, l2=l2, class_weights=of_classes)
    ours, best = (objective(each, features, labels, of_classes) for each in (head, optimum))
    assert ours == pytest.approx(best, rel=1e-4)
    predicted = head.logits(features).argmax(1)
    agree = predicted == (features.double() @ optimum.weight.T + optimum.bias).argmax(1)
    assert agree.float().mean() >= 0.999


def drawn_sets(n: int, d: int, num_classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and label sets, of classes from rare to frequent."""
    generator = torch.Generator().manual_seed(n + d)
    hidden = torch.randn(n, 8, generator=generator)
    features = hidden @ torch.randn(8, d, generator=generator) + torch.randn(n, d, generator=generator)
    scores = hidden @ torch.randn(8, num_classes, generator=generator)
    shares = torch.linspace(0.1, 0.6, num_classes)
    return features.half(), scores > torch.stack([s.quantile(1 - q) for s, q in zip(scores.T, shares, strict=True)])


@pytest.mark.oracle
@pytest.mark.parametrize("l2", [1e-1, 1e-3])
@pytest.mark.parametrize(("n", "d", "weight"), [(200, 40, 1), (60, 100, 1), (200, 40, 3)])
def test_of_several_labels_it_is_scikit_learns_one_against_the_rest(n, d, weight, l2):
    linear_model = pytest.importorskip("sklearn.linear_model")
    features, truth = drawn_sets(n, d, 4)
    x = features.double().numpy()
    mean, std = x.mean(0), x.std(0)
    how = {"C": 1 / (n * l2), "class_weight": {0: 1, 1: weight}, "tol": 1e-9, "max_iter": 20_000}
    every = pytest.importorskip("sklearn.multiclass").OneVsRestClassifier(linear_model.LogisticRegression(**how))
    with pytest.importorskip("threadpoolctl").threadpool_limits(1):
        theirs = every.fit((x - mean) / std, truth.numpy())
    head = fit(features, truth, 4, l2=l2, class_weights=torch.full((4,), float(weight)))
    probabilities = torch.from_numpy(theirs.predict_proba((x - mean) / std)).float()
    assert torch.allclose(head.logits(features).sigmoid(), probabilities, atol=2e-3)


def test_of_several_labels_the_penalty_and_the_error_are_those_of_unseen_images():
    features, truth = drawn_sets(2000, 40, 5)
    head = fit(features[:1000], truth[:1000], 5)
    wrong = ((head.logits(features) > 0) != truth).any(1).float()
    assert wrong[:1000].mean() < head.out_of_fold_error_rate
    assert head.out_of_fold_error_rate == pytest.approx(float(wrong[1000:].mean()), abs=0.04)
    noise = torch.randn(300, 40, generator=torch.Generator().manual_seed(0))
    assert fit(noise, truth[:300], 5).l2 > head.l2


def test_a_label_that_no_image_or_every_image_has_is_never_or_always_predicted():
    features, truth = drawn_sets(100, 20, 4)
    truth[:, 0], truth[:, 1] = False, True
    logits = fit(features, truth, 4).logits(features)
    assert (logits[:, 0] < -4).all() and (logits[:, 1] > 4).all()
    always = fit(features, torch.ones_like(truth), 4).logits(features)
    assert always.isfinite().all() and (always > 4).all()


@pytest.mark.parametrize(("n", "d"), [(60, 200), (400, 40)])
def test_no_step_from_the_head_lowers_the_objective(n, d):
    features, labels = drawn(n, d, 4)
    head = fit(features, labels, 4, l2=1e-3)
    weight, bias = (part.double().requires_grad_() for part in (head.weight, head.bias))
    x = features.double()
    loss = cross_entropy(x @ weight.T + bias, labels)
    (loss + head.l2 / 2 * (weight * x.std(0, correction=0)).square().sum()).backward()
    assert bias.grad.abs().max() < 1e-4
    assert (weight.grad / x.std(0, correction=0)).abs().max() < 1e-4


def test_the_same_seed_gives_the_same_head():
    features, labels = drawn(90, 120, 3)
    first, again = fit(features, labels, 3, seed=1), fit(features, labels, 3, seed=1)
    assert first.weight.equal(again.weight)
    assert first.bias.equal(again.bias)
    assert (first.l2, first.out_of_fold_error_rate) == (again.l2, again.out_of_fold_error_rate)


def test_another_seed_makes_otherfolds_of():
    labels = torch.arange(60) % 3
    assert not folds_of(labels, 0).equal(folds_of(labels, 1))


def test_noise_is_penalised_strongly_and_separable_classes_weakly():
    features, labels = drawn(100, 150, 4, distance=3)
    noise = torch.randn(100, 150, generator=torch.Generator().manual_seed(0))
    chance, certain = fit(noise, labels, 4), fit(features, labels, 4)
    assert chance.l2 >= 1
    assert chance.out_of_fold_error_rate > 0.5
    assert certain.l2 < 0.1
    assert certain.out_of_fold_error_rate < 0.05


def test_the_out_of_fold_error_rate_is_that_of_unseen_images():
    features, labels = drawn(600, 40, 5)
    head = fit(features[:300], labels[:300], 5)
    assert error_rate(head, features[:300], labels[:300]) < head.out_of_fold_error_rate
    assert head.out_of_fold_error_rate == pytest.approx(error_rate(head, features[300:], labels[300:]), abs=0.06)


def test_it_is_that_of_fits_without_half_a_fold():
    features, labels = drawn(120, 40, 4)
    head, folds = fit(features, labels, 4), folds_of(labels, 0)
    wrong = 0
    for fold in range(5):
        unseen = (folds == fold).nonzero().flatten()
        unseen = unseen[labels[unseen].argsort(stable=True)]
        for half in (unseen[::2], unseen[1::2]):
            seen = torch.ones(120, dtype=torch.bool)
            seen[half] = False
            other = fit(features[seen], labels[seen], 4, l2=head.l2)
            wrong += int((other.logits(features[half]).argmax(1) != labels[half]).sum())
    assert head.out_of_fold_error_rate == pytest.approx(wrong / 120, abs=2.5 / 120)


def test_out_of_fold_probabilities_are_those_of_fits_that_have_not_seen_the_image():
    features, labels = drawn(120, 40, 4)
    head = fit(features, labels, 4)
    found = head.out_of_fold
    assert found.shape == (120, 4) and found.dtype == torch.float16
    assert torch.allclose(found.float().sum(1), torch.ones(120), atol=5e-3)
    assert head.out_of_fold_error_rate == (found.argmax(1) != labels).double().mean()
    for image in (0, 50, 119):
        seen = torch.arange(120) != image
        alone = fit(features[seen], labels[seen], 4, l2=head.l2).logits(features[image : image + 1]).softmax(1)
        assert torch.allclose(found[image].float(), alone[0], atol=0.15)
    own = head.logits(features).softmax(1)[torch.arange(120), labels]
    assert found[torch.arange(120), labels].float().mean() < own.mean() - 0.02


def test_who_was_never_held_out_has_no_probabilities_and_an_absent_class_has_zero():
    features, labels = drawn(40, 30, 4, distance=3)
    labels[labels == 2] = 4
    labels[0] = 5
    head = fit(features, labels, 6)
    assert head.out_of_fold.isnan().any(1).nonzero().flatten().tolist() == [0]
    assert (head.out_of_fold[1:, 2] == 0).all() and head.out_of_fold[0].isnan().all()
    assert head.out_of_fold_error_rate == (head.out_of_fold[1:].argmax(1) != labels[1:]).double().mean()


def test_probabilities_that_take_too_much_room_are_not_kept(monkeypatch):
    features, labels = drawn(60, 20, 3)
    expected = fit(features, labels, 3)
    monkeypatch.setattr(cross_validation, "MAX_KEPT", 179)
    head = fit(features, labels, 3)
    assert head.out_of_fold is None and head.out_of_fold_error_rate == expected.out_of_fold_error_rate


def test_cross_validation_chooses_what_is_near_the_best_for_unseen_images():
    features, labels = drawn(500, 30, 5)
    x, y, unseen, truth = features[:150], labels[:150], features[150:], labels[150:]
    losses = [float(cross_entropy(fit(x, y, 5, l2=l2).logits(unseen), truth)) for l2 in L2_GRID[::3]]
    chosen = float(cross_entropy(fit(x, y, 5).logits(unseen), truth))
    assert chosen < min(losses) + 0.05 * (max(losses) - min(losses))


def test_folds_have_equally_many_images_of_every_class():
    labels = torch.tensor([0] * 10 + [1] * 7 + [2] * 3 + [3])
    folds = folds_of(labels, 0)
    assert sorted(folds[:10].tolist()) == sorted([0, 1, 2, 3, 4] * 2)
    assert len(set(folds[17:20].tolist())) == 3
    assert folds[:20].bincount().tolist() == [4] * 5


def test_the_only_image_of_a_class_is_never_held_out():
    assert folds_of(torch.tensor([0, 0, 1, 2, 2]), 0)[2] == -1
    features, labels = drawn(40, 30, 4, distance=3)
    features[0], labels[0] = features[0] + 5, 4
    head = fit(features, labels, 5)
    assert head.logits(features[:1]).argmax() == 4
    assert head.out_of_fold_error_rate < 0.2


def test_one_image_of_each_class_is_enough():
    features, labels = drawn(10, 50, 10)
    head = fit(features, labels, 10)
    assert error_rate(head, features, labels) == 0
    assert (head.l2, head.out_of_fold_error_rate) == (L2_WITHOUT_VALIDATION, None)


def test_fewer_images_thanfolds_of():
    features, labels = drawn(4, 50, 2, distance=3)
    head = fit(features, labels, 2)
    assert error_rate(head, features, labels) == 0
    assert head.out_of_fold_error_rate is not None


def test_a_thousand_classes():
    features, labels = drawn(2000, 24, 1000, distance=4)
    head = fit(features, labels, 1000, l2=1e-2)
    assert head.weight.shape == (1000, 24)
    assert error_rate(head, features, labels) < 0.5


def test_a_class_without_an_image_is_never_predicted_and_changes_nothing_for_the_others():
    features, labels = drawn(60, 40, 3)
    without = fit(features, labels, 3, l2=1e-2)
    head = fit(features, 2 * labels, 6, l2=1e-2)
    assert head.weight[::2].equal(without.weight)
    assert head.bias[::2].equal(without.bias)
    logits = head.logits(torch.cat([features, 10 * torch.randn(1000, 40)]))
    assert set(logits.argmax(1).tolist()) <= {0, 2, 4}
    assert logits.isfinite().all()


def test_images_of_one_class_only():
    features, _ = drawn(20, 30, 2)
    head = fit(features, torch.ones(20, dtype=torch.int64), 3)
    assert set(head.logits(features).argmax(1).tolist()) == {1}


def test_a_constant_feature_has_no_weight():
    features, labels = drawn(60, 30, 3)
    without = fit(features, labels, 3, l2=1e-2)
    constant = torch.full((60, 1), 0.1, dtype=torch.float16)
    head = fit(torch.cat([features, constant], 1), labels, 3, l2=1e-2)
    assert head.weight[:, -1].abs().max() == 0
    assert torch.allclose(head.weight[:, :-1], without.weight, atol=1e-3)


def test_scale_and_offset_of_a_feature_do_not_matter():
    features, labels = drawn(60, 30, 3)
    x = features.double()
    logits = fit(x, labels, 3, l2=1e-2).logits(x)
    moved = x * torch.linspace(0.1, 10, 30) + torch.linspace(-5, 5, 30)
    assert torch.allclose(fit(moved, labels, 3, l2=1e-2).logits(moved), logits, atol=1e-2)


def test_identical_images_do_no_harm():
    features, labels = drawn(12, 40, 3)
    head = fit(features.repeat(4, 1), labels.repeat(4), 3, l2=1e-2)
    assert torch.allclose(head.logits(features), fit(features, labels, 3, l2=1e-2).logits(features), atol=1e-2)
    same = fit(torch.ones(6, 40), torch.arange(6) % 2, 2, l2=1e-2)
    assert torch.allclose(same.logits(torch.ones(1, 40)), torch.zeros(1, 2), atol=1e-3)


def test_progress_is_told_while_it_computes():
    features, labels = drawn(60, 30, 3)
    calls = []
    fit(features, labels, 3, on_progress=lambda: calls.append(None))
    assert len(calls) > 5 * len(L2_GRID) / 2


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_features_that_are_not_finite_are_named(value):
    features, labels = drawn(20, 10, 2)
    features[7, 3] = value
    with pytest.raises(ValueError, match=r"1 of 20 images have features that are NaN or infinite.*first is image 7"):
        fit(features, labels, 2)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.arange(20) % 4, r"from 0 to 3, expected whole numbers from 0 to 2"),
        (torch.arange(20) % 3 - 1, r"from -1 to 1, expected"),
        ((torch.arange(20) % 3).float(), r"torch.float32"),
        (torch.arange(19) % 3, r"\(20, 10\) and labels \(19,\), expected"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        fit(torch.randn(20, 10), labels, 3)


def test_no_images_are_refused():
    with pytest.raises(ValueError, match="at least one"):
        fit(torch.zeros(0, 10), torch.zeros(0, dtype=torch.int64), 3)


@pytest.mark.parametrize("l2", [0.0, -1.0, math.nan, math.inf])
def test_an_l2_without_a_solution_is_refused(l2):
    with pytest.raises(ValueError, match=r"l2=.*expected a number above 0"):
        fit(*drawn(20, 10, 2), 2, l2=l2)


@pytest.mark.parametrize("l2", [1e-1, 1e-4])
def test_a_fit_that_starts_from_a_similar_head_finds_the_same_one_in_fewer_steps(l2):
    features, labels = drawn(200, 40, 6)
    noise = torch.randn(features.shape, generator=torch.Generator().manual_seed(0))
    similar = features.float() + 0.3 * features.float().std(0) * noise
    before = fit(features, labels, 7, l2=l2)  # a class without images
    steps = {"alone": 0, "started": 0}
    heads = {}
    for name, how in (("alone", {"l2": l2}), ("started", {"start": before})):

        def count(name=name):
            steps[name] += 1

        heads[name] = fit(similar, labels, 7, **how, on_progress=count)
    alone, started = (head.logits(similar).softmax(1) for head in heads.values())
    assert (started - alone).abs().mean() < 1e-3 and heads["started"].l2 == l2
    assert steps["started"] < steps["alone"]


def test_large_problems_are_penalised_as_by_all_of_their_axes(monkeypatch):
    features, labels = drawn(240, 120, 8)
    small = fit(features, labels, 8)
    monkeypatch.setattr(cross_validation, "SMALL_SIZE", 0)
    large = fit(features, labels, 8)
    assert large.l2 == small.l2
    assert large.out_of_fold_error_rate == pytest.approx(small.out_of_fold_error_rate, abs=0.01)
