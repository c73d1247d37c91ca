"""bench/budget.py: who sees which images, which model counts at a time, what is written, and that it resumes."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from in_process import run_here
from searches import ROOT

from trainables.data.layouts import find_images

sys.path.insert(0, str(ROOT / "bench"))

import budget
import budget_clock
import budget_methods
import budget_table


def record(method: str, models: list[dict], *, split: int = 0, minutes: float = 10, **others) -> dict:
    job = {"set": "birds", "split": split, "method": method, "minutes": minutes, "words": "--archs a"}
    return (
        job | {"train_images": 27, "test_images": 9, "majority_error": 0.75, "seconds": 9.0, "models": models} | others
    )


def model(seconds: float, valid_error: float, test_error: float, valid_loss: float = 0.0) -> dict:
    return {"seconds": seconds, "valid_error": valid_error, "valid_loss": valid_loss, "test_error": test_error}


# --- Splits -----------------------------------------------------------------------------------------------------------


def test_a_quarter_of_every_class_is_for_the_test_and_a_method_finds_only_the_rest(colour_folder):
    images, tests = find_images(colour_folder), []
    for number in (0, 0, 1):
        with budget_methods.split_folders(images, number) as part:
            assert part.counts == {"train_images": 27, "test_images": 9, "majority_error": pytest.approx(2 / 3)}
            train, test = ([file.resolve() for file in sorted(each.glob("*/*"))] for each in (part.train, part.test))
            assert not set(train) & set(test) and len({*train, *test}) == len(images.paths)
            found = find_images(part.train)
            assert found.classes == images.classes and len(found.paths) == 27
            assert all(path.split("/")[0] in Path(path).name for path in found.paths)  # the labels are those of before
            tests.append(test)
    assert tests[0] == tests[1] != tests[2]


def test_a_method_without_a_model_has_the_error_of_the_most_frequent_class(tmp_path):
    for name, count in {"train/a": 3, "train/b": 2, "test/a": 1, "test/b": 3}.items():
        (tmp_path / name).mkdir(parents=True)
        for i in range(count):
            (tmp_path / name / f"{i}.jpg").touch()
    part = budget_methods.Split(0, tmp_path / "train", tmp_path / "test")
    assert part.counts["majority_error"] == 0.75
    assert budget_table.errors_at(record("search", []), 1) == {"search": (0.75, False)}


# --- What counts ------------------------------------------------------------------------------------------------------


def test_only_models_that_are_ready_in_time_count_and_validation_chooses_among_them():
    probe = record(
        "probe", [model(20, 0.2, 0.30), model(40, 0.1, 0.20, 0.9), model(50, 0.1, 0.25, 0.8), model(90, 0, 0)]
    )
    assert budget_table.errors_at(probe, 0.1) == {"probe_best": (0.75, False), "probe_median": (0.75, False)}
    assert budget_table.errors_at(probe, 1) == {"probe_best": (0.25, True), "probe_median": (0.25, True)}
    assert budget_table.errors_at(probe, 3)["probe_best"] == (0, True)


def test_the_numbers_are_means_over_the_splits_by_set_time_and_method():
    records = [record("search", [model(60, 0.1, error)], split=i, minutes=1) for i, error in enumerate((0.1, 0.2, 0.6))]
    records += [record("probe", [model(70, 0.1, 0.3)])]
    found = budget_table.summarise(records, [1, 3])
    assert found["birds"]["1"]["search"]["error_mean"] == pytest.approx(0.3)
    assert found["birds"]["1"]["search"]["error_median"] == 0.2
    assert found["birds"]["1"]["search"]["error_sem"] == pytest.approx(0.152753, abs=1e-6)
    assert found["birds"]["1"]["search"]["splits"] == 3
    assert found["birds"]["1"]["probe_best"] | {"error_sem": None, "no_model": 1} == found["birds"]["1"]["probe_best"]
    assert found["birds"]["3"].keys() == {"probe_best", "probe_median"}  # no search had three minutes
    assert found["birds"]["3"]["probe_best"]["no_model"] == 0


def test_a_short_run_says_nothing_about_longer_times():
    short, long = record("fastai", [model(50, 0.1, 0.2)], minutes=1), record("fastai", [model(55, 0.1, 0.4)])
    assert budget_table.summarise([short], [1, 3])["birds"].keys() == {"1"}
    found = budget_table.summarise([short, long], [1, 3])["birds"]
    assert [found[each]["fastai"]["errors"] for each in ("1", "3")] == [[0.4], [0.4]]


def test_the_clock_stands_still_while_test_images_are_labelled_and_ends_the_process(tmp_path):
    code = (
        "import time; from pathlib import Path; from budget_clock import Clock\n"
        f"clock = Clock(time.monotonic() - 10, 10.5, Path({str(tmp_path / 'models')!r}))\n"
        "with clock.stopped():\n    time.sleep(0.7); clock.record(arch='a')\n"
        "time.sleep(60)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "bench", timeout=30)
    [line] = (tmp_path / "models").read_text().splitlines()
    assert done.returncode == 0 and 10 <= json.loads(line)["seconds"] < 10.4


# --- The command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def ran(monkeypatch):
    """The methods that run, which are not the real ones."""
    calls = []

    def method(*args, minutes, **options):
        calls.append((Path(args[0]).name, minutes))
        return {"seconds": 60 * minutes, "exit_code": 0, "models": [model(30, 0.1, 0.1 * len(calls))]}

    for name in ("search", "peer"):
        monkeypatch.setattr(budget, name, method)
    monkeypatch.setattr(budget, "warm_up", lambda *args: None)
    monkeypatch.setattr(budget, "versions", lambda *packages: dict.fromkeys(packages, "1"))
    return calls


def arguments(colour_folder: Path, out: Path) -> list[str]:
    words = ["--data", f"birds={colour_folder}", "--archs", "a,b", "--methods", "search,before,probe"]
    return [*words, "--before", str(out.parent / "as-it-was"), "--minutes", "1,3", "--splits", "2", "--out", str(out)]


def test_an_interrupted_benchmark_goes_on_and_writes_both_files(ran, colour_folder, tmp_path):
    words = arguments(colour_folder, tmp_path / "out")
    assert run_here(budget.main, *words, cwd=tmp_path).returncode in (0, None)
    here = (ROOT.name, 1.0), (ROOT.name, 3.0), ("as-it-was", 1.0), ("as-it-was", 3.0), ("budget_probe.py", 3.0)
    assert ran == [*here, *here]
    lines = (tmp_path / "out" / "budget.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 11
    (tmp_path / "out" / "budget.jsonl").write_text("".join(lines[:-2]) + lines[-2][:40])  # killed while it wrote
    ran.clear()
    run_here(budget.main, *words, cwd=tmp_path)
    assert ran == [("as-it-was", 3.0), ("budget_probe.py", 3.0)]

    result = json.loads((tmp_path / "out" / "budget.json").read_text())
    assert set(result["birds"]) == {"1", "3"}
    assert set(result["birds"]["3"]) == {"search", "before", "probe_best", "probe_median"}
    assert {"error_mean", "error_sem", "error_median", "splits"} < set(result["birds"]["3"]["search"])
    assert {"hardware", "versions", "date", "command"} < set(result)
    table = (tmp_path / "out" / "budget.md").read_text()
    assert "| this project, before | " in table and "AutoGluon MultiModal was left out" in table
    assert "27 images to train and choose by, 9 to test; n = 2 splits" in table
    for text in (table, json.dumps(result)):
        assert str(colour_folder) not in text and str(tmp_path) not in text

    ran.clear()
    again = run_here(budget.main, "--report-only", "--minutes", "1,3", "--out", tmp_path / "out", cwd=tmp_path)
    assert again.returncode in (0, None) and not ran and (tmp_path / "out" / "budget.md").read_text() == table


def test_results_of_other_settings_are_not_mixed(ran, colour_folder, tmp_path):
    words = arguments(colour_folder, tmp_path / "out")
    run_here(budget.main, *words, cwd=tmp_path)
    ran.clear()
    done = run_here(budget.main, *words, "--sizes", "64", cwd=tmp_path)
    assert done.returncode and not ran and "has other results: search on birds ran with" in str(done)


def test_a_command_that_fails_is_no_result_and_runs_again(ran, colour_folder, tmp_path, monkeypatch):
    words, method = arguments(colour_folder, tmp_path / "out"), budget.search

    def failing(*args, **options):
        raise budget_methods.Failed("exit code 2: no such option")

    monkeypatch.setattr(budget, "search", failing)
    done = run_here(budget.main, *words, cwd=tmp_path)
    assert "exit code 2: no such option" in done.stdout and "8 commands failed" in str(done)
    monkeypatch.setattr(budget, "search", method)
    ran.clear()
    assert run_here(budget.main, *words, cwd=tmp_path).returncode in (0, None) and len(ran) == 8


@pytest.mark.parametrize(("code", "told"), [("print('no trial completed')", True), ("1 / 0", False)])
def test_a_search_that_ends_without_a_model_is_a_result_unless_it_broke(code, told, tmp_path):
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "__init__.py").touch()
    (tmp_path / "search" / "run.py").write_text(code)
    part = budget_methods.Split(0, tmp_path, tmp_path)
    if told:
        found = budget_methods.search(tmp_path, [], part, minutes=1, margin=0)
        assert found["models"] == [] and found["ended"] and found["seconds"] < 60
    else:
        with pytest.raises(budget_methods.Failed, match="ZeroDivisionError"):
            budget_methods.search(tmp_path, [], part, minutes=1, margin=0)


def test_what_is_in_best_when_the_minutes_are_over_is_the_model(tmp_path, monkeypatch):
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "__init__.py").touch()
    (tmp_path / "search" / "run.py").write_text(
        "import sys, time; from pathlib import Path\n"
        "best = Path(sys.argv[sys.argv.index('--results') + 1]) / 'run' / 'best'; best.mkdir(parents=True)\n"
        "(best / 'model.safetensors').touch()\n"
        "(best / 'metrics.json').write_text('{\"number\": 3, \"error_rate\": 0.25}')\n"
        "time.sleep(60)"
    )
    monkeypatch.setattr(budget_methods, "predicted_error", lambda repo, model, test: 0.5)
    found = budget_methods.search(tmp_path, [], budget_methods.Split(0, tmp_path, tmp_path), minutes=0.08, margin=0)
    assert not found["ended"] and 4.8 <= found["seconds"] < 15
    [model] = found["models"]
    assert (model["number"], model["valid_error"], model["test_error"]) == (3, 0.25, 0.5)


def test_the_commands_that_are_measured_take_what_they_are_given(tmp_path):
    words = budget.words_of(budget.parse_arguments(["--data", "a=b", "--archs", "a,b"]), "probe")
    given = ["--train", "a", "--test", "b", *words, "--models", "m", "--seconds", "1", "--started", "0.5"]
    args = budget_clock.parser_of("").parse_args(given)
    assert (args.archs, args.sizes, args.presize) == ("a,b", "160,192,224", 256)


def test_the_probe_separates_colours(colour_folder):
    pytest.importorskip("sklearn")
    from budget_probe import decoded, fit

    files = sorted((colour_folder / "images").glob("*.jpg"))
    images = decoded(files, 32)
    assert images.shape == (36, 32, 32, 3)
    features = images.reshape(36, -1, 3).mean(1).astype("float32")
    labels = np.arange(36) // 12
    train, valid = np.flatnonzero(np.arange(36) % 4), np.flatnonzero(np.arange(36) % 4 == 0)
    found, told = fit(features, labels, train, valid)
    assert told["valid_error"] == 0 and (found.predict(features) == labels).all()
