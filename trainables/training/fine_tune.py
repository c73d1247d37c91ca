"""The training loop: freeze, then unfreeze, epoch by epoch. Plain PyTorch, alone, under torchrun or under Ray Train.

A training continues exactly from the state of any epoch's end and does not depend on the number of workers, see
`epoch_plan`.
"""

import gc
import io
import itertools
import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F

from trainables.batches import augmentation, tta
from trainables.batches.epoch_plan import Step, plan_epoch
from trainables.batches.loader import loader_for, normalized
from trainables.data.labelled_images import DataError
from trainables.data.presize import PresizedImages
from trainables.network import loss, model, normalization, optimizer, schedule
from trainables.network.dropout import WholeBatch
from trainables.recipe import Recipe
from trainables.training import lr_finder
from trainables.training.checkpoint import PREPROCESSING_FILE, TRAINING_FILE, WEIGHTS_FILE, Files, Preprocessing
from trainables.training.distributed import World, share, share_batch_norm

MIN_CPU_BF16_SIZE = 160
"""px; an EfficientNet-Lite trains no faster in bf16 on smaller images."""
STEPS_PER_CHECK = 20
"""So often losses are looked at: a GPU and the other workers are waited for then."""


class Diverged(RuntimeError):
    """The training loss is no longer a finite number."""


class FineTune:
    """One training in progress. `run_epoch` goes on by one epoch; `state` and `load_state` carry it elsewhere.

    `weights` is a folder of pretrained weights (see `weights.find_weights`); `load_pretrained=False` skips loading
    them where `load_state` follows. Where memory is scarce, `batch_parts` splits each worker's share of a batch: the
    gradients of the parts add up to those of the batch, while batch norms see one part at a time. `on_progress` is
    called after each batch. Raises `ValueError` where the recipe does not fit the model or the workers.
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
        load_pretrained: bool = True,
        batch_parts: int = 1,
        on_progress: Callable[[], None] = lambda: None,
    ) -> None:
        self.recipe = recipe
        self.batch_parts = batch_parts
        self.on_progress = on_progress
        self.device = torch.device(device)
        self.world = World.current()
        self.epochs_done = 0
        require_same_images(images, self.world)
        self.train_indices, self.valid_indices = images.split(seed=split_seed)
        self.labels = torch.as_tensor(np.asarray(images.labels), dtype=torch.long)
        self.num_classes = len(images.classes)
        self.white_level = images.white_level
        smallest = min(recipe.batch_size, self.batch_size)
        if smallest < self.world.size:
            raise ValueError(f"a batch of {smallest} images is too small for {self.world.size} workers")

        self.network = model.build(recipe, self.num_classes, weights, load_pretrained=load_pretrained)
        if self.world.size > 1:
            self.network = self.network.with_model(share_batch_norm(self.network.model, self.device))
        self.network.model.to(self.device, memory_format=torch.channels_last)
        if normalization.from_data(recipe):
            mean, std = normalization.channel_statistics(images, self.train_indices)
            self.network = replace(self.network, mean=mean, std=std)
        self.mean = 255 * torch.tensor(self.network.mean, device=self.device).view(1, 3, 1, 1)
        self.std = 255 * torch.tensor(self.network.std, device=self.device).view(1, 3, 1, 1)
        self.amp_dtype = autocast_dtype(recipe, self.device)
        self.loader = loader_for(images, self.device, num_threads)
        self._enter_stage()

    @property
    def preprocessing(self) -> Preprocessing:
        names = ("presize", "resize_method", "image_size")
        sizes = {name: getattr(self.recipe, name) for name in names}
        return Preprocessing(**sizes, mean=self.network.mean, std=self.network.std, white_level=self.white_level)

    @property
    def frozen(self) -> bool:
        """Whether the next epoch trains the head alone."""
        return self.epochs_done < self.recipe.freeze_epochs

    @property
    def image_size(self) -> int:
        """px; of the next epoch, and after the last one of the model."""
        return self.recipe.image_size_at(self.epochs_done)

    @property
    def batch_size(self) -> int:
        """Of the next epoch, over all workers."""
        return min(self.recipe.batch_size_at(self.epochs_done), len(self.train_indices))

    @property
    def can_split_further(self) -> bool:
        """Whether the next epoch's batches can go in more parts than now."""
        return self.batch_parts < self._most_parts

    @property
    def fewest_images(self) -> int:
        """That a part can have: batch norms of the mlp head, which see no pixels, take their statistics over two."""
        return 2 if self.recipe.head == "mlp" else 1

    @property
    def _most_parts(self) -> int:
        return max(1, self.batch_size // self.world.size // self.fewest_images)

    @property
    def steps_per_epoch(self) -> int:
        """Of the next epoch: whole batches only."""
        return len(self.train_indices) // self.batch_size

    @property
    def progress(self) -> int:
        """Percent of the unfrozen stage that is done; 0 all through the frozen one, unless nothing follows it."""
        if self.epochs_done == self.recipe.total_epochs:
            return 100
        unfrozen_done = max(0, self.epochs_done - self.recipe.freeze_epochs)
        return 100 * unfrozen_done // max(1, self.recipe.epochs)

    def run_epoch(self) -> dict[str, float | int | str]:
        """Train one epoch, then evaluate; losses are means per image. Raises `Diverged` where one is not finite."""
        epoch = {"epoch": self.epochs_done + 1, "stage": "frozen" if self.frozen else "unfrozen"}
        num_images = self.steps_per_epoch * self.batch_size
        started = time.perf_counter()
        train_loss = self._train()
        trained = time.perf_counter()
        metrics = self.evaluate()
        if self.epochs_done + 1 == self.recipe.total_epochs and self.recipe.tta_views:
            metrics |= {"tta_error_rate": self.tta_error_rate()}
        evaluated = time.perf_counter()
        self.epochs_done += 1
        if self.epochs_done == self.recipe.freeze_epochs:
            self._enter_stage()
        return dict(
            **epoch,
            progress=self.progress,
            train_loss=train_loss,
            **metrics,
            train_seconds=trained - started,
            valid_seconds=evaluated - trained,
            images_per_second=num_images / (trained - started),
            train_images=len(self.train_indices),
            valid_images=len(self.valid_indices),
        )

    def evaluate(self) -> dict[str, float]:
        """Plain cross-entropy and error rate over the whole validation split, the same on every worker."""
        rows, targets = self._my_validation_rows()
        augmentations = augmentation.centre(len(self.valid_indices), self.recipe.resize_method)
        logits = self._valid_logits(augmentations[rows])
        sums = torch.stack([F.cross_entropy(logits, targets, reduction="sum"), (logits.argmax(1) != targets).sum()])
        total, errors = (self.world.sum(sums.double()) / len(self.valid_indices)).tolist()
        if not np.isfinite(total):
            raise Diverged(f"validation loss is {total} after epoch {self.epochs_done + 1}")
        return {"valid_loss": total, "error_rate": errors, "accuracy": 1 - errors}

    def tta_error_rate(self) -> float:
        """Error rate over the validation split with the recipe's test-time augmentation."""
        rows, targets = self._my_validation_rows()
        views = self.recipe.tta_views
        averaged = tta.predict(self._valid_logits, self.recipe, len(self.valid_indices), views=views, rows=rows)
        wrong = (averaged.argmax(dim=1) != targets).sum().double()
        return self.world.sum(wrong).item() / len(self.valid_indices)

    def lr_range_test(self, *, num_it: int = 100, start: float = 1e-7, end: float = 10.0) -> lr_finder.Curve:
        """Loss while the rate of all groups grows from `start` to `end` in `num_it` steps, or until it explodes.

        The training is afterwards as it was before.
        """
        before = self.state()
        torch.manual_seed(self.recipe.seed)
        self.network.train(frozen=self.frozen, train_bn=self.recipe.train_bn)
        steps = itertools.chain.from_iterable(self._steps(epoch) for epoch in itertools.count(self.epochs_done))
        sweep = lr_finder.Sweep(num_it, start, end)
        for step, batch in self._with_batches(itertools.islice(steps, num_it)):
            optimizer.set_rate(self.optimizer, sweep.rate)
            sweep.record(self.world.sum(self._step(batch, step)).item())
            if sweep.finished:
                break
        self.load_state(before)
        return sweep.curve()

    def state(self) -> Files:
        """All that is needed to go on from here, as the files of a checkpoint. Nothing random needs to be kept."""
        training = io.BytesIO()
        parts = {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
        torch.save({"epochs_done": self.epochs_done, **parts}, training)
        weights = {name: value.contiguous() for name, value in self.network.model.state_dict().items()}
        return {
            WEIGHTS_FILE: safetensors.torch.save(weights),
            PREPROCESSING_FILE: json.dumps(asdict(self.preprocessing), indent=2).encode(),
            TRAINING_FILE: training.getvalue(),
        }

    def load_state(self, state: Files) -> None:
        """Go on from `state`, which any number of workers may have made."""
        self.network.model.load_state_dict(safetensors.torch.load(state[WEIGHTS_FILE]))
        # To the CPU first: the optimizer moves what it needs to the parameters' device.
        training = torch.load(io.BytesIO(state[TRAINING_FILE]), map_location="cpu", weights_only=True)
        self.epochs_done = training["epochs_done"]
        self._enter_stage()
        self.optimizer.load_state_dict(training["optimizer"])
        if training["scaler"]:  # none where the worker before this one had bf16
            self.scaler.load_state_dict(training["scaler"])

    def close(self) -> None:
        self.loader.close()

    def _enter_stage(self) -> None:
        """Set up what the frozen and the unfrozen stage do not share: gradients, rates, optimizer, schedule."""
        recipe, frozen = self.recipe, self.frozen
        if frozen:
            self.network.freeze_backbone(recipe.train_bn)
        else:
            self.network.unfreeze()
        groups = self.network.layer_groups(recipe.layer_groups)
        rates = schedule.stage_rates(recipe, len(groups), frozen=frozen)
        self.optimizer = optimizer.adamw(groups, rates, recipe)
        self.draws = True  # as far as is known
        self.cycle = schedule.stage_cycle(recipe, frozen=frozen)
        self.stage_epochs = recipe.freeze_epochs if frozen else recipe.epochs
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp_dtype is torch.float16)
        # The wrapper of the stage before must be gone, or its gradient hooks would average a second time.
        self.parallel_model = None
        gc.collect()
        self.parallel_model = self.world.wrap(self.network.model, self.device)

    def _train(self) -> float:
        """One epoch of steps; the mean loss over them."""
        self.network.train(frozen=self.frozen, train_bn=self.recipe.train_bn)
        torch.manual_seed(self.recipe.seed * 10_007 + self.epochs_done)  # dropout
        num_steps = self.steps_per_epoch
        losses, unchecked = [], []
        for number, (step, batch) in enumerate(self._with_batches(self._steps(self.epochs_done))):
            optimizer.set_position(self.optimizer, self.cycle, self._position(number / num_steps))
            unchecked.append(self._step(batch, step))
            if len(unchecked) == STEPS_PER_CHECK or number + 1 == num_steps:
                losses += self._checked(unchecked, len(losses), num_steps)
                unchecked = []
        return float(np.mean(losses))

    def _position(self, epoch_share: float) -> float:
        """Where in the stage's cycle the current epoch is when `epoch_share` of its steps are done."""
        stage_epochs_done = self.epochs_done - (0 if self.frozen else self.recipe.freeze_epochs)
        return (stage_epochs_done + epoch_share) / self.stage_epochs

    def _step(self, batch: torch.Tensor, step: Step) -> torch.Tensor:
        """One optimizer step; this worker's part of the batch's mean loss."""
        inputs, targets = self._mixed(batch, step)
        num_parts = min(self.batch_parts, self._most_parts)
        losses = []
        for part in range(num_parts):
            rows, last = share(len(inputs), part, num_parts), part + 1 == num_parts
            # Workers average their gradients once, with the last part.
            with self.world.gradients_later(self.parallel_model, not last):
                with self._autocast(), self._whole_batch(rows, last):
                    logits = self.parallel_model(inputs[rows]).float()
                value = loss.cross_entropy(logits, targets[rows], self.recipe.smoothing) / self.batch_size
                # The workers' gradients are averaged, but their losses add up.
                self.scaler.scale(value * self.world.size).backward()
            losses.append(value.detach())
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.on_progress()
        return sum(losses)

    @contextmanager
    def _whole_batch(self, rows: slice, last: bool) -> Iterator[None]:
        """Within it, `rows` of this worker's share see the whole batch's dropout, as do all parts until the last.

        A network that draws nothing for its images in a stage's first step is not watched in the others: being watched
        costs microseconds a call.
        """
        first = self.world.share(self.batch_size).start
        devices = [self.device] if self.device.type == "cuda" else []
        whole_batch = WholeBatch(slice(first + rows.start, first + rows.stop), self.batch_size)
        with torch.random.fork_rng(devices, enabled=not last), whole_batch if self.draws else nullcontext():
            yield
        self.draws = whole_batch.has_drawn

    def _steps(self, epoch: int) -> Iterator[Step]:
        return plan_epoch(
            self.recipe,
            self.train_indices,
            epoch=epoch,
            batch_size=self.batch_size,
            share=self.world.share(self.batch_size),
        )

    def _with_batches(self, steps: Iterator[Step]) -> Iterator[tuple[Step, torch.Tensor]]:
        """Each step and its batch; `steps` are drawn as the loader starts on them, a few ahead."""
        steps, ahead = itertools.tee(steps)
        plans = ((step.indices, step.augmentations) for step in ahead)
        return zip(steps, self.loader.batches(plans, self.image_size, self.device), strict=True)

    def _mixed(self, batch: torch.Tensor, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalized inputs and soft targets of this worker's rows, mixup included."""
        inputs = self._normalized(batch)
        targets = self._sent(loss.soft_targets(self.labels[step.indices], self.num_classes))
        if step.second is None:
            return inputs, targets
        rows = [self._sent(torch.as_tensor(part)) for part in (step.first, step.second)]
        weight = self._sent(torch.as_tensor(step.share, dtype=torch.float32))
        mixed = loss.mix(inputs, *rows, weight).contiguous(memory_format=torch.channels_last)
        return mixed, loss.mix(targets, *rows, weight)

    def _my_validation_rows(self) -> tuple[slice, torch.Tensor]:
        """Which rows of the validation split this worker labels, and their labels."""
        rows = self.world.share(len(self.valid_indices))
        return rows, self.labels[self.valid_indices[rows]].to(self.device)

    @torch.inference_mode()
    def _valid_logits(self, augmentations: augmentation.Augmentations) -> torch.Tensor:
        """Logits (rows, classes) of this worker's validation images, augmented so."""
        self.network.model.eval()
        indices = self.valid_indices[self._my_validation_rows()[0]]
        rows = max(1, self.batch_size // self.batch_parts)
        chunks = [slice(i, i + rows) for i in range(0, len(indices), rows)]
        plans = [(indices[chunk], augmentations[chunk]) for chunk in chunks]
        logits = [torch.empty(0, self.num_classes, device=self.device)]  # a worker may have no rows
        for batch in self.loader.batches(plans, self.image_size, self.device):
            with self._autocast():
                logits.append(self.network.model(self._normalized(batch)).float())
            self.on_progress()
        return torch.cat(logits)

    def _normalized(self, batch: torch.Tensor) -> torch.Tensor:
        return normalized(batch, self.mean, self.std)

    def _sent(self, values: torch.Tensor) -> torch.Tensor:
        """`values` on the device, without the host waiting for the steps before."""
        pinned = values.pin_memory() if self.device.type == "cuda" else values
        return pinned.to(self.device, non_blocking=True)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None)

    def _checked(self, losses: list[torch.Tensor], before: int, num_steps: int) -> list[float]:
        """The losses of some steps over all workers, `before` steps of the epoch having gone before them."""
        losses = self.world.sum(torch.stack(losses).double()).cpu().numpy()
        for number, value in enumerate(losses, start=before):
            if not np.isfinite(value):
                peak = max(group["lr_max"] for group in self.optimizer.param_groups)
                rate = peak * self.cycle.lr_factor(self._position(number / num_steps))
                raise Diverged(
                    f"training loss is {value} at epoch {self.epochs_done + 1}, step {number + 1} of {num_steps} "
                    f"(head's learning rate {rate:.2g})"
                )
        return losses.tolist()


def require_same_images(images: PresizedImages, world: World) -> None:
    """Raises `DataError` where the workers of a training have different images: one that a single node cannot read
    would shift all that follow it there."""
    found = world.gather((socket.gethostname(), images.digest, len(images), images.unreadable[:3]))
    if len({digest for _, digest, _, _ in found}) > 1:
        nodes = (
            f"{node} (worker {rank}) has {count}" + (f" and cannot read {', '.join(map(repr, bad))}" if bad else "")
            for rank, (node, _, count, bad) in enumerate(found)
        )
        raise DataError(
            f"The nodes of this trial have different images: {'; '.join(nodes)}. Every node needs the same files, with "
            "the same content."
        )


def autocast_dtype(recipe: Recipe, device: torch.device) -> torch.dtype | None:
    """What the forward pass computes in under `torch.autocast`; None for plain fp32."""
    precision = recipe.precision
    if precision == "auto" and device.type == "cuda":
        precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif precision == "auto":
        # Small images gain nothing on a CPU. At 32 px they would even lose: where a network shrinks them to 1 x 1,
        # oneDNN leaves most of the weight gradient of a 3 x 3 convolution unset in bf16 (torch 2.14).
        has, smallest = torch.cpu.get_capabilities(), min(recipe.start_size or recipe.image_size, recipe.image_size)
        has_bf16 = has.get("avx512_bf16") or has.get("amx_bf16")
        precision = "bf16" if has_bf16 and smallest >= MIN_CPU_BF16_SIZE else "fp32"
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
