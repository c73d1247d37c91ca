"""command.json: what it keeps, and that runs of earlier versions open."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import search
from search import compare
from search.options.arguments import parse_arguments
from search.options.search_options import SearchOptions
from search.report import write_report
from search.reporting.summary import summary
from search.runs.command import FORMAT, CommandRecord, FilesRecord, ImagesRecord, Resume
from search.runs.paths import RunFolder
from search.runs.results_table import ResultsTable, consecutive_failures
from search.runs.resume import options_to_resume
from search.runs.time_budget import TimeBudget, seconds_spent

EARLIER = Path(__file__).parent / "earlier"
"""Runs of six trials as the versions with these formats wrote them, without weights and Ray's state."""
FORMATS = sorted(int(folder.name) for folder in EARLIER.iterdir())


@pytest.fixture(params=FORMATS)
def earlier(request, tmp_path) -> Path:
    return shutil.copytree(EARLIER / str(request.param), tmp_path / "results" / "earlier")


def test_there_is_a_run_of_every_format():
    assert list(range(1, FORMAT + 1)) == FORMATS


def test_the_run_of_an_earlier_version_is_loaded(earlier):
    run = search.load(earlier)
    command = run.command
    assert (len(run.trials), run.best["status"], run.labels) == (6, "completed", ["blue_tit", "robin", "wren"])
    assert (command.data, command.split_seed, command.strategy.scheduler) == ("/home/me/photos", 0, "rungs")
    assert (command.arguments.trials, command.arguments.test_split, command.arguments.max_concurrent) == (6, 0.1, None)
    assert command.arguments.set[0] == "arch=test_resnet,test_vit" and command.asked == command.arguments
    assert command.images.count == 27 and command.versions["ray"]
    assert run.study.best_value == run.best["error_rate"]


def test_the_run_of_an_earlier_version_is_reported_and_compared(earlier, capsys):
    write_report(search.load(earlier), earlier / "report.html", analysis=False)
    page = (earlier / "report.html").read_text()
    assert "searcher tpe, scheduler rungs, objective error, seed 6" in page and "--test-split 0.1" in page
    assert 'id="probe-card"' not in page and summary(search.load(earlier))[0].startswith("best: trial ")
    other = shutil.copytree(EARLIER / "1", earlier.with_name("other"))
    assert compare.main([str(earlier), str(other)]) == 0
    assert "warning" not in capsys.readouterr().err


def test_a_run_of_an_earlier_version_is_refused_in_one_sentence_and_one_of_this_version_is_not(earlier):
    words = ["--resume", "--name", earlier.name, "--results", str(earlier.parent), "--trust"]
    options, folder = parse_arguments([*words, "--trials", "9"]), RunFolder(earlier)
    if CommandRecord.load(earlier).format == FORMAT:
        assert options_to_resume(options, folder).trials == 9
        return
    with pytest.raises(
        ValueError, match=r"was begun by an earlier version .* cannot be resumed, because its Ray state"
    ):
        options_to_resume(options, folder)


def test_a_scheduler_is_known_by_its_former_name(tmp_path):
    shutil.copytree(EARLIER / "1", tmp_path, dirs_exist_ok=True)
    file = tmp_path / "command.json"
    file.write_text(file.read_text().replace('"scheduler": null', '"scheduler": "annealed"'))
    file.write_text(file.read_text().replace('"scheduler": "rungs"', '"scheduler": "annealed"'))
    command = CommandRecord.load(tmp_path)
    assert command.strategy.scheduler == command.arguments.scheduler == command.asked.strategy.scheduler == "halving"


def test_a_record_is_read_back_as_it_was_saved(tmp_path):
    words = "--space pets --data /my/photos --weights s3://bucket/w --test-split /other --set epochs=3 --name mine"
    options = parse_arguments([*words.split(), "--workers-per-trial", "2", "--max-concurrent", "4"])
    record = CommandRecord(
        run_id="1",
        argv=tuple(words.split()),
        resumes=(Resume(argv=("--resume",), started_at="2026-01-31T12:00:00+00:00", changed=("trials",)),),
        arguments=replace(options, trials=9),
        asked=options,
        strategy=options.strategy,
        images=ImagesRecord(digest="a", names_digest="b", count=2, classes=("cat", "dog")),
        files=FilesRecord(weights={"resnet18": "c"}),
        data="/my/photos",
    )
    record.save(tmp_path)
    assert json.loads((tmp_path / "command.json").read_text())["format"] == FORMAT
    assert CommandRecord.load(tmp_path) == record


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({"format": FORMAT + 1}, f"has format {FORMAT + 1}, and this version of finetune-search reads formats up to"),
        ({"format": "two"}, "has format two"),
        ({"arguments": {"objective": "error,seconds", "searcher": "cmaes"}}, "is damaged"),
        ({"resumes": [{}]}, "is damaged"),
        ([], "is damaged"),
    ],
)
def test_a_record_of_a_later_version_or_a_damaged_one_is_refused(tmp_path, content, problem):
    (tmp_path / "command.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=problem):
        CommandRecord.load(tmp_path)


def test_two_runs_of_one_name_in_different_folders_do_not_share_their_state(tmp_path):
    folders = []
    for number, place in enumerate(("one", "other")):
        path = tmp_path / place / "mine"
        path.mkdir(parents=True)
        options = SearchOptions(space="pets")
        CommandRecord(run_id=str(number), arguments=options, asked=options).save(path)
        folders.append(RunFolder(path))
    tables = [ResultsTable(folder, settings={}, dimensions=[], labels=[]) for folder in folders]
    budgets = [TimeBudget(folder, None) for folder in folders]
    tables[0].consecutive_failures, budgets[0].spent = 3, 60.0
    assert [consecutive_failures(folder) for folder in folders] == [3, 0]
    assert [seconds_spent(folder) for folder in folders] == [60.0, 0.0]
    folders[0].path.rename(tmp_path / "moved")
    assert seconds_spent(RunFolder(tmp_path / "moved")) == 60.0
