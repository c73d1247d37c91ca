"""bench/frozen.py: which seconds of a search's tables are frozen work, and whose errors it compares."""

import sys
from pathlib import Path

import pytest
from searches import ROOT

from search.runs.csv_file import as_csv
from search.runs.result_rows import EPOCH_COLUMNS

sys.path.insert(0, str(ROOT / "bench"))

import frozen


def epochs(tmp_path: Path, *rows: tuple[str, float, float]) -> list[dict]:
    """As a search writes them: stage, seconds of training and of validation."""
    table = [{"stage": stage, "train_seconds": train, "valid_seconds": valid} for stage, train, valid in rows]
    (tmp_path / "epochs.csv").write_text(as_csv(EPOCH_COLUMNS, table))
    return frozen.rows_of(tmp_path / "epochs.csv")


def trial(error: float | str, kind: str | None = None, status: str = "completed") -> dict:
    return {"error_rate": str(error), "status": status} | ({"kind": kind} if kind else {})


def test_probes_and_frozen_epochs_are_frozen_work(tmp_path):
    rows = epochs(tmp_path, ("probe", 8, 1), ("probe", 0.5, float("nan")), ("frozen", 2, 1), ("unfrozen", 30, 5))
    found = frozen.summarise([trial(0.2)], rows)
    assert found["frozen_seconds"] == 12.5
    assert found["seconds_by_stage"] == {"frozen": 3, "probe": 9.5, "unfrozen": 35}


def test_the_best_may_be_a_probe_but_the_mean_is_that_of_trials(tmp_path):
    rows = epochs(tmp_path, ("frozen", 2, 1))
    table = [
        trial(0.1, "probe"),
        trial(0.2, "trial"),
        trial(0.4, "trial", "stopped early"),
        trial("", "trial", "failed"),
    ]
    found = frozen.summarise(table, rows)
    assert (found["error_best"], found["error_mean"]) == (0.1, pytest.approx(0.3))
    assert [found[name] for name in ("trials", "probes", "stopped", "failed")] == [2, 1, 1, 1]
    before = frozen.summarise([trial(0.3), trial(0.5)], rows)  # its table has no kinds
    assert (before["trials"], before["probes"], before["error_mean"]) == (2, 0, 0.4)


def test_the_table_has_both_sides(tmp_path):
    sides = {"before": ("frozen", 40.0, 8.0), "now": ("probe", 10.0, 2.0)}
    found = {side: frozen.summarise([trial(0.2)], epochs(tmp_path, row)) for side, row in sides.items()}
    found = {side: numbers | {"command_seconds": 60.0} for side, numbers in found.items()}
    settings = {"trials": 20, "archs": "a,b,c", "image_size": 224, "seed": 0}
    result = found | {"frozen_seconds_ratio": 0.25, "data": "birds", "command": "", "settings": settings}
    result |= {"hardware": {"cpu": "none", "cores": 2, "gpu": None}, "versions": {"ray": "2.60"}}
    table = frozen.markdown(result)
    assert "| **seconds of frozen work** | 48.0 | 12.0 |" in table and "| of them, probes | 0.0 | 12.0 |" in table
    assert "takes 0.25 times" in table and "| best validation error, % | 20.0 | 20.0 |" in table
