"""Whole searches on a real Ray, with a tiny network on tiny images: their end, their interruption, their losses.

One search that nothing happens to, and others that end with its tables. Nearly all start a Ray of their own, which is
what takes the time here.
"""

import json
import os
import re
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
from object_store import s3_server
from optuna.trial import TrialState
from processes import descendants, left_after, listening_addresses, stopped
from searches import EPOCH_TIMES, SMALL, TIMES, Search, completed, small_search, tables, without
from tiny_run import draw_images

from search.runs.remote_run import RemoteRun
from search.runs.run_record import load
from search.runs.rungs_file import RungsFile
from search.spaces.space import load_space
from search.tuning.searcher import FORGOTTEN

pytestmark = pytest.mark.ray

NUM_TRIALS = 6


@pytest.fixture(scope="module")
def class_folders(tmp_path_factory) -> Path:
    return draw_images(tmp_path_factory.mktemp("search") / "data", each=20)


@pytest.fixture(scope="module")
def undisturbed(class_folders, search_cache, tmp_path_factory) -> Search:
    """A search from start to end, and which of its processes had torch in memory."""
    folder = tmp_path_factory.mktemp("results") / "undisturbed"
    with pytest.MonkeyPatch.context() as patch:  # no obstacle: a temporary folder whose path is too long for sockets
        (folder.parent / ("temporary" * 12)).mkdir()
        patch.setenv("TMPDIR", str(folder.parent / ("temporary" * 12)))
        search = small_search(folder, class_folders, "--trials", NUM_TRIALS, "--report", "full")
    search.wait_for("trial 1 .*epoch 1/")
    titles = {"trial actor": "ray::(FineTuneTrial|ResourceTrainable)", "worker": "ray::RayTrainWorker"}
    search.has_torch = {name: [maps_torch(pid) for pid in search.processes(title)] for name, title in titles.items()}
    search.has_torch["driver"] = [maps_torch(search.process.pid)]
    search.listens_on = listening_addresses([search.process.pid, *descendants(search.process.pid)])
    search.code = search.wait()
    return search


def test_a_search_ends_well_and_says_what_it_found(undisturbed):
    assert undisturbed.code == 0, undisturbed.text
    best = min(completed(undisturbed.folder), key=lambda row: (float(row["error_rate"]), float(row["valid_loss"])))
    text = undisturbed.text
    assert re.search(r"trial +status +epochs +error +loss +seconds +recipe", text)
    assert f"best: trial {best['number']} with {100 * float(best['error_rate']):.1f} % validation error" in text
    assert f"{NUM_TRIALS} trials in " in text
    for part in (undisturbed.folder / "trials.csv", undisturbed.folder / "best", "python -m search.export"):
        assert str(part) in text
    assert "Traceback" not in text


def test_a_search_leaves_its_report_with_the_errors_of_the_winner(undisturbed):
    best = min(completed(undisturbed.folder), key=lambda row: (float(row["error_rate"]), float(row["valid_loss"])))
    assert f"labelling the validation images with trial {best['number']} for the report" in undisturbed.text
    assert f"report: {undisturbed.folder}/report.html" in undisturbed.text
    page = (undisturbed.folder / "report.html").read_text()
    assert f"The winner: trial {best['number']}" in page and 'id="confusion"' in page and 'id="top-losses"' in page
    assert "still going on" not in page


def test_the_tables_hold_every_trial_and_every_epoch(undisturbed):
    trials, epochs = tables(undisturbed.folder)
    assert [row["number"] for row in trials] == [str(n) for n in range(NUM_TRIALS)]
    assert {row["status"] for row in trials} <= {"completed", "stopped early", "failed"}
    assert len(epochs) == sum(int(row["epochs_done"]) for row in trials)
    for row in trials:
        mine = [epoch for epoch in epochs if epoch["trial_id"] == row["trial_id"]]
        assert [int(epoch["epoch"]) for epoch in mine] == list(range(1, int(row["epochs_done"]) + 1))
        if row["status"] != "failed":
            assert (row["error_rate"], row["valid_loss"]) == (mine[-1]["error_rate"], mine[-1]["valid_loss"])
            seconds = sum(float(epoch["train_seconds"]) + float(epoch["valid_seconds"]) for epoch in mine)
            assert float(row["seconds"]) == pytest.approx(seconds, rel=1e-3)
        assert (row["status"] == "completed") == (row["epochs_done"] == row["epochs_total"])
        assert bool(row["reason"]) == (row["status"] != "completed")


def test_forecasts_know_how_every_trial_ended(undisturbed):
    rows = completed(undisturbed.folder)
    curves = RungsFile(undisturbed.folder / "rungs.json").read()["curves"]
    finals = {"t" + trial_id: curve["final"][0] for trial_id, curve in curves.items() if curve["final"] is not None}
    assert rows and finals == {row["trial_id"]: pytest.approx(float(row["error_rate"]), abs=1e-5) for row in rows}


def test_trial_0_is_the_default_recipe(undisturbed):
    default = load_space("quickstart").with_settings(SMALL).first_configs()[0]
    first = tables(undisturbed.folder)[0][0]
    assert {name: first[name] for name in default} == {name: str(value) for name, value in default.items()}


def test_best_is_the_best_completed_trial(undisturbed):
    rows = completed(undisturbed.folder)
    best = min(rows, key=lambda row: (float(row["error_rate"]), float(row["valid_loss"])))
    recipe, metrics, labels = (json.loads((undisturbed.folder / "best" / f"{name}.json").read_text())
                               for name in ("recipe", "metrics", "labels"))  # fmt: skip
    assert metrics["trial_id"] == best["trial_id"]
    assert metrics["error_rate"] == pytest.approx(float(best["error_rate"]), abs=1e-5)
    assert (recipe["arch"], recipe["epochs"], recipe["presize"]) == (best["arch"], int(best["epochs"]), 40)
    assert labels == ["blue_tit", "robin", "wren"]
    assert metrics["refit"]["averaged"] >= 2  # with the winner itself
    assert (undisturbed.folder / "best" / "model.safetensors").stat().st_size > 10_000


def test_what_ran_is_on_record(undisturbed, class_folders):
    command, space = (json.loads((undisturbed.folder / f"{name}.json").read_text()) for name in ("command", "space"))
    assert command["data"] == str(class_folders)
    assert command["arguments"]["trials"] == NUM_TRIALS
    assert {"python", "ray", "torch", "optuna"} <= set(command["versions"])
    assert set(space["dimensions"]) == {"arch", "epochs", "lr_max"}
    assert space["settings"]["presize"] == 40


def test_the_state_of_ended_trials_does_not_fill_the_disk(undisturbed):
    kept = [path for path in undisturbed.folder.glob("checkpoints/*/*epoch_*/*") if path.suffix != ".json"]
    assert len([*undisturbed.folder.glob("checkpoints/*/epoch_*")]) == NUM_TRIALS + 1  # and the refit
    assert not kept
    assert not [*undisturbed.folder.glob("tune/**/*.safetensors")]


def test_only_workers_load_torch(undisturbed):
    assert undisturbed.lines[-1] == "False"  # 'torch' in the driver's sys.modules at its end
    assert undisturbed.has_torch == {"driver": [False], "trial actor": [False], "worker": [True]}


def test_nothing_listens_beyond_this_machine(undisturbed):
    local = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    assert undisturbed.listens_on and undisturbed.listens_on <= local


def test_further_trials_start_at_once(undisturbed):
    """Worker processes are kept from trial to trial; a new one needs many seconds for its imports alone."""
    overheads = [float(row["overhead_seconds"]) for row in tables(undisturbed.folder)[0] if row["overhead_seconds"]]
    assert len(overheads) > 2
    assert sorted(overheads[1:])[len(overheads[1:]) // 2] < 5


def test_a_diverging_trial_fails_alone(undisturbed):
    trials, _ = tables(undisturbed.folder)
    failed = [row for row in trials if row["status"] == "failed"]
    assert failed and all(row["lr_max"] == "10" for row in failed)
    for row in failed:
        assert re.match(r"diverged: (training|validation) loss is (nan|inf) ", row["reason"]), row
        assert row["error_rate"] == row["valid_loss"] == row["accuracy"] == ""
        assert f"trial {row['number']} failed: {row['reason']}" in undisturbed.text
    later = [row["status"] for row in trials if int(row["number"]) > int(failed[0]["number"])]
    assert "completed" in later


def test_a_lost_worker_ctrl_c_a_kill_and_a_lost_actor_leave_no_trace_in_the_end(undisturbed, class_folders, tmp_path):
    """One search that all of it happens to ends with the tables of the undisturbed one."""
    expected_trials, expected_epochs = tables(undisturbed.folder)

    search = small_search(tmp_path / "disturbed", class_folders, "--trials", NUM_TRIALS)
    search.wait_for(r"trial 0 .*epoch 1/")
    [worker] = search.processes("ray::RayTrainWorker")
    os.kill(worker, signal.SIGKILL)
    search.wait_for(r"trial 1 .*epoch 1/")
    search.process.send_signal(signal.SIGINT)
    asked = time.monotonic()
    assert search.wait() == 130, search.text
    assert time.monotonic() - asked < 15
    assert not left_after(20, search.ray_processes)
    assert "python -m search.run --resume --name disturbed" in search.text
    assert "Traceback" not in search.text
    ended = [row for row in tables(search.folder)[0] if row["status"] != "running"]
    assert ended and ended[0]["status"] == "completed"

    killed = Search(search.folder, "--resume")
    killed.wait_for(r"trial 2 .*(epoch 2/|failed|completed)")
    killed.process.kill()
    killed.wait()
    rows, epochs = tables(search.folder)
    assert rows[: len(ended)] == ended
    assert without(rows[:2], TIMES) == without(expected_trials[:2], TIMES)
    assert len(epochs) == sum(int(row["epochs_done"]) for row in rows)

    resumed = Search(search.folder, "--resume")
    resumed.wait_for(r"trial [3-5] .*epoch 1/")
    [actor] = resumed.processes("ray::(FineTuneTrial|ResourceTrainable)")
    os.kill(actor, signal.SIGKILL)
    assert resumed.wait() == 0, resumed.text
    assert resumed.lines[-1] == "False"  # no torch in a resumed driver either
    trials, epochs = tables(search.folder)
    assert trials[: len(ended)] == ended
    assert without(trials, TIMES) == without(expected_trials, TIMES)
    assert sorted(without(epochs, EPOCH_TIMES), key=str) == sorted(without(expected_epochs, EPOCH_TIMES), key=str)
    assert_study_knows_each_once(search.folder, trials)


def assert_study_knows_each_once(folder: Path, trials: list[dict[str, str]]) -> None:
    """As it ended, with its values by progress; what a kill made Tune forget has failed."""
    states = {"completed": TrialState.COMPLETE, "stopped early": TrialState.PRUNED, "failed": TrialState.FAIL}
    known = load(folder).study.trials
    assert not [trial for trial in known if trial.state == TrialState.RUNNING]
    told = {
        "t" + trial.user_attrs["trial_id"]: trial for trial in known if trial.user_attrs.get("failure") != FORGOTTEN
    }
    assert set(told) == {row["trial_id"] for row in trials}
    for row in trials:
        trial = told[row["trial_id"]]
        assert trial.state == states[row["status"]]
        if row["status"] == "failed":
            assert trial.user_attrs["failure"] == row["reason"]
        else:
            assert trial.intermediate_values[max(trial.intermediate_values)] == pytest.approx(float(row["error_rate"]))


@pytest.fixture
def s3():
    with s3_server() as bucket:
        yield bucket


def test_a_search_whose_head_is_lost_goes_on_from_its_storage(undisturbed, class_folders, s3, tmp_path):
    """On another disk, in another folder, with its images in another place and with a trial more, it ends with the
    tables of the undisturbed one."""
    data = shutil.copytree(class_folders, tmp_path / "data")
    lost = small_search(tmp_path / "lost" / "run", data, "--trials", 3, "--storage", s3)
    lost.wait_for(r"trial 0 .*completed")
    with stopped(lost.processes("ray::RayTrainWorker")):  # so that the search cannot end before it is copied
        [ended] = completed(lost.folder)
        deadline, there = time.monotonic() + 60, RemoteRun(s3, "run")
        while "best/model.safetensors" not in (there.index() or {"files": {}})["files"]:
            assert time.monotonic() < deadline, lost.text
            time.sleep(0.2)
        for process in (lost.process.pid, *descendants(lost.process.pid)):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
    lost.wait()
    shutil.rmtree(lost.folder)

    elsewhere = data.rename(tmp_path / "elsewhere")
    resumed = Search(tmp_path / "new" / "run", "--resume", "--storage", s3, "--data", elsewhere, "--trials", 4)
    assert resumed.wait() == 0, resumed.text
    assert f"bringing it back from {s3}/run/" in resumed.text
    assert f"storage: {s3}/run/ holds the run as it is now" in resumed.text
    assert resumed.lines[-1] == "False"  # no torch in the driver
    trials, epochs = tables(resumed.folder)
    expected_trials, expected_epochs = tables(undisturbed.folder)
    expected_epochs = [epoch for epoch in expected_epochs if int(epoch["number"]) < 4]
    assert trials[0] == ended
    assert without(trials, TIMES) == without(expected_trials[:4], TIMES)
    assert sorted(without(epochs, EPOCH_TIMES), key=str) == sorted(without(expected_epochs, EPOCH_TIMES), key=str)
    assert not lost.folder.exists()
    command = json.loads((resumed.folder / "command.json").read_text())
    assert command["data"] == str(elsewhere) and command["argv"][-1] == "run" and "--resume" not in command["argv"]
    assert command["resumes"][0]["changed"] == ["data", "trials"]


def test_two_workers_learn_what_one_learns_and_survive_the_loss_of_one(undisturbed, class_folders, ray_head, tmp_path):
    search = small_search(
        tmp_path / "two", class_folders, "--trials", 2, "--workers-per-trial", 2, "--address", ray_head
    )
    search.wait_for(r"trial 1 .*starts")
    workers = search.processes("ray::RayTrainWorker")
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    assert search.wait() == 0, search.text
    trials, epochs = tables(search.folder)
    expected = tables(undisturbed.folder)[1][: len(epochs)]
    assert [row["status"] for row in trials] == ["completed", "completed"]
    for epoch, other in zip(epochs, expected, strict=True):
        assert (epoch["number"], epoch["epoch"], epoch["stage"]) == (other["number"], other["epoch"], other["stage"])
        for loss in ("train_loss", "valid_loss"):
            assert float(epoch[loss]) == pytest.approx(float(other[loss]), rel=1e-3)


def maps_torch(pid: int) -> bool:
    return "libtorch" in Path(f"/proc/{pid}/maps").read_text()
