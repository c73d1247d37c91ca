"""The training loop: freeze, then unfreeze, epoch by epoch. Plain PyTorch, alone, under torchrun or under Ray Train.

A training continues exactly from the state at the end of any epoch and does not depend on the number of workers, see
`epoch_plan`. (The file is long so that an epoch reads from top to bottom in one place.)
"""

import gc
import io
import itertools
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from trainables.batches import augmentation, tta
from trainables.batches.epoch_plan import Step, plan_epoch
from trainables.data.presized_images import PresizedImages
from trainables.network import loss, model, normalization, optimizer, schedule
from trainables.network.calibration import calibration_metrics, fit_temperature
from trainables.network.dropout import WholeBatch
from trainables.network.fused_convolutions import NORMS, fuse_convolutions
from trainables.network.precision import autocast_dtype
from trainables.probe.cross_validation import are_wrong
from trainables.probe.expected_error import Reference, reference
from trainables.probe.feature_files import Features, FeatureSet
from trainables.probe.logistic_regression import LinearHead
from trainables.probe.soft_start import soften, softening
from trainables.recipe import Recipe
from trainables.training import lr_finder
from trainables.training.checkpoint import (
    PREPROCESSING_FILE,
    TEMPERATURE,
    TRAINING_FILE,
    WEIGHTS_FILE,
    Files,
    Preprocessing,
)
from trainables.training.distributed import CpuSyncBatchNorm, World, require_same_images, shard, share_batch_norm
from trainables.training.inputs import Inputs
from trainables.training.label_set_metrics import (
    EVEN,
    Thresholds,
    above_thresholds,
    best_thresholds,
    label_set_metrics,
)
from trainables.training.metrics import balanced_error, more_metrics
from trainables.training.probing import Probing
from trainables.training.weight_averaging import Weights, between, pull_back, weights_of

STEPS_PER_CHECK = 20
"""Steps between checks of the loss, each of which waits for the GPU and the other workers."""

FEATURES_AT_ONCE = 8192
"""Rows of features that the head reads at a time in a probe, whose memory takes twice as much in fp32."""


class Diverged(RuntimeError):
    """The loss is no longer a finite number."""


class FineTune:
    """One training in progress: `run_epoch` trains the next epoch; `state` and `load_state` move it elsewhere.

    Args:
        recipe: All settings of the training.
        images: The presized images, of the recipe's `presize` and `resize_method`.
        weights: A folder of pretrained weights, see `pretrained_weights.find_weights`.
        device: Where to train.
        num_threads: Threads that load and augment images.
        split_seed: Draws the validation images if the data set has no split of its own.
        fold: The number of a fold and how many there are, see `PresizedImages.split`.
        all_images: Whether those for validation train, too. Then metrics say nothing about new images.
        temperature: What divides the logits, until the first epoch has fitted it; with `all_images` none does.
        thresholds: Of images with several labels; by default, each epoch chooses the best ones on those for validation.
        wise_alpha: How far from the start the weights end up, with `all_images`; by default, those for validation tell.
        load_pretrained: Whether to load pretrained weights; not needed if `load_state` follows.
        probe_deadline: The `time.time` by which epoch 0 must have ended: its probe learns from as many of the images
            for training as there is time for. None: from all.
        batch_parts: Splits each worker's share of a batch to save memory. The gradients of the parts add up to those of
            the batch, while batch norms see one part at a time.
        on_progress: Called after each batch.

    Raises:
        ValueError: The recipe does not fit the model or the number of workers.
        DataError: The workers have different images.

    Example:
        >>> recipe = Recipe(arch="resnet18.a1_in1k", epochs=3)
        >>> images = presize(find_images("birds"), recipe.presize, recipe.resize_method)
        >>> training = FineTune(recipe, images)
        >>> for _ in range(recipe.total_epochs):
        ...     metrics = training.run_epoch()
    """

    def __init__(
        self,
        recipe: Recipe,
        images: PresizedImages,
        *,
        weights: Path | None = None,
        device: torch.device | str = "cpu",
        num_threads: int = 2,
        split_seed: int = 0,
        fold: tuple[int, int] = (0, 1),
        all_images: bool = False,
        temperature: float = 1.0,
        thresholds: Thresholds | None = None,
        wise_alpha: float = 1.0,
        load_pretrained: bool = True,
        probe_deadline: float | None = None,
        batch_parts: int = 1,
        on_progress: Callable[[], None] = lambda: None,
    ) -> None:
        if min(num_threads, batch_parts) < 1:
            raise ValueError(f"num_threads={num_threads}, batch_parts={batch_parts}: expected 1 or more of each")
        self.recipe = recipe
        self.batch_parts = batch_parts
        self.on_progress = on_progress
        self.device = torch.device(device)
        self.world = World.current()
        self.epochs_done = recipe.before_first_epoch
        self.probe_deadline = probe_deadline
        self.skipped_images = 0
        """For training, of which there was no time to learn."""
        self.reference: Reference | None = None
        """What the linear probe gets wrong, once it is known."""
        self.temperature = temperature
        """Of the probabilities, from the last evaluation."""
        self.weights = weights
        self.wise_alpha = wise_alpha
        self.start_head: Weights = {}
        """With which the unfrozen stage begins; empty where nothing goes back to it."""
        self.draws = True
        """Whether the network draws random numbers in training, as far as is known."""
        require_same_images(images, self.world)
        self.train_indices, self.valid_indices = images.split(seed=split_seed, fold=fold)
        self.all_images = all_images
        self.parts = [self.train_indices, self.valid_indices] if all_images else [self.train_indices]
        """Of the images that train. The first one decides the probe's penalty, and each has cached views of its own."""
        self.train_indices = np.sort(np.concatenate(self.parts))
        self.num_classes = len(images.classes)
        self.white_level = images.white_level
        smallest = min(recipe.batch_size, self.batch_size)
        if smallest < self.world.size:
            raise ValueError(f"a batch of {smallest} images is too small for {self.world.size} workers")

        self.network = model.build(recipe, self.num_classes, weights, load_pretrained=load_pretrained)
        if recipe.starts_with_probe:
            model.check_probed(self.network, recipe)
        # Before several workers share its batch norms, which makes other layers of them: all choose alike.
        self.amp_dtype = autocast_dtype(recipe, self.device, self.network.model)
        if self.world.size > 1:
            self.network = self.network.with_model(share_batch_norm(self.network.model, self.device))
        self.network.model.to(self.device).to(memory_format=torch.channels_last)
        fuse_convolutions(self.network.model, recipe.image_size, norms=(*NORMS, CpuSyncBatchNorm))
        if normalization.from_data(recipe):
            mean, std = normalization.channel_statistics(images, self.train_indices)
            self.network = replace(self.network, mean=mean, std=std)
        statistics = {"mean": self.network.mean, "std": self.network.std}
        self.inputs = Inputs(images, **statistics, device=self.device, num_threads=num_threads)
        self.images = images
        self.several_labels = images.label_sets is not None
        self.loss = loss.binary_cross_entropy if self.several_labels else loss.cross_entropy
        self.given_thresholds = thresholds
        self.thresholds = (thresholds or (EVEN,) * self.num_classes) if self.several_labels else None
        weights_of = loss.class_weights(recipe.class_weights, self.inputs.truth[self.train_indices], self.num_classes)
        self.class_weights = None if weights_of is None else weights_of.to(self.device)
        priors = loss.log_priors(self.inputs.truth[self.train_indices], self.num_classes, recipe.logit_adjustment)
        self.log_priors = None if priors is None else priors.to(self.device)
        self._enter_stage()
        self._note_start()

    # --- An epoch: training steps, then validation --------------------------------------------------------------------

    def run_epoch(self) -> dict[str, float | int | str]:
        """Trains the next epoch, then evaluates.

        Returns:
            The epoch's metrics; losses are means per image.

        Raises:
            Diverged: A loss is not finite.
        """
        if self.epochs_done < 0:
            return self._run_probe()
        epoch: dict[str, int | str] = {"epoch": self.epochs_done + 1, "stage": "frozen" if self.frozen else "unfrozen"}
        num_images = self.steps_per_epoch * self.batch_size
        started = time.perf_counter()
        train_loss = self._train()
        trained = time.perf_counter()
        metrics = self._end_training() if self.epochs_done + 1 == self.recipe.total_epochs else self.evaluate()
        return self._end_epoch(
            **epoch,
            train_loss=train_loss,
            **metrics,
            train_seconds=trained - started,
            valid_seconds=time.perf_counter() - trained,
            images_per_second=num_images / (trained - started),
        )

    def _end_training(self) -> dict[str, float]:
        """The metrics after the last epoch: with WiSE-FT, of weights between the start and the end."""
        start = self._start() if self._goes_back else {}
        if self._goes_back and self.all_images:  # those for validation have trained it, and cannot tell how far
            self.network.model.load_state_dict(between(start, weights_of(self), self.wise_alpha))
        logits = self.valid_logits()
        if self._goes_back and not self.all_images:
            self.wise_alpha, logits = pull_back(self, start, logits)
        metrics = self._metrics(logits, self._my_validation_rows()[1])
        metrics |= {"wise_alpha": self.wise_alpha} if self._goes_back else {}
        return metrics | ({"tta_error_rate": self.tta_error_rate()} if self.recipe.tta_views else {})

    @property
    def _goes_back(self) -> bool:
        """Whether WiSE-FT follows the last epoch."""
        return self.recipe.wise_ft and self.recipe.pretrained and self.recipe.epochs > 0

    def _start(self) -> Weights:
        """The weights with which the unfrozen stage began: the pretrained ones, and a head."""
        begun = model.build(self.recipe, self.num_classes, self.weights).model
        return {name: value.to(self.device) for name, value in begun.state_dict().items()} | self.start_head

    def _note_start(self) -> None:
        """Keep the head with which the unfrozen stage begins, if it begins now and WiSE-FT needs it at the end."""
        if self._goes_back and self.epochs_done == self.recipe.freeze_epochs:
            self.start_head = {
                name: value.clone()
                for name, value in self.network.model.state_dict().items()
                if name.startswith(tuple(f"{each}." for each in model.classifier_names(self.network.model)))
            }

    def _run_probe(self) -> dict[str, float | int | str]:
        """Epoch 0 of a training that starts with a probe: computes its head, and evaluates on the same features. Where
        more epochs follow, they start from a softer one, see `soft_start`."""
        started = time.perf_counter()
        probing = self.probing()
        deadline = self.probe_deadline
        found = probing.features() if deadline is None else self._features_within(deadline, probing)
        linear = probing.linear_probe(found, self.parts[0])
        self.network.classifier.load_state_dict(probing.head(found, self.parts, linear))
        self.reference = self._reference(linear, found.rows[self.valid_indices])
        labels = self.inputs.truth[torch.as_tensor(self.train_indices)].to(self.device)
        logits = self._head_logits(found.rows[self.train_indices])
        if self.recipe.total_epochs:
            factor = self.world.gather(softening(logits, labels, self.recipe.head_softening))[0]
            soften(self.network.classifier, factor)
            logits = logits * factor
        trained = time.perf_counter()
        train_loss = loss.log_loss(logits, labels).item()
        rows, targets = self._my_validation_rows()
        logits = self._head_logits(found.rows[self.valid_indices[rows]])
        metrics = self._metrics(logits, targets)
        return self._end_epoch(
            epoch=0,
            stage="probe",
            train_loss=train_loss,
            **metrics,
            train_seconds=trained - started,
            valid_seconds=time.perf_counter() - trained,
            images_per_second=len(self.train_indices) / (trained - started),
            feature_seconds=found.seconds,
            **({"skipped_images": self.skipped_images} if self.skipped_images else {}),
        )

    def _features_within(self, deadline: float, probing: Probing) -> FeatureSet:
        """Those that the probe has time for; the images for training that it has none for are left out."""
        found, some = probing.within(deadline, self.train_indices, self.valid_indices)
        self.skipped_images = len(self.train_indices) - len(some)
        self.train_indices = some
        self.parts = [some]
        return found

    def _reference(self, linear: LinearHead, features: Features) -> Reference | None:
        """What the linear probe gets wrong, with the features of the validation images; None without enough images to
        cross-validate it, and where it has seen those for validation."""
        if linear.out_of_fold_error_rate is None or self.all_images:
            return None
        logits = linear.logits(torch.from_numpy(features))
        wrong = are_wrong(logits, self.inputs.truth[self.valid_indices])
        balanced = None
        if linear.out_of_fold is not None and not self.several_labels:
            on_validation, unseen = logits.numpy(), linear.out_of_fold.numpy()
            valid, train = (self.inputs.labels[rows].numpy() for rows in (self.valid_indices, self.train_indices))
            balanced = (
                balanced_error(on_validation, valid),
                balanced_error(np.concatenate([on_validation, unseen]), np.concatenate([valid, train])),
            )
        # All workers have the first one's: the last bits of a product may differ between machines.
        wrong, balanced = self.world.gather((wrong, balanced))[0]
        return reference(wrong, linear.out_of_fold_error_rate, len(self.train_indices), balanced)

    def _end_epoch(self, **metrics: Any) -> dict[str, float | int | str]:
        """Moves on to the next epoch; all metrics of this one."""
        self.epochs_done += 1
        if self.epochs_done == self.recipe.freeze_epochs:
            self._enter_stage()
            self._note_start()
        counts = {"train_images": len(self.train_indices), "valid_images": len(self.valid_indices)}
        return metrics | {"progress": self.progress} | counts

    def probing(self) -> Probing:
        """Of the network as it is now."""
        return Probing(
            recipe=self.recipe,
            network=self.network,
            images=self.images,
            inputs=self.inputs,
            amp_dtype=self.amp_dtype,
            world=self.world,
            batch_parts=self.batch_parts,
            on_progress=self.on_progress,
            class_weights=self.class_weights,
        )

    @torch.inference_mode()
    def _head_logits(self, features: Features) -> torch.Tensor:
        """The head's logits for features (n, features), as validation computes them."""
        self.network.model.eval()
        logits = []
        for rows in torch.from_numpy(features).split(FEATURES_AT_ONCE):
            with self._autocast():
                logits.append(self.network.classifier(rows.to(self.device).float()).float())
        return torch.cat(logits)

    def _train(self) -> float:
        """The steps of an epoch; their mean loss."""
        self.network.train(frozen=self.frozen, train_bn=self.recipe.train_bn)
        torch.manual_seed(self.recipe.seed * 10_007 + self.epochs_done)  # dropout
        num_steps = self.steps_per_epoch
        losses: list[float] = []
        unchecked: list[torch.Tensor] = []
        for number, (step, batch) in enumerate(self.inputs.steps(self._steps(self.epochs_done), self.image_size)):
            optimizer.set_position(self.optimizer, self.cycle, self._position(number / num_steps))
            unchecked.append(self._step(batch, step))
            if len(unchecked) == STEPS_PER_CHECK or number + 1 == num_steps:
                losses += self._checked(unchecked, len(losses), num_steps)
                unchecked = []
        return float(np.mean(losses))

    def _steps(self, epoch: int) -> Iterator[Step]:
        rows = self.world.shard(self.batch_size)
        return plan_epoch(
            self.recipe,
            self.train_indices,
            labels=self.inputs.labels[self.train_indices].numpy(),
            epoch=epoch,
            batch_size=self.batch_size,
            rows=rows,
        )

    def _position(self, epoch_share: float) -> float:
        """The position in the stage's cycle when `epoch_share` of the current epoch's steps are done."""
        stage_epochs_done = self.epochs_done - (0 if self.frozen else self.recipe.freeze_epochs)
        return (stage_epochs_done + epoch_share) / self.stage_epochs

    def _step(self, batch: torch.Tensor, step: Step) -> torch.Tensor:
        """One optimizer step; this worker's part of the batch's mean loss."""
        images, targets = self.inputs.mixed(batch, step)
        num_parts = min(self.batch_parts, self._max_parts)
        losses = []
        for part in range(num_parts):
            rows, last = shard(len(images), part, num_parts), part + 1 == num_parts
            # Workers average their gradients once, with the last part.
            with self.world.gradients_later(self.parallel_model, not last):
                with self._autocast(), self._whole_batch(rows, last):
                    logits = self.parallel_model(images[rows]).float()
                logits = logits if self.log_priors is None else logits + self.log_priors
                value = self.loss(logits, targets[rows], self.recipe.smoothing, self.class_weights)
                value = value / self.batch_size
                # Workers average their gradients but sum their losses.
                self.scaler.scale(value * self.world.size).backward()
            losses.append(value.detach())
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.on_progress()
        return sum(losses[1:], start=losses[0])

    @contextmanager
    def _whole_batch(self, rows: slice, last: bool) -> Iterator[None]:
        """Within it, `rows` of this worker's share get the dropout of the whole batch, and so do all parts of a batch.

        A network that draws nothing for its images in a stage's first step is not watched in the others: watching costs
        microseconds per call.
        """
        first = self.world.shard(self.batch_size).start
        devices = [self.device] if self.device.type == "cuda" else []
        whole_batch = WholeBatch(slice(first + rows.start, first + rows.stop), self.batch_size)
        with torch.random.fork_rng(devices, enabled=not last), whole_batch if self.draws else nullcontext():
            yield
        self.draws = whole_batch.has_drawn

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None)

    def _checked(self, losses: list[torch.Tensor], before: int, num_steps: int) -> list[float]:
        """The losses of some steps over all workers; `before` is the number of the epoch's earlier steps."""
        values: list[float] = self.world.sum(torch.stack(losses).double()).tolist()
        for number, value in enumerate(values, start=before):
            if not np.isfinite(value):
                peak = max(group["lr_max"] for group in self.optimizer.param_groups)
                rate = peak * self.cycle.lr_factor(self._position(number / num_steps))
                raise Diverged(
                    f"training loss is {value} at epoch {self.epochs_done + 1}, step {number + 1} of {num_steps} "
                    f"(head's learning rate {rate:.2g})"
                )
        return values

    def evaluate(self) -> dict[str, float]:
        """Plain cross-entropy and error rate over the whole validation split, and how far its probabilities are to be
        trusted, the same on all workers."""
        return self._metrics(self.valid_logits(), self._my_validation_rows()[1])

    def valid_logits(self) -> torch.Tensor:
        """Logits (rows, classes) of this worker's validation images as they are."""
        augmentations = augmentation.centre(len(self.valid_indices), self.recipe.resize_method)
        return self._valid_logits(augmentations[self._my_validation_rows()[0]])

    def calibrated_loss(self, logits: torch.Tensor) -> tuple[float, float]:
        """The validation loss at the temperature that fits best, and this temperature, of all workers' `valid_logits`;
        infinite where these are not finite. Probabilities of images with several labels have no temperature."""
        everywhere, truth = torch.cat(self.world.gather(logits.cpu())), self.inputs.truth[self.valid_indices]
        loss_there, temperature = np.inf, 1.0
        if everywhere.isfinite().all():
            if not self.several_labels:
                temperature = fit_temperature(everywhere.numpy(), truth.numpy())
            loss_there = loss.log_loss(everywhere / temperature, truth).item()
        # All workers have the first one's: the last bits may differ between machines.
        found: tuple[float, float] = self.world.gather((loss_there, temperature))[0]
        return found

    def _metrics(self, logits: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
        """Validation metrics over all workers, from this worker's logits and labels. Keeps the temperature, which only
        images can tell that did not train."""
        if self.several_labels:
            return self._label_set_metrics(torch.cat(self.world.gather(logits.cpu())))
        wrong = logits.argmax(1) != targets
        rows = self.world.shard(len(self.valid_indices))
        both = wrong & self.reference.wrong[rows].to(self.device) if self.reference else torch.zeros_like(wrong)
        sums = torch.stack([loss.log_loss(logits, targets, reduction="sum"), wrong.sum(), both.sum()])
        total, errors, both_wrong = (self.world.sum(sums.double()) / len(self.valid_indices)).tolist()
        if not np.isfinite(total):
            raise Diverged(f"validation loss is {total} after epoch {self.epochs_done + 1}")
        everywhere = torch.cat(self.world.gather(logits.cpu())).numpy()
        labels = self.inputs.labels[self.valid_indices].numpy()
        calibration = calibration_metrics(everywhere, labels)
        if not self.all_images:
            self.temperature = calibration["temperature"]
        found = {"valid_loss": total, "error_rate": errors, "accuracy": 1 - errors}
        found |= more_metrics(everywhere, labels) | calibration
        if self.reference:
            found["expected_error_rate"] = self.reference.expected(errors, both_wrong)
            expected = self.reference.expected_balanced(found["balanced_error"], errors, both_wrong)
            found |= {} if expected is None else {"expected_balanced_error": expected}
        return found

    def _label_set_metrics(self, logits: torch.Tensor) -> dict[str, float]:
        """The same where an image may have several labels, from the logits (validation images, classes) of all workers.
        Keeps the thresholds; their probabilities have no temperature."""
        truth = self.inputs.truth[self.valid_indices]
        total = loss.log_loss(logits, truth).item()
        if not np.isfinite(total):
            raise Diverged(f"validation loss is {total} after epoch {self.epochs_done + 1}")
        probabilities = tta.probabilities(logits, several_labels=True).numpy()
        self.thresholds = self.given_thresholds or best_thresholds(probabilities, truth.numpy())
        found = label_set_metrics(probabilities, truth.numpy(), self.thresholds)
        expected = {}
        if self.reference:
            wrong = (above_thresholds(probabilities, self.thresholds) != truth.numpy()).any(1)
            both_wrong = float((wrong & self.reference.wrong.numpy()).mean())
            expected = {"expected_error_rate": self.reference.expected(found["error_rate"], both_wrong)}
        return {"valid_loss": total, "accuracy": 1 - found["error_rate"]} | expected | found

    def tta_error_rate(self) -> float:
        """Error rate over the validation split with the recipe's test-time augmentation."""
        rows, targets = self._my_validation_rows()
        views = self.recipe.tta_views
        how: dict[str, Any] = {"views": views, "rows": rows, "several_labels": self.several_labels}
        averaged = tta.predict(self._calibrated_logits, self.recipe, len(self.valid_indices), **how)
        if self.several_labels:
            wrong = ((averaged > torch.tensor(self.thresholds, device=self.device)) != targets).any(1).sum().double()
        else:
            wrong = (averaged.argmax(dim=1) != targets).sum().double()
        return self.world.sum(wrong).item() / len(self.valid_indices)

    def _my_validation_rows(self) -> tuple[slice, torch.Tensor]:
        """The rows of the validation split that this worker predicts, and their labels."""
        rows = self.world.shard(len(self.valid_indices))
        return rows, self.inputs.truth[self.valid_indices[rows]].to(self.device)

    @torch.inference_mode()
    def _valid_logits(self, augmentations: augmentation.Augmentations) -> torch.Tensor:
        """Logits (rows, classes) of this worker's validation images under `augmentations`."""
        self.network.model.eval()
        indices = self.valid_indices[self._my_validation_rows()[0]]
        rows = max(1, self.batch_size // self.batch_parts)
        chunks = [slice(i, i + rows) for i in range(0, len(indices), rows)]
        plans = [(indices[chunk], augmentations[chunk]) for chunk in chunks]
        logits = [torch.empty(0, self.num_classes, device=self.device)]  # a worker may have no rows
        for images in self.inputs.batches(plans, self.image_size):
            with self._autocast():
                logits.append(self.network.model(images).float())
            self.on_progress()
        return torch.cat(logits)

    def _calibrated_logits(self, augmentations: augmentation.Augmentations) -> torch.Tensor:
        return self._valid_logits(augmentations) / self.temperature

    # --- The learning-rate range test ---------------------------------------------------------------------------------

    def lr_range_test(self, *, num_it: int = 100, start: float = 1e-7, end: float = 10.0) -> lr_finder.Curve:
        """The loss while the rate of all groups grows from `start` to `end` in `num_it` steps, or until it diverges.

        Restores the training to its state before.
        """
        before = self.state()
        torch.manual_seed(self.recipe.seed)
        self.network.train(frozen=self.frozen, train_bn=self.recipe.train_bn)
        steps = itertools.chain.from_iterable(self._steps(epoch) for epoch in itertools.count(self.epochs_done))
        sweep = lr_finder.Sweep(num_it, start, end)
        for step, batch in self.inputs.steps(itertools.islice(steps, num_it), self.image_size):
            optimizer.set_rate(self.optimizer, sweep.rate)
            sweep.record(self.world.sum(self._step(batch, step)).item())
            if sweep.finished:
                break
        self.load_state(before)
        return sweep.curve()

    # --- Stages, and what the next epoch is ---------------------------------------------------------------------------

    def _enter_stage(self) -> None:
        """Sets up what differs between the frozen and the unfrozen stage: gradients, rates, optimizer, schedule."""
        recipe, frozen = self.recipe, self.frozen
        if frozen:
            self.network.freeze_backbone(recipe.train_bn)
        else:
            self.network.unfreeze(recipe.frozen_layers, recipe.layer_groups)
        groups = self.network.layer_groups(recipe.layer_groups)
        rates = schedule.stage_rates(recipe, len(groups), frozen=frozen)
        self.optimizer = optimizer.adamw(groups, rates, recipe)
        self.draws = True
        self.cycle = schedule.stage_cycle(recipe, frozen=frozen)
        self.stage_epochs = recipe.freeze_epochs if frozen else recipe.epochs
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp_dtype is torch.float16)
        # The wrapper of the stage before must be gone, or its gradient hooks would average a second time.
        self.parallel_model = self.network.model
        gc.collect()
        self.parallel_model = self.world.wrap(self.network.model, self.device)

    @property
    def frozen(self) -> bool:
        """Whether the next epoch trains only the head."""
        return self.epochs_done < self.recipe.freeze_epochs

    @property
    def image_size(self) -> int:
        """px; of the next epoch, and of the model after the last one."""
        return self.recipe.image_size_at(self.epochs_done)

    @property
    def batch_size(self) -> int:
        """Of the next epoch, over all workers."""
        return min(self.recipe.batch_size_at(self.epochs_done), len(self.train_indices))

    @property
    def steps_per_epoch(self) -> int:
        """Of the next epoch: whole batches only."""
        return len(self.train_indices) // self.batch_size

    @property
    def progress(self) -> int:
        """Percent of the unfrozen stage that is done; 0 during the frozen one, unless it is the last stage."""
        if self.epochs_done == self.recipe.total_epochs:
            return 100
        unfrozen_done = max(0, self.epochs_done - self.recipe.freeze_epochs)
        return 100 * unfrozen_done // max(1, self.recipe.epochs)

    @property
    def can_split_further(self) -> bool:
        """Whether the next epoch's batches can be split into more parts."""
        return self.batch_parts < self._max_parts

    @property
    def min_images(self) -> int:
        """Of a part of a batch: the batch norms of the mlp head, which see no pixels, need two for their statistics."""
        return 2 if self.recipe.head == "mlp" else 1

    @property
    def _max_parts(self) -> int:
        return max(1, self.batch_size // self.world.size // self.min_images)

    # --- The state ----------------------------------------------------------------------------------------------------

    @property
    def preprocessing(self) -> Preprocessing:
        names = ("presize", "resize_method", "image_size")
        sizes = {name: getattr(self.recipe, name) for name in names}
        mean, std, white = self.network.mean, self.network.std, self.white_level
        return Preprocessing(**sizes, mean=mean, std=std, white_level=white, thresholds=self.thresholds)

    def state(self) -> Files:
        """All that is needed to continue from here, as the files of a checkpoint. No random state is among it."""
        training = io.BytesIO()
        parts = {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
        known = {"reference": asdict(self.reference)} if self.reference else {}
        progress = {"epochs_done": self.epochs_done, TEMPERATURE: self.temperature, "start_head": self.start_head}
        torch.save({**progress, **parts, **known}, training)
        weights = {name: value.contiguous() for name, value in self.network.model.state_dict().items()}
        return {
            WEIGHTS_FILE: safetensors.torch.save(weights, {TEMPERATURE: repr(self.temperature)}),
            PREPROCESSING_FILE: json.dumps(self.preprocessing.to_dict(), indent=2).encode(),
            TRAINING_FILE: training.getvalue(),
        }

    def load_state(self, state: Files) -> None:
        """Continue from `state`, which any number of workers may have made."""
        self.network.model.load_state_dict(safetensors.torch.load(state[WEIGHTS_FILE]))
        # To the CPU first: the optimizer moves what it needs to the parameters' device.
        training = torch.load(io.BytesIO(state[TRAINING_FILE]), map_location="cpu", weights_only=True)
        self.epochs_done = training["epochs_done"]
        self.temperature = training.get(TEMPERATURE, 1.0)
        self.reference = Reference(**training["reference"]) if "reference" in training else None
        if self.several_labels:
            self.thresholds = tuple(json.loads(state[PREPROCESSING_FILE])["thresholds"])
        self._enter_stage()
        self.start_head = {name: value.to(self.device) for name, value in training.get("start_head", {}).items()}
        self.optimizer.load_state_dict(training["optimizer"])
        if training["scaler"]:  # empty if the worker that saved it had bf16
            self.scaler.load_state_dict(training["scaler"])

    def close(self) -> None:
        self.inputs.close()
