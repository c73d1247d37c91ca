"""The results table: whole at every moment, one row a trial, one row an epoch, and the best trial's weights."""

import csv
import json
import math
import os
import threading
from types import SimpleNamespace

import pandas as pd
import pytest

from search.runs import table_files
from search.runs.atomic_files import replace_folder, write_atomically
from search.runs.csv_file import read_rows
from search.runs.kinds import name_of
from search.runs.paths import RunFolder
from search.runs.refit import Refit, winner_to_refit
from search.runs.result_rows import (
    COMPLETED,
    EPOCH_COLUMNS,
    FAILED,
    RETRAINED,
    RUNNING,
    STOPPED,
    UNFINISHED,
    check_tables,
    leaders,
    read_epochs,
    read_trials,
)
from search.runs.results_table import ResultsTable, TooManyFailures
from trainables.ray.trial import table_id
from trainables.recipe import Recipe
from trainables.training import checkpoint
from trainables.training.checkpoint import BEST_FILE, PREPROCESSING_FILE, TRAINING_FILE, WEIGHTS_FILE

SETTINGS = Recipe(epochs=2, freeze_epochs=1, arch="resnet18").to_dict()
DIMENSIONS = ["arch", "lr_max"]


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    (tmp_path / "run").mkdir()
    return RunFolder(tmp_path / "run")


@pytest.fixture
def table(folder) -> ResultsTable:
    return made(folder)


def made(folder, **more) -> ResultsTable:
    table = ResultsTable(folder, settings=SETTINGS, dimensions=DIMENSIONS, labels=["cat", "dog"], **more)
    table.setup()
    return table


class FakeTrial(SimpleNamespace):
    """What the table knows of Tune's trials."""

    TERMINATED = "TERMINATED"

    def __init__(self, trial_id: str, **config) -> None:
        config = {"arch": "resnet18", "lr_max": 1e-3} | config
        super().__init__(trial_id=trial_id, config=config, status="RUNNING", error=None)

    def get_error(self):
        return self.error


def result(
    epoch: int, error_rate: float, *, valid_loss: float = 0.5, overhead: float = 0.25, expected: float = math.nan
) -> dict:
    metrics = {"error_rate": error_rate, "valid_loss": valid_loss, "accuracy": 1 - error_rate, "train_loss": 0.7}
    metrics |= {} if math.isnan(expected) else {"expected_error_rate": expected}
    metrics |= {"stage": "frozen" if epoch == 1 else "unfrozen", "progress": 50 * (epoch - 1)}
    times = {"train_seconds": 2.0, "valid_seconds": 0.5, "seconds": 2.5 * epoch}
    times |= {"images_per_second": 100.0, "overhead_seconds": overhead}
    return {"epoch": epoch, "epochs_total": 3, "failure": "", **metrics, **times}


def run_epochs(table, trial, *error_rates: float, first: int = 1, **more) -> None:
    """Tell the table of epochs; each has left its checkpoint before."""
    for epoch, error_rate in enumerate(error_rates, first):
        outcome = result(epoch, error_rate, **more)
        files = {WEIGHTS_FILE: trial.trial_id.encode(), PREPROCESSING_FILE: b"{}", TRAINING_FILE: b"moments"}
        checkpoint.save(table.folder.checkpoints / table_id(trial), epoch, files, outcome)
        table.on_trial_result(0, [], trial, outcome)


def complete(
    table, trial_id: str, error_rate: float, *, valid_loss: float = 0.5, expected: float = math.nan, **config
) -> FakeTrial:
    trial = FakeTrial(trial_id, **config)
    table.on_trial_start(0, [], trial)
    run_epochs(table, trial, 0.9, 0.8, error_rate, valid_loss=valid_loss, expected=expected)
    table.on_trial_complete(0, [], trial)
    return trial


def fail(table, trial_id: str, reason: str = "diverged") -> FakeTrial:
    trial = FakeTrial(trial_id)
    table.on_trial_start(0, [], trial)
    table.on_trial_result(0, [], trial, {"failure": reason, "error_rate": math.nan, "done": True})
    table.on_trial_complete(0, [], trial)
    return trial


def probed(table, trial_id: str, error_rate: float) -> None:
    """A probe of the screen, from its start to its end."""
    trial = FakeTrial(trial_id, epochs=0, freeze_epochs=0, head_init="probe", screens=-2)
    table.on_trial_start(0, [], trial)
    assert read_trials(table.folder.trials)[-1]["status"] == RUNNING
    outcome = result(0, error_rate) | {"stage": "probe", "epochs_total": 0}
    outcome |= {"best_epoch": 0, "best_error_rate": error_rate}
    files = {WEIGHTS_FILE: trial_id.encode(), PREPROCESSING_FILE: b"{}"}
    checkpoint.save(table.folder.checkpoints / table_id(trial), 0, files, outcome)
    table.on_trial_result(0, [], trial, outcome)
    table.on_trial_complete(0, [], trial)


def best(folder) -> tuple[bytes, dict, dict, list]:
    contents = (json.loads((folder.best / f"{name}.json").read_text()) for name in ("recipe", "metrics", "labels"))
    return ((folder.best / WEIGHTS_FILE).read_bytes(), *contents)


def test_the_tables_are_there_and_whole_from_the_first_moment(table, folder):
    assert read_trials(folder.trials) == read_rows(folder.epochs) == []
    assert folder.trials.read_text().startswith(
        "number,trial_id,kind,status,error_rate,expected_error_rate,tta_error_rate,wise_alpha,valid_loss,accuracy,"
        "balanced_error,macro_f1,auroc,top5_error,map,temperature,calibration_error_before,calibration_error,best_epoch,"
    )
    assert folder.epochs.read_text().splitlines() == [",".join(EPOCH_COLUMNS)]


def test_a_trials_row_is_right_after_every_event(table, folder):
    trial = FakeTrial("abc", lr_max=0.002)
    table.on_trial_start(0, [], trial)
    [row] = read_trials(folder.trials)
    assert (row["number"], row["trial_id"], row["status"]) == (0, "tabc", RUNNING)
    assert (row["epochs_done"], row["epochs_total"], row["seconds"], row["lr_max"]) == (0, 3, 0, "0.002")
    assert math.isnan(row["error_rate"])

    run_epochs(table, trial, 0.9, 0.4)
    [row] = read_trials(folder.trials)
    assert (row["status"], row["epochs_done"], row["error_rate"], row["accuracy"]) == (RUNNING, 2, 0.4, 0.6)
    assert (row["seconds"], row["overhead_seconds"], row["images_per_second"]) == (5, 0.25, 100)

    run_epochs(table, trial, 0.3, first=3)
    table.on_trial_complete(0, [], trial)
    [row] = read_trials(folder.trials)
    assert (row["status"], row["epochs_done"], row["error_rate"], row["reason"]) == (COMPLETED, 3, 0.3, "")
    assert [(epoch["epoch"], epoch["error_rate"]) for epoch in read_rows(folder.epochs)] == [
        ("1", "0.9"), ("2", "0.4"), ("3", "0.3")
    ]  # fmt: skip


def test_a_stopped_trial_keeps_its_last_epoch_and_the_schedulers_reason(table, folder):
    trial = FakeTrial("abc")
    run_epochs(table, trial, 0.9, 0.8)
    folder.rungs.write_text(json.dumps({"recorded": {}, "reasons": {"abc": "error_rate 0.8 above the cut-off"}}))
    table.on_trial_complete(0, [], trial)
    [row] = read_trials(folder.trials)
    assert (row["status"], row["error_rate"], row["epochs_done"]) == (STOPPED, 0.8, 2)
    assert row["reason"] == "error_rate 0.8 above the cut-off"


def test_a_trial_that_the_searchs_end_terminated_does_not_stay_running(table, folder):
    """A time budget ends Tune's trials without a word to callbacks."""
    running, terminated = FakeTrial("a"), FakeTrial("b")
    for trial in (running, terminated):
        table.on_trial_start(0, [], trial)
        run_epochs(table, trial, 0.9)
    terminated.status = "TERMINATED"
    table.on_step_end(0, [running, terminated, FakeTrial("never started")])
    rows = read_trials(folder.trials)
    assert [row["status"] for row in rows] == [RUNNING, UNFINISHED]
    assert rows[1]["reason"] == "the search ended"


def test_the_last_epoch_of_an_unfinished_trial_is_the_best_model_where_nothing_is_better(table, folder):
    complete(table, "a", 0.3)
    good, bad, none = FakeTrial("b"), FakeTrial("c"), FakeTrial("d")
    run_epochs(table, good, 0.2)
    run_epochs(table, bad, 0.4)
    table.on_trial_start(0, [], none)
    for trial in (good, bad, none):
        table.on_trial_start(0, [], trial)
        trial.status = "TERMINATED"
    table.on_step_end(0, [good, bad, none])
    weights, _, metrics, _ = best(folder)
    assert (weights, metrics["number"], metrics["status"], metrics["epochs_done"]) == (b"b", 1, UNFINISHED, 1)
    assert [row["number"] for row in leaders(read_trials(folder.trials))] == [1, 0, 2]


def test_an_interrupted_search_delivers_a_running_trials_last_epoch_and_takes_it_back(table, folder):
    complete(table, "a", 0.3)
    running = FakeTrial("b")
    table.on_trial_start(0, [], running)
    run_epochs(table, running, 0.2)
    table.deliver_running()
    assert best(folder)[0] == b"b"
    assert read_trials(folder.trials)[1]["status"] == RUNNING
    made(folder)  # resumed
    assert best(folder)[0] == b"a"


def test_probes_have_numbers_below_0_and_trial_0_stays_the_first_fine_tuning(table, folder):
    probed(table, "p", 0.25)
    complete(table, "a", 0.5)
    rows = read_trials(folder.trials)
    assert [(row["number"], row["kind"], row["status"]) for row in rows] == [
        (-2, "probe", COMPLETED), (0, "trial", COMPLETED)
    ]  # fmt: skip
    weights, recipe, metrics, _ = best(folder)
    assert (weights, metrics["number"], recipe["epochs"], recipe["freeze_epochs"]) == (b"p", -2, 0, 0)
    assert "screens" not in metrics | recipe
    assert [name_of(row["number"]) for row in rows] == ["probe 2", "trial 0"]


def test_a_probe_that_the_searchs_end_cuts_off_is_not_completed(table, folder):
    probe = FakeTrial("p", epochs=0, freeze_epochs=0, head_init="probe", screens=-2)
    table.on_trial_start(0, [], probe)
    table.on_trial_complete(0, [], probe)
    [row] = read_trials(folder.trials)
    assert row["status"] == UNFINISHED
    assert leaders([row]) == []


def test_with_keep_epoch_best_a_trial_leaves_the_model_and_the_error_of_its_best_epoch(folder):
    table, trial = made(folder, keep_epoch="best"), FakeTrial("b")
    table.on_trial_start(0, [], trial)
    for epoch, error in enumerate((0.4, 0.1, 0.3), 1):
        outcome = result(epoch, error, valid_loss=error, expected=error + 0.05) | {"tta_error_rate": 0.2}
        outcome |= {"temperature": 1 + epoch / 10, "calibration_error": epoch / 100}
        outcome |= {"best_epoch": min(epoch, 2), "best_error_rate": min(error, 0.1 if epoch > 1 else 1.0)}
        files = {WEIGHTS_FILE: b"last", BEST_FILE: b"best", PREPROCESSING_FILE: b"{}"}
        checkpoint.save(folder.checkpoints / table_id(trial), epoch, files, outcome)
        table.on_trial_result(0, [], trial, outcome)
    table.on_trial_complete(0, [], trial)
    [row] = read_trials(folder.trials)
    assert (row["error_rate"], row["valid_loss"], row["accuracy"], row["best_epoch"]) == (0.1, 0.1, 0.9, 2)
    assert row["expected_error_rate"] == pytest.approx(0.15)
    assert (row["temperature"], row["calibration_error"]) == (1.2, 0.02)
    assert math.isnan(row["tta_error_rate"])  # it is the last epoch's
    assert best(folder)[0] == b"best"


def test_a_failed_trial_has_its_reason_and_no_error_rate(table, folder):
    fail(table, "abc", "diverged: training loss is nan")
    [row] = read_trials(folder.trials)
    assert (row["status"], row["reason"]) == (FAILED, "diverged: training loss is nan")
    assert math.isnan(row["error_rate"])


def test_a_trial_that_fails_after_a_good_epoch_scores_nothing(table, folder):
    trial = FakeTrial("abc")
    run_epochs(table, trial, 0.0)
    table.on_trial_result(0, [], trial, {"failure": "diverged", "error_rate": math.nan, "done": True})
    table.on_trial_complete(0, [], trial)
    [row] = read_trials(folder.trials)
    assert (row["status"], row["epochs_done"]) == (FAILED, 1)
    assert all(math.isnan(row[name]) for name in ("error_rate", "valid_loss", "accuracy"))


def test_a_trial_whose_actor_breaks_has_failed_with_the_last_line_of_its_error(table, folder):
    trial = FakeTrial("abc")
    trial.error = "Traceback ...\n  File x\nOSError: disk full\n"
    table.on_trial_start(0, [], trial)
    table.on_trial_error(0, [], trial)
    lost = FakeTrial("def")
    table.on_trial_error(0, [], lost)
    assert [(row["status"], row["reason"]) for row in read_trials(folder.trials)] == [
        (FAILED, "OSError: disk full"),
        (FAILED, "its actor was lost"),
    ]


@pytest.mark.parametrize("text", ["", "  \n\n"])
def test_a_trial_whose_error_has_no_text_has_failed_like_any_other(table, folder, text):
    trial = FakeTrial("abc")
    trial.error = text
    table.on_trial_start(0, [], trial)
    table.on_trial_error(0, [], trial)
    [row] = read_trials(folder.trials)
    assert (row["status"], row["reason"]) == (FAILED, "its actor was lost")


@pytest.mark.parametrize(
    "reason", ['a, b, "c"', "two\nlines", "two\r\nlines", "ä ° 一", "'=1+1", " spaces ", "50 %\r100 %"]
)
def test_any_reason_comes_back_as_it_was(table, folder, reason):
    fail(table, "abc", reason)
    complete(table, "def", 0.1)
    assert [row["reason"] for row in read_trials(folder.trials)] == [reason, ""]
    made(folder)  # reads and writes it again
    assert [row["reason"] for row in read_trials(folder.trials)] == [reason, ""]


def test_a_reason_that_names_a_file_without_a_utf_8_name_can_be_written(table, folder):
    fail(table, "abc", f"cannot read {os.fsdecode(b'c%st' % bytes([0xE4]))}.jpg")
    assert [row["reason"] for row in read_trials(folder.trials)] == ["cannot read c\\udce4t.jpg"]


def test_pandas_reads_the_tables_with_ids_as_text(table, folder):
    for trial_id in ("00876659", "976e1612"):
        complete(table, trial_id, 0.1)
    for path in (folder.trials, folder.epochs):
        ids = pd.read_csv(path)["trial_id"].unique().tolist()
        assert ids == ["t00876659", "t976e1612"]
    frame = pd.read_csv(folder.trials)
    assert frame["error_rate"].dtype == float
    assert frame.set_index("trial_id").loc["t976e1612", "epochs_done"] == 3


def test_a_reader_never_sees_half_a_table(table, folder):
    """Somebody may open trials.csv at any moment, and a kill may come at any moment."""
    ended = threading.Event()
    seen: list[tuple[bool, int]] = []

    def read() -> None:
        while not ended.is_set():
            text = folder.trials.read_text()
            seen.append((text.endswith("\n"), len(list(csv.DictReader(text.splitlines())))))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for i in range(60):
            complete(table, f"{i:04}", 0.5)
    finally:
        ended.set()
        reader.join()
    assert all(whole for whole, _ in seen)
    assert seen == sorted(seen), "rows were missing for a moment"
    assert len(seen) > 10


def test_a_write_that_breaks_leaves_the_old_file(tmp_path):
    path = tmp_path / "table.csv"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "new \ud800")
    assert path.read_text() == "old"


def test_a_torn_last_line_is_gone_when_the_search_goes_on(table, folder):
    complete(table, "abc", 0.1)
    whole = folder.epochs.read_text()
    folder.epochs.write_text(whole[: whole.rstrip("\n").rfind(",") - 5])
    later = made(folder)
    assert [row["epoch"] for row in read_rows(folder.epochs)] == ["1", "2"]
    run_epochs(later, FakeTrial("abc"), 0.1, first=3)
    assert [row["epoch"] for row in read_rows(folder.epochs)] == ["1", "2", "3"]


DAMAGES = {
    "text for a number": ("trials", "0.3,", "0.3?,", r"line 2 has '0\.3\?' for error_rate"),
    "a lost field": ("trials", "completed,", "", "line 2 has 27 fields, expected 28"),
    "another status": ("trials", "completed", "complete", "line 2 has 'complete' for status"),
    "a setting renamed": ("trials", ",lr_max,", ",lr_mix,", "line 1 has no column lr_max"),
    "a metric renamed": ("trials", ",epochs_done,", ",epochs-done,", "line 1 has no column epochs_done"),
    "text for an epoch": ("epochs", ",1,frozen", ",one,frozen", "line 2 has 'one' for epoch"),
    "no trial": ("epochs", "trial_id", "trial", "line 1 has no column trial_id"),
    "half a time": ("epochs", "T", "", "for finished_at, expected a time"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_table_is_told_with_its_line_before_a_search_goes_on(table, folder, damage):
    name, old, new, message = DAMAGES[damage]
    complete(table, "a", 0.3)
    check_tables(folder, DIMENSIONS)
    path = getattr(folder, name)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError, match=f"{name}.csv is damaged: .*{message}.*Repair that line") as caught:
        check_tables(folder, DIMENSIONS)
    assert "\n" not in str(caught.value)


def test_without_a_damaged_row_the_search_goes_on_and_gives_its_number_to_no_other_trial(table, folder):
    for trial_id, error in (("a", 0.3), ("b", 0.2)):
        complete(table, trial_id, error)
    lines = folder.trials.read_text().splitlines(keepends=True)
    folder.trials.write_text("".join(lines[:2]))
    complete(made(folder), "c", 0.1)
    assert [(row["number"], row["trial_id"]) for row in read_trials(folder.trials)] == [(0, "ta"), (2, "tc")]


def test_an_epoch_that_is_trained_again_has_one_row_the_last(table, folder):
    trial = FakeTrial("abc")
    run_epochs(table, trial, 0.9, 0.8)
    run_epochs(table, FakeTrial("other"), 0.7)
    run_epochs(table, trial, 0.85, 0.1, first=2)
    rows = [(row["trial_id"], row["epoch"], row["error_rate"]) for row in read_rows(folder.epochs)]
    assert sorted(rows) == [("tabc", "1", "0.9"), ("tabc", "2", "0.85"), ("tabc", "3", "0.1"), ("tother", "1", "0.7")]
    assert read_trials(folder.trials)[0]["seconds"] == 7.5  # three epochs of 2.5


def test_rows_doubled_by_hand_or_by_a_kill_are_one_when_the_search_goes_on(table, folder):
    run_epochs(table, FakeTrial("abc"), 0.9, 0.8)
    lines = folder.epochs.read_text().splitlines(keepends=True)
    folder.epochs.write_text("".join([*lines, lines[2].replace("0.8,", "0.75,")]))
    made(folder)
    assert [(row["epoch"], row["error_rate"]) for row in read_rows(folder.epochs)] == [("1", "0.9"), ("2", "0.75")]


def test_a_search_that_goes_on_keeps_its_rows_and_numbers(table, folder):
    complete(table, "a", 0.2)
    fail(table, "b")
    running = FakeTrial("c")
    run_epochs(table, running, 0.9)
    before = folder.trials.read_text()
    later = made(folder)
    assert folder.trials.read_text() == before
    run_epochs(later, running, 0.5, 0.4, first=2)
    later.on_trial_complete(0, [], running)
    complete(later, "d", 0.3)
    rows = read_trials(folder.trials)
    assert [(row["number"], row["status"]) for row in rows] == [
        (0, COMPLETED), (1, FAILED), (2, COMPLETED), (3, COMPLETED)
    ]  # fmt: skip
    assert rows[2]["seconds"] == 7.5


def test_the_first_completed_trial_is_the_best_at_once(table, folder):
    complete(table, "a", 0.2, lr_max=0.004)
    weights, recipe, metrics, labels = best(folder)
    assert (weights, labels) == (b"a", ["cat", "dog"])
    assert Recipe.from_dict(recipe) == Recipe.from_dict(SETTINGS | {"lr_max": 0.004})
    assert (metrics["trial_id"], metrics["error_rate"], metrics["status"]) == ("ta", 0.2, COMPLETED)


def test_best_changes_for_a_better_trial_only(table, folder):
    for trial_id, error_rate, valid_loss, expected in [
        ("a", 0.2, 0.5, b"a"),
        ("b", 0.3, 0.1, b"a"),
        ("c", 0.2, 0.6, b"a"),
        ("d", 0.2, 0.4, b"d"),
        ("e", 0.1, 0.9, b"e"),
        ("f", 0.1, 0.9, b"e"),
    ]:
        complete(table, trial_id, error_rate, valid_loss=valid_loss)
        assert best(folder)[0] == expected
    assert leaders(table.rows.values())[0]["trial_id"] == best(folder)[2]["trial_id"] == "te"


def test_the_error_to_expect_decides_where_it_is_known(table, folder):
    for trial_id, error_rate, expected, winner in [
        ("a", 0.10, 0.2, b"a"),
        ("b", 0.15, 0.1, b"b"),
        ("c", 0.05, 0.1, b"c"),  # as good, and better on the validation images
        ("d", 0.07, math.nan, b"d"),
        ("e", 0.01, 0.08, b"d"),
    ]:
        complete(table, trial_id, error_rate, expected=expected)
        assert best(folder)[0] == winner
    rows = read_trials(folder.trials)
    assert [row["trial_id"] for row in leaders(rows)] == ["td", "te", "tc", "tb", "ta"]
    assert [row["expected_error_rate"] for row in rows[:3]] == [0.2, 0.1, 0.1]
    assert read_epochs(folder.epochs)[2]["expected_error_rate"] == 0.2


def test_the_mean_of_the_retrainings_is_of_errors_to_expect(folder):
    table = made(folder, confirm=1)
    first = complete(table, "a", 0.1, expected=0.2)
    for number in range(3):
        retrain(table, number, first, 0.1, [], expected=0.3)
    assert read_trials(folder.trials)[0]["confirmed_error_rate"] == pytest.approx(0.3)


def test_a_trial_that_was_stopped_or_failed_is_never_the_best(table, folder):
    complete(table, "a", 0.5)
    stopped = FakeTrial("b")
    folder.rungs.write_text(json.dumps({"reasons": {"b": "error_rate 0.1 above the cut-off"}}))
    run_epochs(table, stopped, 0.1, 0.1)
    table.on_trial_complete(0, [], stopped)
    failed = FakeTrial("c")
    run_epochs(table, failed, 0.1, 0.1)
    table.on_trial_result(0, [], failed, {"failure": "diverged", "error_rate": math.nan})
    table.on_trial_complete(0, [], failed)
    assert best(folder)[0] == b"a"


def test_the_best_of_before_is_known_when_the_search_goes_on(table, folder):
    complete(table, "a", 0.2)
    later = made(folder)
    complete(later, "b", 0.3)
    assert best(folder)[0] == b"a"
    complete(later, "c", 0.1)
    assert best(folder)[0] == b"c"


@pytest.mark.parametrize("asked", [True, False])
def test_trial_0_is_kept_beside_the_winner_only_for_a_test(folder, asked):
    table = made(folder, keep_first=asked)
    complete(table, "a", 0.5)
    complete(table, "b", 0.1)
    kept = {model: (table.folder.path / model / "model.safetensors") for model in ("first", "best")}
    assert kept["best"].read_bytes() == b"b"
    assert kept["first"].is_file() == asked
    if asked:
        assert kept["first"].read_bytes() == b"a"
        assert json.loads((table.folder.first / "metrics.json").read_text())["number"] == 0


def test_a_trial_0_that_failed_leaves_no_weights(folder):
    table = made(folder, keep_first=True)
    fail(table, "a")
    complete(table, "b", 0.1)
    assert not table.folder.first.exists() and table.folder.best.is_dir()


def test_best_keeps_numbers_as_numbers_after_a_restart(table, folder):
    trial = FakeTrial("a", lr_max=0.004)
    run_epochs(table, trial, 0.9)
    later = made(folder)
    run_epochs(later, trial, 0.8, 0.1, first=2)
    assert best(folder)[2]["lr_max"] == 0.004


def test_an_ended_trials_state_leaves_the_disk(table, folder):
    trial = complete(table, "a", 0.2)
    left = checkpoint.newest(folder.checkpoints / table_id(trial))
    assert names(left) == [checkpoint.ENDED_FILE, PREPROCESSING_FILE, checkpoint.RESULT_FILE]
    assert best(folder)[0] == b"a"


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    folder = tmp_path / "best"
    replace_folder(folder, lambda path: (path / "one").touch())

    def break_off(path) -> None:
        (path / "half").touch()
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        replace_folder(folder, break_off)
    assert names(folder) == ["one"]
    replace_folder(folder, lambda path: (path / "two").touch())
    assert names(folder) == ["two"]
    assert names(tmp_path) == ["best"]


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_failures_count_from_the_last_success(table):
    assert table.consecutive_failures == 0
    fail(table, "a")
    complete(table, "b", 0.1)
    for i in range(3):
        fail(table, f"c{i}")
    table.on_trial_start(0, [], FakeTrial("running"))
    assert table.consecutive_failures == 3
    complete(table, "d", 0.1)
    assert table.consecutive_failures == 0


def test_so_many_failures_in_a_row_end_the_search(table):
    stopper = TooManyFailures(table, 3)
    for i in range(3):
        assert not stopper.stop_all()
        fail(table, f"a{i}")
        assert not stopper(f"a{i}", {})
    assert stopper.stop_all()


def test_failures_of_before_do_not_end_a_search_that_goes_on(table, folder):
    """Who resumes after five failures has mended what was wrong."""
    for i in range(5):
        fail(table, f"a{i}")
    later = made(folder)
    assert later.consecutive_failures == 0
    fail(later, "b")
    assert later.consecutive_failures == 1


def test_trial_ids_in_the_table_cannot_be_taken_for_numbers():
    assert table_id(FakeTrial("00876659")) == "t00876659"


def test_a_trial_that_tune_forgot_in_a_kill_leaves_no_row(table, folder):
    complete(table, "a", 0.2)
    kept, forgotten = FakeTrial("b"), FakeTrial("c")
    run_epochs(table, kept, 0.5)
    run_epochs(table, forgotten, 0.5)
    later = made(folder)
    later.on_step_begin(0, [kept])
    assert [row["trial_id"] for row in read_trials(folder.trials)] == ["ta", "tb"]
    assert {row["trial_id"] for row in read_rows(folder.epochs)} == {"ta", "tb"}


# --- A kill between the table's write and Tune's next save ------------------------------------------------------------


def repeat(table, trial: FakeTrial, last: dict) -> None:
    """What Tune does with a trial of which it did not save the end: it says its last result once more."""
    again = FakeTrial(trial.trial_id, **trial.config)
    table.on_trial_start(0, [], again)
    table.on_trial_result(0, [], again, last)
    table.on_trial_complete(0, [], again)


def test_a_stopped_trial_stays_stopped_when_a_kill_comes_before_the_next_save(table, folder):
    folder.rungs.write_text(json.dumps({"reasons": dict.fromkeys("abcde", "error_rate 0.8 above the cut-off")}))
    trials = [FakeTrial(name) for name in "abcde"]
    for trial in trials:
        run_epochs(table, trial, 0.9, 0.8)
        table.on_trial_complete(0, [], trial)
    before = folder.trials.read_text()
    assert "above the cut-off" in before
    later = made(folder)
    for trial in trials:
        repeat(later, trial, result(2, 0.8))
    assert folder.trials.read_text() == before
    assert {row["status"] for row in later.rows.values()} == {STOPPED}
    assert later.consecutive_failures == 0


def test_failures_that_are_said_once_more_are_not_failures_of_this_start(table, folder):
    trials = [fail(table, f"a{i}") for i in range(5)]
    lost = FakeTrial("lost")
    run_epochs(table, lost, 0.1)
    table.on_trial_error(0, [], lost)
    before = folder.trials.read_text()
    later = made(folder)
    for trial in trials:
        repeat(later, trial, {"failure": "diverged", "error_rate": math.nan, "done": True})
    repeat(later, lost, result(1, 0.1))  # the last epoch that it finished
    assert folder.trials.read_text() == before and later.consecutive_failures == 0
    fail(later, "b")
    assert later.consecutive_failures == 1


def test_a_winner_that_says_its_result_once_more_keeps_its_weights_while_others_end(table, folder):
    table = made(folder, keep=1)
    winner, other = complete(table, "a", 0.1), complete(table, "b", 0.2)
    later = made(folder, keep=1)
    again = FakeTrial("a")
    later.on_trial_start(0, [], again)
    repeat(later, other, result(3, 0.2))  # its end renews what is kept
    later.on_trial_result(0, [], again, result(3, 0.1))
    later.on_trial_complete(0, [], winner)
    assert best(folder)[0] == b"a" and kept(folder) == {"0": b"a"}


def test_a_trial_whose_files_were_lost_with_its_end_begins_anew(table, folder):
    trial = complete(table, "a", 0.1)
    later = made(folder)
    later.on_trial_start(0, [], trial)
    run_epochs(later, trial, 0.9)
    [row] = read_trials(folder.trials)
    assert (row["status"], row["epochs_done"], row["reason"]) == (RUNNING, 1, "")
    run_epochs(later, trial, 0.8, 0.3, first=2)
    later.on_trial_complete(0, [], trial)
    [row] = read_trials(folder.trials)
    assert (row["status"], row["error_rate"]) == (COMPLETED, 0.3)


# --- The best once more, and the front --------------------------------------------------------------------------------


def retrain(table, number: int, original: FakeTrial, error_rate: float, trials: list, **more) -> None:
    trial = FakeTrial(f"again{number}", seed=number, retrains=table_id(original), **original.config)
    run_epochs(table, trial, 0.9, 0.8, error_rate, **more)
    table.on_trial_complete(0, trials, trial)


def test_the_mean_of_the_retrainings_decides_who_has_won(folder):
    table = made(folder, confirm=2)
    lucky, steady, _ = trials = [complete(table, name, e) for name, e in (("a", 0.1), ("b", 0.2), ("c", 0.5))]
    assert [row["number"] for row in leaders(read_trials(folder.trials))] == [0, 1, 2]
    assert best(folder)[0] == b"a"
    for number, error in enumerate((0.3, 0.4, 0.2)):
        retrain(table, number, lucky, error, trials)
    assert best(folder)[0] == b"a"
    for number, error in enumerate((0.2, 0.2, 0.2), start=3):
        retrain(table, number, steady, error, trials)
    rows = read_trials(folder.trials)
    assert [row["confirmed_error_rate"] for row in rows[:2]] == pytest.approx([0.3, 0.2])
    assert [(row["retrains"], row["seed"]) for row in rows[3:]] == list(
        zip([0, 0, 0, 1, 1, 1], [str(number) for number in range(6)], strict=True)
    )
    assert {row["status"] for row in rows[3:]} == {RETRAINED}
    assert [row["number"] for row in leaders(rows)] == [1, 0, 2]
    weights, _, metrics, _ = best(folder)
    assert (weights, metrics["trial_id"], metrics["error_rate"]) == (b"b", "tb", 0.2)


def test_a_probe_needs_no_retraining_to_beat_what_was_trained_again(folder):
    table = made(folder, confirm=1)
    probed(table, "p", 0.25)
    lucky = complete(table, "a", 0.1)
    assert best(folder)[0] == b"a"
    for number in range(3):
        retrain(table, number, lucky, 0.3, [])
    rows = leaders(read_trials(folder.trials))
    assert [(row["number"], row["confirmed_error_rate"]) for row in rows] == [(-2, 0.25), (0, pytest.approx(0.3))]
    assert best(folder)[0] == b"p"


def kept(folder) -> dict[str, bytes]:
    return {model.name: (model / WEIGHTS_FILE).read_bytes() for model in folder.models.iterdir()}


@pytest.mark.parametrize("options", [{"keep": 2}, {"confirm": 2}, {"keep": 1, "confirm": 2}])
def test_the_best_trials_keep_their_models_and_others_none(folder, options):
    table = made(folder, **options)
    for name, error in (("a", 0.3), ("b", 0.4), ("c", 0.1), ("d", 0.5), ("e", 0.2)):
        complete(table, name, error)
    assert kept(folder) == {"2": b"c", "4": b"e"}
    assert not list(folder.checkpoints.glob(f"*/*/{WEIGHTS_FILE}"))
    metrics = json.loads((folder.models / "4" / "metrics.json").read_text())
    assert (metrics["trial_id"], metrics["error_rate"]) == ("te", 0.2)
    later = made(folder, **options)
    complete(later, "f", 0.15)
    assert kept(folder) == {"2": b"c", "5": b"f"}


def test_a_search_that_goes_on_with_a_smaller_keep_keeps_fewer_models_at_once(folder):
    table = made(folder, keep=3)
    for name, error in (("a", 0.3), ("b", 0.1), ("c", 0.2)):
        complete(table, name, error)
    made(folder, keep=3)
    assert set(kept(folder)) == {"0", "1", "2"}
    made(folder, keep=1)
    assert kept(folder) == {"1": b"b"} and best(folder)[0] == b"b"


def test_a_models_bytes_are_on_the_disk_once(folder):
    table = made(folder, keep=2, keep_first=True)
    complete(table, "a", 0.2)
    places = [place / WEIGHTS_FILE for place in (folder.best, folder.first, folder.models / "0")]
    assert len({place.stat().st_ino for place in places}) == 1


def test_where_files_cannot_have_two_names_they_are_copied(folder, monkeypatch):
    def refuse(*args, **kwargs) -> None:
        raise OSError("Operation not permitted")

    monkeypatch.setattr("search.runs.atomic_files.os.link", refuse)
    complete(made(folder, keep=1), "a", 0.2)
    assert kept(folder) == {"0": b"a"} and best(folder)[0] == b"a"


def test_what_an_extended_search_is_to_confirm_next_keeps_its_weights(folder):
    """Those that were confirmed go first, whatever their error."""
    table = made(folder, keep=1, confirm=2)
    trials = [complete(table, name, error) for name, error in (("a", 0.2), ("b", 0.3))]
    for number in range(6):
        retrain(table, number, trials[number // 3], 0.4, trials)
    later = made(folder, keep=1, confirm=2)
    for name, error in (("c", 0.1), ("d", 0.15), ("e", 0.5)):
        trials.append(complete(later, name, error))
    assert best(folder)[0] == b"a" and kept(folder) == {"0": b"a", "8": b"c", "9": b"d"}
    for number in range(6, 9):
        retrain(later, number, trials[2], 0.05, trials)
    assert best(folder)[0] == b"c" and "8" in kept(folder)


def test_a_search_that_goes_on_knows_the_retrainings_of_before(folder):
    table = made(folder, confirm=1)
    trial = complete(table, "a", 0.1)
    for number in range(2):
        retrain(table, number, trial, 0.2, [trial])
    later = made(folder, confirm=1)
    later.on_step_begin(0, [trial])
    retrain(later, 2, trial, 0.5, [trial])
    assert read_trials(folder.trials)[0]["confirmed_error_rate"] == pytest.approx(0.3)


def test_a_retraining_that_failed_leaves_its_trial_unconfirmed(folder):
    table = made(folder, confirm=1)
    trial = complete(table, "a", 0.1)
    for number in range(2):
        retrain(table, number, trial, 0.2, [trial])
    diverged = FakeTrial("again2", retrains=table_id(trial))
    table.on_trial_result(0, [trial], diverged, {"failure": "diverged", "error_rate": math.nan, "done": True})
    table.on_trial_complete(0, [trial], diverged)
    rows = read_trials(folder.trials)
    assert math.isnan(rows[0]["confirmed_error_rate"]) and rows[-1]["status"] == FAILED


def test_the_front_holds_what_no_other_trial_beats_in_error_and_seconds(folder):
    table = made(folder, front=True)

    def marked() -> list[int]:
        return [row["number"] for row in read_trials(folder.trials) if row["front"] == "yes"]

    for name, error, seconds in (("a", 0.3, 20.0), ("b", 0.2, 40.0), ("c", 0.25, 50.0), ("d", 0.1, 90.0)):
        trial = FakeTrial(name)
        run_epochs(table, trial, 0.9, 0.8)
        table.on_trial_result(0, [], trial, result(3, error) | {"seconds": seconds})
        table.on_trial_complete(0, [], trial)
    assert marked() == [0, 1, 3]
    complete(table, "e", 0.15)  # 7.5 s
    assert marked() == [3, 4]


# --- Another metric than the error rate -------------------------------------------------------------------------------


def by_f1(folder, **more) -> ResultsTable:
    """A table whose better trial by macro F1 is the worse one by error rate."""
    table = made(folder, metric="macro_f1", keep=2, **more)
    for trial_id, error, value in (("a", 0.1, 0.6), ("b", 0.2, 0.3)):
        trial = FakeTrial(trial_id)
        table.on_trial_start(0, [], trial)
        for epoch in (1, 2, 3):
            outcome = result(epoch, error) | {"macro_f1": 1 - value, "objective": value}
            files = {WEIGHTS_FILE: trial_id.encode(), PREPROCESSING_FILE: b"{}", TRAINING_FILE: b"moments"}
            checkpoint.save(table.folder.checkpoints / table_id(trial), epoch, files, outcome)
            table.on_trial_result(0, [], trial, outcome)
        table.on_trial_complete(0, [], trial)
    return table


def test_the_metric_of_the_search_decides_which_trial_is_the_best(folder):
    by_f1(folder)
    assert [row["trial_id"] for row in leaders(read_trials(folder.trials))] == ["tb", "ta"]
    assert best(folder)[0] == b"b"
    assert [row["objective"] for row in read_trials(folder.trials)] == [0.6, 0.3]
    assert [float(row["objective"]) for row in read_rows(folder.epochs)] == [0.6] * 3 + [0.3] * 3


def test_a_table_of_another_metric_is_read_again_as_it_was(folder):
    by_f1(folder)
    before = folder.trials.read_text(), folder.epochs.read_text()
    made(folder, metric="macro_f1", keep=2)
    assert (folder.trials.read_text(), folder.epochs.read_text()) == before


def test_retrainings_confirm_the_metric_of_the_search(folder):
    table = by_f1(folder, confirm=1)
    for seed, value in enumerate((0.2, 0.3, 0.4), 1):
        trial = FakeTrial(f"again{seed}", retrains="tb", seed=seed)
        table.on_trial_start(0, [], trial)
        for epoch in (1, 2, 3):
            table.on_trial_result(0, [], trial, result(epoch, 0.2) | {"macro_f1": 1 - value, "objective": value})
        table.on_trial_complete(0, [], trial)
    assert read_trials(folder.trials)[1]["confirmed_objective"] == pytest.approx(0.3)
    assert "confirmed_error_rate" not in folder.trials.read_text()


# --- The winner again, on all images ----------------------------------------------------------------------------------


def refitted(table, winner: str, error_rate: float, *, epochs: int = 3) -> None:
    """Train the winner again, and tell all who listen."""
    trial = FakeTrial("again", refits=winner)
    listeners = (table, Refit(table))
    for listener in listeners:
        listener.on_trial_start(0, [], trial)
    for epoch in range(1, epochs + 1):
        outcome = result(epoch, error_rate) | {"train_images": 100}
        files = {WEIGHTS_FILE: b"of all images", PREPROCESSING_FILE: b"{}", TRAINING_FILE: b"moments"}
        checkpoint.save(table.folder.checkpoints / table_id(trial), epoch, files, outcome)
        for listener in listeners:
            listener.on_trial_result(0, [], trial, outcome)
    for listener in listeners:
        listener.on_trial_complete(0, [], trial)


def test_the_best_model_is_the_winner_trained_again_on_all_images(table, folder):
    complete(table, "a", 0.3)
    complete(table, "b", 0.2)
    before = folder.trials.read_text(), folder.epochs.read_text()
    refitted(table, "tb", 0.1)
    weights, recipe, metrics, labels = best(folder)
    assert weights == b"of all images"
    assert (metrics["number"], metrics["error_rate"], labels) == (1, 0.2, ["cat", "dog"])
    assert metrics["refit"] == {"train_images": 100, "error_rate": 0.1}
    assert recipe["arch"] == "resnet18"
    assert (folder.trials.read_text(), folder.epochs.read_text()) == before
    assert (folder.validated / WEIGHTS_FILE).read_bytes() == b"b"
    assert not list(folder.checkpoints.glob(f"*/*/{WEIGHTS_FILE}"))


def test_a_refit_that_knows_the_validation_images_less_well_than_the_winner_is_not_delivered(table, folder):
    complete(table, "a", 0.2)
    for error in (0.21, math.nan):
        refitted(table, "ta", error)
        assert best(folder)[0] == b"a" and "refit" not in best(folder)[2]


def test_a_refit_that_a_time_budget_has_ended_is_not_delivered(table, folder):
    complete(table, "a", 0.2)
    refitted(table, "ta", 0.1, epochs=2)
    assert best(folder)[0] == b"a"


def test_a_better_trial_of_an_extended_search_takes_the_place_of_an_earlier_winners_refit(table, folder):
    complete(table, "a", 0.3)
    refitted(table, "ta", 0.1)
    complete(table, "c", 0.4)
    assert best(folder)[0] == b"of all images"
    complete(table, "b", 0.2)
    assert best(folder)[0] == b"b" and "refit" not in best(folder)[2]
    assert folder.validated == folder.models / "2"


def test_an_unfinished_winner_is_not_trained_again(table):
    assert winner_to_refit(table) is None
    complete(table, "a", 0.3)
    assert winner_to_refit(table)["trial_id"] == "ta"
    table.rows["ta"]["status"] = UNFINISHED
    assert winner_to_refit(table) is None


def test_a_refit_is_averaged_with_the_kept_trials_of_the_same_network(folder):
    table = made(folder, keep=3)
    complete(table, "a", 0.4)
    complete(table, "b", 0.2)
    complete(table, "c", 0.3, arch="resnet34")
    complete(table, "d", 0.25)
    assert winner_to_refit(table)["averages"] == [1, 3]


def test_in_folds_a_trial_is_ranked_by_the_mean_over_all_of_them(folder):
    table = made(folder, confirm=2, folds=3, keep=2)
    complete(table, "a", 0.1, expected=0.15)
    complete(table, "b", 0.2)
    for trial_id, errors in (("ta", (0.3, 0.5)), ("tb", (0.2, 0.2))):
        for fold, error in enumerate(errors, 1):
            trial = FakeTrial(f"{trial_id}{fold}", retrains=trial_id, fold=fold)
            table.on_trial_start(0, [], trial)
            run_epochs(table, trial, 0.9, 0.8, error)
            table.on_trial_complete(0, [], trial)
    rows = read_trials(folder.trials)
    assert [row["confirmed_error_rate"] for row in rows[:2]] == pytest.approx([0.3, 0.2])
    assert [(row["retrains"], row["fold"]) for row in rows[2:]] == [(0, 1), (0, 2), (1, 1), (1, 2)]
    assert [row["trial_id"] for row in leaders(rows)] == ["tb", "ta"]
    assert best(folder)[0] == b"b"


# --- A long table -----------------------------------------------------------------------------------------------------


@pytest.fixture
def long(folder, monkeypatch):
    """A table that is long from its second row on, and is not written again by itself."""
    monkeypatch.setattr(table_files, "AT_ONCE", 1)
    monkeypatch.setattr(table_files, "WRITE_SECONDS", 1e6)
    table = made(folder)
    complete(table, "first", 0.5)
    return table


def test_a_long_table_is_written_from_time_to_time_and_before_tune_saves_its_state(long, folder):
    running = FakeTrial("a")
    long.on_trial_start(0, [], running)
    run_epochs(long, running, 0.9)
    long.on_step_end(0, [])
    assert [row["trial_id"] for row in read_trials(folder.trials)] == ["tfirst"]
    long.trials.written_at -= 2e6
    long.on_step_end(0, [])
    assert [row["epochs_done"] for row in read_trials(folder.trials)] == [3, 1]
    complete(long, "b", 0.1)
    long.get_state()
    assert [row["status"] for row in read_trials(folder.trials)] == [COMPLETED, RUNNING, COMPLETED]
    complete(long, "c", 0.2)
    long.on_experiment_end([])
    assert read_trials(folder.trials)[-1]["status"] == COMPLETED


def test_a_kill_before_a_long_table_is_written_loses_no_trial_that_has_ended(long, folder):
    """Tune's state does not have the end either: its trial says its last result once more, from what is on the disk."""
    running = FakeTrial("a")
    long.on_trial_start(0, [], running)
    long.flush()
    run_epochs(long, running, 0.9, 0.8, 0.1)
    long.on_trial_complete(0, [], running)
    assert read_trials(folder.trials)[-1]["status"] == RUNNING
    assert checkpoint.newest(folder.checkpoints / "ta") is not None
    later = made(folder)
    later.on_step_begin(0, [running])
    repeat(later, running, result(3, 0.1))
    later.flush()
    row = read_trials(folder.trials)[-1]
    assert (row["status"], row["error_rate"], row["number"]) == (COMPLETED, 0.1, 1)
    assert not list(folder.checkpoints.rglob(TRAINING_FILE)) and best(folder)[0] == b"a"
    epochs = [row["epoch"] for row in read_rows(folder.epochs) if row["trial_id"] == "ta"]
    assert epochs == ["1", "2", "3"]


def test_epochs_of_ended_trials_stay_on_the_disk_and_leave_the_memory(table, folder):
    for name in "abc":
        complete(table, name, 0.5)
    assert table.epochs.rows == {} and len(read_rows(folder.epochs)) == 9
    later = made(folder)
    assert later.epochs.rows == {}
    complete(later, "d", 0.5)
    assert read_trials(folder.trials)[-1]["number"] == 3
