"""Export a run's best model to a folder of its own and verify it: `python -m search.export RUN --out DIR`.

`model.safetensors` and `config.json` are timm's local format: a linear head loads with
`timm.create_model("local-dir:DIR", pretrained=True)`. timm has no head=mlp, so its config.json refers to
`search.predict.Predictor`, which loads every export. `preprocessing.json` holds what `config.json` cannot. The weights
include the temperature, so that every format gives calibrated probabilities. README.md is the model card.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from search.cli.messages import command_name
from search.exporting import export_formats
from search.exporting.verification import Differs, check_against_table
from search.runs.atomic_files import replace_folder
from search.runs.command import CommandRecord
from search.runs.kinds import PROBE, name_of, short_name
from search.runs.trained_model import open_run
from trainables.data.labelled_images import MAX_UNREADABLE
from trainables.inference.model_folder import ModelFolder, read_json, read_model
from trainables.inference.predictor import load_model
from trainables.system.command_line import run_cli
from trainables.system.text import percent, shell_command
from trainables.training.checkpoint import PREPROCESSING_FILE, SPLIT_FILE, WEIGHTS_FILE

if TYPE_CHECKING:  # imports Ray, which --help and the new process do not need
    from search.runs.run_record import RunRecord

CONFIG_FILE, CARD_FILE = "config.json", "README.md"
COPIED = (PREPROCESSING_FILE, "recipe.json", "labels.json", "metrics.json", SPLIT_FILE)
FILES = (*export_formats.FILES.values(), CONFIG_FILE, CARD_FILE, *COPIED)
"""All that an export may contain."""
TIMM_CROP_MODES = {"crop": "center", "squish": "squash", "pad": "border"}

EXAMPLES = """
examples:
  python -m search.export results/quickstart-20250101-120000 --out exported
  python -m search.predict exported cat.jpg
      the best model in timm's local format, with its labels, preprocessing, recipe, metrics and a model card
  python -m search.export results/quickstart-20250101-120000 --out exported --format safetensors,onnx,pt2
      also model.onnx and model.pt2 (torch.export), for any batch size: pixels in 0..1 in, logits out; they run
      without this project, onnx in ONNX Runtime (to write it: pip install onnx onnxruntime onnxscript), pt2 in torch
  python -m search.export results/quickstart-20250101-120000 --out exported --trial 6
      another of the best trials; if its weights were not kept, prints the command that trains it again

A new process then opens every format and labels all validation images of the run. The number of errors must match the
run's table within one image, and the probabilities those of the checkpoint. They are compared in fp32: where training
validated in bf16 or fp16, the checkpoint's errors must match the table, and the formats' those of the checkpoint in
fp32. Exit code 0 if they match (or if the images are not on this machine, with a warning), 1 if not, 2 if the run or an
option is invalid. DIR is written only on success. All formats give calibrated probabilities.
"""


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=command_name("search.export"),
        description="Write the best model of a run to a folder that timm and search.predict load, and verify it.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a run, such as results/<name>")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to write")
    parser.add_argument("--trial", metavar="ID", help=(
        "a trial's number or id, or 'probe 3'; a run keeps the weights of its best (--keep); default: the best"
    ))  # fmt: skip
    parser.add_argument("--format", default="safetensors", metavar="LIST", help=(
        "safetensors, onnx and pt2, separated by commas; safetensors is always written and the default"
    ))  # fmt: skip
    parser.add_argument("--force", action="store_true", help="replace an earlier export in DIR")
    parser.add_argument("--no-check", action="store_true", help=(
        "do not check against the table; for images that have changed since the run"
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
    """Write the best model of `run`, or that of `trial`, to `out` and verify it; prints the outcome.

    Args:
        run: the folder of a run.
        out: the folder to write. It must not exist, or be empty.
        trial: a trial's number or id; the default is the best trial.
        formats: of safetensors, onnx and pt2.
        force: replace an earlier export in `out`.
        check: compare its errors on the validation images with the run's table.

    Raises:
        ValueError: there is no model to export, or `out` cannot be used.
        Differs: the check failed; `out` is not written.
    """
    from search.exporting.model_card import model_card

    run, out = run.expanduser(), out.expanduser().absolute()
    model = find_model(run, trial)
    metrics = read_json(model.path / "metrics.json")
    export_formats.require_packages(formats)
    require_free(out, force=force)
    name = name_of(metrics["number"]) if "number" in metrics else f"trial {metrics['trial_id']}"
    print(f"exporting {name}: {model.recipe.arch}, {percent(metrics['error_rate'], 2)} wrong")

    def require_same_best() -> None:
        if not model.path.is_dir() or read_json(model.path / "metrics.json") != metrics:
            raise ValueError(f"A better trial of {run} completed during the export. Export again.")

    def fill(folder: Path) -> None:
        write(model, folder, formats)
        card = model_card(model, metrics, CommandRecord.load(run), record_of(run), formats)
        (folder / CARD_FILE).write_text(card, encoding="utf-8")
        require_same_best()
        if not check:
            return
        try:
            check_against_table(folder, run, model.path, metrics, formats)
        except Differs:
            require_same_best()  # the checkpoint that the check reads may have been replaced
            raise

    try:
        replace_folder(out, fill)
    except OSError as error:
        raise ValueError(f"{out} cannot be written: {error}. Make room, or give another --out.") from error


def record_of(run: Path) -> RunRecord | None:
    """The run's tables, or None if they are missing or damaged."""
    from search.runs.run_record import load

    try:
        return load(run)
    except ValueError:
        return None


def find_model(run: Path, trial: str | None) -> ModelFolder:
    """The best model of `run`, or that of `trial` (a number or id). Raises `ValueError` if its weights are missing."""
    best = open_run(run)
    metrics = read_json(best.path / "metrics.json")
    if trial is None or trial == metrics["trial_id"] or ("number" in metrics and trial in names_of(metrics["number"])):
        return best
    record = record_of(run)
    unknown = f"--trial {trial}: there is no such trial in {run}. Its trials:"
    if record is None or record.trials.empty:
        raise ValueError(f"{unknown} {metrics['trial_id']}.")
    numbers, ids = record.trials["number"], record.trials["trial_id"]
    found = record.trials[(ids == trial) | numbers.map(lambda number: trial in names_of(number))]
    if found.empty:
        kinds = [numbers[numbers < 0].iloc[::-1], numbers[numbers >= 0]]
        ranges = [f"{short_name(found.iloc[0])} to {short_name(found.iloc[-1])}" for found in kinds if len(found)]
        raise ValueError(f"{unknown} {', '.join(ranges)} (or by id, such as {metrics['trial_id']}).")
    row = found.iloc[0]
    folders = weight_folders(record, metrics.get("number"))
    if row["number"] in folders:
        return read_model(folders[row["number"]])
    kept = ", ".join(map(short_name, sorted(folders))) or metrics["trial_id"]
    score = "" if math.isnan(row["error_rate"]) else f", {percent(row['error_rate'], 2)} wrong"
    raise ValueError(
        f"--trial {trial}: the weights of {name_of(row['number'])} ({row['status']}{score}) were not kept: a run keeps "
        f"those of its best trials only (--keep; here {kept}). "
        f"Train this one again with: {training_command(record, row)}"
    )


def names_of(number: int) -> tuple[str, str]:
    """What `--trial` may call a trial."""
    return str(number), name_of(number)


def weight_folders(record: RunRecord, best: int | None) -> dict[int, Path]:
    """Trial number -> folder of its weights, for all trials whose weights the run has kept."""
    folder = record.folder
    paths = [(0, folder.first), (best, folder.best), *((n, folder.models / str(n)) for n in record.trials["number"])]
    return {number: path for number, path in paths if number is not None and path.is_dir()}


def training_command(record: RunRecord, row: Any) -> str:
    """A search with one trial that repeats a row's recipe (`trainables.finetune` would not keep the weights)."""
    options, space = record.command.arguments, record.space
    settings = space.get("settings", {})
    # With named recipes the space's own dimensions are plain settings, and would be searched unless all are pinned.
    names = list(settings) if options.recipes else [*record.dimensions, *space.get("pinned", [])]
    values = {name: row[name] if name in row else settings[name] for name in dict.fromkeys(names) if name != "seed"}
    if row.get("kind") == PROBE:
        values |= {"head_init": "probe", "freeze_epochs": 0, "epochs": 0}
    words = ["--space", space["name"], "--trials", "1"]
    for name, value in (("data", options.data), ("weights", options.weights)):
        words += [f"--{name}", str(value)] if value else []
    if options.max_unreadable != MAX_UNREADABLE:
        words += ["--max-unreadable", str(options.max_unreadable)]
    words += ["--seed", str(space["seed"])] if space.get("seed") is not None else []
    pinned = (word for name, value in values.items() for word in ("--set", f"{name}={value}"))
    return shell_command("search.run", *words, *pinned)


def require_free(out: Path, *, force: bool) -> None:
    """Raises `ValueError` unless `out` is free; `force` also accepts an earlier export, but nothing else."""
    if not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f"--out {out} is a file. Give a folder that does not exist yet.")
    names = {entry.name for entry in out.iterdir()}
    if names and not force:
        raise ValueError(f"--out {out} is not empty. Give another folder, or --force to replace an earlier export.")
    if foreign := sorted(names.difference(FILES)):
        shown = ", ".join(foreign[:3]) + (", ..." if len(foreign) > 3 else "")
        raise ValueError(f"--out {out} contains files that no export writes ({shown}); --force will not remove them.")
    if names and WEIGHTS_FILE not in names:  # such as a README.md of the user
        raise ValueError(f"--out {out} is not an earlier export: it has no {WEIGHTS_FILE}. --force will not remove it.")


def write(model_folder: ModelFolder, folder: Path, formats: tuple[str, ...] = ("safetensors",)) -> None:
    """Write all files of an export except its card to an empty folder."""
    import timm

    from trainables.network.model import divide_logits

    model, preprocessing = load_model(model_folder), model_folder.preprocessing
    divide_logits(model, model_folder.temperature)
    side = preprocessing.image_size
    config: dict[str, Any] = {
        "pretrained_cfg": {
            "input_size": (3, side, side),
            "mean": preprocessing.mean,
            "std": preprocessing.std,
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": TIMM_CROP_MODES[preprocessing.resize_method],
            # the pretrained weights' own recommendations no longer apply
            "test_input_size": None,
            "test_crop_pct": None,
        },
        "label_names": list(model_folder.labels),
    }
    if model_folder.recipe.head == "mlp":
        config["note"] = "head=mlp: timm cannot build this classifier; load the folder with search.predict.Predictor"
    timm.models.save_for_hf(model, str(folder), model_config=config, safe_serialization=True)
    shutil.copymode(folder / CONFIG_FILE, folder / WEIGHTS_FILE)  # safetensors makes it readable by its owner only
    for name in COPIED:
        if name != SPLIT_FILE or (model_folder.path / name).is_file():  # an earlier version wrote none
            shutil.copyfile(model_folder.path / name, folder / name)
    export_formats.write_formats(model_folder, model, formats, folder)


if __name__ == "__main__":
    run_cli(main)
