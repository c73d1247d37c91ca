"""A run folder made of tables alone, in a moment: as many trials as wanted, with the ends that trials come to."""

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from PIL import Image

from search.runs.csv_file import as_csv
from search.runs.kinds import PROBE, TRIAL
from search.runs.result_rows import COMPLETED, EPOCH_COLUMNS, FAILED, METRICS, STOPPED, UNFINISHED
from trainables.network.calibration import calibration_of
from trainables.recipe import Recipe

DIMENSIONS = {
    "arch": {"values": ["resnet18", "resnet34"]},
    "epochs": {"low": 1, "high": 3, "log": False, "off": False},
    "lr_max": {"low": 0.0001, "high": 0.01, "log": True, "off": False},
    "mixup_alpha": {"low": 0, "high": 0.4, "log": False, "off": False},
}
DISTRIBUTIONS = {
    "arch": optuna.distributions.CategoricalDistribution(["resnet18", "resnet34"]),
    "epochs": optuna.distributions.IntDistribution(1, 3),
    "lr_max": optuna.distributions.FloatDistribution(1e-4, 1e-2, log=True),
    "mixup_alpha": optuna.distributions.FloatDistribution(0, 0.4),
}
NUM_VALID = 20
SCREENED = ("resnet18", "resnet34", "resnet50")
"""The architectures of the probes, in their order; trials have the first two."""
START = datetime(2026, 1, 1, tzinfo=UTC)


def write_run(
    folder: Path,
    *,
    num_trials: int = 10,
    labels: Sequence[str] = ("cat", "dog", "emu"),
    reason: str = "loss is nan",
    arch: str = "resnet18",
    name: str = "pets",
    shift: float = 0.0,
    probes: Sequence[float] = (),
) -> Path:
    """Every fifth trial was stopped early, every seventh failed; `shift` is added to all error rates.

    With the error rates of `probes`, of one per architecture in `SCREENED`, the search began with them, trials with
    even numbers started from that of their architecture, and the last one is unfinished.
    """
    rng = np.random.default_rng(num_trials)
    folder.mkdir(parents=True, exist_ok=True)
    trials, epochs = [], []
    clock = START
    for place, error in enumerate(probes):
        clock += timedelta(seconds=9)
        row = {"number": place - len(probes), "trial_id": f"p{place}"}
        epochs.append(row | _epoch(0, "probe", error, clock, seconds=9))
        metrics = {"error_rate": error, "valid_loss": error + 0.01, "accuracy": 1 - error, "best_error_rate": error}
        row |= {"kind": PROBE, "status": COMPLETED, **metrics, "best_epoch": 0, "epochs_done": 0, "epochs_total": 0}
        trials.append(row | {"seconds": 9.0, "arch": SCREENED[place], "epochs": 0, "lr_max": 0.001, "mixup_alpha": 0.0})
    for number in range(num_trials):
        config = {"arch": arch if number % 2 else "resnet34", "epochs": 1 + number % 3}
        config |= {"lr_max": float(10 ** rng.uniform(-4, -2)), "mixup_alpha": float(rng.uniform(0, 0.4))}
        total = config["epochs"] + 1
        status = STOPPED if number % 5 == 3 else FAILED if number % 7 == 5 else COMPLETED
        if probes and number == num_trials - 1:
            status = UNFINISHED
        ended = total if status == COMPLETED else total - 1
        # lower rates do better, so that there is something to find
        base = 0.2 + shift + 0.1 * np.log10(config["lr_max"] / 1e-4)
        errors = [round(max(0, base + 0.1 * (total - epoch)) * NUM_VALID) / NUM_VALID for epoch in range(1, ended + 1)]
        starts = [probes[SCREENED.index(config["arch"])]] if probes and number % 2 == 0 else []
        for epoch, error in enumerate([*starts, *errors], 1 - len(starts)):
            clock += timedelta(seconds=10)
            stage = ("probe", "frozen", "unfrozen")[min(epoch, 2)]
            row = {"number": number, "trial_id": f"t{number}"}
            epochs.append(row | _epoch(epoch, stage, error, clock, seconds=10))
        best = min(range(len(starts) + len(errors)), key=lambda place: [*starts, *errors][place])
        metrics = {"error_rate": errors[-1], "valid_loss": errors[-1] + 0.01, "accuracy": 1 - errors[-1]}
        if status == FAILED:
            metrics = dict.fromkeys(metrics, float("nan"))
        metrics |= {"kind": TRIAL, "best_epoch": best + 1 - len(starts), "best_error_rate": [*starts, *errors][best]}
        why = {STOPPED: "error_rate 0.5000 above the cut-off 0.4000 of rung 50 %", FAILED: reason, COMPLETED: ""}
        why[UNFINISHED] = "the search ended"
        trials.append(
            {"number": number, "trial_id": f"t{number}", "status": status, **metrics, "epochs_done": ended}
            | {"epochs_total": total, "seconds": 10.0 * ended, **config, "reason": why[status]}
        )
    columns = ["number", "trial_id", "kind", "status", *METRICS, "seconds", *DIMENSIONS, "reason"]
    (folder / "trials.csv").write_text(as_csv(columns, trials))
    (folder / "epochs.csv").write_text(as_csv(EPOCH_COLUMNS, epochs))
    rungs = {row["trial_id"]: 50 for row in trials if row["status"] == STOPPED}
    (folder / "rungs.json").write_text(json.dumps({"reasons": dict.fromkeys(rungs, "bad"), "rungs": rungs}))
    _write_frame(folder, name)
    _write_study(folder, name, [row for row in trials if row["kind"] == TRIAL])
    done = [row for row in trials if row["status"] in (COMPLETED, UNFINISHED)]
    if done:
        _write_winner(folder, min(done, key=lambda row: (row["error_rate"], row["valid_loss"])), labels)
    return folder


def _epoch(number: int, stage: str, error: float, ended: datetime, *, seconds: float) -> dict:
    """A row of epochs.csv, without its trial."""
    row = {"epoch": number, "stage": stage, "error_rate": error, "train_loss": 1.0, "valid_loss": error + 0.01}
    row |= {"train_seconds": 0.8 * seconds, "valid_seconds": 0.2 * seconds, "train_images": 80}
    return row | {"valid_images": NUM_VALID, "finished_at": ended.isoformat(timespec="seconds")}


def _write_frame(folder: Path, name: str) -> None:
    command = {
        "argv": ["--space", name, "--set", "arch=resnet18,resnet34"],
        "arguments": {"recipes": None},
        "method": {"searcher": "tpe", "scheduler": "rungs", "objective": "error", "target_seconds": None, "confirm": 0},
        "data": str(folder / "images"),
        "split_seed": 0,
        "group_size": {"num_workers": 1, "cpus_per_worker": 2, "gpus_per_worker": 0},
        "max_concurrent": 1,
        "started_at": START.isoformat(),
        "versions": {"python": "3.11.7", "ray": "2.60.0"},
        "hardware": {"processor": "AMD EPYC", "cpus": 2, "memory_gib": 24, "nodes": [{"cpus": 2, "gpus": 0}]},
    }
    space = {"name": name, "doc": "photos", "dimensions": DIMENSIONS, "seed": 6, "settings": {"image_size": 224}}
    (folder / "command.json").write_text(json.dumps(command))
    (folder / "space.json").write_text(json.dumps(space))


def _write_study(folder: Path, name: str, trials: list[dict]) -> None:
    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(folder / "study.journal"))), study_name=name
    )
    for row in (row for row in trials if row["arch"] in ("resnet18", "resnet34")):
        of_row = {"params": {name: row[name] for name in DIMENSIONS}, "distributions": DISTRIBUTIONS}
        of_row["user_attrs"] = {"trial_id": str(row["number"]), "seconds": row["seconds"]}  # Tune's id
        if row["status"] == COMPLETED:
            study.add_trial(optuna.trial.create_trial(value=row["error_rate"], **of_row))
        elif row["status"] == STOPPED:
            of_row["intermediate_values"] = {50: row["error_rate"]}
            study.add_trial(optuna.trial.create_trial(state=optuna.trial.TrialState.PRUNED, **of_row))


def _write_winner(folder: Path, row: dict, labels: Sequence[str]) -> None:
    best, interpretation, images = folder / "best", folder / "interpretation", folder / "images"
    for made in (best, interpretation, images):
        made.mkdir()
    (best / "model.safetensors").touch()
    settings = {name: row[name] for name in DIMENSIONS if name != "arch" and row.get(name, "") != ""}
    if row.get("kind") == PROBE:
        settings |= {"head_init": "probe", "freeze_epochs": 0, "epochs": 0}
    recipe = Recipe.from_dict(settings)
    preprocessing = {"presize": 64, "image_size": 48, "mean": [0.5] * 3, "std": [0.5] * 3, "resize_method": "crop"}
    contents = {"recipe": recipe.to_dict(), "labels": list(labels), "metrics": {"trial_id": row["trial_id"]}}
    for name, content in (contents | {"preprocessing": preprocessing}).items():
        (best / f"{name}.json").write_text(json.dumps(content))
    (interpretation / "metrics.json").write_text(json.dumps(contents["metrics"]))
    counts = 5 * np.eye(len(labels), dtype=int)
    counts[0, 1] = 2
    _write_csv(
        interpretation / "confusion_matrix.csv",
        [("actual", *labels), *((name, *row) for name, row in zip(labels, counts.tolist(), strict=True))],
    )
    Image.new("RGB", (64, 48), (200, 30, 30)).save(images / "0.jpg")
    losses = [("0.jpg", labels[1], labels[0], "2.5", "0.9"), ("gone.jpg", labels[1], labels[0], "1.5", "0.8")]
    _write_csv(interpretation / "top_losses.csv", [("path", "predicted", "actual", "loss", "probability"), *losses])
    sure = np.linspace(0.55, 0.98, NUM_VALID)
    judged = calibration_of(np.stack([sure, 1 - sure], axis=1), (np.arange(NUM_VALID) % 5 == 4).astype(int))
    (interpretation / "calibration.json").write_text(json.dumps(asdict(judged)))


def _write_csv(path: Path, rows: list) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
