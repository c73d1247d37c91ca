"""Whole searches with options that change their course: retraining, the book's recipes, rates from the finder; and one
whose trials all fail. All on one Ray, with a tiny network on tiny images."""

import json
import re
from pathlib import Path

import pytest
from optuna.trial import TrialState
from searches import PINNED, SEED, Search, settings, small_search, tables
from tiny_run import draw_images

from search.runs.run_record import load
from search.spaces.space import load_space

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def class_folders(tmp_path_factory) -> Path:
    return draw_images(tmp_path_factory.mktemp("options") / "data", each=20)


def test_the_best_are_trained_again_and_the_front_is_marked(class_folders, ray_head, tmp_path):
    """A kill while they are trained again takes nothing with it."""
    pinned = ("--set", "epochs=1..4", "--set", "lr_max=0.001..0.01")
    method = ("--objective", "error,seconds", "--confirm", 2)
    search = small_search(tmp_path / "confirmed", class_folders, "--trials", 3, *method, *pinned, "--address", ray_head)
    search.wait_for(r"trial 4 .*epoch 1/")
    search.process.kill()
    search.wait()
    resumed = Search(search.folder, "--resume", "--address", ray_head)
    assert resumed.wait() == 0, resumed.text
    trials, _ = tables(search.folder)
    first, again = trials[:3], trials[3:]
    assert [row["status"] for row in trials] == ["completed"] * 3 + ["retrained"] * 6
    best = [row for row in first if row["confirmed_error_rate"]]
    assert len(best) == 2
    for row in best:
        mine = [other for other in again if other["retrains"] == row["number"]]
        assert {other["seed"] for other in mine} == {str(SEED + n) for n in (1, 2, 3)}
        assert {other["epochs_total"] for other in mine} == {row["epochs_total"]}
        mean = sum(float(other["error_rate"]) for other in mine) / 3
        assert float(row["confirmed_error_rate"]) == pytest.approx(mean, abs=1e-5)
    scores = ("confirmed_error_rate", "error_rate", "valid_loss")
    winner = min(best, key=lambda row: [float(row[score]) for score in scores])
    assert json.loads((search.folder / "best/metrics.json").read_text())["trial_id"] == winner["trial_id"]
    assert re.search(rf"best: trial {winner['number']} with .* on average over 3 more seeds\)", resumed.text)
    quickest = min(first, key=lambda row: float(row["seconds"]))
    assert quickest["front"] == "yes" and "best for their cost: " in resumed.text
    assert all(len(trial.values) == 2 for trial in load(search.folder).study.trials)


def test_five_failures_in_a_row_end_the_search(class_folders, ray_head, tmp_path):
    hopeless = ("--set", "lr_max=9,10", "--set", "arch=test_vit.r160_in1k", "--set", "epochs=2")
    search = small_search(tmp_path / "hopeless", class_folders, "--trials", 30, *hopeless, "--address", ray_head)
    assert search.wait() == 1, search.text
    rows, _ = tables(search.folder)
    assert [row["status"] for row in rows[:5]] == ["failed"] * 5
    assert len(rows) <= 6  # one more may have started
    assert all(row["status"] != "running" for row in rows)
    assert "no trial completed" in search.text
    assert not (search.folder / "best").exists()
    assert not [trial for trial in load(search.folder).study.trials if trial.state == TrialState.RUNNING]
    again = Search(search.folder, "--resume", "--address", ray_head)  # it goes on, and gives up likewise
    assert again.wait() == 1, again.text
    later, _ = tables(search.folder)
    assert later[: len(rows)] == rows and len(rows) + 5 <= len(later) <= len(rows) + 6


def test_the_books_recipes_are_run_and_shown_beside_the_published_errors(class_folders, ray_head, tmp_path):
    pinned = f"{PINNED} arch=test_resnet.r160_in1k head=linear concat_pool=false epochs=1 lr_max=1e-4 lr_ratio=1"
    common = ("--data", class_folders, "--max-concurrent", 1, "--cpus-per-worker", 1, "--address", ray_head)
    search = Search(tmp_path / "book", "--space", "pets", "--recipes", "book", *common, *settings(pinned))
    assert search.wait() == 0, search.text
    rows, _ = tables(search.folder)
    assert [row["status"] for row in rows] == ["completed"] * len(rows)
    assert (
        len({tuple(row[name] for name in ("lr_max_frozen", "lr_ratio_frozen", "div")) for row in rows}) == len(rows) > 2
    )
    for recipe in load_space("pets").recipes["book"]:
        [line] = [line for line in search.lines if line.startswith(recipe.name + " ")]
        trial, error = re.search(r" (\d+) +2/2 +\d+ +([0-9.]+) %", line).groups()
        assert float(error) == pytest.approx(100 * float(rows[int(trial)]["error_rate"]), abs=0.06)
        assert f"{100 * recipe.error_rate:.1f} %" in line
    assert {row["presize"] for row in rows} == {"40"}  # what is pinned is in the table


def test_the_finder_narrows_the_rates_of_a_search_once(class_folders, ray_head, tmp_path):
    narrow = ("--lr-range", "auto", "--set", "lr_max=1e-5..1", "--set", "lr_max_frozen=1e-5..1", "--set", "epochs=1")
    search = small_search(tmp_path / "narrowed", class_folders, "--trials", 2, *narrow, "--address", ray_head)
    assert search.wait() == 0, search.text
    found = re.search(r"searching lr_max_frozen=(\S+)\.\.(\S+), lr_max=(\S+)\.\.(\S+), curves", search.text).groups()
    frozen, unfrozen = list(map(float, found[:2])), list(map(float, found[2:]))
    for low, high in (frozen, unfrozen):
        assert 1e-5 <= low < high <= 1
        assert high / low < 2e4
    for row in tables(search.folder)[0]:
        assert frozen[0] <= float(row["lr_max_frozen"]) <= frozen[1]
        assert unfrozen[0] <= float(row["lr_max"]) <= unfrozen[1]
    pictures = {path.name for path in (search.folder / "lr_find").iterdir()}
    archs = ("test_resnet.r160_in1k", "test_vit.r160_in1k")
    assert pictures == {f"{arch}-{stage}.png" for arch in archs for stage in ("frozen", "unfrozen")}
    command = json.loads((search.folder / "command.json").read_text())
    assert command["arguments"]["lr_range"] == "space"  # a resumed search keeps the bounds and runs no finder
    assert any(text.startswith("lr_max_frozen=") for text in command["arguments"]["set"][-2:])
    assert search.lines[-1] == "False"  # no torch in the driver
