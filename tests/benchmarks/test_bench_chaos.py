"""bench/chaos.py: it notices what is broken, and a search that five faults happen to keeps its promises."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "bench"))

import chaos_promises  # noqa: E402
from chaos_promises import Witness, judge  # noqa: E402

TRIAL = {"number": "0", "trial_id": "ta", "status": "completed", "epochs_done": "2", "error_rate": "0.25", "reason": ""}
EPOCH = {"number": "0", "trial_id": "ta", "epoch": "1", "train_seconds": "1.5"}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Writes a run's tables, and says what is broken in them after what was seen before."""
    monkeypatch.setattr(chaos_promises, "studys_problems", lambda folder, trials: [])
    witness = Witness(tmp_path)

    def write(trials: list[dict], epochs: list[dict]) -> None:
        for name, rows in (("trials.csv", trials), ("epochs.csv", epochs)):
            with (tmp_path / name).open("w", newline="") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)
        witness.look()

    def verdict():
        witness.end()
        return judge(tmp_path, witness, 0, 1)

    write([TRIAL], [EPOCH, EPOCH | {"epoch": "2"}])
    return write, verdict


def test_whole_tables_keep_all_promises(run):
    found = run[1]()
    assert found.finished and not (found.rows_lost or found.trials_run_twice or found.epochs_repeated or found.problems)


def test_a_row_that_is_gone_or_changed_is_lost(run):
    write, verdict = run
    write([TRIAL | {"error_rate": "0.5"}], [EPOCH, EPOCH | {"epoch": "2"}])
    assert verdict().rows_lost == ["ta"]


def test_an_epoch_that_was_trained_again_is_counted_and_so_is_a_finished_trial(run):
    write, verdict = run
    write([TRIAL | {"error_rate": "0.5"}], [EPOCH, EPOCH | {"epoch": "2", "train_seconds": "1.25"}])
    found = verdict()
    assert found.epochs_repeated == {"ta": 1} and found.trials_run_twice == ["ta"]


@pytest.mark.parametrize(
    ("trials", "epochs", "problem"),
    [
        ([TRIAL, TRIAL], [EPOCH, EPOCH | {"epoch": "2"}], "2 rows of 1 trials, expected 1"),
        ([TRIAL], [EPOCH, EPOCH], "has the epochs [1, 1], not 1 to 2"),
        ([TRIAL], [EPOCH], "has the epochs [1], not 1 to 2"),
        ([TRIAL | {"status": "running"}], [EPOCH, EPOCH | {"epoch": "2"}], "trial 0 is running"),
        ([TRIAL], [EPOCH, EPOCH | {"epoch": "2"}, EPOCH | {"trial_id": "tb"}], "epochs of tb, which is no trial"),
        (
            [TRIAL | {"status": "failed", "reason": "lost"}],
            [EPOCH, EPOCH | {"epoch": "2"}],
            "trial 0 failed: lost",
        ),
    ],
)
def test_tables_that_do_not_fit_are_problems(run, trials, epochs, problem):
    write, verdict = run
    write(trials, epochs)
    assert any(problem in found for found in verdict().problems)


@pytest.mark.ray
@pytest.mark.timeout(1500)
def test_a_search_that_five_faults_happen_to_keeps_its_promises(tmp_path):
    words = ["--faults", "5", "--seed", "4", "--kinds", "1 worker", "--trials", "4", "--out", tmp_path]
    ended = subprocess.run(
        [sys.executable, ROOT / "bench" / "chaos.py", *words], cwd=ROOT, env=os.environ, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    result = json.loads((tmp_path / "chaos.json").read_text())
    assert result["faults"] == 5 and result["searches"] == result["searches_finished"] >= 1
    assert (result["rows_lost"], result["trials_run_twice"], result["left_behind"]) == (0, 0, 0)
    assert result["max_epochs_repeated"] <= 1
    assert "| **all** | 5 |" in (tmp_path / "chaos.md").read_text()
