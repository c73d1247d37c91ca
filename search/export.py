"""Take a run's best model away as a folder of its own, checked: `python -m search.export RUN --out DIR`.

`model.safetensors` and `config.json` are timm's local format. A linear head loads with
`timm.create_model("local-dir:DIR", pretrained=True)`; a head=mlp is not of timm's making, so its config.json says that
it loads with `search.predict.Predictor`, as all exports do. `preprocessing.json` holds what `config.json` cannot.
"""

from __future__ import annotations

import argparse
import math
import shlex
import shutil
import signal
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from search.cli import run_cli
from search.files import replace_folder
from search.model_folder import open_run
from search.predict import Predictor
from trainables.checkpoint import PREPROCESSING_FILE, WEIGHTS_FILE
from trainables.data import DataError
from trainables.model_folder import ModelFolder, read_json
from trainables.predictor import load_model

CONFIG_FILE = "config.json"
COPIED = (PREPROCESSING_FILE, "recipe.json", "labels.json", "metrics.json")
FILES = (WEIGHTS_FILE, CONFIG_FILE, *COPIED)
TIMM_CROP_MODES = {"crop": "center", "squish": "squash", "pad": "border"}
MAX_TIMM_DIFFERENCE = 0.01
"""Largest difference between timm's loader and ours, as a share of the largest logit; more is another model."""

EXAMPLES = """
example:
  python -m search.export results/quickstart-20250101-120000 --out exported
  python -m search.predict exported cat.jpg

Before it says done, the written folder is loaded by a new process and labels all validation images of the run; its
errors must be those of the run's table. Exit code 0 if so (or if the images are not on this machine, with a warning), 1
if not, 2 if the run or an option is no good. Nothing is left in DIR but after success.
"""


class Differs(Exception):
    """The written folder does not do what the run's table says."""


@dataclass(frozen=True)
class Check:
    """What a new process found out about an exported folder."""

    num_images: int
    num_wrong: int
    timm_difference: float | None
    """Largest difference of a logit when timm loads the folder, as a share of the largest; None for head=mlp."""
    on_gpu: bool


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m search.export",
        description="Write the best model of a run to a folder that timm and search.predict load, and check it.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a run, such as results/<name>")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to write")
    parser.add_argument("--force", action="store_true", help="replace an earlier export in DIR")
    parser.add_argument("--no-check", action="store_true", help=(
        "do not check against the table, for when the images have changed since the run"
    ))  # fmt: skip
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    try:
        export(args.run, args.out, force=args.force, check=not args.no_check)
    except Differs as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"exported to {args.out}/: {', '.join(FILES)}")
    print(f"next: python -m search.predict {shlex.quote(str(args.out))} IMAGE...")
    return 0


def export(run: Path, out: Path, *, force: bool = False, check: bool = True) -> None:
    """Write the best model of `run` to `out`, checked first; prints what it finds.

    Raises `ValueError` where there is nothing to export or `out` is taken, `Differs` where the check fails.
    """
    run, out = run.expanduser(), out.expanduser().absolute()
    best = open_run(run)
    require_free(out, force=force)
    metrics = read_json(best.path / "metrics.json")
    print(f"exporting trial {metrics['trial_id']}: {best.recipe.arch}, {percent(metrics['error_rate'])} wrong")

    def fill(folder: Path) -> None:
        write(best, folder)
        if read_json(best.path / "metrics.json") != metrics:
            raise ValueError(f"A better trial of {run} completed while it was exported. Export again.")
        if check:
            check_against_table(folder, run, metrics)

    try:
        replace_folder(out, fill)
    except OSError as error:
        raise ValueError(f"{out} cannot be written: {error}. Make room, or give another --out.") from error


def require_free(out: Path, *, force: bool) -> None:
    """Raises `ValueError` unless `out` can be written; `force` gives up an earlier export, never anything else."""
    if not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f"--out {out} is a file. Give a folder that does not exist yet.")
    names = {entry.name for entry in out.iterdir()}
    if names and not force:
        raise ValueError(f"--out {out} is not empty. Give another folder, or --force to replace an earlier export.")
    if foreign := sorted(names.difference(FILES)):
        shown = ", ".join(foreign[:3]) + (", ..." if len(foreign) > 3 else "")
        raise ValueError(f"--out {out} holds more than an export ({shown}), which --force will not remove.")


def write(best: ModelFolder, folder: Path) -> None:
    """All files of an export, into an empty folder."""
    import timm

    model, preprocessing = load_model(best), best.preprocessing
    side = preprocessing.image_size
    config: dict[str, Any] = {
        "pretrained_cfg": {
            "input_size": (3, side, side),
            "mean": preprocessing.mean,
            "std": preprocessing.std,
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": TIMM_CROP_MODES[preprocessing.resize_method],
            # recommendations for the weights that the training started from
            "test_input_size": None,
            "test_crop_pct": None,
        },
        "label_names": list(best.labels),
    }
    if best.recipe.head == "mlp":
        config["note"] = "head=mlp: timm cannot build this classifier; load the folder with search.predict.Predictor"
    timm.models.save_for_hf(model, str(folder), model_config=config, safe_serialization=True)
    shutil.copymode(folder / CONFIG_FILE, folder / WEIGHTS_FILE)  # safetensors leaves it for its owner alone
    for name in COPIED:
        shutil.copyfile(best.path / name, folder / name)


# --- The check --------------------------------------------------------------------------------------------------------


def check_against_table(folder: Path, run: Path, metrics: dict[str, Any]) -> None:
    """Load `folder` in a new process and compare its errors with the run's. Raises `Differs`; prints what it finds."""
    command = read_json(run / "command.json")
    data = Path(command["data"])
    if not data.is_dir():
        print(f"warning: not checked against the table: the run's images, {data}, are not here", file=sys.stderr)
        return
    print(f"checking on the validation images of {data}", flush=True)
    try:
        storage = command.get("arguments", {}).get("cache", "auto")
        found = in_new_process(check_export, folder, data, command["split_seed"], storage)
    except DataError as error:
        print(
            f"warning: not checked against the table, as the run's images are no longer there. {error}", file=sys.stderr
        )
        return
    expected = metrics["error_rate"] * found.num_images
    same_rounding = found.on_gpu == bool(command.get("group_size", {}).get("gpus_per_worker"))
    tolerance = 1 if same_rounding else max(1, found.num_images // 100)
    difference = abs(found.num_wrong - expected)
    figures = (
        f"{found.num_wrong} of {found.num_images} images wrong ({percent(found.num_wrong / found.num_images)}), "
        f"in the table {expected:.0f} ({percent(metrics['error_rate'])})"
    )
    if difference > tolerance + 1e-6 or not math.isfinite(difference):
        raise Differs(
            f"the exported model differs from the run's table: {figures}. Nothing was exported. Have the images in "
            f"{data} changed since? Then --no-check exports without this comparison."
        )
    if found.timm_difference is not None and not found.timm_difference <= MAX_TIMM_DIFFERENCE:
        raise Differs(
            f"timm loads another model from the export than the one trained: its outputs differ by up to "
            f"{percent(found.timm_difference)} of the largest. Nothing was exported."
        )
    beside = "" if same_rounding else "; a GPU and a CPU round differently, so 1 % is allowed"
    print(f"check passed: {figures}{beside}")


def in_new_process(function, *arguments):
    """What `function` returns in a fresh interpreter, which Ctrl-C ends without a word."""
    with ProcessPoolExecutor(
        1, mp_context=get_context("spawn"), initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_DFL)
    ) as pool:
        return pool.submit(function, *arguments).result()


def check_export(folder: Path, data: Path, split_seed: int, storage: str = "auto") -> Check:
    """Label the validation split of `data` with the model in `folder`, read as training reads it.

    Raises `DataError` where these are not the images of the run.
    """
    import numpy as np
    import timm
    import torch

    from trainables.data import find_images
    from trainables.presize import presize

    predictor = Predictor(folder)
    preprocessing = predictor.preprocessing
    images = presize(find_images(data), preprocessing.presize, preprocessing.resize_method, storage=storage)
    if images.classes != predictor.labels:
        raise DataError(f"{data} holds other classes now: {len(images.classes)}, and {len(predictor.labels)} then.")
    valid = images.split(seed=split_seed)[1]
    logits = torch.cat(list(predictor.logits([images[i] for i in valid]))).cpu().numpy()
    num_wrong = int(np.count_nonzero(logits.argmax(axis=1) != images.labels[valid]))

    timm_difference = None
    if read_json(folder / "recipe.json")["head"] == "linear":
        theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        theirs.to(predictor.device, memory_format=torch.channels_last)
        batch = next(predictor.batches([images[i] for i in valid[: predictor.batch_size]]))
        with torch.inference_mode():
            their_logits = predictor.forward(theirs, batch).cpu().numpy()
        logits_here = logits[: len(batch)]
        timm_difference = float(np.abs(their_logits - logits_here).max() / max(1, np.abs(logits_here).max()))
    return Check(len(valid), num_wrong, timm_difference, on_gpu=predictor.device.type == "cuda")


def percent(share: float) -> str:
    return f"{100 * share:.2f} %"


if __name__ == "__main__":
    run_cli(main)
