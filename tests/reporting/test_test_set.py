"""`--test-split`: which images are held out, that nobody opens them before the end, and what is said of them then."""

import html
import json
import random
import shutil
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from opened import watched
from run_tables import write_run
from searches import PINNED, Search, completed, settings, tables
from tiny_run import draw_images, make_run, write_json

from search import export
from search.options.arguments import parse_arguments
from search.options.search_options import SearchOptions
from search.reporting.error_analysis import read_analysis
from search.reporting.test_set import compare, hold_out, lines, mcnemar, read_once, score
from search.run import conclude
from search.runs.paths import RunFolder
from search.runs.run_record import load, wilson_interval
from search.spaces.space import Range, load_space
from search.tuning.tuner import RunOptions
from trainables.data.held_out_images import WithoutTestImages, set_aside, without_test_images
from trainables.data.labelled_images import DataError, ImageFolder
from trainables.data.layouts import find_images
from trainables.data.source import images_digest, images_of
from trainables.inference.model_folder import read_model
from trainables.inference.predictor import Predictor
from trainables.inference.split_record import read_split
from trainables.ray.worker_group import GroupSize


def folder_of(counts: dict[str, int], valid: dict[str, int] | None = None) -> ImageFolder:
    """Images that are names alone: so many of each class, and so many for validation where the data has a split."""
    entries = [
        (f"{'train/' if valid else ''}{name}/{i}.jpg", name, False) for name in counts for i in range(counts[name])
    ]
    entries += [(f"val/{name}/{i}.jpg", name, True) for name in valid or {} for i in range(valid[name])]
    paths, names, given = zip(*sorted(entries), strict=True)
    classes = tuple(sorted(counts))
    labels = tuple(map(classes.index, names))
    return ImageFolder(Path("/images"), "class folders", paths, labels, classes, given if valid else None)


def counts_of(images: ImageFolder) -> dict[str, int]:
    return dict(Counter(images.classes[label] for label in images.labels))


# --- Which images -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_the_share_of_every_class_is_held_out_and_nothing_is_lost(seed):
    images = folder_of({"cat": 50, "dog": 24, "emu": 3, "fox": 10})
    kept, test = set_aside(images, 0.2, seed)
    assert counts_of(test) == {"cat": 10, "dog": 5, "emu": 1, "fox": 2}
    assert sorted(kept.paths + test.paths) == list(images.paths)
    assert kept.classes == test.classes == images.classes
    for part in (kept, test):
        assert all(path.startswith(part.classes[label]) for path, label in zip(part.paths, part.labels, strict=True))


def test_which_ones_is_told_by_the_seed_and_not_by_the_order_or_the_place():
    images = folder_of({"cat": 30, "dog": 30})
    order = random.Random(1).sample(range(60), 60)
    shuffled = replace(
        images,
        root=Path("/elsewhere"),
        paths=tuple(images.paths[i] for i in order),
        labels=tuple(images.labels[i] for i in order),
    )
    expected = set(set_aside(images, 0.2, 0)[1].paths)
    assert set(set_aside(shuffled, 0.2, 0)[1].paths) == expected
    assert set(set_aside(images, 0.2, 1)[1].paths) != expected


def test_another_class_does_not_change_what_is_held_out_of_the_others():
    few, more = folder_of({"cat": 30, "dog": 30}), folder_of({"bee": 9, "cat": 30, "dog": 30})
    of_both = {path for path in set_aside(more, 0.2, 0)[1].paths if not path.startswith("bee")}
    assert of_both == set(set_aside(few, 0.2, 0)[1].paths)


def test_every_image_is_as_likely_to_be_held_out():
    images = folder_of({"cat": 10, "dog": 10}, valid={"cat": 5, "dog": 5})
    held = Counter(path for seed in range(600) for path in set_aside(images, 0.2, seed)[1].paths)
    assert len(held) == 30
    assert min(held.values()) > 70 and max(held.values()) < 180  # 120 expected, standard deviation 10


def test_a_split_that_the_data_came_with_gives_from_both_parts_alike():
    images = folder_of({"cat": 80, "dog": 40}, valid={"cat": 20, "dog": 10})
    kept, test = set_aside(images, 0.2, 0)
    of_valid = {test.classes[label] for label, valid in zip(test.labels, test.valid, strict=True) if valid}
    assert counts_of(test) == {"cat": 20, "dog": 10} and of_valid == {"cat", "dog"}
    assert sum(test.valid) == 6 and sum(kept.valid) == 24


@pytest.mark.parametrize("seed", range(20))
def test_no_part_of_a_class_is_held_out_as_a_whole(seed):
    kept, _ = set_aside(folder_of({"cat": 9, "dog": 1}, valid={"cat": 1, "dog": 9}), 0.5, seed)
    left = Counter(zip(kept.labels, kept.valid, strict=True))
    assert len(left) == 4 and counts_of(kept) == {"cat": 5, "dog": 5}


def test_a_class_of_two_keeps_both_and_one_of_three_gives_one():
    assert counts_of(set_aside(folder_of({"cat": 2, "dog": 3}), 0.2, 0)[1]) == {"dog": 1}


@pytest.mark.parametrize("counts, share", [({"cat": 20, "dog": 4}, 0.7), ({"cat": 2, "dog": 9}, 0.5)])
def test_a_share_that_leaves_too_little_is_refused(counts, share):
    small = min(counts, key=counts.get)
    with pytest.raises(
        DataError, match=rf"--test-split {share} leaves too few images in 1 class \('{small}'\) .*smaller"
    ):
        set_aside(folder_of(counts), share, 0)


# --- The same for everybody -------------------------------------------------------------------------------------------


@pytest.fixture
def birds(tmp_path) -> Path:
    return draw_images(tmp_path / "birds", each=10)


def test_every_node_leaves_out_the_same_images(birds, tmp_path):
    kept = hold_out(find_images(birds), 0.2, 7)
    shutil.copytree(birds, tmp_path / "node" / "birds")
    there = WithoutTestImages(str(tmp_path / "node" / "birds"), 0.2, 7)
    assert images_of(there, images_digest(kept)).paths == kept.paths and len(kept.paths) == 24
    with pytest.raises(DataError, match="not those that the search started with"):
        images_of(str(birds), images_digest(kept))


def test_a_run_tells_later_readers_its_share(birds):
    found = find_images(birds)
    shares = [SearchOptions.from_record(record).held_out_share for record in ({"test_split": 0.2}, {})]
    assert shares == [0.2, None] and SearchOptions.from_record({"test_split": "/elsewhere"}).held_out_share is None
    assert without_test_images(found, None, 0) is found


def test_a_folder_of_test_images_leaves_all_others(birds, tmp_path, capsys):
    test = draw_images(tmp_path / "test", each=2)
    found = find_images(birds)
    assert hold_out(found, test, 0) == found
    assert "test: 6 images held out" in capsys.readouterr().out


def test_a_test_folder_that_is_none_is_refused(birds, tmp_path):
    found, other = find_images(birds), draw_images(tmp_path / "other", each=2)
    with pytest.raises(DataError, match=r"There is no folder .*nowhere"):
        hold_out(found, tmp_path / "nowhere", 0)
    shutil.copyfile(birds / "wren" / "0.jpg", other / "wren" / "9.jpg")
    (other / "robin" / "9.jpg").symlink_to(birds / "robin" / "0.jpg")
    with pytest.raises(DataError, match="1 of its images are among those to train and validate on"):
        hold_out(found, other, 0)
    (other / "robin").rename(other / "Robin")
    with pytest.raises(DataError, match=r"only one of them has 2 classes \('Robin', 'robin'\)"):
        hold_out(found, other, 0)


def test_the_option_takes_a_share_or_a_folder(capsys):
    words = ["--space", "quickstart", "--test-split"]
    assert parse_arguments([*words, "0.2"]).test_split == 0.2
    assert parse_arguments([*words, "test"]).test_split == Path("test").absolute()
    for wrong in ("0", "1", "20", "nan"):
        with pytest.raises(SystemExit):
            parse_arguments([*words, wrong])
        assert f"{wrong!r} is neither a share between 0 and 1, such as 0.2, nor a folder" in capsys.readouterr().err


# --- What is said of them ---------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.best.mkdir(parents=True)
    write_json(folder.best / "metrics.json", {"number": 6})
    return folder


def answers(*counts: tuple[bool, bool, int]) -> list[tuple[bool, ...]]:
    """Of two models: so many images with such answers."""
    return list(zip(*[(one, other) for one, other, count in counts for _ in range(count)], strict=True))


def written(folder: RunFolder, ours: tuple, theirs: tuple | None, number: int = 6) -> list[str]:
    first, pair = (score(0, theirs), compare(ours, theirs)) if theirs else (None, None)
    write_json(folder.test, {"unreadable": 0, "winner": score(number, ours), "trial_0": first, "pair": pair})
    return lines(folder)


def test_the_p_value_is_that_of_a_fair_coin():
    assert mcnemar(0, 0) == mcnemar(3, 3) == 1
    assert mcnemar(5, 0) == mcnemar(0, 5) == 2 / 2**5
    assert mcnemar(9, 2) == pytest.approx(0.0654, abs=1e-4)
    assert 0 < mcnemar(3000, 2000) < 1e-40


def test_a_clear_winner_is_said_to_be_better_by_more_than_noise(folder):
    ours, theirs = answers((True, True, 84), (True, False, 29), (False, True, 2), (False, False, 5))
    assert written(folder, ours, theirs) == [
        "test: trial 6 has 7 of 120 wrong (5.8 %, 95 % interval 2.9 to 11.6 %); "
        "trial 0 has 34 of 120 wrong (28.3 %, 95 % interval 21.0 to 37.0 %)",
        "test: only trial 6 is right on 29 images, only trial 0 on 2 (McNemar's p 4.6e-07): "
        "trial 6 is better than trial 0 by more than noise",
    ]
    assert score(6, ours)["interval"] == wilson_interval(7 / 120, 120)


def test_a_small_difference_is_not_taken_for_more_than_noise(folder):
    assert written(folder, *answers((True, True, 84), (True, False, 4), (False, True, 2)))[1].endswith("may be noise")


def test_a_winner_that_tests_worse_is_not_said_to_be_better(folder):
    text = written(folder, *answers((True, True, 84), (True, False, 2), (False, True, 29)))[1]
    assert text.endswith("trial 0 is better than trial 6 by more than noise")


def test_a_probe_that_has_won_is_called_one(folder):
    write_json(folder.best / "metrics.json", {"number": -3})
    both = answers((True, True, 84), (True, False, 29), (False, True, 2), (False, False, 5))
    first, second = written(folder, *both, number=-3)
    assert first.startswith("test: probe 3 has 7 of 120 wrong") and "; trial 0 has 34" in first
    assert "only probe 3 is right on 29 images" in second and "probe 3 is better than trial 0" in second
    write_json(folder.best / "metrics.json", {"number": -2})
    assert lines(folder)[-1].startswith("test: probe 2 has won since")


def test_without_a_trial_0_the_winner_stands_alone(folder):
    assert written(folder, (True, False), None) == [
        "test: trial 6 has 1 of 2 wrong (50.0 %, 95 % interval 9.5 to 90.5 %)"
    ]


def test_a_later_winner_is_not_taken_for_the_tested_one(folder):
    write_json(folder.best / "metrics.json", {"number": 9})
    assert written(folder, (True, False), None)[1] == (
        "test: trial 9 has won since, but is not tested: the images are read only once"
    )


# --- Reading them -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    """A run whose winner and trial 0 are two models, with a quarter of `data` held out."""
    run, other = (tmp_path_factory.mktemp("runs") / name for name in ("run", "other"))
    make_run(run, data)
    make_run(other, data, epochs=1, lr_max=1e-5)
    shutil.move(other / "best", run / "first")
    for model, number in (("best", 6), ("first", 0)):
        write_json(run / model / "metrics.json", {"number": number})
    command = {"data": str(data), "split_seed": 3, "arguments": {"test_split": 0.25, "address": None}}
    write_json(run / "command.json", command)
    return run


@pytest.fixture
def ended(trained, tmp_path) -> RunFolder:
    return RunFolder(shutil.copytree(trained, tmp_path / "run"))


def known_digest(data: Path) -> str:
    return images_digest(without_test_images(find_images(data), 0.25, 3))


def test_winner_and_trial_0_are_scored_by_their_labels_of_the_same_images(ended, data):
    read_once(ended, known_digest(data))
    found = json.loads(ended.test.read_text())
    _, test = set_aside(find_images(data), 0.25, 3)
    files, truth = [test.root / path for path in test.paths], [test.classes[label] for label in test.labels]
    right = {}
    for name, model in (("winner", ended.best), ("trial_0", ended.first)):
        labels = [prediction.labels[0] for prediction in Predictor(read_model(model)).predict(files)]
        right[name] = [label == name for label, name in zip(labels, truth, strict=True)]
        assert (found[name]["total"], found[name]["wrong"]) == (15, 15 - sum(right[name]))
    assert right["winner"] != right["trial_0"]
    assert found["pair"] == compare(right["winner"], right["trial_0"])


@pytest.mark.usefixtures("no_new_process")
def test_a_test_image_that_cannot_be_read_is_left_out_and_said(ended, data, tmp_path):
    copy = shutil.copytree(data, tmp_path / "copy")
    write_json(ended.command, json.loads(ended.command.read_text()) | {"data": str(copy)})
    (copy / set_aside(find_images(copy), 0.25, 3)[1].paths[0]).write_bytes(b"no image")
    read_once(ended, known_digest(copy))
    assert json.loads(ended.test.read_text())["winner"]["total"] == 14
    assert lines(ended)[-1] == "test: 1 image skipped: unreadable"


def test_images_that_changed_during_the_search_are_not_taken_for_held_out_ones(ended, data, capsys):
    read_once(ended, "of other images")
    assert "no test: the images in" in capsys.readouterr().out
    assert not ended.test.exists() and lines(ended) == []


def test_running_out_of_memory_over_the_test_images_is_said(ended, data, capsys):
    """torch says it with an error of its own, in the process that labels them."""
    preprocessing = ended.best / "preprocessing.json"
    write_json(preprocessing, json.loads(preprocessing.read_text()) | {"image_size": 2_000_000})
    read_once(ended, known_digest(data))
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith("no test: RuntimeError: ") and "memory" in said
    assert ". To try again: python -m search.run --resume --name run" in said and not ended.test.exists()


def test_a_search_whose_test_goes_wrong_still_has_its_summary_its_report_and_its_exit_code(tmp_path, capsys):
    folder = RunFolder(write_run(tmp_path / "run"))  # whose best/ has no number
    birds = draw_images(tmp_path / "birds", each=4)
    of_run = {"data": str(birds), "arguments": {"recipes": None, "test_split": 0.25, "address": None}}
    write_json(folder.command, json.loads(folder.command.read_text()) | of_run)
    space = replace(load_space("pets"), dimensions={"lr_max": Range(1e-4, 1e-2)})
    options = SearchOptions(space="pets", report="tables", time_budget=60.0, test_split=0.25, metric="error_rate")
    digest = images_digest(without_test_images(find_images(birds), 0.25, 0))
    found = {"data": str(birds), "data_digest": digest, "labels": [], "group_size": GroupSize()}
    assert conclude(RunOptions(options=options, space=space, folder=folder, **found), 60.0, interrupted=False) == 0
    said = capsys.readouterr().out
    for part in (
        "no test: KeyError",
        "the time budget of 1 min 0 s is spent",
        "10 trials in 1 min 0 s",
        "best: trial ",
        "report: ",
        "next: ",
    ):
        assert part in said
    assert folder.report.is_file()


# --- A whole search ---------------------------------------------------------------------------------------------------


@pytest.mark.ray
@pytest.mark.skipif(sys.platform != "linux", reason="inotify")
def test_nobody_opens_the_test_images_before_the_search_has_ended_and_nobody_twice(tmp_path, ray_head, capsys):
    data = draw_images(tmp_path / "birds", each=20)
    _, test = set_aside(find_images(data), 0.2, 0)
    files = [test.root / path for path in test.paths]
    searched = "arch=test_resnet.r160_in1k epochs=2 head=linear mixup_alpha=0 lr_max=0.0001..0.02"
    command = ["--space", "quickstart", "--data", data, "--test-split", 0.2, "--trials", 3, "--seed", 1]
    command += ["--cpus-per-worker", 1, "--max-concurrent", 1, "--address", ray_head, *settings(PINNED, searched)]

    def trials_ended() -> bool:
        statuses = [row["status"] for row in tables(run)[0]] if (run / "trials.csv").is_file() else []
        said = any(line.startswith("labelling the 12 test images with trial ") for line in search.lines)
        return len(statuses) == 3 and "running" not in statuses and said

    run = tmp_path / "results" / "run"
    search = Search(run, *command)
    with watched(files, trials_ended) as opened:
        assert search.wait() == 0, search.text
    assert search.lines[-1] == "False"  # no torch in the driver
    assert "test: 12 images held out" in search.text and "labelling the validation images" in search.text
    found = json.loads((run / "test.json").read_text())
    models = 2 if found["trial_0"] else 1
    sizes = Counter(path.stat().st_size for path in data.rglob("*.jpg"))
    compared = {(file, False): 1 for file in files if sizes[file.stat().st_size] > 1}  # with images as large, by bytes
    assert Counter(opened) == compared | {(file, True): models for file in files}

    best = min(completed(run), key=lambda row: (float(row["error_rate"]), float(row["valid_loss"])))
    winner = found["winner"]
    assert (winner["trial"], winner["total"]) == (int(best["number"]), 12)
    said = lines(RunFolder(run))
    assert set(said) <= set(search.lines)
    report = html.unescape((run / "report.html").read_text())
    assert all(f'<p class="test">{line}</p>' in report for line in said)
    assert {int(row["train_images"]) + int(row["valid_images"]) for row in tables(run)[1]} == {48}

    search, before = Search(run, "--resume", "--address", ray_head), (run / "test.json").read_bytes()
    with watched(files, trials_ended) as opened:
        assert search.wait() == 0, search.text
    assert set(opened) <= set(compared)
    assert set(said) <= set(search.lines) and (run / "test.json").read_bytes() == before

    analysis = read_analysis(load(run))  # of the images that validated it
    assert analysis.counts.sum() - analysis.counts.trace() == round(float(best["error_rate"]) * analysis.counts.sum())

    search = Search(run, "--resume", "--address", ray_head, "--trials", 4)  # one that has ended is extended
    with watched(files, bool) as opened:
        assert search.wait() == 0, search.text
    assert set(opened) <= set(compared) and (run / "test.json").read_bytes() == before
    assert "now with --trials 4 (3 before)" in search.text and "and not read again" in search.text
    assert [row["number"] for row in tables(run)[0]] == ["0", "1", "2", "3"] and "4 trials in " in search.text
    command = json.loads((run / "command.json").read_text())
    assert (command["arguments"]["trials"], command["resumes"][-1]["changed"]) == (4, ["trials"])
    assert "--resume" not in command["argv"]

    with watched(files, bool) as opened:
        assert export.main([str(run), "--out", str(tmp_path / "exported")]) == 0
    assert "check passed" in capsys.readouterr().out and not opened
    assert read_split(tmp_path / "exported").images == images_digest(without_test_images(find_images(data), 0.2, 0))
    tested = json.loads((run / "best" / "metrics.json").read_text())["number"] == winner["trial"]
    card = (tmp_path / "exported" / "README.md").read_text()
    assert (said[0].split(";")[0].removeprefix("test: ") in card) == tested
