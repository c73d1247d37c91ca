"""Epoch 0 of a training that starts from a probe: the head that is best on the features of the frozen backbone.

Fine-tuning from it changes the features less than from a random head (Kumar et al. 2022, "Fine-Tuning can Distort
Pretrained Features and Underperform Out-of-Distribution", https://arxiv.org/abs/2202.10054).
"""

import logging
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch

from trainables.batches import augmentation
from trainables.data.presized_images import PresizedImages
from trainables.network.model import Network
from trainables.probe.features import (
    Features,
    FeatureSet,
    as_float16,
    feature_path,
    open_features,
    pooled_features,
    probed_classifier,
    write_features,
)
from trainables.probe.logistic_regression import fit
from trainables.probe.mlp_training import fit_mlp
from trainables.recipe import Recipe
from trainables.system.cache import DamagedCache, flush, locked
from trainables.training.distributed import World
from trainables.training.inputs import Inputs

CHUNK = 64
"""Images of a forward pass. The same for any number of workers, so that they compute the same features."""
HEAD_VERSION = 1
"""Raise it when the same features give another head."""

logger = logging.getLogger(__name__)

State = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Probing:
    """What is needed to compute a probe; all workers of a training call it together."""

    recipe: Recipe
    network: Network
    images: PresizedImages
    inputs: Inputs
    amp_dtype: torch.dtype | None
    world: World
    on_progress: Callable[[], None]

    def features(self) -> FeatureSet:
        """The features of all images: from this node's cache, or computed by the workers in equal shares."""
        path = feature_path(self.network, self.images, self.recipe, self.amp_dtype)
        found = _opened(path)
        if all(self.world.gather(found is not None)) and found:
            return found
        with ExitStack() as held:
            if self.world.rank == 0:
                held.enter_context(_lock(path, self.on_progress))
                found = _opened(path)
            if all(self.world.gather(found is not None)) and found:
                return found
            computed = self._computed(path)
            return found or self._kept(computed, locked_already=self.world.rank == 0)

    def head(self, features: Features, train: npt.NDArray[np.int64]) -> State:
        """The state of the classifier that is best on the features of the images `train`; the first worker's."""
        state = self._cached_head(features, train) if self.world.rank == 0 else None
        shared: State = self.world.gather(state)[0]
        return shared

    # --- Features -----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _computed(self, path: Path) -> FeatureSet:
        """The features of all images, of which each worker computes its share of chunks."""
        started = time.perf_counter()
        count = len(self.images)
        chunks = [np.arange(start, min(count, start + CHUNK)) for start in range(0, count, CHUNK)]
        mine = chunks[self.world.shard(len(chunks))]
        plans = ((chunk, augmentation.centre(len(chunk), self.recipe.resize_method)) for chunk in mine)
        self.network.model.eval()
        rows = []
        with pooled_features(self.network) as found:
            for batch in self.inputs.batches(plans, self.recipe.image_size):
                with torch.autocast(batch.device.type, self.amp_dtype, enabled=self.amp_dtype is not None):
                    self.network.model(batch)
                rows.append(as_float16(found.pop()))
                self.on_progress()
        parts = self.world.gather(np.concatenate(rows) if rows else None)
        whole: Features = np.concatenate([part for part in parts if part is not None])
        return FeatureSet(rows=whole, seconds=time.perf_counter() - started, path=path)

    def _kept(self, computed: FeatureSet, *, locked_already: bool) -> FeatureSet:
        """The features as the cache has them from now on; unchanged where it cannot be written."""
        with ExitStack() as held:
            try:
                if not locked_already:
                    held.enter_context(_lock(computed.path, self.on_progress))
                    if found := _opened(computed.path):
                        return found
                return write_features(computed, self.images, self.recipe)
            except OSError as error:
                logger.warning("features cannot be kept in %s, and are computed again: %s", computed.path, error)
                return computed

    # --- The head -----------------------------------------------------------------------------------------------------

    def _cached_head(self, features: Features, train: npt.NDArray[np.int64]) -> State:
        path = feature_path(self.network, self.images, self.recipe, self.amp_dtype)
        labels = self.inputs.labels[torch.as_tensor(train)]
        recipe = self.recipe
        mlp = (recipe.hidden, recipe.dropout, recipe.seed) if recipe.head == "mlp" else ()
        decisive = (HEAD_VERSION, self.inputs.num_classes, recipe.head, *mlp)
        name = sha256(repr(decisive).encode() + train.tobytes() + labels.numpy().tobytes()).hexdigest()[:16]
        file = path / f"{recipe.head}-{name}.head"
        if (state := _read_head(file)) is None:
            state = self._fitted(features[train], labels)
            _write_head(file, state)
        return state

    def _fitted(self, features: Features, labels: torch.Tensor) -> State:
        rows, classifier = torch.from_numpy(features), probed_classifier(self.network)
        device, classes = self.inputs.device, self.inputs.num_classes
        if isinstance(classifier, torch.nn.Linear):
            found = fit(rows, labels, classes, seed=0, device=device, on_progress=self.on_progress)
            return {"weight": found.weight, "bias": found.bias}
        assert isinstance(classifier, torch.nn.Sequential)  # see `probed_classifier`
        fit_mlp(classifier, rows, labels, seed=self.recipe.seed, device=device, on_progress=self.on_progress)
        return {name: value.detach().cpu().clone() for name, value in classifier.state_dict().items()}


def _lock(path: Path, on_wait: Callable[[], None]) -> AbstractContextManager[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    return locked(path.with_name(f".{path.name}.lock"), "for another process that computes the same features", on_wait)


def _opened(path: Path) -> FeatureSet | None:
    try:
        return open_features(path)
    except DamagedCache as error:
        logger.warning("the cached features are damaged and will be computed again: %s", error)
        return None


def _read_head(file: Path) -> State | None:
    """A kept head; None if there is none, or none that is as it was written."""
    try:
        content = file.read_bytes()
    except OSError:
        return None
    digest, state = content[:32], content[32:]
    return safetensors.torch.load(state) if sha256(state).digest() == digest else None


def _write_head(file: Path, state: State) -> None:
    """Keeps a head beside its features, if that is possible: it is quick to compute."""
    content = safetensors.torch.save({name: value.contiguous() for name, value in state.items()})
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    with suppress(OSError):
        with partial.open("wb") as opened:
            opened.write(sha256(content).digest() + content)
            flush(opened)
        partial.replace(file)
