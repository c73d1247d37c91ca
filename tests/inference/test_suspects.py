"""Which images a probe suspects, the file that lists them, and the command that writes it."""

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_run import draw_images, make_run
from weights import draw_weights

from search.reporting import suspects as of_a_run
from search.runs.paths import RunFolder
from trainables import interpret
from trainables.data.layouts import find_images
from trainables.data.left_out_images import read_left_out, remaining
from trainables.data.presize import presize
from trainables.data.presized_images import PresizedImages
from trainables.inference import suspects
from trainables.inference.suspects import Suspect, counted, find_suspects, read_suspects, write_suspects
from trainables.recipe import Recipe

RECIPE = Recipe(arch="test_resnet.r160_in1k", presize=40, image_size=32, precision="fp32", batch_size=8)
MOVED = {"robin/blue_3.jpg": "blue_tit", "wren/robin_5.jpg": "robin", "blue_tit/wren_2.jpg": "wren"}
BROKEN = "wren/7.jpg"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def birds(cache, tmp_path_factory) -> Path:
    """Images of three classes, three of them in the folder of another one, and one that is black but for a stripe."""
    root = draw_images(tmp_path_factory.mktemp("data") / "birds", each=24)
    for (moved, true), name in zip(MOVED.items(), ("3.jpg", "5.jpg", "2.jpg"), strict=True):
        (root / true / name).rename(root / moved)
    stripe = np.zeros((48, 48, 3), dtype=np.uint8)
    stripe[:, ::6] = 255
    Image.fromarray(stripe).save(root / BROKEN)
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return draw_weights(tmp_path_factory.mktemp("weights"), RECIPE.arch)


@pytest.fixture(scope="module")
def images(birds) -> PresizedImages:
    return presize(find_images(birds), 40)


@pytest.fixture(scope="module")
def found(images, weights) -> list[Suspect]:
    return find_suspects(RECIPE, images, weights=weights, seed=3)


def test_images_in_the_folder_of_another_class_are_found_with_their_own_class(found, images):
    labels = [each for each in found if each.kind == "label"]
    assert {each.path: each.suggested for each in labels[:3]} == MOVED
    assert all(each.label == each.path.partition("/")[0] and each.score < 0.5 for each in labels)
    valid = {images.paths[i] for i in images.split(seed=3)[1]}
    assert all((each.split == "valid") == (each.path in valid) for each in found)


def test_an_image_that_is_like_no_other_is_found(found):
    assert BROKEN in [each.path for each in found]
    assert sum(each.kind == "outlier" for each in found) <= 1


def test_without_them_no_label_is_doubted(birds, images, weights, found):
    rest = remaining(find_images(birds), [each.path for each in found])
    again = find_suspects(RECIPE, presize(rest, 40), weights=weights, seed=3)
    assert len(again) < len(found) and not {each.path for each in again} & set(MOVED)


def test_features_that_are_not_cached_are_computed_only_if_that_is_allowed(images, weights, monkeypatch, found):
    assert find_suspects(RECIPE, images, weights=weights, seed=3, effort="cached") == found
    other = Recipe(**RECIPE.to_dict() | {"image_size": 40})
    with pytest.raises(ValueError, match="the features of the 72 images are not cached on this machine"):
        find_suspects(other, images, weights=weights, seed=3, effort="cached")
    monkeypatch.setitem(suspects.QUICK, "cpu", 71)
    with pytest.raises(ValueError, match="not cached"):
        find_suspects(other, images, weights=weights, seed=3, effort="quick")
    monkeypatch.setitem(suspects.QUICK, "cpu", 72)
    assert find_suspects(other, images, weights=weights, seed=3, effort="quick")


def test_a_backbone_without_pretrained_weights_finds_none(images):
    with pytest.raises(ValueError, match="trained from scratch"):
        find_suspects(Recipe(**RECIPE.to_dict() | {"pretrained": False}), images)


# --- The file ---------------------------------------------------------------------------------------------------------


def test_the_file_is_what_leave_out_takes_and_its_rows_can_be_deleted(found, tmp_path, images):
    file = tmp_path / "suspects.csv"
    write_suspects(file, found)
    assert [each.path for each in read_suspects(file)] == [each.path for each in found]
    header, *rows = file.read_text().splitlines()
    assert header == "path,label,suggested,score,kind,split"
    file.write_text("\n".join([header, *rows[1:]]))
    assert read_left_out(file) == tuple(sorted(each.path for each in found[1:]))
    assert set(read_left_out(file)) <= set(images.paths)


def test_a_summary_counts_what_is_left_of_it(found, tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    assert of_a_run.lines(folder) == []  # nobody has looked
    write_suspects(folder.suspects, [])
    assert of_a_run.lines(folder) == ["suspects: none, no label looks wrong"]
    labels = [each for each in found if each.kind == "label"]
    write_suspects(folder.suspects, labels[:2])
    (line,) = of_a_run.lines(folder)
    assert line.startswith("suspects: 2 images may be labelled wrongly, see ") and "--leave-out " in line
    folder.suspects.write_text("path;label\n")  # whatever a table program made of it
    assert of_a_run.lines(folder) == []
    outlier = Suspect(path="a", label="b", suggested="", score=0.1, kind="outlier", split="train")
    assert counted([labels[0], outlier]) == "1 image may be labelled wrongly, 1 image is like no other"


# --- The command ------------------------------------------------------------------------------------------------------


def test_the_command_writes_the_file_with_the_backbone_of_the_model(birds, weights, tmp_path, found, capsys):
    settings = RECIPE.to_dict() | {"freeze_epochs": 0, "epochs": 0, "head_init": "probe"}
    run = make_run(tmp_path / "run", birds, weights=weights, **settings)
    out = tmp_path / "out"
    words = ["--model", str(run), "--data", str(birds), "--out", str(out), "--suspects", "cached"]
    assert interpret.main([*words, "--weights", str(weights)]) == 0
    assert f"suspects: {counted(found)}, in {out}/suspects.csv" in capsys.readouterr().out
    with (out / "suspects.csv").open(newline="") as file:
        assert [row["path"] for row in csv.DictReader(file)] == [each.path for each in found]


def test_other_images_than_those_of_the_training_are_refused(birds, capsys):
    with pytest.raises(SystemExit):
        interpret.parse_arguments(["--model", "m", "--data", str(birds), "--suspects", "--split", "all"])
    assert "omit --split all" in capsys.readouterr().err
