"""Going on with a run: only where it is the same search, by the same user, and by one search at a time."""

import fcntl
import json
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest
from opened import watched

from search.options.arguments import parse_arguments
from search.options.search_options import SearchOptions
from search.runs.command import CommandRecord, FilesRecord, ImagesRecord
from search.runs.csv_file import as_csv
from search.runs.paths import RunFolder
from search.runs.resume import (
    files_record,
    history,
    is_same_command,
    options_to_resume,
    require_same,
    said_changes,
    saved_options,
)
from search.runs.run_lock import alone_in
from search.runs.trust import require_own, signature
from search.spaces.space import load_space

BEGUN = ["--space", "quickstart", "--name", "mine", "--trials", "9", "--set", "epochs=2"]
IMAGES = ImagesRecord(digest="a", names_digest="n", count=90, classes=("robin", "wren"))
FILES = FilesRecord()
SPACE = {"name": "quickstart", "seed": 0, "settings": {"presize": 160}, "dimensions": {"epochs": "1..3"}}


@pytest.fixture(autouse=True)
def key(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def test_a_home_without_links_keeps_the_key_that_a_run_is_known_by(folder, tmp_path, monkeypatch):
    def without_links(*paths) -> None:
        raise PermissionError("Operation not permitted")

    shutil.rmtree(tmp_path / "state")
    monkeypatch.setattr(os, "link", without_links)
    mine = signature(folder, "1")
    assert mine and signature(folder, "1") == mine
    assert [file.name for file in (tmp_path / "state" / "finetune-search").iterdir()] == ["key"]


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return begun(tmp_path, BEGUN)


def begun(tmp_path: Path, argv: list[str]) -> RunFolder:
    folder = RunFolder(tmp_path / "results" / "mine")
    folder.path.mkdir(parents=True)
    options = parse_arguments([*argv, "--results", str(folder.path.parent)])
    mine = signature(folder, "1")
    CommandRecord(run_id="1", signature=mine, arguments=options, asked=options, images=IMAGES).save(folder.path)
    folder.space.write_text(json.dumps(SPACE))
    return folder


def change(folder: RunFolder, **fields) -> None:
    replace(CommandRecord.load(folder.path), **fields).save(folder.path)


def arguments(folder: RunFolder, *words: str) -> SearchOptions:
    return parse_arguments([*words, "--results", str(folder.path.parent)])


def resumed(folder: RunFolder, *words: str) -> SearchOptions:
    return saved_options(folder, arguments(folder, "--resume", "--name", "mine", *words))


# --- What it was asked for --------------------------------------------------------------------------------------------


def test_a_run_goes_on_with_the_options_that_it_was_begun_with(folder):
    args = resumed(folder, "--address", "auto")
    assert (args.space, args.trials, args.set, args.resume, args.address) == (
        "quickstart", 9, ("epochs=2",), True, "auto"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("words", "difference"),
    [
        (["--space", "pets"], "--space is quickstart there and pets here"),
        (["--set", "epochs=3"], "--set is epochs=2 there and epochs=3 here"),
        (["--weights", "/else"], "--weights is not given there and /else here"),
        (["--test-split", "/else"], "--test-split is not given there and /else here"),
        (["--data", "/else", "--seed", "4"], "--seed is not given there and 4 here"),
        (["--confirm", "3"], "--confirm is 0 there and 3 here"),
        (["--group", "parent"], "--group is not given there and parent here"),
    ],
)
def test_an_option_that_differs_is_refused_with_the_difference(folder, words, difference):
    with pytest.raises(ValueError, match="as it was begun, but") as refused:
        resumed(folder, *words)
    assert difference in str(refused.value)


def test_options_that_are_the_same_may_be_said_again(folder):
    assert resumed(folder, "--space", "quickstart", "--trials", "9", "--set", "epochs=2").trials == 9


def test_the_command_that_began_a_run_goes_on_with_it_and_another_one_does_not(folder):
    assert is_same_command(folder, arguments(folder, *BEGUN))
    assert is_same_command(folder, arguments(folder, *BEGUN, "--address", "auto"))
    assert not is_same_command(folder, arguments(folder, *BEGUN, "--seed", "4"))
    folder.command.unlink()
    assert not is_same_command(folder, arguments(folder, *BEGUN))


# --- What may change --------------------------------------------------------------------------------------------------

MAY_CHANGE = ["--trials", "40", "--time-budget", "2h", "--keep", "5", "--report", "off", "--max-concurrent", "3"]
MAY_CHANGE += ["--stall-timeout", "20m", "--workers-per-trial", "2", "--cpus-per-worker", "4", "--gpus-per-worker", "1"]


def write_trials(folder: RunFolder, count: int, retrained: int = 0) -> None:
    rows = [{"number": i, "trial_id": f"t{i}", "status": "completed", "error_rate": 0.1} for i in range(count)]
    rows += [
        row | {"number": count + i, "trial_id": f"r{i}", "retrains": "0"} for i, row in enumerate(rows[:retrained])
    ]
    columns = ["number", "trial_id", "status", "error_rate", "epochs_done", "epochs_total", "retrains"]
    folder.trials.write_text(as_csv(columns, [{"epochs_done": 1, "epochs_total": 1} | row for row in rows]))


def test_a_search_goes_on_with_more_trials_and_whatever_else_changes_nothing_about_them(folder):
    args = resumed(folder, *MAY_CHANGE)
    assert (args.trials, args.time_budget, args.keep, args.report, args.max_concurrent) == (40, 7200, 5, "off", 3)
    assert (args.stall_timeout, args.workers_per_trial, args.cpus_per_worker, args.gpus_per_worker) == (
        1200, ("2",), 4, 1
    )  # fmt: skip
    assert (args.space, args.set) == ("quickstart", ("epochs=2",))
    said = said_changes(folder, args)
    assert said.startswith(", now with --trials 40 (9 before), --time-budget 2 h 0 min (not given before), ")
    assert said_changes(folder, resumed(folder)) == ""


def test_a_search_goes_on_with_more_or_fewer_trials_on_a_gpu(folder):
    assert said_changes(folder, resumed(folder, "--trials-per-gpu", "4")) == ", now with --trials-per-gpu 4 (1 before)"


def test_the_first_command_goes_on_with_what_a_later_one_has_changed(folder):
    change(folder, arguments=resumed(folder, *MAY_CHANGE))
    assert is_same_command(folder, arguments(folder, *BEGUN))
    assert saved_options(folder, arguments(folder, *BEGUN)).trials == 40
    assert resumed(folder).trials == 40
    assert resumed(folder, "--trials", "30").trials == 30


def test_fewer_trials_than_have_begun_are_refused(folder):
    write_trials(folder, 6, retrained=3)
    more, fewer = ([*words, "--resume", "--name", "mine"] for words in (["--trials", "6"], ["--trials", "5"]))
    assert options_to_resume(arguments(folder, *more), folder).trials == 6
    with pytest.raises(ValueError, match=r"--trials 5: 6 trials of .*mine/ have begun already. Give 6 or more"):
        options_to_resume(arguments(folder, *fewer), folder)


@pytest.mark.parametrize("method", [["--target-seconds", "90s"], ["--objective", "error,seconds"]])
def test_trials_that_are_compared_by_their_seconds_keep_their_workers(tmp_path, method):
    folder = begun(tmp_path, [*BEGUN, *method])
    assert resumed(folder, "--trials", "40").trials == 40
    with pytest.raises(ValueError, match="--workers-per-trial is not given there and 2 here"):
        resumed(folder, "--workers-per-trial", "2")


def test_named_recipes_are_not_extended(tmp_path):
    folder = begun(tmp_path, ["--space", "pets", "--name", "mine", "--recipes", "book"])
    with pytest.raises(ValueError, match=r"--trials has no effect: .* runs each of its recipes once"):
        resumed(folder, "--trials", "40")


def test_the_same_images_may_lie_elsewhere(folder):
    assert resumed(folder, "--data", "/else").data == Path("/else")  # what is there is compared later
    assert "--data /else (not given before)" in said_changes(folder, resumed(folder, "--data", "/else"))


def test_the_address_of_what_was_fetched_then_is_no_other_place(tmp_path):
    folder = begun(tmp_path, ["--space", "quickstart", "--name", "mine", "--data", "https://me:secret@host/x.tar"])
    pinned = "https://me:secret@host/x.tar#sha256=" + 64 * "0"
    change(folder, arguments=replace(CommandRecord.load(folder.path).arguments, data=pinned))
    assert resumed(folder, "--data", "https://me:secret@host/x.tar").data == pinned
    moved = resumed(folder, "--data", "https://me:secret@other/x.tar")
    assert said_changes(folder, moved) == ", now with --data https://other/x.tar (https://host/x.tar before)"


def recorded(folder: RunFolder, *words: str) -> FilesRecord:
    return files_record(arguments(folder, *words), load_space("quickstart").with_settings(["arch=resnet18"]))


def test_weights_and_test_images_elsewhere_must_be_the_same_files(tmp_path):
    paths = {}
    for place, weights, images in (("here", b"w", 2), ("there", b"w", 2), ("other", b"v", 2), ("more", b"w", 3)):
        paths[place] = ["--weights", f"{tmp_path}/{place}/w", "--test-split", f"{tmp_path}/{place}/t"]
        for name in ("cat", "dog"):
            (tmp_path / place / "t" / name).mkdir(parents=True)
            for i in range(images):
                (tmp_path / place / "t" / name / f"{i}.jpg").touch()
        (tmp_path / place / "w").mkdir()
        (tmp_path / place / "w" / "resnet18.safetensors").write_bytes(weights)
    folder = begun(tmp_path, ["--space", "quickstart", "--name", "mine", *paths["here"]])
    with watched((tmp_path / "here" / "t").glob("*/*.jpg"), bool) as opened:
        files = recorded(folder, "--space", "quickstart", *paths["here"])
    assert not opened  # nobody opens test images before the end
    change(folder, files=files)
    resume = ["--resume", "--name", "mine"]
    assert recorded(folder, *resume, *paths["there"]) == files
    assert resumed(folder, *paths["there"]).weights == tmp_path / "there" / "w"
    for place, what in (("other", "its weights have changed"), ("more", "its test images have changed")):
        with pytest.raises(ValueError, match=what):
            require_same(folder, SPACE, IMAGES, recorded(folder, *resume, *paths[place]))


def test_how_a_run_was_begun_outlives_its_resumes(folder):
    first = history(folder, arguments(folder, *BEGUN), BEGUN)
    change(folder, **first | {"started_at": "2026-01-31T12:00:00+00:00"})
    again = history(folder, resumed(folder, "--trials", "40"), ["--resume", "--name", "mine", "--trials", "40"])
    assert (again["argv"], again["started_at"]) == (tuple(BEGUN), "2026-01-31T12:00:00+00:00")
    [resume] = again["resumes"]
    assert (resume.argv[-1], resume.changed) == ("40", ("trials",))
    assert datetime.fromisoformat(resume.started_at) > datetime.fromisoformat(again["started_at"])


# --- Whether it is the same search ------------------------------------------------------------------------------------


def test_the_same_images_and_space_go_on(folder):
    require_same(folder, SPACE, IMAGES, FILES)


@pytest.mark.parametrize(
    ("images", "difference"),
    [
        ({"digest": "b", "names_digest": "m", "count": 91}, "91 instead of 90"),
        ({"digest": "b", "names_digest": "m", "classes": ("robin",)}, "without the class 'wren'"),
        ({"digest": "b", "names_digest": "m", "classes": ("robin", "tit", "wren")}, "with the class 'tit'"),
        ({"digest": "b", "names_digest": "m"}, "as many as before (90), but with other names or in other classes"),
        ({"digest": "b"}, "their names are the same, but files have other sizes"),
    ],
)
def test_other_images_are_refused_with_the_difference(folder, images, difference):
    with pytest.raises(ValueError, match="its images have changed") as refused:
        require_same(folder, SPACE, replace(IMAGES, **images), FILES)
    assert difference in str(refused.value)


def test_other_groups_are_refused(folder):
    change(folder, groups="0-3;5 8")
    require_same(folder, SPACE, IMAGES, FILES, "0-3;5 8")
    with pytest.raises(ValueError, match="the groups of its images have changed"):
        require_same(folder, SPACE, IMAGES, FILES, "0-3")
    change(folder, groups=None)
    require_same(folder, SPACE, IMAGES, FILES)


def test_another_space_is_refused_with_the_difference(folder):
    changed = SPACE | {"dimensions": {"epochs": "1..4"}, "seed": 3}
    with pytest.raises(ValueError, match="search space has changed") as refused:
        require_same(folder, changed, IMAGES, FILES)
    assert "seed was 0 and is 3" in str(refused.value)
    assert "dimensions.epochs was '1..3' and is '1..4'" in str(refused.value)


def test_a_space_that_an_earlier_version_saved_as_texts_is_the_same(folder):
    fields = {"low": 1, "high": 3, "log": False, "off": False}
    require_same(folder, SPACE | {"dimensions": {"epochs": fields}}, IMAGES, FILES)
    with pytest.raises(ValueError, match=r"dimensions.epochs was '1..3' and is '1..3 \(log\)'"):
        require_same(folder, SPACE | {"dimensions": {"epochs": fields | {"log": True}}}, IMAGES, FILES)


# --- Whose run it is --------------------------------------------------------------------------------------------------


def test_ones_own_run_needs_no_trust(folder):
    require_own(folder, trust=False)


def test_a_run_that_another_user_began_is_refused_unless_trusted(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "of another user"))
    with pytest.raises(ValueError, match=r"was not begun by you .* add --trust"):
        require_own(folder, trust=False)
    require_own(folder, trust=True)


@pytest.mark.parametrize("forged", [{"run_id": "2"}, {"signature": ""}, {"signature": None}, {"signature": "\xe9"}])
def test_a_forged_record_is_refused(folder, forged):
    change(folder, **forged)
    with pytest.raises(ValueError, match="was not begun by you"):
        require_own(folder, trust=False)


def test_a_record_copied_into_another_folder_is_refused_and_a_moved_run_is_not(folder, tmp_path):
    shutil.copytree(folder.path, tmp_path / "copy")
    with pytest.raises(ValueError, match="was not begun by you"):
        require_own(RunFolder(tmp_path / "copy"), trust=False)
    folder.path.rename(tmp_path / "moved")
    require_own(RunFolder(tmp_path / "moved"), trust=False)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs the right to give files away")
def test_a_run_in_which_somebody_else_has_put_files_is_refused(folder):
    folder.tune.mkdir()
    (folder.tune / "tuner.pkl").touch()
    require_own(folder, trust=False)
    os.chown(folder.tune / "tuner.pkl", 12345, -1)
    with pytest.raises(ValueError, match="was not begun by you"):
        require_own(folder, trust=False)


def test_an_empty_key_is_no_key(folder, tmp_path):
    (tmp_path / "state" / "finetune-search" / "key").write_bytes(b"")
    assert signature(folder, "1") == ""


def test_the_key_is_for_its_owner_alone_and_without_a_place_for_one_nothing_is_trusted(folder, tmp_path, monkeypatch):
    key = tmp_path / "state" / "finetune-search" / "key"
    assert key.stat().st_mode & 0o777 == 0o600
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    assert signature(folder, "1") == ""
    change(folder, signature="")
    with pytest.raises(ValueError, match="was not begun by you"):
        require_own(folder, trust=False)


class Bomb:
    """Pickled, it makes a file where it is read."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple:
        return Path.touch, (self.file,)


def test_a_refused_run_executes_nothing_of_what_it_holds(folder, tmp_path, monkeypatch):
    """The whole command, on a run whose pickles would leave a file."""
    witness = tmp_path / "executed"
    folder.tune.mkdir()
    for name in ("tuner.pkl", "searcher-state-1.pkl"):
        (folder.tune / name).write_bytes(pickle.dumps(Bomb(witness)))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "of another user"))
    words = ["-m", "search.run", "--resume", "--name", "mine", "--results", str(folder.path.parent)]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    assert done.returncode == 2 and "add --trust" in done.stderr
    assert not witness.exists()


# --- One search at a time ---------------------------------------------------------------------------------------------


def test_a_second_search_of_the_same_name_is_refused_while_the_first_one_lives(tmp_path):
    folder = RunFolder(tmp_path / "results" / "mine")
    holder = f"""
import sys, time
from pathlib import Path
from search.runs.run_lock import alone_in
from search.runs.paths import RunFolder
with alone_in(RunFolder(Path({str(folder.path)!r}))):
    print("alone", flush=True)
    time.sleep(60)
"""
    first = subprocess.Popen([sys.executable, "-c", holder], stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "alone\n"
    with pytest.raises(ValueError, match="is being written by another search"), alone_in(folder):
        pass
    first.kill()  # it says good-bye to nobody
    first.wait()
    with alone_in(folder):
        pass


@pytest.mark.parametrize("written", [True, False])
def test_a_third_search_is_refused_where_the_second_came_as_the_first_one_left(tmp_path, monkeypatch, written):
    """The second one has opened the lock's file, and then the first one removes it."""
    folder = RunFolder(tmp_path / "results" / "mine")
    first = alone_in(folder)
    first.__enter__()
    if written:
        folder.trials.touch()
    lock = fcntl.flock

    def leave_before_locking(*arguments: int) -> None:
        monkeypatch.setattr(fcntl, "flock", lock)
        first.__exit__(None, None, None)
        lock(*arguments)

    monkeypatch.setattr(fcntl, "flock", leave_before_locking)
    with alone_in(folder):
        assert folder.path.is_dir()
        with pytest.raises(ValueError, match="is being written by another search"), alone_in(folder):
            pass
    assert folder.path.is_dir() == written


def test_a_search_that_ends_before_it_wrote_anything_leaves_no_folder(tmp_path):
    folder = RunFolder(tmp_path / "results" / "mine")
    with pytest.raises(ValueError, match="bad"), alone_in(folder):
        raise ValueError("bad")
    assert not folder.path.parent.exists()
    with alone_in(folder):
        folder.trials.touch()
    assert folder.trials.exists() and list(folder.path.parent.iterdir()) == [folder.path]
