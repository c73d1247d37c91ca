"""The copy of a run in an object store: whole at any moment, and enough to go on from."""

import json
import os
import re
import threading
import time
from pathlib import Path

import pytest
from object_store import s3_server

from search.run import run_cli
from search.runs import remote_copy, snapshot
from search.runs.atomic_files import replace_folder, write_atomically
from search.runs.paths import RunFolder
from search.runs.remote_copy import Mirror, Mirroring
from search.runs.remote_run import RemoteRun, bring_back
from trainables.training import checkpoint

NAME = "birds"
AGAIN = f"python -m search.run --resume --name {NAME}"
Content = dict[str, bytes]


@pytest.fixture(scope="module")
def s3():
    with s3_server() as bucket:
        yield bucket


@pytest.fixture
def folder(tmp_path, monkeypatch) -> RunFolder:
    """A run with all kinds of files, as they are after its first epoch."""
    monkeypatch.setattr(remote_copy, "LAST_TRIES", (0,))
    monkeypatch.setattr(remote_copy, "PAUSE", 0.0)
    folder = RunFolder(tmp_path / "here" / NAME)
    folder.checkpoints.mkdir(parents=True)
    folder.tune.mkdir()
    folder.command.write_text("{}")
    write_epoch(folder, 1)
    return folder


@pytest.fixture
def uri(tmp_path) -> str:
    return (tmp_path / "store").as_uri()


def write_epoch(folder: RunFolder, number: int) -> None:
    """Each file as the search writes it: in place, at its end, or anew."""
    text = f"epoch {number}"
    (folder.tune / "experiment_state-1.json").write_text(text)
    for file in (folder.epochs, folder.journal):
        with file.open("a") as out:
            out.write(f"{text}\n")
    for file in (folder.trials, folder.rungs):
        write_atomically(file, text)
    files = {name: f"{name} of {text}".encode() for name in (checkpoint.WEIGHTS_FILE, checkpoint.TRAINING_FILE)}
    checkpoint.save(folder.checkpoints / "t1", number, files, {"epoch": number})
    replace_folder(folder.best, lambda best: checkpoint.write(best, files))


def content(folder: Path) -> Content:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def brought_back(uri: str, tmp_path: Path) -> Content:
    there = RunFolder(tmp_path / f"{time.monotonic_ns()}" / NAME)
    bring_back(uri, there)
    return content(there.path)


def copy_now(mirror: Mirror, tunes: Path | None = None) -> None:
    """A whole pass as the search goes."""
    mirror.due = 0.0
    mirror.step(tunes)
    if mirror.thread:
        mirror.thread.join()


def shown(uri: str, tmp_path: Path) -> Content:
    return {name: text for name, text in content(tmp_path / "store" / NAME).items() if not name.startswith("resume/")}


def test_what_is_new_changed_and_gone_on_the_disk_is_so_in_the_store(folder, uri, tmp_path):
    with Mirror(folder, uri, resume=False, resume_command=AGAIN) as mirror:
        copy_now(mirror)
        assert brought_back(uri, tmp_path) == content(folder.path)
        write_epoch(folder, 2)
        (folder.path / "lr_find").mkdir()
        (folder.path / "lr_find" / "curve.png").write_bytes(b"png")
        folder.rungs.unlink()
        copy_now(mirror)
        now = content(folder.path)
        assert "checkpoints/t1/epoch_0002/result.json" in now and "checkpoints/t1/epoch_0001/result.json" not in now
        assert brought_back(uri, tmp_path) == now
    people = {name: text for name, text in now.items() if not name.startswith("checkpoints/")}
    assert shown(uri, tmp_path) == people


def test_the_end_of_the_search_is_in_the_store(folder, uri, tmp_path, capsys):
    with Mirror(folder, uri, resume=False, resume_command=AGAIN):
        write_epoch(folder, 7)
    assert brought_back(uri, tmp_path) == content(folder.path)
    assert f"storage: {uri}/{NAME}/ holds the run as it is now" in capsys.readouterr().out


def test_contents_that_no_file_has_any_more_are_removed(folder, uri, tmp_path):
    with Mirror(folder, uri, resume=False, resume_command=AGAIN) as mirror:
        for number in range(2, 6):
            write_epoch(folder, number)
            copy_now(mirror)
        (tmp_path / "store" / NAME / "resume" / ("0" * 64)).write_text("left by a pass that was killed")
    with Mirror(folder, uri, resume=True, resume_command=AGAIN):
        pass
    kept = {path.name for path in (tmp_path / "store" / NAME / "resume").iterdir()}
    index = json.loads((tmp_path / "store" / NAME / "resume" / "index.json").read_text())
    assert kept == {"index.json", *index["files"].values()}


def test_a_pass_that_is_cut_off_anywhere_leaves_one_moment_whole(folder, uri, tmp_path, monkeypatch):
    """The store fails at its first, second, ... operation: what is there is the moment before, or the new one."""
    with Mirror(folder, uri, resume=False, resume_command=AGAIN) as mirror:
        copy_now(mirror)
        number, cuts, seen = 1, 0, set()
        while True:
            before = brought_back(uri, tmp_path)
            write_epoch(folder, number := number + 1)
            with monkeypatch.context() as patch:
                left = fail_after(patch, cuts)
                copy_now(mirror)
            found = brought_back(uri, tmp_path)
            assert found in (before, content(folder.path)), cuts
            seen.add(found == before)
            if left() >= 0:
                break
            assert mirror.error == "cut off"
            cuts += 1
            copy_now(mirror)
            assert brought_back(uri, tmp_path) == content(folder.path)
            assert shown(uri, tmp_path)["trials.csv"] == folder.trials.read_bytes()
        assert cuts > 10 and seen == {True, False}


def fail_after(patch: pytest.MonkeyPatch, operations: int):
    """Let that many operations on the store pass, and no other; returns a function that tells how many are left."""
    lock, left = threading.Lock(), operations

    def counted(operation):
        def act(*arguments):
            nonlocal left
            with lock:
                left -= 1
                if left < 0:
                    raise OSError("cut off")
            return operation(*arguments)

        return act

    for name in ("put", "copy", "remove"):
        patch.setattr(RemoteRun, name, counted(getattr(RemoteRun, name)))
    return lambda: left


@pytest.mark.parametrize("large", [1, 1 << 20])
def test_a_moment_stays_what_it_was_while_it_is_copied(folder, uri, tmp_path, monkeypatch, large):
    monkeypatch.setattr(snapshot, "LARGE_BYTES", large)
    mirror = Mirror(folder, uri, resume=False, resume_command=AGAIN)
    then = content(folder.path)
    found = snapshot.snapshot(folder, None, {})
    write_epoch(folder, 2)
    write_epoch(folder, 3)
    mirror._try(found)
    assert mirror.error == ""
    assert brought_back(uri, tmp_path) == then


@pytest.mark.parametrize("large", [1, 1 << 20])
def test_of_a_trial_that_trains_meanwhile_one_whole_epoch_is_taken(folder, monkeypatch, large):
    """While another thread ends epochs, each moment has all files of one of them."""
    monkeypatch.setattr(snapshot, "LARGE_BYTES", large)
    ended = threading.Event()

    def train() -> None:
        for number in range(2, 300):
            files = {name: f"{number}".encode() for name in (checkpoint.WEIGHTS_FILE, checkpoint.TRAINING_FILE)}
            checkpoint.save(folder.checkpoints / "t1", number, files, {"epoch": number})
            time.sleep(0.002)
        ended.set()

    trial = threading.Thread(target=train)
    trial.start()
    epochs = []
    while not ended.is_set():
        try:
            found = snapshot.snapshot(folder, None, {})
        except FileNotFoundError:
            continue
        files = {name.split("/", 2)[2]: file for name, file in found.items() if name.startswith("checkpoints/")}
        (epoch,) = {name.split("/")[0] for name in files}
        assert {name.split("/")[1] for name in files} == {"model.safetensors", "training.pt", "result.json"}
        number = int(epoch.removeprefix("epoch_"))
        assert number == 1 or files[f"{epoch}/training.pt"].content.read() == f"{number}".encode()
        epochs.append(number)
    trial.join()
    assert len(set(epochs)) > 5


def test_tunes_state_is_that_of_the_moment(folder, uri, tmp_path):
    """Tune's own copy of it in the run's folder lags behind."""
    tunes = tmp_path / "session"
    tunes.mkdir()
    (tunes / "experiment_state-1.json").write_text("of now")
    (folder.tune / "tuner.pkl").write_text("only here")
    with Mirror(folder, uri, resume=False, resume_command=AGAIN) as mirror:
        copy_now(mirror, tunes)
        found = brought_back(uri, tmp_path)
    assert (found["tune/experiment_state-1.json"], found["tune/tuner.pkl"]) == (b"of now", b"only here")


def test_nothing_is_sent_while_only_tune_renews_its_state(folder, uri, tmp_path):
    index = tmp_path / "store" / NAME / "resume" / "index.json"
    with Mirror(folder, uri, resume=False, resume_command=AGAIN) as mirror:
        copy_now(mirror)
        before = index.read_text(), index.stat().st_mtime_ns
        (folder.tune / "experiment_state-1.json").write_text("a second later")
        copy_now(mirror)
        assert (index.read_text(), index.stat().st_mtime_ns) == before
    assert brought_back(uri, tmp_path) == content(folder.path)  # at the end all the same


def test_an_error_is_said_once_and_its_end_once(folder, uri, tmp_path, capsys):
    with Mirror(folder, uri, resume=False, resume_command=AGAIN) as mirror:
        away = (tmp_path / "store").rename(tmp_path / "away")
        (tmp_path / "store").write_text("no folder")
        for number in (2, 3, 4):
            write_epoch(folder, number)
            copy_now(mirror)
        (tmp_path / "store").unlink()
        away.rename(tmp_path / "store")
        copy_now(mirror)
        assert brought_back(uri, tmp_path) == content(folder.path)
        copy_now(mirror)
    text = capsys.readouterr().out
    assert text.count("cannot be written, the search continues and tries again: ") == 1
    assert text.count("can be written again") == 1
    assert "FAILED" not in text


def test_a_last_copy_that_fails_is_said_loudly(folder, uri, tmp_path, capsys):
    with Mirror(folder, uri, resume=False, resume_command=AGAIN):
        (tmp_path / "store").rename(tmp_path / "away")
        (tmp_path / "store").write_text("no folder")
    text = capsys.readouterr().out
    assert "STORAGE: THE LAST COPY FAILED" in text and AGAIN in text


def test_a_search_that_goes_on_elsewhere_is_not_overwritten(folder, uri, tmp_path):
    with Mirror(folder, uri, resume=False, resume_command=AGAIN) as lost:
        copy_now(lost)
        elsewhere = RunFolder(tmp_path / "elsewhere" / NAME)
        bring_back(uri, elsewhere)
        write_epoch(elsewhere, 2)
        with Mirror(elsewhere, uri, resume=True, resume_command=AGAIN):
            pass
        write_epoch(folder, 9)
        copy_now(lost)
        assert "another search of this name" in lost.error
    assert brought_back(uri, tmp_path) == content(elsewhere.path)


def test_what_was_brought_back_is_not_sent_again(folder, uri, tmp_path):
    with Mirror(folder, uri, resume=False, resume_command=AGAIN):
        pass
    elsewhere = RunFolder(tmp_path / "elsewhere" / NAME)
    bring_back(uri, elsewhere)
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "store" / NAME / "resume").iterdir()}
    with Mirror(elsewhere, uri, resume=True, resume_command=AGAIN):
        pass
    now = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "store" / NAME / "resume").iterdir()}
    assert now.pop("index.json") > times.pop("index.json")
    assert now == times


def test_a_folder_that_is_here_takes_the_place_of_the_copy_and_says_so(folder, uri, capsys):
    with Mirror(folder, uri, resume=False, resume_command=AGAIN):
        pass
    Mirror(folder, uri, resume=True, resume_command=AGAIN)
    assert "replaces it" not in capsys.readouterr().out
    folder.command.write_text('{"started_at": "later"}')
    Mirror(folder, uri, resume=True, resume_command=AGAIN)
    assert f"{uri}/{NAME}/ is of another start of this run" in capsys.readouterr().out


def test_a_run_of_that_name_in_the_store_is_not_overwritten_by_a_new_one(folder, uri):
    with Mirror(folder, uri, resume=False, resume_command=AGAIN):
        pass
    with pytest.raises(ValueError, match=rf"{NAME}/ exists\. Add --resume"):
        Mirror(folder, uri, resume=False, resume_command=AGAIN)


def test_a_copy_that_is_damaged_or_incomplete_is_refused_as_a_whole(folder, uri, tmp_path):
    with Mirror(folder, uri, resume=False, resume_command=AGAIN):
        pass
    resume = tmp_path / "store" / NAME / "resume"
    digest = json.loads((resume / "index.json").read_text())["files"]["trials.csv"]
    there = RunFolder(tmp_path / "there" / NAME)
    (resume / digest).write_text("damaged")
    with pytest.raises(ValueError, match=r"cannot be brought back .* is damaged there"):
        bring_back(uri, there)
    (resume / digest).unlink()
    with pytest.raises(ValueError, match="cannot be brought back"):
        bring_back(uri, there)
    assert not there.path.exists()


def test_a_copy_that_would_write_elsewhere_is_refused(folder, uri, tmp_path):
    with Mirror(folder, uri, resume=False, resume_command=AGAIN):
        pass
    index = tmp_path / "store" / NAME / "resume" / "index.json"
    index.write_text(index.read_text().replace("trials.csv", "../../trials.csv"))
    with pytest.raises(ValueError, match="is refused"):
        bring_back(uri, RunFolder(tmp_path / "there" / NAME))


def test_an_index_that_is_replaced_while_it_is_read_is_read_again(folder, uri, monkeypatch):
    with Mirror(folder, uri, resume=False, resume_command=AGAIN):
        pass
    remote = RemoteRun(uri, NAME)
    whole, get, cuts = remote.index(), remote.get, [100, 0]

    def get_part(name, file):
        get(name, file)
        if cuts:
            file.truncate(cuts.pop())

    monkeypatch.setattr(remote, "get", get_part)
    assert remote.index() == whole
    assert not cuts


def test_an_index_that_stays_damaged_is_said_to_be(folder, uri, tmp_path):
    with Mirror(folder, uri, resume=False, resume_command=AGAIN):
        pass
    index = tmp_path / "store" / NAME / "resume" / "index.json"
    index.write_text(index.read_text()[:100])
    with pytest.raises(ValueError, match=r"cannot be brought back .* its resume/index\.json is damaged"):
        bring_back(uri, RunFolder(tmp_path / "there" / NAME))


def test_without_storage_a_step_copies_nothing(folder):
    Mirroring(folder).on_step_end(iteration=1, trials=[])


# --- S3 ---------------------------------------------------------------------------------------------------------------


def test_a_run_comes_back_from_s3(folder, s3, tmp_path):
    uri = f"{s3}/some/where"
    with Mirror(folder, uri, resume=False, resume_command=AGAIN) as mirror:
        copy_now(mirror)
        for number in (2, 3):
            write_epoch(folder, number)
            copy_now(mirror)
            assert mirror.error == ""
            assert brought_back(uri, tmp_path) == content(folder.path)
    remote = RemoteRun(uri, NAME)
    assert remote.contents() == set(remote.index()["files"].values())
    with remote.filesystem.open_input_stream(f"{remote.path}/best/{checkpoint.WEIGHTS_FILE}") as file:
        assert file.read() == (folder.best / checkpoint.WEIGHTS_FILE).read_bytes()


def test_a_large_file_goes_to_s3_in_parts(folder, s3, tmp_path):
    weights = bytes(range(256)) * (90 << 10)
    (folder.checkpoints / "t1" / "epoch_0001" / checkpoint.WEIGHTS_FILE).write_bytes(weights)
    with Mirror(folder, f"{s3}/large", resume=False, resume_command=AGAIN):
        pass
    assert brought_back(f"{s3}/large", tmp_path)[f"checkpoints/t1/epoch_0001/{checkpoint.WEIGHTS_FILE}"] == weights


def test_s3_may_be_named_by_the_uri(folder, s3, tmp_path, monkeypatch):
    endpoint = os.environ["AWS_ENDPOINT_URL_S3"]
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3")
    uri = f"{s3}/named?scheme=http&endpoint_override={endpoint.removeprefix('http://')}&region=us-east-1"
    with Mirror(folder, uri, resume=False, resume_command=AGAIN):
        pass
    assert brought_back(uri, tmp_path) == content(folder.path)


# --- What is refused before Ray starts --------------------------------------------------------------------------------


def refused(monkeypatch, capsys, *arguments: str) -> str:
    """What `python -m search.run` says with exit code 2."""
    from search import run

    monkeypatch.setattr("sys.argv", ["search.run", *arguments])
    with pytest.raises(SystemExit) as ended:
        run_cli(run.main)
    assert ended.value.code == 2
    return capsys.readouterr().err.rstrip("\n").split("\n")[-1]


@pytest.mark.parametrize(("uri", "said"), [
    ("ftp://host/runs", "'ftp://host/runs' is not an address in an object store: expected s3://bucket/path"),
    ("/mnt/runs", "'/mnt/runs' is not an address in an object store"),
    ("s3://", "is not an address in an object store"),
    ("s3://AKIA:verysecret@bucket/runs", "s3://bucket/runs contains a key"),
    ("s3://bucket/runs?zone=verysecret", "s3://bucket/runs is not a usable address"),
    ("s3://nobody-has-it/runs", "s3://nobody-has-it/runs/birds/ cannot be used: .*NO_SUCH_BUCKET"),
    ("file:///proc/runs", "file:///proc/runs/birds/ cannot be used"),
])  # fmt: skip
def test_places_that_cannot_be_written_are_refused(s3, uri, said, tmp_path, monkeypatch, capsys):
    new = ("--space", "quickstart", "--results", str(tmp_path), "--name", NAME, "--storage", uri)
    message = refused(monkeypatch, capsys, *new)
    assert re.search(said, message), message
    assert "verysecret" not in message
    assert not list(tmp_path.iterdir())


def test_a_run_that_is_nowhere_cannot_be_resumed(s3, tmp_path, monkeypatch, capsys):
    resume = ("--resume", "--name", NAME, "--results", str(tmp_path), "--storage", f"{s3}/empty")
    message = refused(monkeypatch, capsys, *resume)
    assert f"neither {tmp_path}/{NAME}/ nor {s3}/empty/{NAME}/ exists" in message
