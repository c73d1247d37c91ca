"""What a notebook gets of a run: typed tables, the winner with its interval, the study, errors in words."""

import json
import math
import random

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

import search
from search.runs.result_rows import leaders, read_trials

TRIALS = """number,trial_id,status,error_rate,tta_error_rate,valid_loss,epochs_done,epochs_total,arch,head,reason
0,t1e5,completed,0.3,,1.1,3,3,none,crop,
1,t976e1612,stopped early,0.5,,1.5,2,3,resnet18,pad,"error_rate 0.5 above, the cut-off"
2,tffff,completed,0.2,0.1,0.9,3,3,resnet18,crop,
3,taaaa,completed,0.2,,0.8,3,3,resnet18,crop,
4,tbbbb,running,,,,0,3,resnet18,crop,
"""
EPOCHS = """number,trial_id,epoch,stage,error_rate,train_images,valid_images
0,t1e5,1,frozen,0.4,80,20
0,t1e5,2,unfrozen,0.3,80,20
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "command.json").write_text(json.dumps({"data": "/images", "split_seed": 0}))
    (tmp_path / "space.json").write_text(json.dumps({"name": "pets", "dimensions": {"arch": "none, resnet18"}}))
    (tmp_path / "trials.csv").write_text(TRIALS)
    (tmp_path / "epochs.csv").write_text(EPOCHS)
    return tmp_path


def test_the_tables_are_frames_with_a_row_a_trial_and_a_row_an_epoch(folder):
    run = search.load(folder)
    assert list(run.trials.index) == [0, 1, 2, 3, 4]
    assert run.trials["arch"][0] == "none"  # a value, not a missing one
    assert list(run.trials["trial_id"][:2]) == ["t1e5", "t976e1612"]
    assert run.trials["reason"][0] == "" and "cut-off" in run.trials["reason"][1]
    assert math.isnan(run.trials["error_rate"][4])
    assert run.epochs["error_rate"].tolist() == [0.4, 0.3]
    assert run.dimensions == ["arch"]


def test_the_winner_has_the_lowest_error_and_among_equals_the_lowest_loss(folder):
    run = search.load(folder)
    assert run.completed.index.tolist() == [3, 2, 0]
    assert run.best.name == 3
    assert run.first.name == 0


def test_the_winner_of_a_frame_is_that_of_the_table(folder):
    """However errors, expected ones and means of retrainings are mixed."""
    draws = random.Random(0)
    rows = []
    for number in range(40):
        cells = [f"{draws.choice(('', round(draws.random(), 1)))}" for _ in range(2)]
        rows.append(f"{number},t{number},completed,{draws.random():.1f},,{draws.random():.1f},3,3,{','.join(cells)}\n")
    head = "number,trial_id,status,error_rate,best_error_rate,valid_loss,epochs_done,epochs_total"
    (folder / "trials.csv").write_text(f"{head},expected_error_rate,confirmed_error_rate\n" + "".join(rows))
    expected = [row["number"] for row in leaders(read_trials(folder / "trials.csv"))]
    assert search.load(folder).completed.index.tolist() == expected


def test_probes_and_what_was_fine_tuned_are_told_apart_and_an_unfinished_trial_can_win(folder):
    kinds = TRIALS.replace("trial_id,status", "trial_id,kind,status").replace("completed", "trial,completed")
    kinds = kinds.replace("stopped early", "trial,stopped early").replace("running,,,,0", "trial,unfinished,0.1,,0.5,1")
    probes = "-2,p0,probe,completed,0.25,,1.0,0,0,resnet18,crop,\n-1,p1,probe,failed,,,,0,0,none,crop,out of memory\n"
    (folder / "trials.csv").write_text(kinds + probes)
    run = search.load(folder)
    assert run.probe.name == -2 and run.best.name == 4 and run.first.name == 0
    assert run.tuned.index.tolist() == [4, 3, 2, 0] and run.whole.index.tolist() == [3, 2, 0]
    assert run.completed.index.tolist() == [4, 3, 2, -2, 0]


def test_a_run_of_an_earlier_version_has_no_probe(folder):
    run = search.load(folder)
    assert run.probe is None and run.fine_tuning == "" and run.tuned.index.tolist() == [3, 2, 0]


def test_a_row_that_is_being_written_is_not_there_yet(folder):
    change(folder / "epochs.csv", ",0.3,80,20\n", ",0.")
    assert search.load(folder).epochs["error_rate"].tolist() == [0.4]


def test_an_error_comes_with_its_interval(folder):
    run = search.load(folder)
    assert (run.num_train, run.num_valid) == (80, 20)
    assert run.interval(run.best) == pytest.approx((0.0807, 0.4160), abs=1e-4)  # 4 of 20, by R's prop.test
    assert run.interval(run.trials.loc[4]) is None


def test_before_a_trial_has_completed_there_is_no_winner(folder):
    (folder / "trials.csv").write_text("\n".join(TRIALS.splitlines()[::5]) + "\n")  # the head and the running trial
    (folder / "epochs.csv").write_text(EPOCHS.splitlines()[0] + "\n")
    run = search.load(folder)
    assert run.best is None and run.first is None and run.best_recipe is None
    assert run.labels == [] and run.num_valid is None


def test_the_study_is_the_one_in_the_journal(folder):
    with pytest.raises(ValueError, match="has no study yet"):
        _ = search.load(folder).study
    assert not (folder / "study.journal").exists()
    storage = JournalStorage(JournalFileBackend(str(folder / "study.journal")))
    study = optuna.create_study(storage=storage, study_name="pets")
    study.add_trial(optuna.trial.create_trial(value=0.25))
    assert [trial.value for trial in search.load(folder).study.trials] == [0.25]


def change(path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("break_it", "expected"),
    [
        (lambda folder: (folder / "command.json").unlink(), "is no run: it has no command.json"),
        (lambda folder: (folder / "trials.csv").unlink(), "first trial has not started"),
        (lambda folder: (folder / "trials.csv").write_bytes(b"\xff\xfe\x00"), "is damaged"),
        (lambda folder: (folder / "trials.csv").write_text("a,b\n1,2\n"), "no column number"),
        (lambda folder: (folder / "trials.csv").write_bytes(b""), "trials.csv is damaged: line 1 is empty"),
        (lambda folder: change(folder / "trials.csv", "0.3", "0.3.1"), r"line 2 has '0\.3\.1' for error_rate"),
        (lambda folder: change(folder / "trials.csv", "2,tffff", "0,tffff"), "line 4 has number 0, as a line above"),
        (lambda folder: change(folder / "trials.csv", ",none,", ",no,ne,"), "line 2 has 12 fields, expected 11"),
        (lambda folder: change(folder / "trials.csv", "status", "state"), "no column status"),
        (lambda folder: change(folder / "epochs.csv", ",20\n", ",twenty\n"), "line 2 has 'twenty' for valid_images"),
        (lambda folder: (folder / "space.json").write_text("[]"), "is damaged"),
    ],
)
def test_what_is_missing_or_damaged_is_named(folder, break_it, expected):
    break_it(folder)
    with pytest.raises(ValueError, match=expected):
        search.load(folder)
