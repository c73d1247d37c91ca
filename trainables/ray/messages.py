"""What a trial, the host of its worker group and its workers tell each other."""

from dataclasses import dataclass, field
from typing import Any

from trainables.data.held_out_images import Remaining
from trainables.data.labelled_images import MAX_UNREADABLE
from trainables.training.checkpoint import Files


@dataclass(frozen=True, kw_only=True)
class TrialSpec:
    """All that a worker needs to build a trial."""

    trial_id: str
    recipe: dict[str, Any]
    data: str | Remaining  # source of the images, see `source`
    data_digest: str | None = None  # of the images that it must have
    weights: str | None = None  # source of pretrained weights
    cache: str = "auto"  # how presized images are stored, see `presize`
    max_unreadable: float = MAX_UNREADABLE  # the share of the images that may be unreadable
    split_seed: int = 0


@dataclass(frozen=True)
class Command:
    """Train the epoch after `epochs_done` of `trial`, a worker's batches in so many parts. Safe to repeat."""

    number: int
    trial: TrialSpec
    epochs_done: int
    batch_parts: int = 1


@dataclass(frozen=True)
class Outcome:
    """What became of a command: an epoch's metrics and the state after it, or the reason why the trial failed, or that
    the memory did not suffice and the batches should go in more parts."""

    metrics: dict[str, Any] = field(default_factory=dict)
    state: Files | None = None
    failure: str | None = None
    split_batches: bool = False
