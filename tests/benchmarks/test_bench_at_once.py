"""The benchmark of many trials at once: what it asks of a killed driver's tables, and what it says."""

import json
import sys
from pathlib import Path

import pytest
from run_tables import write_run

from search.runs.result_rows import read_epochs, read_trials

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import scale_at_once

KILLED_AT = 1000.0


@pytest.fixture
def root(tmp_path) -> Path:
    """What a driver has left that had handled all results of its tables."""
    run = write_run(tmp_path / "run", num_trials=4)
    done = {row["trial_id"]: row["epochs_done"] for row in read_trials(run / "trials.csv")}
    hear(tmp_path, *((row["trial_id"], row["epoch"], 900.0) for row in read_epochs(run / "epochs.csv")))
    assert max(done.values()) > 1
    return tmp_path


def hear(root: Path, *results: tuple[str, int, float]) -> None:
    with (root / "heard.jsonl").open("a") as file:
        for trial_id, epoch, at in results:
            file.write(json.dumps({"trial": trial_id.removeprefix("t"), "epoch": epoch, "at": at}) + "\n")


def test_whole_tables_are_counted(root):
    left = scale_at_once.left(root, KILLED_AT)
    assert left["trials"] == left["ended"] == 4 and left["epochs"] > 4


def test_an_epoch_that_was_handled_must_be_in_the_table(root):
    hear(root, ("t0", 9, KILLED_AT))
    with pytest.raises(ValueError, match=r"epoch 9 of t0 is not in epochs\.csv"):
        scale_at_once.left(root, KILLED_AT)


def test_half_a_line_is_not_whole(root):
    table = root / "run" / "trials.csv"
    table.write_text(table.read_text()[:-5])
    with pytest.raises(ValueError, match="half a line"):
        scale_at_once.left(root, KILLED_AT)


def test_a_row_may_be_a_second_behind_and_no_more(root):
    table = root / "run" / "trials.csv"
    first, row, *others = table.read_text().splitlines(keepends=True)
    fields = dict(zip(first.strip().split(","), row.strip().split(","), strict=True))
    fields["epochs_done"] = "0"
    table.write_text("".join([first, ",".join(fields.values()) + "\n", *others]))
    with pytest.raises(ValueError, match="more than 1 s behind for 1 trials"):
        scale_at_once.left(root, KILLED_AT)
    assert scale_at_once.left(root, 900.5)["trials"] == 4


def test_the_table_has_the_mean_of_all_slices():
    row = {"at": 10.0, "seconds": 10.0, "results": 170, "cores": 0.4, "mb": 300.0, "ended": 17, "waiting": 2,
           "delay_p50": 0.01, "delay_p95": 0.5}  # fmt: skip
    left = {"trials": 100, "ended": 17, "epochs": 400}
    told = {"slices": [row, row | {"results": 150, "cores": 0.2, "mb": 310.0}], "after_kill": left, "command": "x",
            "at_once": 1000, "epoch_seconds": 60}  # fmt: skip
    assert "**16.0 results a second, 0.30\ncores, at most 310 MB.**" in scale_at_once.markdown(told)
