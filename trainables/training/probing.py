"""Epoch 0 of a training that starts from a probe: the head that is best on the features of the frozen backbone.

Fine-tuning from it changes the features less than from a random head (Kumar et al. 2022, "Fine-Tuning can Distort
Pretrained Features and Underperform Out-of-Distribution", https://arxiv.org/abs/2202.10054).
"""

import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from filelock import FileLock, Timeout

from trainables.batches.loader import Plan
from trainables.data.presized_images import PresizedImages
from trainables.data.splits import group_numbers, some_of_each_class
from trainables.network.loss import log_priors
from trainables.network.model import Network, mlp_head
from trainables.probe.feature_files import Features, FeatureSet, lock_file, open_features, write_features
from trainables.probe.features import as_float16, backbone_digest, description, feature_path, pooled_features
from trainables.probe.head_files import State, read_head, write_head
from trainables.probe.logistic_regression import LinearHead, fit
from trainables.probe.mlp_training import fit_mlp
from trainables.probe.views import View, augmented_view, centre_view, part_of_centre_view
from trainables.recipe import Recipe
from trainables.system.cache import DamagedCache, locked
from trainables.training.distributed import World
from trainables.training.inputs import Inputs

CHUNK = 64
"""Images of a forward pass. The same for any number of workers, so that they compute the same features."""
PIECE = 8192
"""Rows that a worker gives to the others at a time: a collective copies several times what it passes on."""
TINY = 1e-7
"""Probabilities below it count as this: float16 has nothing between."""
FORWARD_SHARE, LAST_SECONDS = 0.6, 3.0
"""Of the time until a deadline: the share for features, where the rest is for the head, and the seconds after both."""
HEAD_VERSION = 4
"""Raise it when the same features give another head, or when more is kept with it."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Probing:
    """What is needed to compute a probe; all workers of a training call it together."""

    recipe: Recipe
    network: Network
    images: PresizedImages
    inputs: Inputs
    amp_dtype: torch.dtype | None
    world: World
    batch_parts: int
    """As in `FineTune`; of a forward pass of `CHUNK` images, too."""
    on_progress: Callable[[], None]
    class_weights: torch.Tensor | None = None
    """(classes,); of the losses that the head minimises."""

    def features(self, view: View | None = None) -> FeatureSet:
        """The features of a view, by default of all images as validation sees them: from this node's cache, or computed
        by the workers in equal shares.

        The first worker locks those of its node while all of them compute. The others neither wait for a lock nor hold
        one then, so that two trainings never wait for each other.
        """
        view = view or centre_view(len(self.images), self.recipe)
        path = self.path(view)
        if found := self._opened_by_all(path):
            return found
        with ExitStack() as held:
            self._lock(path, held)
            if found := self._opened_by_all(path, warn=True):  # another training has computed them
                return found
            computed = self._computed(view, path)
            if self.world.rank == 0:
                found = _opened(path) or self._written(computed, view)
            self.world.gather(None)  # until they are written
        return found or _opened(path) or self._written_on_other_node(computed, view)

    def within(
        self, deadline: float, train: npt.NDArray[np.int64], valid: npt.NDArray[np.int64]
    ) -> tuple[FeatureSet, npt.NDArray[np.int64]]:
        """The features of all images, and `train`, where there is time for them until the `deadline` (`time.time`);
        else those of the images `valid` and of as many of `train` as there is time for, and which these are.

        For one worker: several would have to agree on what fits.
        """
        view = centre_view(len(self.images), self.recipe)
        if self.world.size > 1 or self._opened_by_all(self.path(view)):
            return self.features(view), train
        first = part_of_centre_view(valid[: self._chunk], self.recipe)
        plan = [(first.indices, first.augmentations)]
        self._forward(plan)  # the first pass of a process is slower
        began = time.perf_counter()
        self._forward(plan)
        each = (time.perf_counter() - began) / len(first.indices)
        fitting = int(FORWARD_SHARE * (deadline - LAST_SECONDS - time.time()) / each)
        if fitting >= len(self.images):
            return self.features(view), train
        labels = self.inputs.labels[torch.as_tensor(train)].numpy()
        some = train[some_of_each_class(labels, max(fitting - len(valid), self.inputs.num_classes))]
        logger.warning("time suffices for %d of %d training images", len(some), len(train))
        part = part_of_centre_view(np.sort(np.concatenate([some, valid])), self.recipe)
        computed = self._computed(part, self.path(part))
        rows = np.zeros((len(self.images), computed.rows.shape[1]), dtype=np.float16)
        rows[part.indices] = computed.rows
        return replace(computed, rows=rows), some

    def linear_probe(self, features: FeatureSet, train: npt.NDArray[np.int64]) -> LinearHead:
        """The logistic regression on the features of the images `train`; the first worker's, which alone has the
        out-of-fold probabilities."""
        found = self._adjusted(self._linear_probe(features, train), train) if self.world.rank == 0 else None
        shared: LinearHead = self.world.gather(found and replace(found, out_of_fold=None))[0]
        return found or shared

    def head(self, features: FeatureSet, parts: Sequence[npt.NDArray[np.int64]], linear: LinearHead) -> State:
        """The state of the classifier that is best on the features of some images and of their `probe_views`; the first
        worker's. The images come in `parts` whose views are cached separately; `linear` is the first one's linear
        probe."""
        recipe = self.recipe
        if recipe.head == "linear" and not recipe.probe_views and len(parts) == 1:
            return {"weight": linear.weight, "bias": linear.bias}
        mlp = (recipe.hidden, recipe.dropout, recipe.seed) if recipe.head == "mlp" else ()
        train = np.concatenate(parts)
        file = self._head_file(features, train, recipe.head, recipe.probe_views, recipe.flip, *mlp)
        state: State | None = self.world.gather(read_head(file) if self.world.rank == 0 else None)[0]
        if state is None:
            views = [
                np.concatenate([self.features(augmented_view(number, part, recipe)).rows for part in parts])
                for number in range(1, recipe.probe_views + 1)
            ]
            if self.world.rank == 0:
                state = self._fitted([features.rows[train], *views], self._labels(train), linear)
                write_head(file, state)
            state = self.world.gather(state)[0]
        return state

    def path(self, view: View) -> Path:
        return feature_path(self._backbone, self.images, self.recipe, view)

    @cached_property
    def _backbone(self) -> str:
        return backbone_digest(self.network, self.inputs.device, self.amp_dtype)

    @property
    def _chunk(self) -> int:
        """Images of a forward pass, fewer where memory is scarce."""
        return max(1, CHUNK // self.batch_parts)

    # --- Features -----------------------------------------------------------------------------------------------------

    def _opened_by_all(self, path: Path, *, warn: bool = False) -> FeatureSet | None:
        """The cached features; None if any worker's node has none."""
        found = _opened(path, warn=warn)
        return found if all(self.world.gather(found is not None)) else None

    def _lock(self, path: Path, held: ExitStack) -> None:
        """The first worker takes the lock of its node, if the cache can be written at all; the others wait for it."""
        if self.world.rank > 0:
            while not self.world.gather(None)[0]:
                pass
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            purpose = "for another process that computes the same features"
            held.enter_context(locked(lock_file(path), purpose, self._still_waiting))
        except OSError as error:
            logger.debug("features cannot be locked: %s", error)  # `_written` will say so
        self.world.gather(True)

    def _still_waiting(self) -> None:
        """The first worker still waits for the lock: no collective of the others may time out."""
        self.on_progress()
        self.world.gather(False)

    def _computed(self, view: View, path: Path) -> FeatureSet:
        """The features of a view, of which each worker computes its share of chunks."""
        started = time.perf_counter()
        chunks = [slice(start, start + self._chunk) for start in range(0, len(view.indices), self._chunk)]
        mine = [(view.indices[rows], view.augmentations[rows]) for rows in chunks[self.world.shard(len(chunks))]]
        rows = self._gathered(self._forward(mine))
        return FeatureSet(rows=rows, seconds=time.perf_counter() - started, path=path)

    @torch.inference_mode()
    def _forward(self, plans: list[Plan]) -> Features:
        """The features of the images of some plans, one after another."""
        rows: Features = np.empty((0, 0), dtype=np.float16)
        done = 0
        self.network.model.eval()
        with pooled_features(self.network) as found:
            for batch in self.inputs.batches(plans, self.recipe.image_size):
                with torch.autocast(batch.device.type, self.amp_dtype, enabled=self.amp_dtype is not None):
                    self.network.model(batch)
                features = as_float16(found.pop())
                if done == 0:
                    rows = np.empty((sum(len(plan[0]) for plan in plans), features.shape[1]), dtype=np.float16)
                rows[done : done + len(features)] = features
                done += len(features)
                self.on_progress()
        return rows

    def _gathered(self, mine: Features) -> Features:
        """The rows of all workers, by rank."""
        if self.world.size == 1:
            return mine
        lengths, widths = zip(*self.world.gather(mine.shape), strict=True)
        whole: Features = np.empty((sum(lengths), max(widths)), dtype=np.float16)  # a worker may have no rows
        first = np.cumsum([0, *lengths])
        for start in range(0, max(lengths), PIECE):
            for rank, piece in enumerate(self.world.gather(mine[start : start + PIECE])):
                if len(piece):
                    whole[first[rank] + start : first[rank] + start + len(piece)] = piece
        return whole

    def _written(self, computed: FeatureSet, view: View) -> FeatureSet:
        """The features as the cache has them from now on; unchanged where it cannot be written."""
        try:
            return write_features(computed, description(self.images, self.recipe, view))
        except OSError as error:
            logger.warning("features cannot be kept in %s, and are computed again: %s", computed.path, error)
            return computed

    def _written_on_other_node(self, computed: FeatureSet, view: View) -> FeatureSet:
        """The same for a worker that does not share the first one's cache; unchanged where another process builds them
        there, for which this worker does not wait."""
        try:
            computed.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(lock_file(computed.path), timeout=0):
                return _opened(computed.path) or self._written(computed, view)
        except Timeout:
            return computed
        except OSError:  # the lock cannot be written, and neither can they
            return self._written(computed, view)

    # --- The head -----------------------------------------------------------------------------------------------------

    def _labels(self, train: npt.NDArray[np.int64]) -> torch.Tensor:
        return self.inputs.truth[torch.as_tensor(train)]

    def _groups(self, train: npt.NDArray[np.int64]) -> torch.Tensor | None:
        """The groups of the images `train` as numbers, None if each is alone."""
        groups = self.images.groups
        return None if groups is None else torch.from_numpy(group_numbers([groups[i] for i in train]))

    def _head_file(self, features: FeatureSet, train: npt.NDArray[np.int64], *decisive: Any) -> Path:
        """Where a head is kept that these settings decide, beside the images and their labels."""
        groups, recipe = self._groups(train), self.recipe
        balance: list[Any] = [recipe.class_weights] if self.class_weights is not None else []
        balance += [recipe.logit_adjustment] if recipe.logit_adjustment else []
        settings = repr((HEAD_VERSION, self.inputs.num_classes, *decisive, *balance)).encode()
        content = settings + train.tobytes() + self._labels(train).numpy().tobytes()
        name = sha256(content + (b"" if groups is None else groups.numpy().tobytes())).hexdigest()[:16]
        return features.path / f"{decisive[0]}-{name}.head"

    def _linear_probe(self, features: FeatureSet, train: npt.NDArray[np.int64]) -> LinearHead:
        file = self._head_file(features, train, "linear", 0)
        if kept := read_head(file):
            error_rate = kept["out_of_fold_error_rate"].item()
            known = None if math.isnan(error_rate) else error_rate
            return LinearHead(kept["weight"], kept["bias"], kept["l2"].item(), known, kept.get("out_of_fold"))
        rows, labels, groups = torch.from_numpy(features.rows[train]), self._labels(train), self._groups(train)
        found = fit(rows, labels, self.inputs.num_classes, groups=groups, **self._how)
        error_rate = math.nan if found.out_of_fold_error_rate is None else found.out_of_fold_error_rate
        numbers = {"l2": found.l2, "out_of_fold_error_rate": error_rate}
        scalars = {name: torch.tensor(number, dtype=torch.float64) for name, number in numbers.items()}
        unseen = {} if found.out_of_fold is None else {"out_of_fold": found.out_of_fold}
        write_head(file, {"weight": found.weight, "bias": found.bias, **scalars, **unseen})
        return found

    def _log_priors(self, labels: torch.Tensor) -> torch.Tensor | None:
        return log_priors(labels, self.inputs.num_classes, self.recipe.logit_adjustment)

    def _adjusted(self, head: LinearHead, train: npt.NDArray[np.int64]) -> LinearHead:
        """A head after `logit_adjustment`: since its bias is not penalised, the fit with priors in the loss is the one
        without them, less the priors."""
        labels = self._labels(train)
        if (priors := self._log_priors(labels)) is None:
            return head
        unseen, error_rate = head.out_of_fold, head.out_of_fold_error_rate
        if unseen is not None:
            unseen = (unseen.float().clamp(min=TINY).log() - priors).softmax(1).half()
            known = ~unseen.isnan().any(1)
            error_rate = float((unseen[known].argmax(1) != labels[known]).double().mean())
        return replace(head, bias=head.bias - priors, out_of_fold=unseen, out_of_fold_error_rate=error_rate)

    @property
    def _how(self) -> dict[str, Any]:
        return {
            "device": self.inputs.device,
            "on_progress": self.on_progress,
            "class_weights": self.class_weights,
        }

    def _fitted(self, views: list[Features], labels: torch.Tensor, linear: LinearHead) -> State:
        """The classifier's state for views of the same images, the first of them the centre ones, with the l2 of
        their `linear` probe. (To choose it by the views, cross-validation would have those of one image on both
        sides.)"""
        rows, repeated = torch.from_numpy(np.concatenate(views)), torch.cat([labels] * len(views))
        classes = self.inputs.num_classes
        if self.recipe.head == "linear":
            found = fit(rows, repeated, classes, start=linear, **self._how)
            offsets = self._log_priors(repeated)
            return {"weight": found.weight, "bias": found.bias if offsets is None else found.bias - offsets}
        # A copy whose batch norms are this worker's own: the others do not train it.
        head = mlp_head(rows.shape[1], classes, self.recipe)
        head.load_state_dict(self.network.classifier.state_dict())
        offsets = self._log_priors(repeated)
        fit_mlp(head, rows, repeated, offsets=offsets, seed=self.recipe.seed, **self._how)
        return {name: value.detach().clone() for name, value in head.state_dict().items()}


def _opened(path: Path, *, warn: bool = False) -> FeatureSet | None:
    try:
        return open_features(path)
    except DamagedCache as error:
        if warn:
            logger.warning("the cached features are damaged and will be computed again: %s", error)
        return None
