"""The messages between a trial, the host of its worker group and its workers."""

from dataclasses import dataclass, field
from typing import Any

from trainables.data.held_out_images import ImageSource
from trainables.data.labelled_images import MAX_UNREADABLE
from trainables.training.checkpoint import Files


@dataclass(frozen=True, kw_only=True)
class TrialSpec:
    """What a worker needs to build a trial."""

    trial_id: str
    recipe: dict[str, Any]
    data: ImageSource  # source of the images, see `source`
    data_digest: str | None = None  # of the images that the worker must have
    weights: str | None = None  # source of pretrained weights
    cache: str = "auto"  # how presized images are stored, see `presize`
    max_unreadable: float = MAX_UNREADABLE  # largest share of unreadable images
    split_seed: int = 0
    fold: tuple[int, int] = (0, 1)  # its number, and how many there are
    all_images: bool = False  # whether those for validation train, too
    probe_deadline: float | None = None  # see `FineTune`
    temperature: float = 1.0  # then
    thresholds: tuple[float, ...] | None = None  # where these cannot choose them, see `Preprocessing.thresholds`
    wise_alpha: float = 1.0  # and how far from its start it ends, see `FineTune`
    earlier: Any = None  # the reference of earlier models' weights to average it with, see `weight_averaging.stir_in`


@dataclass(frozen=True)
class Command:
    """Train the epoch after `epochs_done` of `trial`, each worker's batches in `batch_parts`. Safe to repeat."""

    number: int
    trial: TrialSpec
    epochs_done: int
    batch_parts: int = 1


@dataclass(frozen=True)
class Outcome:
    """The result of a command: an epoch's metrics and the state after it; or why the trial failed; or that it ran out
    of memory and its batches should be split further."""

    metrics: dict[str, Any] = field(default_factory=dict)
    state: Files | None = None
    failure: str | None = None
    split_batches: bool = False


@dataclass(frozen=True, kw_only=True)
class KeepOrder:
    """Keep the state after the current trial's last epoch on the nodes."""

    search: str  # see `keeper`
    trial: str  # its name there
    result: dict[str, Any]  # of the epoch
    places: tuple[str, ...]  # a node, and another one for the copy, if there is one
    is_best: bool | None = None  # whether its model is the trial's best one; None: which is not kept
    finished: bool = False  # then the model is kept, and not the training's state


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What came of a `KeepOrder`."""

    crc32: dict[str, int]  # of its files
    before_copied: bool  # whether the state of the epoch before had reached its second node
