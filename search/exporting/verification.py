"""Verifies an export against the run's table: a new process opens it and labels the validation images."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from search.exporting import export_formats
from search.exporting.export_formats import Floats
from search.runs.command import CommandRecord
from search.runs.kept_models import REFIT
from search.runs.trained_model import Predictor
from trainables.data.address import DataAddress
from trainables.data.labelled_images import DataError
from trainables.network.calibration import softmax
from trainables.system.new_process import in_new_process
from trainables.system.text import percent
from trainables.training.label_set_metrics import Thresholds, above_thresholds

if TYPE_CHECKING:
    import torch
    from torch import nn

Logits = Callable[["torch.Tensor"], Floats]
"""A uint8 batch -> its logits (n, classes)."""
MAX_DIFFERENCE = 0.01
"""Of a logit from the checkpoint's, as a share of the largest logit, and of a probability. With more, it is not the
same model."""
CHECKPOINT = "checkpoint"


class Differs(Exception):
    """The exported folder does not match the run's table."""


@dataclass(frozen=True)
class LoaderResult:
    """How the export did on the validation images when loaded in one way, such as by timm or as ONNX."""

    name: str
    num_wrong: int = 0
    difference: float = 0.0
    """Largest difference of a logit from the checkpoint's."""
    largest: float = 0.0
    """The checkpoint's largest logit."""
    probability_difference: float = 0.0
    """Largest difference of a probability from the checkpoint's."""

    def plus(
        self, found: Floats, expected: Floats, truth: npt.NDArray[Any], thresholds: Thresholds | None = None
    ) -> "LoaderResult":
        """With a further batch: the logits `found`, the checkpoint's, and labels, or label sets with thresholds."""
        probabilities, trained = (softmax(x) if thresholds is None else sigmoid(x) for x in (found, expected))
        difference, probability_difference = abs(found - expected), abs(probabilities - trained)
        return LoaderResult(  # numpy's maximum keeps a nan, which Python's max would lose
            self.name,
            self.num_wrong + num_wrong(found, truth, thresholds),
            float(np.maximum(self.difference, difference.max())),
            max(self.largest, float(abs(expected).max())),
            float(np.maximum(self.probability_difference, probability_difference.max())),
        )


@dataclass(frozen=True)
class Check:
    """What a new process found out about an exported folder."""

    num_images: int
    results: tuple[LoaderResult, ...]
    on_gpu: bool
    fp32_wrong: int | None = None
    """The checkpoint's errors in fp32, in which formats are compared; None if training validated in it. Else the first
    of the results is that of the checkpoint as training validated."""


def check_against_table(
    folder: Path, run: Path, checkpoint: Path, metrics: dict[str, Any], formats: tuple[str, ...] = ("safetensors",)
) -> None:
    """Load `folder` in a new process; compare its logits with the `checkpoint`'s, and its errors with the run's table,
    `metrics`. Prints the outcome. Raises `Differs`."""
    command = CommandRecord.load(run)
    data = Path(command.data)
    not_checked = "warning: not checked against the table"
    if not DataAddress.of(command.data).path.exists():
        print(f"{not_checked}: the run's images, {data}, are not here", file=sys.stderr)
        return
    print(f"checking on the validation images of {data}", flush=True)
    try:
        split = command.split_seed, command.arguments.held_out_share
        images = *split, command.arguments.cache, formats, command.left_out, command.groups or ""
        found = in_new_process(check_export, folder, checkpoint, data, *images)
    except DataError as error:
        print(f"{not_checked}: the run's images are no longer there. {error}", file=sys.stderr)
        return
    trained_on_gpu = bool(command.group_size.get("gpus_per_worker"))
    # A model that was trained again on all images is not in the table.
    error_rate = metrics.get(REFIT, metrics)["error_rate"]
    source = "after its training on them" if REFIT in metrics else "in the run's table"
    for result in found.results:
        require_same(result, found, error_rate, trained_on_gpu, data)
    print(outcome_table(found, error_rate, source))
    note = "" if found.on_gpu == trained_on_gpu else "; a GPU and a CPU round differently, so 1 % is allowed"
    print(f"check passed{note}")


def require_same(result: LoaderResult, found: Check, error_rate: float, trained_on_gpu: bool, data: Path) -> None:
    """Raises `Differs` if the number of wrong images is not as expected, or if the logits differ.

    The run's table gives the expected number. Formats are compared in fp32: where training validated in a lower
    precision, their expected number is that of the checkpoint in fp32, and the checkpoint's that of the table.
    """
    in_table = error_rate * found.num_images
    which = "the run's model" if result.name == CHECKPOINT else f"the exported model ({result.name})"
    shown = f"{result.num_wrong} of {found.num_images} images wrong"
    if result.name != CHECKPOINT and found.fp32_wrong is not None:
        if abs(result.num_wrong - found.fp32_wrong) > 1:
            raise Differs(
                f"{which} differs from the checkpoint in fp32: {shown}, and {found.fp32_wrong} of the checkpoint's. "
                "Nothing was exported."
            )
    elif not abs(result.num_wrong - in_table) <= tolerance(found, trained_on_gpu) + 1e-6:  # so that nan fails
        raise Differs(
            f"{which} differs from the run's table: {shown}, in the table {in_table:.0f}. Nothing was exported. Have "
            f"the images in {data} changed since? Then --no-check exports without this comparison."
        )
    if not result.difference <= MAX_DIFFERENCE * max(1, result.largest):
        raise Differs(
            f"{which} is not the trained one: its logits differ by up to {result.difference:.3g}, and the largest is "
            f"{result.largest:.3g}. Nothing was exported."
        )
    if not result.probability_difference <= MAX_DIFFERENCE:
        raise Differs(
            f"{which} has other probabilities than the trained one: they differ by up to "
            f"{result.probability_difference:.3g}. Nothing was exported."
        )


def tolerance(found: Check, trained_on_gpu: bool) -> int:
    """Images: 1, or 1 % of them if training validated on another kind of device."""
    return 1 if found.on_gpu == trained_on_gpu else max(1, found.num_images // 100)


def outcome_table(found: Check, error_rate: float, source: str) -> str:
    """The outcome as text: a line for each way to load the export. `source` says where the error rate is from."""

    def share(wrong: float) -> str:
        return f"{wrong:.0f} of {found.num_images} wrong ({percent(wrong / found.num_images, 2)})"

    in_table = share(error_rate * found.num_images)
    rows = [("", "on the validation images", source, "largest difference of a probability")]
    for result in found.results:
        rows.append((result.name, share(result.num_wrong), in_table, f"{result.probability_difference:.2g}"))
    if found.fp32_wrong is not None:
        rows.append(("checkpoint in fp32", share(found.fp32_wrong), in_table, "-"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(f"  {line.rstrip()}" for line in lines)


def check_export(
    folder: Path,
    checkpoint: Path,
    data: Path,
    split_seed: int,
    test_share: float | None = None,
    storage: str = "auto",
    formats: tuple[str, ...] = ("safetensors",),
    left_out: tuple[str, ...] = (),
    groups: str = "",
) -> Check:
    """Label the validation split of `data`, of which the run held out `test_share`, left some images out, and had
    `groups` as text, with every format in `folder`.

    Images are read as in training, and logits and probabilities compared in fp32 with those of the model in the folder
    `checkpoint`: in a lower precision, weights that include the temperature round differently. Raises `DataError` if
    these are not the images of the run, `Differs` if a format cannot be run.
    """
    from trainables.data.held_out_images import without_test_images
    from trainables.data.layouts import find_images
    from trainables.data.presize import presize

    predictor, trained = Predictor(folder), Predictor(checkpoint)
    preprocessing = predictor.preprocessing
    known = without_test_images(find_images(data), test_share, split_seed, left_out, groups)
    sizes = preprocessing.presize, preprocessing.resize_method
    white = preprocessing.white_level
    images = presize(known, *sizes, storage=storage, white_level=white, max_unreadable=1)  # the run read what it could
    if images.classes != predictor.labels:
        raise DataError(f"{data} has {len(images.classes)} classes now, other than the run's {len(predictor.labels)}.")
    valid = images.split(seed=split_seed)[1]
    predictor.amp_dtype = None
    models, labels, thresholds = load_all(folder, predictor, formats), images.truth[valid], preprocessing.thresholds
    reduced = trained.amp_dtype is not None
    results = {name: LoaderResult(name) for name in ([CHECKPOINT] if reduced else []) + list(models)}
    start, fp32_wrong = 0, 0
    for batch in predictor.batches([images[i] for i in valid]):
        as_trained, fp32 = reference_logits(trained, batch)
        truth = labels[start : start + len(batch)]
        fp32_wrong += num_wrong(fp32, truth, thresholds)
        if reduced:
            results[CHECKPOINT] = results[CHECKPOINT].plus(as_trained, as_trained, truth, thresholds)
        for name, model in models.items():
            results[name] = results[name].plus(model(batch), fp32, truth, thresholds)
        start += len(batch)
    on_gpu = predictor.device.type == "cuda"
    return Check(len(valid), tuple(results.values()), on_gpu, fp32_wrong if reduced else None)


def num_wrong(logits: Floats, truth: npt.NDArray[Any], thresholds: Thresholds | None) -> int:
    """How many images have another most probable class than their label or, where they may have several, not exactly
    these."""
    if thresholds is None:
        return int((logits.argmax(axis=1) != truth).sum())
    return int((above_thresholds(sigmoid(logits), thresholds) != truth).any(axis=1).sum())


def sigmoid(logits: Floats) -> Floats:
    from scipy.special import expit

    return np.asarray(expit(logits))


def load_all(folder: Path, predictor: Predictor, formats: tuple[str, ...]) -> dict[str, Logits]:
    """The export loaded in every way, by name: functions of a uint8 batch that return the logits."""
    import timm
    import torch

    models: dict[str, Logits] = {"safetensors": lambda batch: forward(predictor, predictor.model, batch)}
    if predictor.recipe.head == "linear":
        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        model = model.to(predictor.device).to(memory_format=torch.channels_last)
        models["timm"] = lambda batch: forward(predictor, model, batch)
    for name, opener in export_formats.OPENERS.items():
        if name in formats:
            models[name] = graph(opener, folder / export_formats.FILES[name])
    return models


def graph(opener: Callable[[Path], export_formats.Graph], file: Path) -> Logits:
    """The graph in `file` as a function of a uint8 batch. It gets one image alone and then the others, so that every
    check uses more than one batch size."""
    with or_differs(file):
        model = opener(file)

    def run(batch: "torch.Tensor") -> Floats:
        images = batch.cpu().contiguous().numpy().astype(np.float32) / np.float32(255)
        with or_differs(file):
            return np.concatenate([model(part) for part in (images[:1], images[1:]) if len(part)])

    return run


@contextmanager
def or_differs(file: Path) -> Iterator[None]:
    """Raises `Differs` instead of whatever a runtime raises: not every error can be sent to another process."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise Differs(f"{file.name} cannot be run: {reason} Nothing was exported.") from None


def forward(predictor: Predictor, model: "nn.Module", batch: "torch.Tensor") -> Floats:
    import torch

    with torch.inference_mode():
        logits: Floats = predictor.forward(model, batch).cpu().numpy()
    return logits


def reference_logits(trained: Predictor, batch: "torch.Tensor") -> tuple[Floats, Floats]:
    """The checkpoint's logits, in the precision that training validated in and in fp32."""
    as_trained = forward(trained, trained.model, batch)
    if trained.amp_dtype is None:
        return as_trained, as_trained
    dtype, trained.amp_dtype = trained.amp_dtype, None
    fp32 = forward(trained, trained.model, batch)
    trained.amp_dtype = dtype
    return as_trained, fp32
