"""Fine-tune one network: freeze, then unfreeze, epoch by epoch. Plain PyTorch, alone or under torchrun.

    python -m trainables.finetune --data DIR --set arch=resnet18.tv_in1k --set epochs=3
    torchrun --nproc-per-node 2 -m trainables.finetune --data DIR

Everything random in an epoch comes from (seed, epoch), drawn for the whole batch, so a training continues exactly from
the state of any epoch's end and does not depend on the number of workers.
"""

import argparse
import gc
import io
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F

from trainables import augment, model, optim
from trainables.checkpoint import PREPROCESSING_FILE, TRAINING_FILE, WEIGHTS_FILE, Files, Preprocessing
from trainables.data import find_images
from trainables.distributed import World, init_from_environment, share_batch_norm
from trainables.loader import BatchLoader
from trainables.presize import PresizedImages, presize
from trainables.recipe import Recipe, parse_value
from trainables.weights import WeightsError


class Diverged(RuntimeError):
    """The training loss is no longer a finite number."""


@dataclass(frozen=True)
class Step:
    """One optimizer step, as this worker sees it: the images it loads, and its rows of the batch among them."""

    indices: np.ndarray
    augmentations: augment.Augmentations
    first: np.ndarray  # rows of this worker
    second: np.ndarray | None  # their mixup partners, which may be another worker's rows
    share: np.ndarray | None  # lambda: the part of the first image in the mixture


class FineTune:
    """One training in progress. `run_epoch` goes on by one epoch; `state` and `load_state` carry it elsewhere.

    `weights` is a folder of pretrained weights (see `weights.find_weights`); `load_pretrained=False` skips loading
    them where `load_state` follows. Raises `ValueError` where the recipe does not fit the model or the workers.
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
    ) -> None:
        self.recipe = recipe
        self.device = torch.device(device)
        self.world = World.current()
        self.train_indices, self.valid_indices = images.split(seed=split_seed)
        self.labels = torch.as_tensor(np.asarray(images.labels), dtype=torch.long)
        self.num_classes = len(images.classes)
        self.batch_size = min(recipe.batch_size, len(self.train_indices))
        if self.batch_size < self.world.size:
            raise ValueError(f"a batch of {self.batch_size} images is too small for {self.world.size} workers")

        self.network = model.build(recipe, self.num_classes, weights, load_pretrained=load_pretrained)
        if self.world.size > 1:
            self.network = self.network.with_model(share_batch_norm(self.network.model, self.device))
        self.network.model.to(self.device, memory_format=torch.channels_last)
        self.mean = 255 * torch.tensor(self.network.mean, device=self.device).view(1, 3, 1, 1)
        self.std = 255 * torch.tensor(self.network.std, device=self.device).view(1, 3, 1, 1)
        self.amp_dtype = autocast_dtype(recipe.precision, self.device)
        self.loader = BatchLoader(images, num_threads=num_threads)
        self.epochs_done = 0
        self._enter_stage()

    @property
    def preprocessing(self) -> Preprocessing:
        sizes = {"presize": self.recipe.presize, "image_size": self.recipe.image_size}
        return Preprocessing(**sizes, mean=self.network.mean, std=self.network.std)

    @property
    def frozen(self) -> bool:
        """Whether the next epoch trains the head alone."""
        return self.epochs_done < self.recipe.freeze_epochs

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches only: a last small one would make a noisy step and noisy batch statistics."""
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
        stage = "frozen" if self.frozen else "unfrozen"
        started = time.perf_counter()
        train_loss = self._train()
        trained = time.perf_counter()
        metrics = self.evaluate()
        evaluated = time.perf_counter()
        self.epochs_done += 1
        if self.epochs_done == self.recipe.freeze_epochs:
            self._enter_stage()
        return dict(
            epoch=self.epochs_done,
            stage=stage,
            progress=self.progress,
            train_loss=train_loss,
            **metrics,
            train_seconds=trained - started,
            valid_seconds=evaluated - trained,
            images_per_second=self.steps_per_epoch * self.batch_size / (trained - started),
        )

    @torch.inference_mode()
    def evaluate(self) -> dict[str, float]:
        """Plain cross-entropy and error rate over the whole validation split, the same on every worker."""
        self.network.model.eval()
        indices = self.valid_indices[self.world.share(len(self.valid_indices))]
        chunks = [indices[i : i + self.batch_size] for i in range(0, len(indices), self.batch_size)]
        plans = [(chunk, augment.centre(len(chunk))) for chunk in chunks]
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for chunk, batch in zip(chunks, self.loader.batches(plans, self.recipe.image_size, self.device), strict=True):
            targets = self.labels[chunk].to(self.device)
            with self._autocast():
                logits = self.network.model(self._normalized(batch)).float()
            sums[0] += F.cross_entropy(logits, targets, reduction="sum")
            sums[1] += (logits.argmax(dim=1) != targets).sum()
        loss, errors = (self.world.sum(sums) / len(self.valid_indices)).tolist()
        if not np.isfinite(loss):
            raise Diverged(f"validation loss is {loss} after epoch {self.epochs_done + 1}")
        return {"valid_loss": loss, "error_rate": errors, "accuracy": 1 - errors}

    def state(self) -> Files:
        """All that is needed to go on from here, as the files of a checkpoint. Nothing random needs to be kept."""
        training = io.BytesIO()
        torch.save({"epochs_done": self.epochs_done, "optimizer": self.optimizer.state_dict()}, training)
        weights = {name: value.contiguous() for name, value in self.network.model.state_dict().items()}
        return {
            WEIGHTS_FILE: safetensors.torch.save(weights),
            PREPROCESSING_FILE: json.dumps(asdict(self.preprocessing), indent=2).encode(),
            TRAINING_FILE: training.getvalue(),
        }

    def load_state(self, state: Files) -> None:
        """Go on from `state`, which any number of workers may have made."""
        self.network.model.load_state_dict(safetensors.torch.load(state[WEIGHTS_FILE]))
        # To the CPU: the optimizer moves its moments to the parameters' device, but its step counts must stay here.
        training = torch.load(io.BytesIO(state[TRAINING_FILE]), map_location="cpu", weights_only=True)
        self.epochs_done = training["epochs_done"]
        self._enter_stage()
        self.optimizer.load_state_dict(training["optimizer"])

    def close(self) -> None:
        self.loader.close()

    def _enter_stage(self) -> None:
        """Set up what the frozen and the unfrozen stage do not share: gradients, rates, optimizer, schedule."""
        recipe = self.recipe
        if self.frozen:
            self.network.freeze_backbone()
            groups, rates = self.network.layer_groups()[-1:], [recipe.lr_max_frozen]
            self.cycle, self.stage_epochs = optim.frozen_cycle(recipe), recipe.freeze_epochs
        else:
            self.network.unfreeze()
            groups = self.network.layer_groups()
            rates = optim.discriminative_rates(recipe.lr_min, recipe.lr_max, len(groups))
            self.cycle, self.stage_epochs = optim.unfrozen_cycle(recipe), recipe.epochs
        self.optimizer = optim.adamw(groups, rates, recipe)
        # The wrapper of the stage before must be gone, or its gradient hooks would average a second time.
        self.parallel_model = None
        gc.collect()
        self.parallel_model = self.world.wrap(self.network.model, self.device)

    def _train(self) -> float:
        """One epoch of steps; the mean loss over them."""
        self.network.train(frozen=self.frozen, freeze_bn=self.recipe.freeze_bn)
        torch.manual_seed(self.recipe.seed * 10_007 + self.epochs_done)  # dropout
        steps = list(self._plan_epoch())
        plans = ((step.indices, step.augmentations) for step in steps)
        stage_epochs_done = self.epochs_done - (0 if self.frozen else self.recipe.freeze_epochs)
        losses = []
        for step, batch in zip(steps, self.loader.batches(plans, self.recipe.image_size, self.device), strict=True):
            inputs, targets = self._mixed(batch, step)
            epochs_done = stage_epochs_done + len(losses) / len(steps)
            optim.set_position(self.optimizer, self.cycle, epochs_done / self.stage_epochs)
            with self._autocast():
                logits = self.parallel_model(inputs).float()
            loss = F.cross_entropy(logits, targets, label_smoothing=self.recipe.smoothing, reduction="sum")
            loss = loss / self.batch_size
            (loss * self.world.size).backward()  # the workers' gradients are averaged, but their losses add up
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
        return self._checked_mean(torch.stack(losses))

    def _plan_epoch(self) -> Iterator[Step]:
        """The epoch's steps, drawn alike on every worker for the whole batch."""
        rng = np.random.default_rng([self.recipe.seed, self.epochs_done])
        n, mine = self.batch_size, self.world.share(self.batch_size)
        self.network.share_dropout(mine, n)
        order = rng.permutation(self.train_indices)
        for start in range(0, self.steps_per_epoch * n, n):
            indices, augmentations = order[start : start + n], augment.draw(rng, n, self.recipe)
            rows = np.arange(n)[mine]
            if self.recipe.mixup_alpha == 0:
                yield Step(indices[rows], augmentations[rows], np.arange(len(rows)), None, None)
                continue
            share = rng.beta(self.recipe.mixup_alpha, self.recipe.mixup_alpha, n)
            share = np.maximum(share, 1 - share)  # as in fastai: the first image is the larger part
            partners = rng.permutation(n)[mine]
            needed, places = np.unique(np.concatenate([rows, partners]), return_inverse=True)
            first, second = np.split(places, 2)
            yield Step(indices[needed], augmentations[needed], first, second, share[mine])

    def _mixed(self, batch: torch.Tensor, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalized inputs and soft targets of this worker's rows, mixup (Zhang et al. 2018) included."""
        inputs = self._normalized(batch)
        targets = F.one_hot(self.labels[step.indices], self.num_classes).to(self.device, torch.float32)
        if step.second is None:
            return inputs, targets
        share = torch.as_tensor(step.share, dtype=torch.float32, device=self.device)
        targets = torch.lerp(targets[step.second], targets[step.first], share[:, None])
        mixed = torch.lerp(inputs[step.second], inputs[step.first], share[:, None, None, None])
        return mixed.contiguous(memory_format=torch.channels_last), targets

    def _normalized(self, batch: torch.Tensor) -> torch.Tensor:
        return (batch.float() - self.mean) / self.std

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None)

    def _checked_mean(self, losses: torch.Tensor) -> float:
        losses = self.world.sum(losses.double()).cpu().numpy()
        bad = np.flatnonzero(~np.isfinite(losses))
        if len(bad):
            rate = max(group["lr"] for group in self.optimizer.param_groups)
            raise Diverged(
                f"training loss is {losses[bad[0]]} at epoch {self.epochs_done + 1}, step {bad[0] + 1} of "
                f"{len(losses)} (head's learning rate at the epoch's end {rate:.2g})"
            )
        return float(losses.mean())


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if precision == "bf16" or (precision == "auto" and has_bf16) else None


def main() -> None:
    """Fine-tune one network on a folder of images and print a line an epoch."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of labelled images")
    parser.add_argument("--weights", type=Path, help="folder with <arch>.safetensors")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the recipe")
    args = parser.parse_args()
    try:
        recipe = Recipe(**dict(_parse_setting(text) for text in args.set))
        model.check_architecture(recipe.arch)
        images = presize(find_images(args.data), recipe.presize)
    except ValueError as error:
        parser.error(str(error))
    device = init_from_environment()
    try:
        training = FineTune(recipe, images, weights=args.weights, device=device)
    except WeightsError as error:
        parser.error(str(error))
    for _ in range(recipe.total_epochs):
        metrics = training.run_epoch()
        if training.world.rank == 0:
            print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in metrics.items()))
    training.close()
    if dist.is_initialized():
        dist.destroy_process_group()


def _parse_setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--set {text!r} is not NAME=VALUE")
    return name, parse_value(name, value)


if __name__ == "__main__":
    main()
