"""Take a run's best model away as a folder of its own, checked: `python -m search.export RUN --out DIR`.

`model.safetensors` and `config.json` are timm's local format. A linear head loads with
`timm.create_model("local-dir:DIR", pretrained=True)`; a head=mlp is not of timm's making, so its config.json says that
it loads with `search.predict.Predictor`, as all exports do. `preprocessing.json` holds what `config.json` cannot, and
README.md, the model card, says it all in words.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from search.cli.messages import command_name, run_cli
from search.exporting import export_formats
from search.exporting.verification import Differs, check_against_table
from search.runs.atomic_files import replace_folder
from search.runs.command import CommandRecord
from search.runs.trained_model import open_run
from trainables.data.labelled_images import MAX_UNREADABLE
from trainables.inference.model_folder import ModelFolder, read_json, read_model
from trainables.inference.predictor import load_model
from trainables.system.text import percent, shell_command
from trainables.training.checkpoint import PREPROCESSING_FILE, SPLIT_FILE, WEIGHTS_FILE

if TYPE_CHECKING:  # Ray comes with it, which --help and the new process can do without
    from search.runs.run_record import RunRecord

CONFIG_FILE, CARD_FILE = "config.json", "README.md"
COPIED = (PREPROCESSING_FILE, "recipe.json", "labels.json", "metrics.json", SPLIT_FILE)
FILES = (*export_formats.FILES.values(), CONFIG_FILE, CARD_FILE, *COPIED)
"""All that an export can hold."""
TIMM_CROP_MODES = {"crop": "center", "squish": "squash", "pad": "border"}


EXAMPLES = """
examples:
  python -m search.export results/quickstart-20250101-120000 --out exported
  python -m search.predict exported cat.jpg
      the best model as timm's local format, with its labels, preprocessing, recipe, metrics and a model card
  python -m search.export results/quickstart-20250101-120000 --out exported --format safetensors,onnx,pt2
      model.onnx and model.pt2 (torch.export) as well, for any batch size: pixels in 0..1 in, logits out; they run
      without this project, onnx in ONNX Runtime (to write it: pip install onnx onnxruntime onnxscript), pt2 in torch
  python -m search.export results/quickstart-20250101-120000 --out exported --trial 6
      another one of the best trials; of one whose weights are not kept it says how to train it again

Before it says done, a new process opens every format and labels all validation images of the run; the errors must be
those of the run's table, but for one image. onnx and pt2 compute in fp32: where training validated in bf16 or fp16,
their errors must be those of the checkpoint in fp32, which are then shown beside the table's. Exit code 0 if so (or if
the images are not on this machine, with a warning), 1 if not, 2 if the run or an option is no good. Nothing is left in
DIR but after success.
"""


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=command_name("search.export"),
        description="Write the best model of a run to a folder that timm and search.predict load, and check it.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a run, such as results/<name>")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to write")
    parser.add_argument("--trial", metavar="ID", help=(
        "a trial's number or id; a run keeps the weights of its best ones (--keep); default: the very best"
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
    print(f"next: {shell_command('search.predict', args.out)} IMAGE...")
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
    best = model_of(run, trial)
    metrics = read_json(best.path / "metrics.json")
    export_formats.require_packages(formats)
    require_free(out, force=force)
    print(f"exporting trial {metrics['trial_id']}: {best.recipe.arch}, {percent(metrics['error_rate'], 2)} wrong")

    def require_same_best() -> None:
        if not best.path.is_dir() or read_json(best.path / "metrics.json") != metrics:
            raise ValueError(f"A better trial of {run} completed while it was exported. Export again.")

    def fill(folder: Path) -> None:
        write(best, folder, formats)
        write_card(best, metrics, run, formats, folder)
        require_same_best()
        if not check:
            return
        try:
            check_against_table(folder, run, best.path, metrics, formats)
        except Differs:
            require_same_best()  # the check reads the checkpoint, which another may have replaced
            raise

    try:
        replace_folder(out, fill)
    except OSError as error:
        raise ValueError(f"{out} cannot be written: {error}. Make room, or give another --out.") from error


def write_card(best: ModelFolder, metrics: dict[str, Any], run: Path, formats: tuple[str, ...], folder: Path) -> None:
    from search.exporting.model_card import model_card

    text = model_card(best, metrics, CommandRecord.load(run), record_of(run), formats)
    (folder / CARD_FILE).write_text(text, encoding="utf-8")


def record_of(run: Path) -> RunRecord | None:
    """The run's tables, where it has them."""
    from search.runs.run_record import load

    try:
        return load(run)
    except ValueError:
        return None


def model_of(run: Path, trial: str | None) -> ModelFolder:
    """The best model of `run`, or that of a `trial` (its number or id). Raises `ValueError` where its weights are gone
    or were never there."""
    best = open_run(run)
    metrics = read_json(best.path / "metrics.json")
    if trial is None or trial in (metrics["trial_id"], str(metrics.get("number"))):
        return best
    record = record_of(run)
    if record is None or record.trials.empty:
        raise ValueError(f"--trial {trial}: there is no such trial in {run}. Its trials: {metrics['trial_id']}.")
    rows = record.trials
    found = rows[(rows["trial_id"] == trial) | (rows["number"].astype(str) == trial)]
    if found.empty:
        known = f"{rows['number'].min()} to {rows['number'].max()} (or by id, such as {metrics['trial_id']})"
        raise ValueError(f"--trial {trial}: there is no such trial in {run}. Its trials: {known}.")
    row = found.iloc[0]
    kept = kept_models(record, metrics.get("number"))
    if row["number"] in kept:
        return read_model(kept[row["number"]])
    score = "" if math.isnan(row["error_rate"]) else f", {percent(row['error_rate'], 2)} wrong"
    raise ValueError(
        f"--trial {trial}: trial {row['number']} ({row['status']}{score}) has no weights any more: a run keeps those "
        f"of its best trials only (--keep; here {', '.join(map(str, sorted(kept))) or metrics['trial_id']}). "
        f"Train this one again with: {training_command(record, row)}"
    )


def kept_models(record: RunRecord, best: int | None) -> dict[int, Path]:
    """Number -> folder of the trials whose weights a run keeps, be it for `--test-split`."""
    folder = record.folder
    places = [(0, folder.first), (best, folder.best), *((n, folder.models / str(n)) for n in record.trials["number"])]
    return {number: place for number, place in places if number is not None and place.is_dir()}


def training_command(record: RunRecord, row: Any) -> str:
    """The search of one trial that repeats the recipe of a row; `trainables.finetune` leaves no weights."""
    options, space = record.command.arguments, record.space
    settings = space.get("settings", {})
    # Of named recipes the space's own dimensions are settings like others, and searched unless all are pinned.
    names = list(settings) if options.recipes else [*record.dimensions, *space.get("pinned", [])]
    values = {name: row[name] if name in row else settings[name] for name in dict.fromkeys(names) if name != "seed"}
    words = ["--space", space["name"], "--trials", "1"]
    for name, value in (("data", options.data), ("weights", options.weights)):
        words += [f"--{name}", str(value)] if value else []
    if options.max_unreadable != MAX_UNREADABLE:
        words += ["--max-unreadable", str(options.max_unreadable)]
    words += ["--seed", str(space["seed"])] if space.get("seed") is not None else []
    settings = (word for name, value in values.items() for word in ("--set", f"{name}={value}"))
    return shell_command("search.run", *words, *settings)


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
    if names and WEIGHTS_FILE not in names:  # such as somebody's own README.md
        raise ValueError(f"--out {out} is no earlier export: it has no {WEIGHTS_FILE}; --force will not remove it.")


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
        if name != SPLIT_FILE or (best.path / name).is_file():  # none of a model that another version trained
            shutil.copyfile(best.path / name, folder / name)
    export_formats.write_formats(best, model, formats, folder)


if __name__ == "__main__":
    run_cli(main)
