"""A training goes as in fastai 2.8: each test runs fastai itself on the same tiny network or data and compares."""

import contextlib
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.optimizer import register_optimizer_step_pre_hook

from trainables.batches import augmentation, tta
from trainables.batches.epoch_plan import plan_epoch
from trainables.network import loss, model, normalization, optimizer, schedule
from trainables.recipe import Recipe
from trainables.training.fine_tune import FineTune

pytestmark = [pytest.mark.oracle, pytest.mark.usefixtures("one_thread")]

AS_FASTAI = {"head": "mlp", "concat_pool": True, "layer_groups": "fastai", "train_bn": "always"}
FROM_SCRATCH = {"arch": "resnet18", "pretrained": False}
SMALL = {"presize": 48, "image_size": 32, "batch_size": 8, "tta_views": 0, "precision": "fp32"}
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def fastai():
    """All of fastai, before any test: it adds methods to its classes wherever it is imported."""
    import fastai.vision.all

    return fastai.vision.all


def fine_tune(images, **settings) -> FineTune:
    return FineTune(Recipe(**(FROM_SCRATCH | AS_FASTAI | SMALL | settings)), images)


# --- fastai's side ----------------------------------------------------------------------------------------------------


class Batches:
    """What fastai takes for a loader: hands out `batches`, `per_epoch` at a time, from the first again at the end."""

    def __init__(self, batches: list[tuple[torch.Tensor, torch.Tensor]], per_epoch: int) -> None:
        self.batches, self.per_epoch, self.epoch = batches, per_epoch, 0

    def __len__(self) -> int:
        return self.per_epoch

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        start = self.epoch * self.per_epoch % len(self.batches)
        self.epoch += 1
        return iter(self.batches[start : start + self.per_epoch])


def drawn_batches(number: int = 3) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(4, 3, 32, 32, generator=generator), torch.randint(0, 3, (4,), generator=generator))
        for _ in range(number)
    ]


def fastai_learner(arch: str = "resnet18", *, batches=None, per_epoch: int = 3, **options):
    """fastai's `vision_learner` on torchvision's network `arch`, or else timm's, from scratch."""
    from fastai.data.core import DataLoaders
    from fastai.losses import CrossEntropyLossFlat
    from fastai.vision.learner import vision_learner

    batches = batches or drawn_batches()
    loaders = DataLoaders(Batches(batches, per_epoch), Batches(batches[:1], 1), device=CPU)
    options = {"n_out": 3, "pretrained": False, "normalize": False, "loss_func": CrossEntropyLossFlat()} | options
    return vision_learner(loaders, getattr(torchvision.models, arch, arch), **options)


def timm_name(fastai_name: str) -> str:
    """timm's name of a tensor in fastai's Sequential(body, head) of a ResNet; the mlp head is `fc`."""
    part, index, rest = fastai_name.split(".", 2)
    if part == "1":
        return f"fc.{int(index) - 2}.{rest}"  # after the pooling and the flattening
    return f"{('conv1', 'bn1', 'relu', 'maxpool', 'layer1', 'layer2', 'layer3', 'layer4')[int(index)]}.{rest}"


def named_parameters(learner) -> dict[str, nn.Parameter]:
    return {timm_name(name): parameter for name, parameter in learner.model.named_parameters()}


def decays(learner, parameter: nn.Parameter) -> bool:
    return learner.opt.state[parameter].get("do_wd", True)


def swap_pools(values: torch.Tensor) -> torch.Tensor:
    """From timm's order of the concatenated pools, average first, to fastai's, or back; features are the last axis."""
    return torch.cat(values.chunk(2, dim=-1)[::-1], dim=-1)


def in_fastai_order(name: str, values: torch.Tensor) -> torch.Tensor:
    """Tensor `name` of an mlp head after concatenated pools, as fastai has it, or back."""
    takes_pools = name == "fc.2.weight" or (name.startswith("fc.0.") and values.ndim == 1)
    return swap_pools(values) if takes_pools else values


def copy_to_fastai(state: dict[str, torch.Tensor], learner) -> None:
    theirs = learner.model.state_dict()
    names = {timm_name(name): name for name in theirs}
    assert set(names) == set(state)
    learner.model.load_state_dict({names[name]: in_fastai_order(name, state[name]) for name in state})


def without_dropout(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


# --- Rates and momentum -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def recorded_steps(training: FineTune):
    """A list that gets, at each optimizer step, the settings of every parameter that the step moves, by name.

    They are rate, momentum, second beta, eps and weight decay.
    """
    names = {id(parameter): name for name, parameter in training.network.model.named_parameters()}
    steps = []

    def record(optimizer, args, kwargs):
        steps.append(
            {
                names[id(p)]: (group["lr"], *group["betas"], group["eps"], group["weight_decay"])
                for group in optimizer.param_groups
                for p in group["params"]
                if p.grad is not None
            }
        )

    hook = register_optimizer_step_pre_hook(record)
    try:
        yield steps
    finally:
        hook.remove()


def record_fastai_steps(learner) -> list[dict[str, tuple[float, ...]]]:
    """As `recorded_steps`, for all fits of `learner` from now on."""
    from fastai.callback.core import Callback

    names = {parameter: name for name, parameter in named_parameters(learner).items()}
    steps = []

    class Record(Callback):
        order = 100  # after the scheduler

        def before_step(self):
            steps.append(
                {
                    names[p]: (
                        *(hyper[key] for key in ("lr", "mom", "sqr_mom", "eps")),
                        hyper["wd"] * decays(learner, p),
                    )
                    for p, _, _, hyper in self.opt.all_params(with_grad=True)
                }
            )

    learner.add_cb(Record())
    return steps


def with_fine_tune_defaults(learner):
    learner.fine_tune(2)


def with_fine_tune(learner):
    learner.fine_tune(2, base_lr=3e-3, freeze_epochs=1, lr_mult=50, pct_start=0.2, div=4, div_final=1e4)


def with_stages_by_hand(learner):
    learner.freeze()
    learner.fit_one_cycle(3, 3e-3)
    learner.unfreeze()
    learner.fit_one_cycle(12, slice(1e-6, 1e-4))


SAME_RATES = [
    (with_fine_tune_defaults, {"freeze_epochs": 1, "epochs": 2}),
    (
        with_fine_tune,
        {"freeze_epochs": 1, "epochs": 2, "lr_max_frozen": 3e-3, "lr_ratio_frozen": 10, "pct_start_frozen": 0.99}
        | {"div_frozen": 25, "lr_max": 1.5e-3, "lr_ratio": 50, "pct_start": 0.2, "div": 4, "div_final": 1e4},
    ),
    (
        with_stages_by_hand,
        {"freeze_epochs": 3, "epochs": 12, "lr_max_frozen": 3e-3, "lr_ratio_frozen": 1, "pct_start_frozen": 0.25}
        | {"div_frozen": 25, "lr_max": 1e-4, "lr_ratio": 100, "pct_start": 0.25, "div": 25, "div_final": 1e5},
    ),
]


@pytest.mark.parametrize(("fit", "settings"), SAME_RATES, ids=lambda value: getattr(value, "__name__", ""))
def test_every_parameter_has_fastais_rate_and_momentum_at_every_step(colour_images, fit, settings):
    training, learner = fine_tune(colour_images, **settings), fastai_learner()
    assert training.steps_per_epoch == len(learner.dls.train)
    expected = record_fastai_steps(learner)
    with learner.no_bar(), learner.no_logging():
        fit(learner)
    with recorded_steps(training) as found:
        for _ in range(training.recipe.total_epochs):
            training.run_epoch()
    training.close()
    assert len(found) == len(expected) == 3 * training.recipe.total_epochs
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        values, wanted = (np.array([step[name] for name in theirs]) for step in (ours, theirs))
        np.testing.assert_allclose(values, wanted, rtol=0, atol=1e-6)
        np.testing.assert_allclose(values, wanted, rtol=1e-4)  # rates are as low as 1e-11
    assert len(found[0]) < len(found[-1]) == len(list(training.network.model.parameters()))


# --- Layer groups and freezing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["resnet18", "resnet34", "resnet50"])
def test_a_resnet_has_fastais_layer_groups_freezing_and_weight_decay(arch):
    recipe = Recipe(**(FROM_SCRATCH | AS_FASTAI | {"arch": arch}))
    network, learner = model.build(recipe, 3), fastai_learner(arch)
    ours, theirs = dict(network.model.named_parameters()), named_parameters(learner)
    assert {name: p.shape for name, p in ours.items()} == {name: p.shape for name, p in theirs.items()}

    learner.create_opt()
    names = {parameter: name for name, parameter in (*ours.items(), *theirs.items())}
    groups = network.layer_groups("fastai")
    found = [{names[p] for p in group} for group in groups]
    assert found == [{names[p] for p in group} for group in learner.opt.param_lists]
    assert len(found) == 3

    learner.freeze()
    network.freeze_backbone("always")
    frozen = {name: p.requires_grad for name, p in ours.items()}
    assert frozen == {name: p.requires_grad for name, p in theirs.items()}
    assert set(frozen.values()) == {True, False}

    learner.unfreeze()
    network.unfreeze()
    assert all(p.requires_grad for p in (*ours.values(), *theirs.values()))

    rates = schedule.stage_rates(recipe, 3, frozen=False)
    ours = optimizer.adamw(groups, rates, recipe).param_groups
    decay = {names[p]: group["weight_decay"] for group in ours for p in group["params"]}
    assert decay == {name: 0.01 if decays(learner, p) else 0 for name, p in theirs.items()}


def parts(groups, head: set[nn.Parameter]) -> list[list[tuple]]:
    """The shapes in each layer group, and whether they are of the head."""
    return [[(tuple(parameter.shape), parameter in head) for parameter in group] for group in groups]


@pytest.mark.parametrize("arch", ["test_efficientnet", "test_vit"])
def test_another_network_has_fastais_two_layer_groups_body_and_head(arch):
    network = model.build(Recipe(arch=arch, pretrained=False, head="mlp", image_size=32), 3)
    learner = fastai_learner(arch, img_size=32) if "vit" in arch else fastai_learner(arch, concat_pool=False)
    learner.create_opt()
    found = parts(network.layer_groups("fastai"), set(network.classifier.parameters()))
    assert len(found) == 2
    assert found == parts(learner.opt.param_lists, set(learner.model[1].parameters()))

    learner.freeze()
    network.freeze_backbone("always")  # layer norms train too
    trained, theirs = ([p.requires_grad for p in net.parameters()] for net in (network.model, learner.model))
    assert trained == theirs
    assert 0 < sum(trained) < len(trained)


def running_statistics(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in network.named_buffers() if "running" in name}


@pytest.mark.parametrize("train_bn", ["always", "unfrozen", "never"])
def test_a_frozen_epoch_moves_the_backbones_statistics_as_in_fastai_or_not_at_all(colour_images, train_bn):
    training = fine_tune(colour_images, train_bn=train_bn)
    before = running_statistics(training.network.model)
    with recorded_steps(training) as steps:
        training.run_epoch()
    training.close()
    after = running_statistics(training.network.model)
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    stepped = set().union(*steps)
    if train_bn != "always":
        assert all(name.startswith("fc.") for name in moved | stepped)
        # No optimizer holds them, so a gradient would still be there.
        assert all(p.grad is None for name, p in training.network.model.named_parameters() if name[:3] != "fc.")
        return
    learner = fastai_learner()
    learner.freeze()
    theirs = running_statistics(learner.model)
    with learner.no_bar(), learner.no_logging():
        learner.fit_one_cycle(1)
    changed = {
        timm_name(name)
        for name, value in running_statistics(learner.model).items()
        if not torch.equal(value, theirs[name])
    }
    assert moved == changed == set(after)
    assert stepped == {name for name, p in named_parameters(learner).items() if p.requires_grad}


# --- Steps ------------------------------------------------------------------------------------------------------------


def small_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
        nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU()),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)),
    )


def test_twenty_steps_of_the_optimizer_are_those_of_fastais_adam():
    from fastai.callback.schedule import combined_cos
    from fastai.optimizer import Adam
    from fastai.torch_core import norm_bias_params

    recipe = Recipe(lr_max=3e-2, lr_ratio=100, pct_start=0.3, div=5, div_final=1e3, weight_decay=0.01)
    ours, theirs, steps = small_network(), small_network(), 20
    cycle = schedule.stage_cycle(recipe, frozen=False)
    opt = optimizer.adamw(
        [list(part.parameters()) for part in ours], schedule.stage_rates(recipe, 3, frozen=False), recipe
    )
    adam = Adam([list(part.parameters()) for part in theirs], lr=slice(3e-4, 3e-2), wd=0.01)
    for parameter in norm_bias_params(theirs):
        adam.state[parameter]["do_wd"] = False
    peaks = np.array([hyper["lr"] for hyper in adam.hypers])
    rate, momentum = combined_cos(0.3, peaks / 5, peaks, peaks / 1e3), combined_cos(0.3, 0.95, 0.85, 0.95)
    before = [p.clone() for p in ours.parameters()]
    for step, (images, labels) in enumerate(drawn_batches(steps)):
        nn.functional.cross_entropy(ours(images), labels).backward()
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            mine.grad *= 10.0 ** -(step % 7)  # down to where eps decides
            other.grad = mine.grad.clone()
        optimizer.set_position(opt, cycle, step / steps)
        opt.step()
        opt.zero_grad()
        adam.set_hyper("lr", rate(step / steps))
        adam.set_hyper("mom", momentum(step / steps))
        adam.step()
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-6)
    moved = [(p - old).abs().max().item() for p, old in zip(ours.parameters(), before, strict=True)]
    assert sorted(moved)[1] > 1e-4  # all but the bias before a norm, which has no gradient


def test_the_same_batches_train_the_same_network_to_the_same_weights(colour_images):
    """Both stages at once: freezing, batch norms, rates, Adam, its fresh moments in each stage, and the loss.

    In float64, since a value that rounding moves across zero, at a ReLU, soon makes another network.
    """
    training = fine_tune(colour_images, freeze_epochs=1, epochs=2, smoothing=0.1)
    network = training.network.model.double()
    inputs = training.inputs
    inputs.mean, inputs.std = inputs.mean.double(), inputs.std.double()
    without_dropout(network)
    start = {name: value.clone() for name, value in network.state_dict().items()}
    batches, losses = [], []
    mixed, step = inputs.mixed, training._step

    def record_batch(*arguments):
        seen, targets = mixed(*arguments)
        batches.append((seen, targets.argmax(dim=1)))
        return seen, targets

    def record_loss(*arguments):
        losses.append(step(*arguments))
        return losses[-1]

    inputs.mixed, training._step = record_batch, record_loss
    for _ in range(3):
        training.run_epoch()
    training.close()

    from fastai.losses import LabelSmoothingCrossEntropyFlat

    smoothed = LabelSmoothingCrossEntropyFlat(eps=0.1)
    learner = fastai_learner(batches=batches, loss_func=lambda logits, labels: smoothed(logits.float(), labels))
    without_dropout(learner.model.double())
    copy_to_fastai(start, learner)
    theirs = record_losses(learner)
    with learner.no_bar(), learner.no_logging():
        learner.fine_tune(2)
    torch.testing.assert_close(torch.stack(losses), torch.stack(theirs), rtol=0, atol=1e-6)
    end = {timm_name(name): value for name, value in learner.model.state_dict().items()}
    for name, value in network.state_dict().items():
        ours, before = in_fastai_order(name, value).float(), in_fastai_order(name, start[name]).float()
        difference, moved = (ours - end[name]).abs().max(), (ours - before).abs().max()
        assert difference <= 5e-6, name
        assert difference <= 0.02 * moved, name
        assert moved > 0, name


def record_losses(learner) -> list[torch.Tensor]:
    from fastai.callback.core import Callback

    losses = []

    class RecordLosses(Callback):
        def before_step(self):
            losses.append(self.learn.loss.detach().as_subclass(torch.Tensor))

    learner.add_cb(RecordLosses())
    return losses


# --- Loss -------------------------------------------------------------------------------------------------------------


class Drawn:
    """A distribution that draws what it is told to."""

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values

    def sample(self, shape) -> torch.Tensor:
        return self.values.view(shape)


def fastai_mixup(learner, images, labels, share, seed: int):
    """fastai's MixUp on one batch with the given lambdas and the permutation of `seed`: its inputs, and its loss."""
    from fastai.callback.mixup import MixUp

    mixup = MixUp()
    learner.add_cb(mixup)
    learner.training, learner.xb, learner.yb = True, (images,), (labels,)
    mixup.before_train()
    mixup.distrib = Drawn(share)
    torch.manual_seed(seed)
    mixup.before_batch()
    return learner.xb[0], lambda logits: learner.loss_func(logits, *learner.yb)


def plain(values: torch.Tensor) -> torch.Tensor:
    return values.as_subclass(torch.Tensor)


@pytest.mark.parametrize("smoothing", [0, 0.1, 0.4])
@pytest.mark.parametrize("mixup", [False, True])
@pytest.mark.parametrize("scale", [1, 4])
def test_mixup_and_label_smoothing_give_fastais_inputs_loss_and_gradient(smoothing, mixup, scale):
    from fastai.losses import CrossEntropyLossFlat, LabelSmoothingCrossEntropyFlat

    n, classes = 16, 5
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(n, 3, 8, 8, generator=generator)
    labels = torch.randint(0, classes, (n,), generator=generator)
    share = torch.rand(n, generator=generator).clamp(0.02, 0.98)
    logits = scale * torch.randn(n, classes, generator=generator)
    torch.manual_seed(7)
    partners = torch.randperm(n)

    function = LabelSmoothingCrossEntropyFlat(eps=smoothing) if smoothing else CrossEntropyLossFlat()
    learner = fastai_learner(loss_func=function)
    inputs, targets = images, loss.soft_targets(labels, classes)
    expected_inputs, expected_loss = images, lambda predictions: function(predictions, labels)
    if mixup:
        expected_inputs, expected_loss = fastai_mixup(learner, images, labels, share, seed=7)
        rows, larger = torch.arange(n), torch.maximum(share, 1 - share)
        inputs, targets = (loss.mix(values, rows, partners, larger) for values in (inputs, targets))
    torch.testing.assert_close(inputs, plain(expected_inputs), rtol=0, atol=1e-6)

    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    value, expected = loss.cross_entropy(ours, targets, smoothing) / n, plain(expected_loss(theirs))
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-6)
    value.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-6)
    assert ours.grad.abs().max() > 1e-3


def test_mixups_alpha_draws_as_in_fastai():
    from fastai.callback.mixup import MixUp

    n = 4000
    recipe = Recipe(mixup_alpha=0.4, affine_p=0, lighting_p=0)
    (step,) = plan_epoch(recipe, np.arange(n), labels=np.zeros(n, int), epoch=0, batch_size=n, rows=slice(n))
    torch.manual_seed(0)
    lam = MixUp(0.4).distrib.sample((n,))
    expected = torch.maximum(lam, 1 - lam)
    deciles = np.linspace(0.1, 0.9, 9)
    np.testing.assert_allclose(np.quantile(step.lam, deciles), np.quantile(expected, deciles), rtol=0, atol=0.02)
    assert sorted(step.second) == sorted(step.first)


# --- Test-time augmentation -------------------------------------------------------------------------------------------


def tta_learner(images: torch.Tensor, labels: list[int], network: nn.Module):
    """A fastai learner whose validation set is `images`, with a random shift of the brightness where augmented."""
    from fastai.data.core import Datasets
    from fastai.learner import Learner
    from fastai.losses import CrossEntropyLossFlat
    from fastai.torch_core import TensorCategory, TensorImage
    from fasttransform import Transform

    def shift(x: TensorImage):
        return x + torch.randn(x.shape[0], x.shape[1], 1, 1)

    indices = list(range(len(images)))
    sets = Datasets(
        indices,
        [[lambda i: TensorImage(images[i])], [lambda i: TensorCategory(torch.tensor(labels[i]))]],
        splits=[indices[:4], indices],
    )
    loaders = sets.dataloaders(bs=4, num_workers=0, device=CPU, after_batch=[Transform(enc=shift, split_idx=0)])
    return Learner(loaders, network, loss_func=CrossEntropyLossFlat())


def recorded_views(learner) -> list[torch.Tensor]:
    """A list that gets the logits of each pass over the validation images."""
    from fastai.callback.core import Callback

    passes = []

    class RecordViews(Callback):
        def before_validate(self):
            passes.append([])

        def after_pred(self):
            passes[-1].append(plain(self.learn.pred).detach())

    learner.add_cb(RecordViews())
    return passes


@pytest.mark.parametrize("beta", [0.25, 0, 1, 0.6])
def test_test_time_augmentation_averages_the_views_as_fastais_tta(beta):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(10, 3, 12, 12, generator=generator)
    network = small_network()
    learner = tta_learner(images, [i % 3 for i in range(10)], network)
    with torch.no_grad():
        network[2][2].weight.mul_(10)  # confident, so that an average of logits would not do
    passes = recorded_views(learner)
    with learner.no_bar(), learner.no_logging():
        expected, _ = learner.tta(n=4, beta=beta)
    logits = [torch.cat(batches) for batches in passes]
    assert [len(view) for view in logits] == [10] * 5
    with torch.inference_mode():
        torch.testing.assert_close(logits[-1], network.eval()(images))  # fastai's last pass is the centre view
    views = torch.stack([view.softmax(dim=1) for view in logits])
    assert (views[0] - views[1]).abs().max() > 0.05

    torch.testing.assert_close(tta.average(views[:-1], views[-1], beta), plain(expected), rtol=0, atol=1e-6)

    augmented = iter(logits[:-1])

    def label(augmentations: augmentation.Augmentations) -> torch.Tensor:
        is_centre = np.array_equal(augmentations.maps, augmentation.centre(10).maps)
        return logits[-1] if is_centre else next(augmented)

    recipe = Recipe(tta_beta=beta, tta_views=4)
    found = tta.predict(label, recipe, 10, views=recipe.tta_views)
    torch.testing.assert_close(found, plain(expected), rtol=0, atol=1e-6)


# --- Normalisation ----------------------------------------------------------------------------------------------------


def fastai_normalisation(arch: str) -> tuple[list[float], list[float]]:
    """Mean and deviation of the Normalize that fastai's `vision_learner` adds for a pretrained timm network."""
    from fastai.vision.learner import _timm_norm, create_timm_model

    loaders = fastai_image_loaders([np.zeros((8, 8, 3), np.uint8)] * 4)
    _, config = create_timm_model(arch, 3, pretrained=False)
    _timm_norm(loaders, config, pretrained=True)
    (added,) = [step for step in loaders.train.after_batch.fs if type(step).__name__ == "Normalize"]
    return added.mean.flatten().tolist(), added.std.flatten().tolist()


def fastai_image_loaders(images: list[np.ndarray], **options):
    """fastai's loaders of images in one batch."""
    from fastai.data.core import Datasets
    from fastai.vision.core import PILImage, ToTensor
    from fastai.vision.data import IntToFloatTensor

    indices = list(range(len(images)))
    sets = Datasets(indices, [[lambda i: PILImage.create(images[i])], [lambda i: 0]], splits=[indices, indices])
    after_batch = [IntToFloatTensor(), *options.pop("after_batch", [])]
    options = {"bs": len(images), "num_workers": 0, "device": CPU} | options
    return sets.dataloaders(after_item=[ToTensor()], after_batch=after_batch, **options)


@pytest.mark.parametrize("arch", ["resnet18.a1_in1k", "test_vit.r160_in1k", "mixer_s32_224", "lcnet_050.ra2_in1k"])
def test_a_pretrained_network_gets_its_inputs_as_fastai_normalises_them(arch):
    network = model.build(Recipe(arch=arch, image_size=224), 3, load_pretrained=False)
    mean, std = fastai_normalisation(arch)
    assert (network.mean, network.std) == (pytest.approx(mean, abs=1e-6), pytest.approx(std, abs=1e-6))


def test_torchvisions_resnet_weights_get_fastais_imagenet_statistics():
    from fastai.vision.core import imagenet_stats

    network = model.build(Recipe(arch="resnet34.tv_in1k"), 3, load_pretrained=False)
    assert (list(network.mean), list(network.std)) == tuple(imagenet_stats)


def textured_images(number: int, side: int, noise: float) -> list[np.ndarray]:
    """Noise over gradients, brighter in one channel, not all square."""
    rng = np.random.default_rng(0)
    images = []
    for i in range(number):
        height, width = side, side + i % 9
        slope = np.linspace(0, rng.uniform(20, 120), width)[None, :, None]
        pixels = rng.normal(rng.uniform(60, 160, 3), noise, (height, width, 3)) + slope
        images.append(np.clip(pixels, 0, 255).astype(np.uint8))
    return images


def all_pixels(images) -> tuple[np.ndarray, np.ndarray]:
    pixels = np.concatenate([image.reshape(-1, 3) for image in images]) / 255
    return pixels.mean(axis=0), pixels.std(axis=0)


@pytest.mark.parametrize(("number", "side", "noise"), [(30, 48, 10), (30, 48, 60), (100, 64, 60), (4, 17, 60)])
def test_from_scratch_the_statistics_are_those_of_all_training_pixels(number, side, noise):
    images = textured_images(number, side, noise)
    mean, std = normalization.channel_statistics(images, np.arange(number))
    expected_mean, expected_std = all_pixels(images)
    np.testing.assert_allclose(mean, expected_mean, rtol=0, atol=1e-3)
    np.testing.assert_allclose(std, expected_std, rtol=0, atol=1e-3)


def test_a_training_from_scratch_normalises_by_its_training_images_alone(colour_images):
    training = fine_tune(colour_images)
    training.close()
    mean, std = all_pixels([colour_images[i] for i in training.train_indices])
    np.testing.assert_allclose(training.network.mean, mean, rtol=0, atol=1e-3)
    np.testing.assert_allclose(training.network.std, std, rtol=0, atol=1e-3)


def test_fastais_normalize_without_statistics_finds_nearly_the_same():
    """It takes one batch, here all images."""
    from fastai.data.transforms import Normalize

    images = [image[:48, :48] for image in textured_images(30, 48, 60)]
    loaders = fastai_image_loaders(images, after_batch=[Normalize()])
    (theirs,) = [step for step in loaders.train.after_batch.fs if isinstance(step, Normalize)]
    mean, std = normalization.channel_statistics(images, np.arange(30))
    np.testing.assert_allclose(mean, theirs.mean.flatten(), rtol=0, atol=0.01)
    np.testing.assert_allclose(std, theirs.std.flatten(), rtol=0, atol=0.01)


# --- Network ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dropout", "hidden"), [(0.5, 512), (0.2, 64)])
def test_the_mlp_head_has_fastais_layers_and_first_weights(dropout, hidden):
    from fastai.vision.learner import add_head

    torch.manual_seed(0)
    ours = model.mlp_head(1024, 37, Recipe(head="mlp", dropout=dropout, hidden=hidden))
    theirs = add_head(nn.Identity(), 512, 37, ps=dropout, lin_ftrs=[hidden])[1][2:]
    assert len(ours) == len(theirs) == 7
    for mine, other in zip(ours, theirs, strict=True):
        assert isinstance(mine, type(other))
        same = ("p", "eps", "momentum", "in_features", "out_features", "affine", "track_running_stats")
        assert {k: getattr(mine, k, None) for k in same} == {k: getattr(other, k, None) for k in same}
        state, expected = mine.state_dict(), other.state_dict()
        assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in expected.items()}
        for name, values in state.items():
            if not isinstance(mine, nn.Linear):
                torch.testing.assert_close(values, expected[name], rtol=0, atol=0)
                continue
            count = values.numel()
            assert values.std().item() == pytest.approx((2 / mine.in_features) ** 0.5, rel=4 / (2 * count) ** 0.5)
            assert values.std().item() == pytest.approx(expected[name].std().item(), rel=6 / (2 * count) ** 0.5)
            assert values.abs().max() > 2.5 * values.std()  # normal, not uniform
            assert abs(values.mean().item()) < 4 * values.std().item() / count**0.5


@pytest.mark.parametrize("concat_pool", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_the_same_weights_answer_as_fastais_network(concat_pool, training):
    recipe = Recipe(**(FROM_SCRATCH | AS_FASTAI | {"concat_pool": concat_pool}))
    network, learner = model.build(recipe, 3).model, fastai_learner(concat_pool=concat_pool)
    for either in (network, learner.model):
        without_dropout(either)
        either.train(training)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))  # or a permuted norm would not show
    order = in_fastai_order if concat_pool else lambda name, values: values
    names = {timm_name(name): name for name in learner.model.state_dict()}
    learner.model.load_state_dict({names[name]: order(name, value) for name, value in network.state_dict().items()})
    images = torch.randn(6, 3, 64, 64)
    found, expected = network(images), learner.model(images)
    torch.testing.assert_close(found, plain(expected), rtol=1e-4, atol=1e-4)
    after = {timm_name(name): value for name, value in learner.model.state_dict().items()}
    for name, value in network.state_dict().items():
        torch.testing.assert_close(order(name, value), after[name], rtol=1e-4, atol=1e-5)


def norms(network: nn.Module) -> list[tuple]:
    found = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    return [(m.num_features, m.eps, m.momentum, m.affine, m.track_running_stats) for m in found]


@pytest.mark.parametrize("arch", ["test_resnet", "test_efficientnet", "tf_efficientnet_b0", "tf_mobilenetv3_small_075"])
def test_the_backbones_batch_norms_are_those_of_fastais_timm_body(arch):
    from fastai.vision.learner import create_timm_model

    ours = model.build(Recipe(arch=arch, pretrained=False), 3).model
    body = create_timm_model(arch, 3, pretrained=False)[0][0]
    assert norms(ours) == norms(body)
    assert len(norms(ours)) > 5
