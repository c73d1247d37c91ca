"""A worker of a group: what Ray Train runs in each of its processes, see `worker_group`."""

import gc
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from trainables.data.held_out_images import ImageSource, WithoutTestImages
from trainables.ray.messages import Command, Outcome, TrialSpec
from trainables.recipe import Recipe
from trainables.system.text import many
from trainables.training.checkpoint import SPLIT_FILE, Files

if TYPE_CHECKING:
    import torch

    from trainables.data.presized_images import PresizedImages
    from trainables.training.fine_tune import FineTune

logger = logging.getLogger(__name__)

DEVICE = "FINETUNE_SEARCH_DEVICE"
"""The environment variable that names the workers' device, instead of the one that Ray gives them."""
SIGN_SECONDS = 1.0
"""The shortest time between two signs of a worker's progress."""


def serve(config: dict[str, Any]) -> None:
    """The train function: run the host's commands until there are no more."""
    import ray.train
    import torch

    from trainables.system.gpu_share import limit_memory

    torch.set_num_threads(config["num_threads"])
    device = own_device()
    limit_memory(config["gpu_share"], device)
    host, context = config["host"], ray.train.get_context()
    rank, several = context.get_world_rank(), context.get_world_size() > 1
    slot = _Slot(host, config["num_threads"], own_gpu(device))
    myself = ray.get_runtime_context()
    ray.get(host.join.remote(rank, myself.get_node_id(), myself.current_actor))
    number = 0
    while (command := ray.get(host.next_command.remote(rank, number))) is not None:
        number = command.number
        outcome, reusable = slot.run(command)
        if rank == 0 or outcome.failure or outcome.split_batches:
            ray.get(host.deliver.remote(number, outcome))
        if several and not reusable:
            # The other workers may be waiting for this one inside a collective; only a restart frees them.
            raise RuntimeError(outcome.failure or "out of memory")


class _Slot:
    """One worker's side of a trial slot: the training in progress."""

    def __init__(self, host: Any, num_threads: int, gpu: Mapping[str, str] | None = None) -> None:
        self.host = host  # the handle of a `GroupHost`
        self.num_threads = num_threads
        self.gpu = gpu or {}  # see `own_gpu`
        self.training: FineTune | None = None
        self.trial_id: str | None = None
        self.split: Files = {}  # how its images were split
        self.number = 0  # of the command
        self.last_sign = 0.0
        self.idle_since = time.perf_counter()

    def run(self, command: Command) -> tuple[Outcome, bool]:
        """The outcome, and whether this worker's group can take the next command as it is."""
        from trainables.training.fine_tune import Diverged

        try:
            self.number = command.number
            training = self._ready(command)
            overhead = time.perf_counter() - self.idle_since
            metrics = training.run_epoch() | self._averaged(command)
            self.idle_since = time.perf_counter()
            # All workers have the same state: only the first one sends it.
            state = training.state() | self.split if training.world.rank == 0 else None
            metrics |= {"overhead_seconds": overhead, "batch_parts": command.batch_parts, **self.gpu}
            return Outcome(metrics, state), True
        except Diverged as error:  # the losses are summed over the workers, so all of them stop here
            self._drop()
            return Outcome(failure=f"diverged: {error}"), True
        except Exception as error:  # fails the trial, with a traceback in the log; the search continues
            if is_of_lost_worker(error):
                raise  # not the trial's fault: Ray Train restarts the group, and the command is repeated
            if is_out_of_memory(error):
                outcome = self._out_of_memory(error)
                self._drop()
                return outcome, False
            logger.exception("trial %s failed", command.trial.trial_id)
            self._drop()
            return Outcome(failure=f"{type(error).__name__}: {error}"), False

    def _averaged(self, command: Command) -> dict[str, float]:
        """After the last epoch, average the model with earlier ones, if there are any; the metrics of the mean."""
        import ray

        from trainables.training.weight_averaging import stir_in

        training = self.training
        assert training is not None  # it has just trained
        if command.trial.earlier is None or training.epochs_done < training.recipe.total_epochs:
            return {}
        return stir_in(training, ray.get(command.trial.earlier))

    def _ready(self, command: Command) -> "FineTune":
        """The trial of `command` at the epoch that it starts from, built unless it is in memory."""
        training = self.training
        if training and self.trial_id == command.trial.trial_id and training.epochs_done == command.epochs_done:
            return training
        with self._signs_of_life():
            return self._prepare(command)

    def _out_of_memory(self, error: Exception) -> Outcome:
        if self.training is None:
            return Outcome(failure=f"out of memory before its first step: {error}")
        if self.training.can_split_further:
            logger.warning("trial %s: out of memory, splitting its batches further", self.trial_id)
            return Outcome(split_batches=True)
        images = many(self.training.min_images, "image")
        return Outcome(failure=f"out of memory even with {images} at a time: {error}")

    @contextmanager
    def _signs_of_life(self) -> Iterator[None]:
        """Gives signs of progress from a thread: fetching and presizing images may take hours."""
        over = threading.Event()

        def give_signs() -> None:
            while not over.wait(SIGN_SECONDS):
                self._give_sign()

        thread = threading.Thread(target=give_signs, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _give_sign(self) -> None:
        """Tells the host that there is progress, not more often than it needs."""
        now = time.monotonic()
        if now - self.last_sign >= SIGN_SECONDS:
            self.last_sign = now
            self.host.progress.remote(self.number)

    def _prepare(self, command: Command) -> "FineTune":
        """Builds the trial of `command` at the epoch that it starts from."""
        import ray.train

        from trainables.data.source import folder_of
        from trainables.training.fine_tune import FineTune

        trial = command.trial
        self._drop()
        if command.batch_parts > 1:
            gc.collect()  # cycles may hold what ran out of memory
        recipe = Recipe.from_dict(trial.recipe)
        continues = command.epochs_done > recipe.before_first_epoch
        sizes = recipe.presize, recipe.resize_method
        images = _presized(trial.data, trial.data_digest, *sizes, trial.cache, trial.max_unreadable)
        weights = folder_of(trial.weights) if trial.weights else None
        ray.get(self.host.meet.remote(ray.train.get_context().get_world_rank(), command.number))
        training = self.training = FineTune(
            recipe,
            images,
            weights=weights,
            device=own_device(),
            num_threads=self.num_threads,
            split_seed=trial.split_seed,
            fold=trial.fold,
            all_images=trial.all_images,
            temperature=trial.temperature,
            thresholds=trial.thresholds,
            wise_alpha=trial.wise_alpha,
            load_pretrained=not continues,
            probe_deadline=trial.probe_deadline,
            batch_parts=command.batch_parts,
            on_progress=self._give_sign,
        )
        self.split = _split_of(images, trial)
        if continues:
            training.load_state(ray.get(self.host.state.remote()))
        self.trial_id = trial.trial_id
        return training

    def _drop(self) -> None:
        if self.training is not None:
            self.training.close()
        self.training = None


def own_device() -> "torch.device":
    """Where this worker trains."""
    import ray.train.torch
    import torch

    # A cluster can be tried out where the GPUs that Ray is told of do not exist.
    device: torch.device = torch.device(os.environ.get(DEVICE) or ray.train.torch.get_device())
    return device


def own_gpu(device: "torch.device") -> dict[str, str]:
    """The GPU that Ray gave this worker, as metrics: which one it is, and of what kind; none without one."""
    import ray
    import torch

    context = ray.get_runtime_context()
    numbers = context.get_accelerator_ids().get("GPU", [])
    if not numbers:
        return {}
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"gpu": f"{context.get_node_id()} {','.join(map(str, numbers))}", "gpu_kind": kind}


def is_of_lost_worker(error: Exception) -> bool:
    """Whether a collective failed because another worker of the group is gone."""
    import torch.distributed

    if isinstance(error, torch.distributed.DistError):
        return True
    # Gloo raises plain RuntimeErrors. Where Ray Train has ended the group before the collective began, torch misses it.
    return "gloo" in str(error) or "process group has not been initialized" in str(error)


def is_out_of_memory(error: Exception) -> bool:
    """Of the GPU or the CPU, for which torch raises a plain RuntimeError."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(text in str(error) for text in ("DefaultCPUAllocator", "_STATUS_ALLOC_FAILED", "out of memory"))


def _split_of(images: "PresizedImages", trial: TrialSpec) -> Files:
    """The file that says which images validated the model; none if the images have no digest."""
    from trainables.inference.split_record import split_file

    if not trial.data_digest:
        return {}
    data, seed = trial.data, trial.split_seed
    used = data if isinstance(data, WithoutTestImages) else WithoutTestImages(data, None, seed)
    content = split_file(
        images,
        trial.data_digest,
        seed=seed,
        test_share=used.share,
        left_out=used.left_out,
        groups=used.groups,
    )
    return {SPLIT_FILE: content}


@lru_cache(maxsize=4)
def _presized(
    data: ImageSource, digest: str | None, size: int, method: str, storage: str, max_unreadable: float
) -> "PresizedImages":
    """The images of a trial; the cache keeps those of the trial before open."""
    from trainables.data.presize import presize
    from trainables.data.source import images_of

    return presize(images_of(data, digest), size, method, storage=storage, max_unreadable=max_unreadable)
