"""What `bench/chaos.py` holds a search to, whatever happened to it."""

import csv
import hashlib
import os
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from processes import command_line
from searches import EPOCH_TIMES, TIMES, without

ENDED = ("completed", "stopped early", "failed")
Row = dict[str, str]


def read_table(path: Path) -> list[Row]:
    """Its whole rows; none while it is not there."""
    try:
        with path.open(newline="") as file:
            return [row for row in csv.DictReader(file) if None not in row.values()]
    except OSError:
        return []


class Witness:
    """Looks at a run's tables all the time, and remembers what they said."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ended: dict[str, Row] = {}  # by trial, as its row was when it had first ended
        self.trained: dict[tuple[str, int], set[str]] = defaultdict(set)
        """By trial and epoch: how long it was trained; another training of it takes another time."""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.is_set():
            self.look()
            time.sleep(0.1)

    def look(self) -> None:
        for row in read_table(self.folder / "trials.csv"):
            if row["status"] in ENDED:
                self.ended.setdefault(row["trial_id"], row)
        for row in read_table(self.folder / "epochs.csv"):
            if row["train_seconds"]:
                self.trained[row["trial_id"], int(row["epoch"])].add(row["train_seconds"])

    def end(self) -> None:
        self._over.set()
        self._thread.join()
        self.look()


@dataclass
class Verdict:
    """What a search kept of its promises."""

    finished: bool
    rows_lost: list[str] = field(default_factory=list)
    trials_run_twice: list[str] = field(default_factory=list)
    epochs_repeated: dict[str, int] = field(default_factory=dict)
    """By trial: epochs in the table that were trained again, beside the one that a fault had cut off."""
    problems: list[str] = field(default_factory=list)


def judge(folder: Path, witness: Witness, code: int, num_trials: int) -> Verdict:
    trials, epochs = read_table(folder / "trials.csv"), read_table(folder / "epochs.csv")
    verdict = Verdict(finished=code == 0)
    rows = {row["trial_id"]: row for row in trials}
    verdict.rows_lost = [trial_id for trial_id, row in witness.ended.items() if rows.get(trial_id) != row]
    for (trial_id, epoch), times in witness.trained.items():
        if len(times) > 1:
            verdict.epochs_repeated[trial_id] = verdict.epochs_repeated.get(trial_id, 0) + len(times) - 1
            if witness.ended.get(trial_id, {}).get("epochs_done") == str(epoch) and trial_id in verdict.rows_lost:
                verdict.trials_run_twice.append(trial_id)
    if len(trials) != num_trials or len(rows) != num_trials:
        verdict.problems.append(f"{len(trials)} rows of {len(rows)} trials, expected {num_trials}")
    for row in trials:
        mine = [int(epoch["epoch"]) for epoch in epochs if epoch["trial_id"] == row["trial_id"]]
        if sorted(mine) != list(range(1, int(row["epochs_done"]) + 1)):
            verdict.problems.append(f"trial {row['number']} has the epochs {mine}, not 1 to {row['epochs_done']}")
        if row["status"] not in ENDED:
            verdict.problems.append(f"trial {row['number']} is {row['status']}")
        if row["status"] == "failed" and not row["reason"].startswith("diverged"):
            verdict.problems.append(f"trial {row['number']} failed: {row['reason']}")
    known = {epoch["trial_id"] for epoch in epochs} - rows.keys()
    verdict.problems += [f"epochs of {trial_id}, which is no trial" for trial_id in known]
    verdict.problems += studys_problems(folder, trials)
    return verdict


def studys_problems(folder: Path, trials: list[Row]) -> list[str]:
    """The Optuna study must know how each trial ended."""
    from optuna.trial import TrialState

    from search.runs.run_record import load

    states = {"completed": TrialState.COMPLETE, "stopped early": TrialState.PRUNED, "failed": TrialState.FAIL}
    known = load(folder).study.trials
    problems = [
        f"the study's trial {trial.number} is still running" for trial in known if not trial.state.is_finished()
    ]
    told = {f"t{trial.user_attrs['trial_id']}": trial.state for trial in known if "trial_id" in trial.user_attrs}
    wrong = [row["number"] for row in trials if told.get(row["trial_id"]) != states.get(row["status"])]
    return problems + [f"the study says something else of trial {number}" for number in wrong]


def content(folder: Path) -> dict[str, Any]:
    """What must be the same, to the last bit, as in a search that nothing happened to."""
    trials, epochs = read_table(folder / "trials.csv"), read_table(folder / "epochs.csv")
    weights = (folder / "best" / "model.safetensors").read_bytes()
    return {
        "trials": without(trials, TIMES),
        "epochs": sorted(without(epochs, EPOCH_TIMES), key=lambda row: (int(row["number"]), int(row["epoch"]))),
        "weights of the best": hashlib.sha256(weights).hexdigest(),
    }


def processes_with(variable: str, value: str) -> list[str]:
    """Command lines of living processes that were started with this in their environment, without this one. Not those
    of Ray's actors, which write their titles over it."""
    wanted, found = f"{variable}={value}".encode(), []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                line = command_line(int(entry.name))
                found += [line] if line else []  # one without a line has ended, and its parent has not looked
        except OSError:
            continue
    return found
