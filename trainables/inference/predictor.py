"""Predicts with a trained model, as validation did in training. Imports torch only when a model is loaded."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainables.inference.model_folder import ModelFolder
from trainables.system.machine import num_cpus
from trainables.training.checkpoint import Preprocessing

if TYPE_CHECKING:
    import torch
    from torch import nn

    from trainables.batches.augmentation import Augmentations
    from trainables.data.image_file import Images, Pixels


@dataclass(frozen=True)
class Prediction:
    """The labels of one image, from the most to the least probable, and their probabilities."""

    path: Path
    labels: tuple[str, ...] = ()
    probabilities: tuple[float, ...] = ()
    chosen: tuple[str, ...] = ()
    """What the image is: the most probable label or, where it may have several, those above their thresholds."""
    problem: str = ""
    """Why the image is unreadable; then there are no labels."""


class Predictor:
    """A trained model that predicts as validation did in training.

    Args:
        folder: The model, as `read_model` or `search.load` finds it.
        device: Where to predict; by default a GPU if there is one.
        batch_size: Images per batch.
        num_threads: Threads that decode images; by default one per CPU.
        tta: Augmented views per image that are averaged with its centre view (test-time augmentation).

    Raises:
        ValueError: The model cannot be loaded, or an argument is out of range.

    Example:
        >>> predictor = Predictor(read_model(Path("exported")))
        >>> [prediction] = predictor.predict("cat.jpg", top=1)
        >>> label, probability = prediction.labels[0], prediction.probabilities[0]
    """

    def __init__(
        self,
        folder: ModelFolder,
        *,
        device: torch.device | str | None = None,
        batch_size: int = 64,
        num_threads: int | None = None,
        tta: int = 0,
    ) -> None:
        import torch

        from trainables.network.fused_convolutions import fuse_convolutions
        from trainables.network.precision import autocast_dtype

        if batch_size < 1 or tta < 0:
            raise ValueError(f"batch_size={batch_size}, tta={tta}: expected 1 or more, and 0 or more")
        self.recipe = folder.recipe
        self.labels = folder.labels
        self.tta = tta
        self.device = _device(device)
        self.batch_size = batch_size
        self.num_threads = num_threads or num_cpus()
        self.preprocessing = folder.preprocessing
        self.several_labels = folder.preprocessing.several_labels
        self.model = load_model(folder).eval().to(self.device).to(memory_format=torch.channels_last)
        fuse_convolutions(self.model, self.preprocessing.image_size)
        self.temperature = folder.temperature
        self.mean, self.std = (
            255 * torch.tensor(values, device=self.device).view(1, 3, 1, 1)
            for values in (self.preprocessing.mean, self.preprocessing.std)
        )
        self.amp_dtype = autocast_dtype(folder.recipe, self.device, self.model)

    def predict(self, images: Path | str | Iterable[Path | str], *, top: int | None = None) -> list[Prediction]:
        """Predicts image files.

        Args:
            images: The path of one file, or several paths.
            top: How many labels to return; by default all.

        Returns:
            One prediction per file, in the given order. An unreadable file has a `problem` instead of labels.

        Raises:
            ValueError: `images` are not paths.
        """
        return list(self.predict_each(images, top=top))

    def predict_each(
        self, images: Path | str | Iterable[Path | str], *, top: int | None = None
    ) -> Iterator[Prediction]:
        """`predict` as an iterator, batch by batch."""
        files = PresizedFiles(_paths(images), self.preprocessing)
        top, thresholds = min(top or len(self.labels), len(self.labels)), self.preprocessing.thresholds
        ranked = len(self.labels) if self.several_labels else top
        rows = (row for batch in self.probabilities(files) for row in zip(*_best(batch, ranked), strict=True))
        for index, (probabilities, indices) in enumerate(rows):
            if problem := files.problems.pop(index, ""):
                yield Prediction(files.paths[index], problem=problem)
            else:
                labels = tuple(self.labels[i] for i in indices)
                chosen = labels[:1]
                if thresholds is not None:
                    above = (p > thresholds[i] for p, i in zip(probabilities, indices, strict=True))
                    chosen = tuple(itertools.compress(labels, above))
                yield Prediction(files.paths[index], labels[:top], tuple(probabilities[:top]), chosen)

    def probabilities(self, images: Images) -> Iterator[torch.Tensor]:
        """Probabilities (n, classes) of presized images, batch by batch, averaged over views with `tta`."""
        from trainables.batches import tta

        if not self.tta:
            yield from (tta.probabilities(logits, self.several_labels) for logits in self.logits(images))
            return
        for chunk in self._chunks(images):
            logits = partial(self._logits_of_batch, _Once(images, chunk))
            yield tta.predict(logits, self.recipe, len(chunk), views=self.tta, several_labels=self.several_labels)

    def _logits_of_batch(self, images: Images, augmentations: Augmentations) -> torch.Tensor:
        return next(self.logits(images, augmentations))

    def logits(self, images: Images, augmentations: Augmentations | None = None) -> Iterator[torch.Tensor]:
        """Calibrated logits (n, classes) of presized images (h, w, 3) uint8, batch by batch."""
        import torch

        for batch in self.batches(images, augmentations):
            with torch.inference_mode():
                yield self.forward(self.model, batch)

    def batches(self, images: Images, augmentations: Augmentations | None = None) -> Iterator[torch.Tensor]:
        """Presized images as uint8 batches (n, 3, image_size, image_size), made in advance by threads.

        `augmentations` of all images default to the centre view.
        """
        import numpy as np

        from trainables.batches import augmentation
        from trainables.batches.loader import BatchLoader

        if augmentations is None:
            augmentations = augmentation.centre(len(images), self.preprocessing.resize_method)
        plans = ((np.asarray(chunk), augmentations[np.asarray(chunk)]) for chunk in self._chunks(images))
        loader = BatchLoader(images, num_threads=self.num_threads)
        try:
            yield from loader.batches(plans, self.preprocessing.image_size, self.device)
        finally:
            loader.close()

    def _chunks(self, images: Images) -> Iterator[range]:
        return (range(i, min(i + self.batch_size, len(images))) for i in range(0, len(images), self.batch_size))

    def forward(self, model: Callable[[torch.Tensor], torch.Tensor], batch: torch.Tensor) -> torch.Tensor:
        """Float logits of a uint8 batch, in the precision of the training's validation, over the temperature."""
        import torch

        from trainables.batches.loader import normalized

        with torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None):
            logits = model(normalized(batch, self.mean, self.std))
        return logits.float() / self.temperature


def load_model(folder: ModelFolder) -> nn.Module:
    """The trained network, on the CPU. Raises `ValueError`."""
    import safetensors.torch
    import torch
    from safetensors import SafetensorError

    from trainables.network.model import build

    with torch.random.fork_rng(devices=[]):  # build seeds it
        network = build(folder.recipe, len(folder.labels), load_pretrained=False)
    try:
        network.model.load_state_dict(safetensors.torch.load_file(folder.weights))
    except (SafetensorError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{folder.weights} does not match the recipe.json next to it: {reason}") from error
    return network.model


class PresizedFiles:
    """Image files as presized images, decoded on access. Unreadable ones are black and listed as `problems`."""

    def __init__(self, paths: list[Path], preprocessing: Preprocessing) -> None:
        self.paths = paths
        self.size = preprocessing.presize
        self.method = preprocessing.resize_method
        self.white_level = preprocessing.white_level
        self.problems: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Pixels:
        import numpy as np

        from trainables.data.image_file import UnreadableImage, read_image, resize

        try:
            image = read_image(self.paths[index], self.size, self.white_level)
            return resize(image, self.size, self.method)
        except UnreadableImage as error:
            self.problems[int(index)] = str(error)
            return np.zeros((self.size, self.size, 3), np.uint8)


class _Once:
    """Some of `images`, each decoded once for all views of a batch."""

    def __init__(self, images: Images, indices: range) -> None:
        self.images = images
        self.indices = indices
        self.made: dict[int, Pixels] = {}

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Pixels:
        if index not in self.made:
            self.made[index] = self.images[self.indices[index]]
        return self.made[index]


def _paths(images: Path | str | Iterable[Path | str]) -> list[Path]:
    """Raises `ValueError` for anything but one path or several."""
    given: list[Any] = [images]
    if isinstance(images, Iterable) and not isinstance(images, str | bytes | os.PathLike):
        given = list(images)
    if wrong := [image for image in given if not isinstance(image, str | os.PathLike)]:
        raise ValueError(
            "predict expects the path of an image file or several paths, 'cat.jpg' or ['cat.jpg', 'dog.jpg'], and "
            f"{type(wrong[0]).__name__} is not a path. Save images that are in memory as files first."
        )
    return [Path(image) for image in given]


def _best(probabilities: torch.Tensor, top: int) -> tuple[list[list[float]], list[list[int]]]:
    best = probabilities.topk(top, dim=1)
    return best.values.tolist(), best.indices.tolist()


def _device(device: torch.device | str | None) -> torch.device:
    import torch

    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # a wrong name, or no such GPU
        raise ValueError(f"device {str(device)!r} cannot be used here: {str(error).splitlines()[0]}") from error
