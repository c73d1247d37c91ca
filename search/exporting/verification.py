"""Whether an export does what the run's table says: a new process opens it and labels the validation images."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from search.exporting import export_formats
from search.runs.command import CommandRecord
from search.runs.trained_model import Predictor
from trainables.data.labelled_images import DataError
from trainables.data.layouts import split_level
from trainables.system.new_process import in_new_process
from trainables.system.text import percent

MAX_DIFFERENCE = 0.01
"""Largest difference of a logit from the checkpoint's, as a share of the largest one; more is another model."""


class Differs(Exception):
    """The written folder does not do what the run's table says."""


@dataclass(frozen=True)
class Way:
    """One way to load an export, and what came of it on the validation images."""

    name: str
    num_wrong: int
    difference: float
    """Largest difference of a logit from the checkpoint's."""
    largest: float
    """The checkpoint's largest logit."""


@dataclass(frozen=True)
class Check:
    """What a new process found out about an exported folder."""

    num_images: int
    ways: tuple[Way, ...]
    on_gpu: bool
    fp32_wrong: int | None = None
    """The checkpoint's errors in fp32, which onnx and pt2 compute in; None where training validated in it, too."""


def check_against_table(
    folder: Path, run: Path, checkpoint: Path, metrics: dict[str, Any], formats: tuple[str, ...] = ("safetensors",)
) -> None:
    """Load `folder` in a new process and compare it with the `checkpoint` of the run that it was exported from, and its
    errors with those in the run's table, `metrics`. Raises `Differs`; prints what it finds."""
    command = CommandRecord.load(run)
    data = Path(command.data)
    if not Path(split_level(str(data))[0]).is_dir():
        print(f"warning: not checked against the table: the run's images, {data}, are not here", file=sys.stderr)
        return
    print(f"checking on the validation images of {data}", flush=True)
    try:
        split = command.split_seed, command.arguments.held_out_share
        found = in_new_process(check_export, folder, checkpoint, data, *split, command.arguments.cache, formats)
    except DataError as error:
        print(
            f"warning: not checked against the table, as the run's images are no longer there. {error}", file=sys.stderr
        )
        return
    trained_on_gpu = bool(command.group_size.get("gpus_per_worker"))
    for way in found.ways:
        require_same(way, found, metrics["error_rate"], trained_on_gpu, data)
    print(outcome(found, metrics["error_rate"]))
    beside = "" if found.on_gpu == trained_on_gpu else "; a GPU and a CPU round differently, so 1 % is allowed"
    print(f"check passed{beside}")


def require_same(way: Way, found: Check, error_rate: float, trained_on_gpu: bool, data: Path) -> None:
    """Raises `Differs` where `way` labels more or fewer images wrong than expected, or gives other logits.

    Expected is what the run's table says; of a graph, which computes in fp32, what the checkpoint gets wrong in fp32
    where training validated in less.
    """
    in_table = error_rate * found.num_images
    shown = f"{way.num_wrong} of {found.num_images} images wrong"
    if way.name in export_formats.OPENERS and found.fp32_wrong is not None:
        if abs(way.num_wrong - found.fp32_wrong) > 1:
            raise Differs(
                f"the exported model ({way.name}) differs from the checkpoint in fp32: {shown}, and "
                f"{found.fp32_wrong} of the checkpoint's. Nothing was exported."
            )
    elif not abs(way.num_wrong - in_table) <= tolerance(found, trained_on_gpu) + 1e-6:  # so that nan fails
        raise Differs(
            f"the exported model ({way.name}) differs from the run's table: {shown}, in the table {in_table:.0f}. "
            f"Nothing was exported. Have the images in {data} changed since? Then --no-check exports without this "
            "comparison."
        )
    if not way.difference <= MAX_DIFFERENCE * max(1, way.largest):
        raise Differs(
            f"{way.name} makes another model of the export than the one trained: its logits differ by up to "
            f"{way.difference:.3g}, of at most {way.largest:.3g}. Nothing was exported."
        )


def tolerance(found: Check, trained_on_gpu: bool) -> int:
    """Images: 1, and 1 % of them where the training validated on another device."""
    return 1 if found.on_gpu == trained_on_gpu else max(1, found.num_images // 100)


def outcome(found: Check, error_rate: float) -> str:
    """What the check found as a table: a line for each way to load the export."""

    def share(wrong: float) -> str:
        return f"{wrong:.0f} of {found.num_images} wrong ({percent(wrong / found.num_images, 2)})"

    in_table = share(error_rate * found.num_images)
    rows = [("", "on the validation images", "in the run's table", "largest difference of a logit")]
    rows += [(way.name, share(way.num_wrong), in_table, f"{way.difference:.2g}") for way in found.ways]
    if found.fp32_wrong is not None:
        rows.append(("checkpoint in fp32", share(found.fp32_wrong), in_table, "-"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  " + "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def check_export(
    folder: Path,
    checkpoint: Path,
    data: Path,
    split_seed: int,
    test_share: float | None = None,
    storage: str = "auto",
    formats: tuple[str, ...] = ("safetensors",),
) -> Check:
    """Label the validation split of `data`, of which the run held out `test_share`, with every format in `folder`, read
    as training reads it, and compare the logits with those of the `checkpoint`'s folder.

    Raises `DataError` where these are not the images of the run, `Differs` where a format cannot be run.
    """
    import numpy as np

    from trainables.data.held_out_images import without_test_images
    from trainables.data.layouts import find_images
    from trainables.data.presize import presize

    predictor, trained = Predictor(folder), Predictor(checkpoint)
    preprocessing = predictor.preprocessing
    known = without_test_images(find_images(data), test_share, split_seed)
    sizes = preprocessing.presize, preprocessing.resize_method
    white = preprocessing.white_level
    images = presize(known, *sizes, storage=storage, white_level=white, max_unreadable=1)  # the run read what it could
    if images.classes != predictor.labels:
        raise DataError(f"{data} holds other classes now: {len(images.classes)}, and {len(predictor.labels)} then.")
    valid = images.split(seed=split_seed)[1]
    ways, labels = loaders(folder, predictor, formats), images.labels[valid]
    wrong, difference, largest = (dict.fromkeys(ways, 0) for _ in range(3))
    place, fp32_wrong = 0, 0
    for batch in predictor.batches([images[i] for i in valid]):
        logits = {name: way(batch) for name, way in ways.items()}
        expected, truth = reference(trained, batch), labels[place : place + len(batch)]
        fp32_wrong += int((expected["fp32"].argmax(axis=1) != truth).sum())
        for name, found in logits.items():
            theirs = expected["fp32" if name in export_formats.OPENERS else "as trained"]
            wrong[name] += int((found.argmax(axis=1) != truth).sum())
            # numpy's maximum keeps a nan, which Python's max would lose
            difference[name] = float(np.maximum(difference[name], abs(found - theirs).max()))
            largest[name] = max(largest[name], float(abs(theirs).max()))
        place += len(batch)
    found = tuple(Way(name, wrong[name], difference[name], largest[name]) for name in ways)
    reduced = trained.amp_dtype is not None
    return Check(len(valid), found, predictor.device.type == "cuda", fp32_wrong if reduced else None)


def loaders(folder: Path, predictor: Predictor, formats: tuple[str, ...]) -> dict[str, Callable]:
    """The ways to load an export by name: functions of a uint8 batch that give the logits as an array."""
    import timm
    import torch

    ways: dict[str, Callable] = {"safetensors": lambda batch: forward(predictor, predictor.model, batch)}
    if predictor.recipe.head == "linear":
        theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        theirs.to(predictor.device, memory_format=torch.channels_last)
        ways["timm"] = lambda batch: forward(predictor, theirs, batch)
    for name, opener in export_formats.OPENERS.items():
        if name in formats:
            ways[name] = graph(opener, folder / export_formats.FILES[name])
    return ways


def graph(opener: Callable, file: Path) -> Callable:
    """What is in `file` as a function of a uint8 batch. Of each batch it takes one image alone, then the others, so
    that no number of images is the only one that it is tried with."""
    import numpy as np

    with or_differs(file):
        model = opener(file)

    def run(batch):
        images = batch.cpu().contiguous().numpy().astype("float32") / 255
        with or_differs(file):
            return np.concatenate([model(part) for part in (images[:1], images[1:]) if len(part)])

    return run


@contextmanager
def or_differs(file: Path) -> Iterator[None]:
    """Raises `Differs` for whatever a runtime raises of `file`; not all of that could be sent to another process."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise Differs(f"{file.name} cannot be run: {reason} Nothing was exported.") from None


def forward(predictor: Predictor, model, batch):
    import torch

    with torch.inference_mode():
        return predictor.forward(model, batch).cpu().numpy()


def reference(trained: Predictor, batch) -> dict[str, Any]:
    """The checkpoint's logits, in the precision that training validated in and in fp32."""
    found = {"as trained": forward(trained, trained.model, batch)}
    if trained.amp_dtype is None:
        return found | {"fp32": found["as trained"]}
    dtype, trained.amp_dtype = trained.amp_dtype, None
    found["fp32"] = forward(trained, trained.model, batch)
    trained.amp_dtype = dtype
    return found
