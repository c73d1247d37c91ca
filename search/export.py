"""Take a run's best model away as a folder of its own, checked: `python -m search.export RUN --out DIR`.

`model.safetensors` and `config.json` are timm's local format. A linear head loads with
`timm.create_model("local-dir:DIR", pretrained=True)`; a head=mlp is not of timm's making, so its config.json says that
it loads with `search.predict.Predictor`, as all exports do. `preprocessing.json` holds what `config.json` cannot, and
README.md, the model card, says it all in words.
"""

from __future__ import annotations

import argparse
import math
import shlex
import shutil
import signal
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from search import export_formats
from search.cli import run_cli
from search.files import replace_folder
from search.model_card import model_card
from search.model_folder import open_run
from search.predict import Predictor
from search.run_record import RunRecord, load
from search.wording import percent
from trainables.checkpoint import PREPROCESSING_FILE, WEIGHTS_FILE
from trainables.data import DataError
from trainables.model_folder import ModelFolder, read_json
from trainables.predictor import load_model

CONFIG_FILE, CARD_FILE = "config.json", "README.md"
COPIED = (PREPROCESSING_FILE, "recipe.json", "labels.json", "metrics.json")
FILES = (*export_formats.FILES.values(), CONFIG_FILE, CARD_FILE, *COPIED)
"""All that an export can hold."""
TIMM_CROP_MODES = {"crop": "center", "squish": "squash", "pad": "border"}
MAX_DIFFERENCE = 0.01
"""Largest difference of a logit from the checkpoint's, as a share of the largest one; more is another model."""

EXAMPLES = """
examples:
  python -m search.export results/quickstart-20250101-120000 --out exported
  python -m search.predict exported cat.jpg
      the best model as timm's local format, with its labels, preprocessing, recipe, metrics and a model card
  python -m search.export results/quickstart-20250101-120000 --out exported --format safetensors,onnx,pt2
      model.onnx and model.pt2 (torch.export) as well, for any batch size: pixels in 0..1 in, logits out

Before it says done, a new process opens every format and labels all validation images of the run; the errors must be
those of the run's table. Exit code 0 if so (or if the images are not on this machine, with a warning), 1 if not, 2 if
the run or an option is no good. Nothing is left in DIR but after success.
"""


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
    reduced: bool
    """Whether training validated in less than fp32, which the other formats are in."""


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m search.export",
        description="Write the best model of a run to a folder that timm and search.predict load, and check it.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a run, such as results/<name>")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to write")
    parser.add_argument("--trial", metavar="ID", help=(
        "a trial's number or id; a run keeps the weights of its best one, which is the default"
    ))  # fmt: skip
    parser.add_argument("--format", default="safetensors", metavar="LIST", help=(
        "of safetensors, onnx and pt2, separated by commas; the first is always written (safetensors)"
    ))  # fmt: skip
    parser.add_argument("--force", action="store_true", help="replace an earlier export in DIR")
    parser.add_argument("--no-check", action="store_true", help=(
        "do not check against the table, for when the images have changed since the run"
    ))  # fmt: skip
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    formats = export_formats.parse_formats(args.format)
    try:
        export(args.run, args.out, trial=args.trial, formats=formats, force=args.force, check=not args.no_check)
    except Differs as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    written = [name for name in FILES if (args.out.expanduser() / name).is_file()]
    print(f"exported to {args.out}/: {', '.join(written)}")
    print(f"next: python -m search.predict {shlex.quote(str(args.out))} IMAGE...")
    return 0


def export(
    run: Path,
    out: Path,
    *,
    trial: str | None = None,
    formats: tuple[str, ...] = ("safetensors",),
    force: bool = False,
    check: bool = True,
) -> None:
    """Write the best model of `run` to `out`, checked first; prints what it finds.

    Raises `ValueError` where there is nothing to export or `out` is taken, `Differs` where the check fails.
    """
    run, out = run.expanduser(), out.expanduser().absolute()
    best = open_run(run)
    metrics = read_json(best.path / "metrics.json")
    require_best(run, metrics, trial)
    export_formats.require_packages(formats)
    require_free(out, force=force)
    print(f"exporting trial {metrics['trial_id']}: {best.recipe.arch}, {percent(metrics['error_rate'], 2)} wrong")

    def fill(folder: Path) -> None:
        write(best, folder, formats)
        (folder / CARD_FILE).write_text(
            model_card(best, metrics, read_json(run / "command.json"), record_of(run), formats), encoding="utf-8"
        )
        if read_json(best.path / "metrics.json") != metrics:
            raise ValueError(f"A better trial of {run} completed while it was exported. Export again.")
        if check:
            check_against_table(folder, run, metrics, formats)

    try:
        replace_folder(out, fill)
    except OSError as error:
        raise ValueError(f"{out} cannot be written: {error}. Make room, or give another --out.") from error


def record_of(run: Path) -> RunRecord | None:
    """The run's tables, where it has them."""
    try:
        return load(run)
    except ValueError:
        return None


def require_best(run: Path, metrics: dict[str, Any], trial: str | None) -> None:
    """Raises `ValueError` where `trial` (its number or id) is not the one whose weights the run keeps."""
    if trial is None or trial in (metrics["trial_id"], str(metrics.get("number"))):
        return
    record = record_of(run)
    rows = record.trials if record is not None else None
    if rows is None or not ((rows["trial_id"] == trial) | (rows["number"].astype(str) == trial)).any():
        known = f"0 to {len(rows) - 1}" if rows is not None and len(rows) else metrics["trial_id"]
        raise ValueError(f"--trial {trial}: there is no such trial in {run}. Its trials: {known}.")
    row = rows[(rows["trial_id"] == trial) | (rows["number"].astype(str) == trial)].iloc[0]
    raise ValueError(
        f"--trial {trial}: a run keeps the weights of its best trial only, which is "
        f"{metrics.get('number', metrics['trial_id'])}. Train this one again with: {training_command(record, row)}"
    )


def training_command(record: RunRecord, row: Any) -> str:
    """The search of one trial that repeats the recipe of a row."""
    names = [*record.dimensions, *record.space.get("pinned", [])]
    settings = [word for name in names for word in ("--set", f"{name}={row[name]}")]
    given = [word for name in ("data", "weights") if (value := record.command["arguments"].get(name))
             for word in (f"--{name}", str(value))]  # fmt: skip
    return shlex.join(
        ["python", "-m", "search.run", "--space", record.space["name"], *given, "--trials", "1", *settings]
    )


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


def write(best: ModelFolder, folder: Path, formats: tuple[str, ...] = ("safetensors",)) -> None:
    """All files of an export but its card, into an empty folder."""
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
    export_formats.write_formats(best, model, formats, folder)


# --- The check --------------------------------------------------------------------------------------------------------


def check_against_table(
    folder: Path, run: Path, metrics: dict[str, Any], formats: tuple[str, ...] = ("safetensors",)
) -> None:
    """Load `folder` in a new process and compare its errors with the run's. Raises `Differs`; prints what it finds."""
    command = read_json(run / "command.json")
    data = Path(command["data"])
    if not data.is_dir():
        print(f"warning: not checked against the table: the run's images, {data}, are not here", file=sys.stderr)
        return
    print(f"checking on the validation images of {data}", flush=True)
    try:
        storage = command.get("arguments", {}).get("cache", "auto")
        found = in_new_process(check_export, folder, run / "best", data, command["split_seed"], storage, formats)
    except DataError as error:
        print(
            f"warning: not checked against the table, as the run's images are no longer there. {error}", file=sys.stderr
        )
        return
    trained_on_gpu = bool(command.get("group_size", {}).get("gpus_per_worker"))
    for way in found.ways:
        require_same(way, found, metrics["error_rate"], trained_on_gpu, data)
    print(f"check passed: {outcome(found, metrics['error_rate'])}")


def require_same(way: Way, found: Check, error_rate: float, trained_on_gpu: bool, data: Path) -> None:
    """Raises `Differs` where `way` labels more or fewer images wrong than the table says, or gives other logits."""
    expected, shown = error_rate * found.num_images, f"{way.num_wrong} of {found.num_images} images wrong"
    difference = abs(way.num_wrong - expected)
    if difference > tolerance(way, found, trained_on_gpu) + 1e-6 or not math.isfinite(difference):
        raise Differs(
            f"the exported model ({way.name}) differs from the run's table: {shown}, in the table {expected:.0f}. "
            f"Nothing was exported. Have the images in {data} changed since? Then --no-check exports without this "
            "comparison."
        )
    if not way.difference <= MAX_DIFFERENCE * max(1, way.largest):
        raise Differs(
            f"{way.name} makes another model of the export than the one trained: its logits differ by up to "
            f"{way.difference:.3g}, of at most {way.largest:.3g}. Nothing was exported."
        )


def tolerance(way: Way, found: Check, trained_on_gpu: bool) -> int:
    """Images: 1, and 1 % of them where the training validated on another device or in another precision."""
    as_trained = found.on_gpu == trained_on_gpu and not (found.reduced and way.name in export_formats.OPENERS)
    return 1 if as_trained else max(1, found.num_images // 100)


def outcome(found: Check, error_rate: float) -> str:
    """What the check found, a line for each way to load the export."""
    wrong = error_rate * found.num_images
    lines = [f"of {found.num_images} images, the table has {wrong:.0f} wrong ({percent(error_rate, 2)})"]
    lines += [
        f"  {way.name:12}{way.num_wrong} wrong ({percent(way.num_wrong / found.num_images, 2)}), "
        f"largest difference of a logit {way.difference:.2g}"
        for way in found.ways
    ]
    return "\n".join(lines)


def in_new_process(function, *arguments):
    """What `function` returns in a fresh interpreter, which Ctrl-C ends without a word."""
    with ProcessPoolExecutor(
        1, mp_context=get_context("spawn"), initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_DFL)
    ) as pool:
        return pool.submit(function, *arguments).result()


def check_export(
    folder: Path,
    checkpoint: Path,
    data: Path,
    split_seed: int,
    storage: str = "auto",
    formats: tuple[str, ...] = ("safetensors",),
) -> Check:
    """Label the validation split of `data` with every format in `folder`, read as training reads it, and compare the
    logits with those of the `checkpoint`'s folder.

    Raises `DataError` where these are not the images of the run.
    """
    from trainables.data import find_images
    from trainables.presize import presize

    predictor, trained = Predictor(folder), Predictor(checkpoint)
    preprocessing = predictor.preprocessing
    images = presize(find_images(data), preprocessing.presize, preprocessing.resize_method, storage=storage)
    if images.classes != predictor.labels:
        raise DataError(f"{data} holds other classes now: {len(images.classes)}, and {len(predictor.labels)} then.")
    valid = images.split(seed=split_seed)[1]
    ways, labels = loaders(folder, predictor, formats), images.labels[valid]
    wrong, difference, largest = (dict.fromkeys(ways, 0) for _ in range(3))
    place = 0
    for batch in predictor.batches([images[i] for i in valid]):
        logits = {name: way(batch) for name, way in ways.items()}
        expected = reference(trained, batch)
        for name, found in logits.items():
            theirs = expected["fp32" if name in export_formats.OPENERS else "as trained"]
            wrong[name] += int((found.argmax(axis=1) != labels[place : place + len(found)]).sum())
            difference[name] = max(difference[name], float(abs(found - theirs).max()))
            largest[name] = max(largest[name], float(abs(theirs).max()))
        place += len(batch)
    found = tuple(Way(name, wrong[name], difference[name], largest[name]) for name in ways)
    return Check(len(valid), found, predictor.device.type == "cuda", predictor.amp_dtype is not None)


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
            model = opener(folder / export_formats.FILES[name])
            ways[name] = lambda batch, model=model: model(batch.cpu().numpy().astype("float32") / 255)
    return ways


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


if __name__ == "__main__":
    run_cli(main)
