"""The training loop: it learns, continues exactly from any epoch, and does not depend on the number of workers."""

import json
import os
import shutil
import socket
import subprocess
import sys
import weakref
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
from conftest import COLOURS
from processes import new_processes
from several_labels import draw_lights
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from trainables import finetune
from trainables.batches import augmentation
from trainables.data.layouts import find_images
from trainables.data.presize import PresizedImages, presize
from trainables.network.calibration import cross_fitted, expected_calibration_error, fit_temperature, softmax
from trainables.network.precision import autocast_dtype
from trainables.network.schedule import stage_cycle
from trainables.recipe import Recipe
from trainables.training import fine_tune as fine_tune_module
from trainables.training.checkpoint import WEIGHTS_FILE
from trainables.training.distributed import share_batch_norm
from trainables.training.fine_tune import Diverged, FineTune

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {"arch": "test_resnet", "pretrained": False, "presize": 48, "image_size": 32, "batch_size": 8, "hidden": 16}
SMALL |= {"freeze_epochs": 1, "epochs": 1, "lr_ratio": 10}
HARD = {"head": "mlp", "dropout": 0.5, "mixup_alpha": 0.4, "smoothing": 0.1}
LOSSES = ("train_loss", "valid_loss", "error_rate", "auroc", "temperature")


def fine_tune(images, *, batch_parts: int = 1, **settings) -> FineTune:
    return FineTune(Recipe(**(SMALL | settings)), images, batch_parts=batch_parts)


def losses(training: FineTune) -> tuple[float, ...]:
    metrics = training.run_epoch()
    return tuple(metrics.get(name, 1.0) for name in LOSSES)  # of several labels there is no temperature


class RecordedSteps:
    """Every optimizer step taken within: the norm of each gradient and the learning rate of each group."""

    def __enter__(self):
        self.gradients, self.rates = [], []
        self.hook = register_optimizer_step_pre_hook(self._record)
        return self

    def __exit__(self, *error):
        self.hook.remove()

    def _record(self, optimizer, args, kwargs):
        groups = optimizer.param_groups
        self.gradients.append([p.grad.norm().item() for group in groups for p in group["params"]])
        self.rates.append([group["lr"] for group in groups])


# --- Learning ---------------------------------------------------------------------------------------------------------


def test_training_learns_what_tells_the_classes_apart(colour_images):
    training = fine_tune(colour_images, epochs=5, batch_size=4, lr_max=1e-2, lr_ratio=1, bn_momentum=0.5)
    first, *_, last = [training.run_epoch() for _ in range(6)]
    assert last["error_rate"] <= 0.15 < first["error_rate"]
    assert last["valid_loss"] < 0.6 * first["valid_loss"]
    assert last["train_loss"] < 0.6 * first["train_loss"]


def test_metrics_say_where_the_training_stands(colour_images):
    training = fine_tune(colour_images, freeze_epochs=1, epochs=3)
    rows = [training.run_epoch() for _ in range(4)]
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    assert [row["stage"] for row in rows] == ["frozen", "unfrozen", "unfrozen", "unfrozen"]
    assert [row["progress"] for row in rows] == [0, 33, 66, 100]
    for row in rows:
        assert row["accuracy"] == 1 - row["error_rate"]
        assert row["images_per_second"] > 0


def test_the_temperature_is_that_of_the_validation_images_and_goes_with_the_weights(colour_images):
    training = fine_tune(colour_images, epochs=1, batch_size=4, lr_max=1e-2, lr_ratio=1, bn_momentum=0.5)
    training.run_epoch()
    metrics = training.run_epoch()
    centre = augmentation.centre(len(training.valid_indices), training.recipe.resize_method)
    logits = training._valid_logits(centre).numpy()
    labels = training.inputs.labels[training.valid_indices].numpy()
    assert metrics["temperature"] == training.temperature == fit_temperature(logits, labels) != 1
    assert metrics["calibration_error"] == expected_calibration_error(cross_fitted(logits, labels), labels)
    assert metrics["calibration_error_before"] == expected_calibration_error(softmax(logits), labels)
    state = training.state()
    copy = fine_tune(colour_images, epochs=1, seed=5)
    copy.load_state(state)
    assert copy.state()[WEIGHTS_FILE] == state[WEIGHTS_FILE]
    header = int.from_bytes(state[WEIGHTS_FILE][:8], "little")
    metadata = json.loads(state[WEIGHTS_FILE][8 : 8 + header])["__metadata__"]
    assert metadata == {"temperature": str(training.temperature)}


@pytest.mark.parametrize(("freeze_epochs", "epochs", "stages"), [(2, 0, ["frozen"] * 2), (0, 2, ["unfrozen"] * 2)])
def test_either_stage_can_be_left_out(colour_images, freeze_epochs, epochs, stages):
    training = fine_tune(colour_images, freeze_epochs=freeze_epochs, epochs=epochs)
    rows = [training.run_epoch() for _ in range(2)]
    assert [row["stage"] for row in rows] == stages
    assert rows[-1]["progress"] == 100
    assert np.isfinite([row["train_loss"] for row in rows]).all()
    assert training.state()


def test_one_cycle_spans_all_epochs_of_a_stage(colour_images):
    training = fine_tune(colour_images, freeze_epochs=2, epochs=3, lr_max=0.01, lr_max_frozen=0.02)
    with RecordedSteps() as steps:
        for _ in range(5):
            training.run_epoch()
    per_epoch = training.steps_per_epoch
    assert (per_epoch, len(steps.rates)) == (3, 15)
    frozen, unfrozen = (stage_cycle(training.recipe, frozen=f) for f in (True, False))
    highest, lowest = ([end(rates) for rates in steps.rates] for end in (max, min))
    assert highest[:6] == pytest.approx([0.02 * frozen.lr_factor(i / 6) for i in range(6)])
    assert highest[6:] == pytest.approx([0.01 * unfrozen.lr_factor(i / 9) for i in range(9)])
    assert [10 * rate for rate in lowest[6:]] == pytest.approx(highest[6:])


def test_the_frozen_stage_computes_no_gradients_of_the_backbone(colour_images):
    training = fine_tune(colour_images, head="mlp", freeze_epochs=1, epochs=1)
    model, seen = training.network.model, []
    head = {id(parameter) for parameter in training.network.classifier.parameters()}

    def record(optimizer, args, kwargs):
        seen.append([(id(p) in head, p.grad is not None, p.requires_grad) for p in model.parameters()])

    before = {name: value.clone() for name, value in model.state_dict().items()}
    hook = register_optimizer_step_pre_hook(record)
    try:
        training.run_epoch()
        frozen_steps = len(seen)
        changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        training.run_epoch()
    finally:
        hook.remove()
    for step in seen[:frozen_steps]:
        assert all(has_gradient == wants_gradient == is_head for is_head, has_gradient, wants_gradient in step)
    for step in seen[frozen_steps:]:
        assert all(has_gradient for _, has_gradient, _ in step)
    assert changed
    assert all(name.startswith("fc.") for name in changed)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["crop", "pad"])
def test_cached_and_uncached_trainings_have_the_same_losses(colour_folder, search_cache, method):
    folder = find_images(colour_folder)
    ours = []
    for storage in ("memory-map", "off"):
        images = presize(folder, 48, method, storage=storage)
        training = fine_tune(images, resize_method=method, **HARD)
        ours.append([losses(training) for _ in range(2)])
        training.close()
    assert ours[0] == ours[1]


def test_a_diverged_training_names_the_epoch_and_the_rate(colour_images):
    training = fine_tune(colour_images, freeze_epochs=1, epochs=1)
    training.run_epoch()
    for group in training.optimizer.param_groups:
        group["lr_max"] = 1e30
    with pytest.raises(
        Diverged, match=r"training loss is (nan|inf) at epoch 2, step [123] of 3 .*rate \d(\.\d)?e\+\d\d\)"
    ):
        training.run_epoch()


def test_a_diverged_training_ends_at_once(colour_images, monkeypatch):
    monkeypatch.setattr(fine_tune_module, "STEPS_PER_CHECK", 4)
    training = fine_tune(colour_images, arch="test_vit", batch_size=2, freeze_epochs=0, epochs=1, head="linear")
    assert training.steps_per_epoch > 8
    for group in training.optimizer.param_groups:
        group["lr_max"] = 1e30
    with RecordedSteps() as steps, pytest.raises(Diverged, match=r"epoch 1, step \d+ of \d+ \(head's learning rate"):
        training.run_epoch()
    assert len(steps.rates) == 4


# --- Batches in parts -------------------------------------------------------------------------------------------------


default_cfgs = timm.models.generate_default_cfgs({"dropping_vit": {"fixed_input_size": True}})  # timm looks for these


@timm.models.register_model
def dropping_vit(**options) -> nn.Module:
    """A transformer that drops whatever a timm network can: patches, features, paths, and inputs of its head."""
    rates = {"drop_rate": 0.3, "proj_drop_rate": 0.2, "drop_path_rate": 0.5, "patch_drop_rate": 0.3}
    return timm.create_model("test_vit", **rates | options)


IN_PARTS = {
    "dropout of all kinds": {"arch": "dropping_vit", "batch_size": 7, "freeze_epochs": 0, "mixup_alpha": 0.2},
    "dropout of positions": {"arch": "test_vit_relpos", "batch_size": 7, "freeze_epochs": 0},
    "layer norms": {"arch": "test_vit", "batch_size": 7, "mixup_alpha": 0.2},
    "frozen norms, linear head": {"train_bn": "never", "freeze_epochs": 1, "epochs": 0},
}
"""Without a batch norm that trains."""


@pytest.mark.slow
@pytest.mark.parametrize("batch_parts", [2, 4])
@pytest.mark.parametrize("settings", IN_PARTS)
def test_a_batch_in_parts_trains_like_the_whole_one(colour_images, whole_batches, settings, batch_parts):
    """Where no batch norm looks at the batch. Odd parts, mixup, dropout and stochastic depth included."""
    whole, parts = whole_batches[settings], run_recipe(colour_images, IN_PARTS[settings], batch_parts=batch_parts)
    assert np.array(parts["losses"]) == pytest.approx(np.array(whole["losses"]), rel=1e-5)
    for found, expected in zip(parts["gradients"], whole["gradients"], strict=True):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.fixture(scope="module")
def whole_batches(colour_images) -> dict[str, dict]:
    return {name: run_recipe(colour_images, settings) for name, settings in IN_PARTS.items()}


def test_the_mlp_heads_dropout_of_a_batch_in_parts_is_that_of_the_whole_batch(colour_images):
    """Its batch norms see one part at a time, so its gradients are others; its masks are not."""
    masks = []
    for batch_parts in (1, 2, 4):
        training, seen = fine_tune(colour_images, head="mlp", dropout=0.5, batch_parts=batch_parts), []
        dropout = [module for module in training.network.classifier.modules() if isinstance(module, nn.Dropout)][-1]
        dropout.register_forward_pre_hook(lambda module, inputs: (torch.ones_like(inputs[0]),))
        dropout.register_forward_hook(
            lambda module, inputs, output, seen=seen: seen.append(output) if module.training else None
        )
        training.run_epoch()
        masks.append(torch.cat(seen))
    assert 0.4 < (masks[0] == 0).float().mean() < 0.6
    assert all(torch.equal(found, masks[0]) for found in masks[1:])


def test_parts_are_no_smaller_than_an_image_and_say_when_they_cannot_be_smaller(colour_images):
    training = fine_tune(colour_images, arch="test_vit", head="linear", batch_size=4, batch_parts=2)
    assert training.can_split_further
    training = fine_tune(colour_images, arch="test_vit", head="linear", batch_size=4, batch_parts=8)
    assert not training.can_split_further
    training.run_epoch()
    training = fine_tune(colour_images, head="mlp", batch_size=6, batch_parts=4)  # whose norms need two images
    assert not training.can_split_further
    training.run_epoch()


def test_every_batch_is_a_sign_of_progress(colour_images):
    signs = []
    training = FineTune(Recipe(**SMALL), colour_images, on_progress=lambda: signs.append(training.epochs_done))
    training.run_epoch()
    assert len(signs) == training.steps_per_epoch + -(-len(training.valid_indices) // training.batch_size)


class ColourOracle(nn.Module):
    """Knows the classes of the drawn images: the largest of the three channels."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 100 * x.mean(dim=(2, 3))


def test_in_the_folds_together_each_image_validates_once(colour_images):
    trainings = [FineTune(Recipe(**SMALL), colour_images, fold=(number, 5)) for number in range(5)]
    assert sorted(np.concatenate([training.valid_indices for training in trainings])) == list(range(36))
    assert trainings[0].valid_indices.tolist() == colour_images.split()[1].tolist()


def test_all_images_train_where_that_is_asked_for(colour_images):
    training = FineTune(Recipe(**SMALL), colour_images, all_images=True)
    assert training.train_indices.tolist() == list(range(36))
    drawn = [int(i) for step in training._steps(0) for i in step.indices]
    assert set(drawn) & set(training.valid_indices)
    metrics = training.run_epoch()
    assert (metrics["train_images"], metrics["valid_images"]) == (36, len(colour_images.split()[1]))


def test_images_keep_their_labels_in_evaluation(colour_images):
    training = fine_tune(colour_images, batch_size=3)
    object.__setattr__(training.network, "model", ColourOracle())
    assert training.evaluate()["error_rate"] == 0
    training.inputs.labels = (training.inputs.labels + 1) % 3
    assert training.evaluate()["error_rate"] == 1


@pytest.mark.parametrize("mixup_alpha", [0, 1])
def test_images_keep_their_labels_in_training_and_mixup_mixes_both_alike(colour_images, mixup_alpha):
    training = fine_tune(colour_images, mixup_alpha=mixup_alpha, lighting_p=0, batch_size=13)
    steps = list(training._steps(training.epochs_done))
    plans = [(step.indices, step.augmentations) for step in steps]
    colours = torch.tensor(list(COLOURS.values()), dtype=torch.float32)
    mixed = 0
    for step, batch in zip(steps, training.inputs.loader.batches(plans, 32, torch.device("cpu")), strict=True):
        inputs, targets = training.inputs.mixed(batch, step)
        assert inputs.shape == (13, 3, 32, 32)
        seen = (inputs * training.inputs.std + training.inputs.mean).mean(dim=(2, 3))
        # A grey square hides up to a tenth of an image.
        assert (seen - targets @ colours).abs().max() < 30
        torch.testing.assert_close(targets.sum(dim=1), torch.ones(13))
        mixed += (targets.max(dim=1).values < 0.99).sum().item()
    assert (mixed > 5) == (mixup_alpha > 0)


def test_each_epoch_sees_each_image_once_at_most_in_another_order(colour_images):
    training = fine_tune(colour_images)
    first = np.concatenate([step.indices for step in training._steps(training.epochs_done)])
    training.epochs_done = 1
    second = np.concatenate([step.indices for step in training._steps(training.epochs_done)])
    assert len(np.unique(first)) == len(first) == 24
    assert set(first) <= set(training.train_indices)
    assert list(first) != list(second)


# --- Continuing -------------------------------------------------------------------------------------------------------

CONTINUED = {
    "mlp head, mixup": HARD | {"freeze_epochs": 2, "epochs": 2},
    "progressive resizing": {"freeze_epochs": 1, "epochs": 3, "start_size": 20, "start_share": 0.5, "batch_size": 4},
    # half precision and a rate that makes losses overflow now and then, so that the scale is no constant
    "fp16 scaler": {"freeze_epochs": 1, "epochs": 3, "precision": "fp16"},
}
"""Recipes of four epochs."""


def continued(cache: str, settings: dict, state: dict[str, bytes]) -> tuple[float, ...]:
    """The next epoch's losses from `state`; runs in a new process."""
    torch.set_num_threads(1)
    torch.manual_seed(np.random.SeedSequence().entropy % 2**31)  # what went on before must not matter
    training = FineTune(Recipe(**SMALL | settings), PresizedImages(cache), load_pretrained=False)
    training.load_state(state)
    return losses(training)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * bool(i)) for i, name in enumerate(CONTINUED)]
)
def test_a_training_continues_exactly_in_a_new_process_from_any_epoch(colour_images, name):
    straight = fine_tune(colour_images, **CONTINUED[name])
    states, expected = [straight.state()], []
    for _ in range(4):
        expected.append(losses(straight))
        states.append(straight.state())
    with new_processes(1) as pool:
        found = [pool.submit(continued, str(colour_images.path), CONTINUED[name], state) for state in states[:-1]]
        assert [future.result(timeout=300) for future in found] == expected
    assert len({train_loss for train_loss, *_ in expected}) == 4


def test_the_loss_scale_is_part_of_the_state(colour_images):
    """An overflow halves it, and whoever goes on must not start from the first scale again."""
    training = fine_tune(colour_images, precision="fp16", freeze_epochs=0, epochs=2)
    # so large that fp16 gradients overflow
    training.scaler.load_state_dict(training.scaler.state_dict() | {"scale": 2.0**40})
    training.run_epoch()
    scale = training.scaler.get_scale()
    assert scale == 2.0 ** (40 - training.steps_per_epoch)
    copy = fine_tune(colour_images, precision="fp16", freeze_epochs=0, epochs=2)
    assert copy.scaler.get_scale() != scale
    copy.load_state(training.state())
    assert copy.scaler.get_scale() == scale


def test_a_state_without_a_loss_scale_goes_on_in_fp16(colour_images):
    """As where precision is automatic and the next worker has an older GPU."""
    training = fine_tune(colour_images, precision="fp32", freeze_epochs=0, epochs=2)
    training.run_epoch()
    other = fine_tune(colour_images, precision="fp16", freeze_epochs=0, epochs=2)
    other.load_state(training.state())
    assert np.isfinite(losses(other)).all()


def test_a_state_holds_the_trained_weights_and_the_optimizer(colour_images):
    training = fine_tune(colour_images, epochs=2)
    training.run_epoch()
    training.run_epoch()
    copy = fine_tune(colour_images, epochs=2, seed=5)
    copy.load_state(training.state())
    theirs, ours = training.network.model.state_dict(), copy.network.model.state_dict()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    assert copy.epochs_done == 2
    moments = [p["exp_avg"].abs().sum() for p in copy.optimizer.state_dict()["state"].values()]
    assert len(moments) == len(list(copy.network.model.parameters()))
    assert all(moment > 0 for moment in moments)
    assert copy.evaluate() == training.evaluate()


# --- The recipe -------------------------------------------------------------------------------------------------------


def test_images_grow_and_batches_shrink_after_the_first_share_of_the_epochs(colour_images):
    settings = {"freeze_epochs": 1, "epochs": 3, "start_size": 16, "start_share": 0.5, "batch_size": 4}
    training, seen = fine_tune(colour_images, **settings), []
    training.network.model.register_forward_pre_hook(lambda model, inputs: seen.append(tuple(inputs[0].shape)))
    for epoch in range(4):
        seen.clear()
        training.run_epoch()
        side, batch_size = (16, 8) if epoch < 2 else (32, 4)
        assert {shape[2:] for shape in seen} == {(side, side)}
        assert seen[0][0] == batch_size
    assert training.preprocessing.image_size == 32


def test_the_schedule_goes_on_smoothly_where_the_images_grow(colour_images):
    settings = {"freeze_epochs": 0, "epochs": 4, "start_size": 16, "start_share": 0.5, "batch_size": 4, "lr_ratio": 1}
    training = fine_tune(colour_images, **settings)
    with RecordedSteps() as steps:
        for _ in range(4):
            training.run_epoch()
    num_images = len(training.train_indices)
    small, large = (2 * (num_images // batch_size) for batch_size in (8, 4))  # steps, each in half of the epochs
    positions = [i / (2 * small) for i in range(small)] + [0.5 + i / (2 * large) for i in range(large)]
    expected = [training.recipe.lr_max * training.cycle.lr_factor(position) for position in positions]
    assert [max(rates) for rates in steps.rates] == pytest.approx(expected)


@pytest.mark.parametrize("train_bn", ["always", "unfrozen", "never"])
def test_train_bn_says_when_the_backbones_norms_learn(colour_images, train_bn):
    training = fine_tune(colour_images, train_bn=train_bn, freeze_epochs=1, epochs=1, head="mlp")
    model = training.network.model
    head = {name for name, module in model.named_modules() if name.startswith("fc")}

    def statistics_and_weights() -> list[list[float]]:
        norms = [m for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d) and name not in head]
        return [[norm.running_mean.sum().item(), norm.weight.sum().item()] for norm in norms]

    start = statistics_and_weights()
    training.run_epoch()
    frozen = statistics_and_weights()
    training.run_epoch()
    unfrozen = statistics_and_weights()
    means, weights = ([[norm[i] for norm in when] for when in (start, frozen, unfrozen)] for i in (0, 1))
    assert (means[0] != means[1]) == (weights[0] != weights[1]) == (train_bn == "always")
    assert (means[1] != means[2]) == (train_bn != "never")
    assert weights[1] != weights[2]


def test_without_pretrained_weights_inputs_are_normalized_by_the_data(colour_images):
    data, weights = (fine_tune(colour_images, normalize=name) for name in ("auto", "weights"))
    pixels = np.concatenate([colour_images[i].reshape(-1, 3) for i in data.train_indices]) / 255
    assert data.preprocessing.mean == pytest.approx(pixels.mean(axis=0), abs=0.01)
    assert data.preprocessing.std == pytest.approx(pixels.std(axis=0), abs=0.01)
    assert weights.preprocessing.mean != data.preprocessing.mean


def test_the_last_epoch_tells_the_error_with_test_time_augmentation(colour_images):
    training = fine_tune(colour_images, tta_views=2, freeze_epochs=1, epochs=1)
    first, last = training.run_epoch(), training.run_epoch()
    assert "tta_error_rate" not in first
    assert last["tta_error_rate"] == training.tta_error_rate()
    assert 0 <= last["tta_error_rate"] <= 1


def test_test_time_augmentation_with_the_centre_view_alone_is_plain_evaluation(colour_images):
    training = fine_tune(colour_images, tta_views=3, tta_beta=1.0)
    training.run_epoch()
    assert training.tta_error_rate() == pytest.approx(training.evaluate()["error_rate"])


@pytest.mark.parametrize("method", ["squish", "pad"])
def test_other_resize_methods_train_too(colour_folder, search_cache, method):
    images = presize(find_images(colour_folder), 48, method)
    longest = {max(images[i].shape[:2]) for i in range(len(images))}
    assert longest == {48}
    training = fine_tune(images, resize_method=method)
    assert np.isfinite(losses(training)).all()
    assert training.preprocessing.resize_method == method


def test_the_first_batch_trains_before_the_plan_of_the_epoch_is_drawn(colour_images):
    training, drawn, seen = fine_tune(colour_images, batch_size=2), [], []
    steps = training._steps
    training._steps = lambda epoch: (drawn.append(step) or step for step in steps(epoch))
    training.on_progress = lambda: seen.append(len(drawn))
    for train in (training._train, lambda: training.lr_range_test(num_it=30)):
        drawn.clear(), seen.clear()
        train()
        ahead = [count - number for number, count in enumerate(seen, start=1)]
        assert len(seen) >= 12
        assert max(ahead) <= training.inputs.loader.prefetch


def test_the_range_test_leaves_the_training_as_it_was(colour_images):
    training = fine_tune(colour_images, epochs=2)
    training.run_epoch()
    before = training.state()
    curve = training.lr_range_test(num_it=40)
    assert training.state() == before
    assert curve.lrs[0] == pytest.approx(1e-7)
    assert (np.diff(curve.lrs) > 0).all()
    assert len(curve.lrs) > 20
    expected, undisturbed = fine_tune(colour_images, epochs=2), losses(training)
    expected.load_state(before)
    assert losses(expected) == undisturbed


@pytest.mark.parametrize(
    ("precision", "device", "expected"),
    [
        ("fp32", "cpu", None),
        ("fp32", "cuda", None),
        ("bf16", "cpu", torch.bfloat16),
        ("fp16", "cuda", torch.float16),
    ],
)
def test_a_precision_is_what_the_forward_pass_computes_in(precision, device, expected):
    assert autocast_dtype(Recipe(precision=precision), torch.device(device)) is expected


@pytest.mark.parametrize(("has_bf16", "expected"), [(True, torch.bfloat16), (False, torch.float16)])
def test_automatic_precision_depends_on_what_the_gpu_has(monkeypatch, has_bf16, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    assert autocast_dtype(Recipe(), torch.device("cuda")) is expected


@pytest.mark.parametrize(
    ("has", "sizes", "expected"),
    [
        ({"avx512_bf16": True}, {}, torch.bfloat16),
        ({"amx_bf16": True}, {"image_size": 160}, torch.bfloat16),
        ({"avx512_f": True}, {}, None),
        ({"avx512_bf16": True}, {"image_size": 128}, None),
        ({"avx512_bf16": True}, {"start_size": 128}, None),
    ],
)
def test_automatic_precision_depends_on_what_the_cpu_has_and_gains(monkeypatch, has, sizes, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    assert autocast_dtype(Recipe(**sizes), torch.device("cpu")) is expected


@pytest.mark.parametrize(
    ("arch", "expected"),
    [("resnet18", torch.bfloat16), ("convnext_atto", torch.bfloat16), ("mobilenetv2_050", None)],
)
def test_automatic_precision_on_a_cpu_depends_on_what_the_network_gains(monkeypatch, arch, expected):
    cpu, network = torch.device("cpu"), timm.create_model(arch)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True, "amx_bf16": True})
    assert autocast_dtype(Recipe(), cpu, network) is expected
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert autocast_dtype(Recipe(), cpu, network) is torch.bfloat16


# --- Several workers --------------------------------------------------------------------------------------------------

SHARED = {
    "linear head": {"epochs": 2},
    "mlp head": {"head": "mlp"},
    "odd batch": {"batch_size": 7, "head": "mlp"},
    "mixup": {"epochs": 2, "batch_size": 9} | HARD,
    "fused norms": {"arch": "test_efficientnet", "mixup_alpha": 0.2},
    "frozen norms": {"train_bn": "never", "freeze_epochs": 0},
    "frozen norms that train": {"train_bn": "always", "layer_groups": "fastai", "lr_ratio_frozen": 5},
    "frozen layers": {"frozen_layers": 0.5, "train_bn": "unfrozen", "freeze_epochs": 0},
    "progressive resizing": {"start_size": 16, "start_share": 0.5},
    "layer norms": {"arch": "test_vit", "batch_size": 5},
    "weights": {"class_weights": "inverse", "sampler": "balanced", "batch_size": 9, "freeze_epochs": 0} | HARD,
    "priors": {"logit_adjustment": 0.5, "freeze_epochs": 0},
}


def run_recipe(images, settings: dict, batch_parts: int = 1) -> dict:
    """All epochs of a recipe: losses, gradients of each step, and how many wrappers outlive their stage."""
    training = fine_tune(images, batch_parts=batch_parts, **settings)
    found = {"losses": [], "wrappers_left": 0}
    with RecordedSteps() as steps:
        for _ in range(training.recipe.total_epochs):
            before = weakref.ref(training.parallel_model)
            found["losses"].append(losses(training))
            found["wrappers_left"] += before() not in (None, training.parallel_model)
    found["losses"].append((training.tta_error_rate(),) * len(LOSSES))
    training.close()
    return found | {"gradients": steps.gradients}


def norm_errors(rank: int) -> dict[str, float]:
    """Largest differences of the shared batch norm from `nn.BatchNorm` over the whole batch, by what differs."""
    errors = {}
    for dtype in (torch.float32, torch.bfloat16):
        for shape in ((8, 6, 5, 5), (8, 6)):
            torch.manual_seed(0)
            x = (50 + 3 * torch.randn(shape)).to(dtype)
            weights = torch.randn(shape)
            whole = (nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d)(6, momentum=0.3)
            nn.init.normal_(whole.weight)
            nn.init.normal_(whole.bias)
            shared = nn.Sequential(type(whole)(6, momentum=0.3))
            shared[0].load_state_dict(whole.state_dict())
            shared = share_batch_norm(shared, torch.device("cpu"))
            rows = slice(0, 3) if rank == 0 else slice(3, 8)
            x_whole, x_part = x.clone().requires_grad_(), x[rows].clone().requires_grad_()
            y_whole, y_part = whole(x_whole), shared(x_part)
            (y_whole * weights).sum().backward()
            (y_part * weights[rows]).sum().backward()
            ours = dict(shared[0].named_parameters())
            for parameter in ours.values():
                dist.all_reduce(parameter.grad)
            pairs = {"output": (y_part, y_whole[rows]), "input gradient": (x_part.grad, x_whole.grad[rows])}
            pairs |= {f"{name} gradient": (ours[name].grad, p.grad) for name, p in whole.named_parameters()}
            pairs |= {name: (buffer, whole.get_buffer(name)) for name, buffer in shared[0].named_buffers()}
            whole.eval(), shared.eval()
            pairs["evaluation"] = (shared(x_part), whole(x_whole)[rows])
            assert y_part.dtype == dtype
            for name, (found, expected) in pairs.items():
                error = (found.float() - expected.float()).abs().max() / expected.float().abs().max().clamp(min=1e-6)
                errors[f"{name}, {dtype}, {len(shape)} dimensions"] = error.item()
    return errors


def work(rank: int, rendezvous: str, cache: str, damaged: str, lights: str, state: dict[str, bytes]) -> dict:
    """One of two workers: every recipe of SHARED, a state made by one worker, and the batch norm alone.

    `damaged` is the cache of a node that cannot read one of the images, `lights` that of images with several labels.
    """
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2, timeout=timedelta(seconds=180)
    )
    images = PresizedImages(cache)
    found = {name: run_recipe(images, settings) for name, settings in SHARED.items()}
    found["several labels"] = run_recipe(PresizedImages(lights), HARD)
    found["in parts"] = run_recipe(images, IN_PARTS["dropout of all kinds"], batch_parts=3)
    resumed = fine_tune(images, **SHARED["mixup"])
    resumed.load_state(state)
    found["resumed"] = losses(resumed)
    found["norm errors"] = norm_errors(rank)
    try:
        fine_tune(PresizedImages((cache, damaged)[rank]))
    except ValueError as error:
        found["different images"] = str(error)
    dist.destroy_process_group()
    return found


@pytest.fixture(scope="module")
def state_after_two_epochs(colour_images) -> tuple[dict[str, bytes], tuple[float, ...]]:
    """A state made by one worker, and the losses of the epoch after it."""
    training = fine_tune(colour_images, **SHARED["mixup"])
    training.run_epoch()
    training.run_epoch()
    return training.state(), losses(training)


@pytest.fixture(scope="module")
def lights(tmp_path_factory, search_cache) -> PresizedImages:
    """Images with several labels."""
    return presize(draw_lights(tmp_path_factory.mktemp("lights")), 48)


@pytest.fixture(scope="module")
def two_workers(colour_images, lights, state_after_two_epochs, tmp_path_factory) -> list[dict]:
    rendezvous = str(tmp_path_factory.mktemp("workers") / "rendezvous")
    other_node = Path(shutil.copytree(colour_images.root, tmp_path_factory.mktemp("node") / "images"))
    photo = other_node / colour_images.paths[2]
    photo.write_bytes(bytes(photo.stat().st_size))  # as large as before
    damaged = presize(find_images(other_node), 48, max_unreadable=0.5)
    with new_processes(2) as pool:
        paths = (str(path) for path in (colour_images.path, damaged.path, lights.path))
        arguments = rendezvous, *paths, state_after_two_epochs[0]
        futures = [pool.submit(work, rank, *arguments) for rank in range(2)]
        return [future.result(timeout=300) for future in futures]


@pytest.fixture(scope="module")
def one_worker(colour_images, lights) -> dict:
    found = {name: run_recipe(colour_images, settings) for name, settings in SHARED.items()}
    return found | {"several labels": run_recipe(lights, HARD)}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SHARED, "several labels"])
def test_two_workers_train_like_one(one_worker, two_workers, name):
    for worker in two_workers:
        np.testing.assert_allclose(worker[name]["losses"], one_worker[name]["losses"], rtol=1e-4)


def test_two_workers_that_split_their_batches_train_like_one(whole_batches, two_workers):
    expected = whole_batches["dropout of all kinds"]["losses"]
    for worker in two_workers:
        np.testing.assert_allclose(worker["in parts"]["losses"], expected, rtol=1e-4)


@pytest.mark.parametrize("name", [*SHARED, "several labels"])
def test_two_workers_step_along_the_gradients_of_the_whole_batch_in_both_stages(one_worker, two_workers, name):
    """AdamW hides a wrong scale of the gradients from the losses, so the gradients themselves are compared."""
    alone = one_worker[name]["gradients"]
    first, second = (worker[name]["gradients"] for worker in two_workers)
    assert first == second
    assert [len(step) for step in first] == [len(step) for step in alone]
    for shared, single in zip(first, alone, strict=True):
        # Some gradients are zero but for rounding (of a bias before a norm), so small ones are compared to the step's.
        np.testing.assert_allclose(shared, single, rtol=5e-3, atol=1e-3 * max(single))


def test_the_wrapper_of_the_frozen_stage_is_gone_in_the_unfrozen_one(two_workers):
    assert [worker[name]["wrappers_left"] for worker in two_workers for name in SHARED] == [0] * 2 * len(SHARED)


def test_two_workers_continue_what_one_began(two_workers, state_after_two_epochs):
    for worker in two_workers:
        np.testing.assert_allclose(worker["resumed"], state_after_two_epochs[1], rtol=1e-4)


def test_a_node_that_cannot_read_one_of_the_images_is_named_before_the_first_step(two_workers, colour_images):
    counts = len(colour_images), len(colour_images) - 1
    for worker in two_workers:
        node, bad = socket.gethostname(), colour_images.paths[2]
        expected = f"{node} (worker 0) has {counts[0]}; {node} (worker 1) has {counts[1]} and cannot read {bad!r}."
        assert expected in worker["different images"]


def test_the_shared_batch_norm_equals_that_of_the_whole_batch(two_workers):
    for worker in two_workers:
        for what, error in worker["norm errors"].items():
            assert error < (2e-2 if "bfloat16" in what else 2e-5), what


# --- The command line -------------------------------------------------------------------------------------------------


def command(folder: Path, *settings: str) -> list[str]:
    options = [f"--set={name}={value}" for name, value in SMALL.items()]
    return ["-m", "trainables.finetune", "--data", str(folder), *options, *(f"--set={text}" for text in settings)]


@pytest.mark.slow
def test_the_command_line_trains_alone_and_under_torchrun_alike(colour_folder, search_cache):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    reports = []
    for launcher in ([], torchrun):
        arguments = [sys.executable, *launcher, *command(colour_folder, "head=mlp", "batch_size=7")]
        child = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=120)
        assert child.returncode == 0, child.stderr
        rows = [dict(part.split(" ", 1) for part in line.split("  ")) for line in child.stdout.splitlines()]
        assert [(row["epoch"], row["stage"]) for row in rows] == [("1", "frozen"), ("2", "unfrozen")]
        reports.append([[float(row[name]) for name in LOSSES] for row in rows])
    np.testing.assert_allclose(reports[1], reports[0], rtol=1e-3)


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ("epoch=3", "unknown setting 'epoch'"),
        ("epochs", "'epochs' is not NAME=VALUE"),
        ("arch=resnt", "not a timm architecture"),
    ],
)
def test_the_command_line_refuses_a_wrong_setting_in_one_paragraph(
    colour_folder, search_cache, monkeypatch, capsys, setting, problem
):
    monkeypatch.setattr(sys, "argv", command(colour_folder, setting)[1:])
    with pytest.raises(SystemExit) as error:
        finetune.main()
    assert error.value.code == 2
    assert problem in capsys.readouterr().err


def test_the_command_line_takes_weights_from_the_given_folder_or_refuses(
    colour_folder, tmp_path, search_cache, monkeypatch, capsys
):
    words = command(colour_folder, "pretrained=true", "arch=tf_efficientnet_lite0")
    monkeypatch.setattr(sys, "argv", [*words[1:], "--weights", str(tmp_path)])
    with pytest.raises(SystemExit) as error:
        finetune.main()
    assert error.value.code == 2
    assert "has no weights for tf_efficientnet_lite0 (looked for" in capsys.readouterr().err
