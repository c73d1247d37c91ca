"""fastai's side of the benchmarks: its loaders and its training, of the images, split and backbone that ours has."""

import time
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from common import CPUS, epoch_row
from fastai.vision import all as fastai

from trainables.data.presize import PresizedImages
from trainables.network import model
from trainables.recipe import Recipe
from trainables.training.fine_tune import FineTune

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def train_fastai(same: FineTune, images: PresizedImages, root: Path) -> list[dict]:
    """fastai's training with the data, statistics and backbone of `same`, which has not been trained."""
    recipe, network, table = same.recipe, same.network, EpochTable(same.recipe.freeze_epochs)
    loaders = data_loaders(recipe, images, root, valid=same.valid_indices, mean=network.mean, std=network.std)
    splitter = resnet_split if isinstance(network.model, timm.models.ResNet) else None
    options = {"pretrained": False, "splitter": splitter, "metrics": fastai.error_rate, "cbs": table}
    learner = fastai.vision_learner(loaders, recipe.arch, **options)
    head = f"{model.classifier_names(network.model)[0]}."
    weights = network.model.state_dict().items()
    learner.model[0].model.load_state_dict({name: value for name, value in weights if not name.startswith(head)})
    with learner.no_bar(), learner.no_logging():
        learner.fine_tune(recipe.epochs, base_lr=recipe.lr_max_frozen, freeze_epochs=recipe.freeze_epochs)
    return table.rows


def data_loaders(
    recipe: Recipe,
    images: PresizedImages,
    root: Path,
    *,
    valid: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
) -> fastai.DataLoaders:
    """fastai's loaders of the very same images; its default shuffling, which drops the last, incomplete batch."""
    block = fastai.DataBlock(
        blocks=(fastai.ImageBlock, fastai.CategoryBlock(vocab=list(images.classes), sort=False)),
        get_x=lambda i: root / images.paths[i],
        get_y=lambda i: images.classes[images.labels[i]],
        splitter=fastai.IndexSplitter([int(i) for i in valid]),
        item_tfms=fastai.Resize(recipe.presize),
        batch_tfms=[
            *fastai.aug_transforms(size=recipe.image_size, min_scale=0.75),
            fastai.Normalize.from_stats(mean, std),
        ],
    )
    return block.dataloaders(range(len(images)), bs=recipe.batch_size, num_workers=CPUS, device=DEVICE)


def resnet_split(network: torch.nn.Sequential) -> list[list[torch.nn.Parameter]]:
    """fastai's own cut of torchvision's ResNets, for timm's, whose modules come in the same order."""
    layers = list(network[0].model.children())
    parts = (layers[:6], layers[6:], network[1:])
    return [[p for layer in part for p in layer.parameters()] for part in parts]


class EpochTable(fastai.Callback):
    """Collects fastai's epochs as rows like ours: the mean training loss, where its recorder smooths."""

    def __init__(self, freeze_epochs: int) -> None:
        self.freeze_epochs, self.rows, self.order = freeze_epochs, [], 55  # after the recorder, whose order is 50

    def before_epoch(self) -> None:
        self.batch_losses, self.started = [], time.perf_counter()

    def after_batch(self) -> None:
        if self.training:
            self.batch_losses.append(self.learn.loss.detach())

    def after_epoch(self) -> None:
        epoch = len(self.rows) + 1
        row = {"epoch": epoch, "stage": "frozen" if epoch <= self.freeze_epochs else "unfrozen"}
        row["train_loss"] = torch.stack(self.batch_losses).mean().item()
        row["seconds"] = time.perf_counter() - self.started
        _, row["valid_loss"], row["error_rate"] = self.learn.recorder.values[-1]
        self.rows.append(epoch_row("fastai", row))
