"""What near-duplicates across the split may hide, and where they are named."""

import csv

import numpy as np
import pytest
from PIL import Image

from search.reporting.leakage import across, in_presized, say_near_duplicates
from trainables.data.groups import grouped
from trainables.data.layouts import find_images
from trainables.data.near_duplicates import Pair
from trainables.data.presize import presize

PATHS = ("cat/0.jpg", "cat/1.jpg", "cat/2.jpg", "dog/3.jpg", "dog/4.jpg", "dog/5.jpg")
LABELS, CLASSES = (0, 0, 0, 1, 1, 1), ("cat", "dog")


def found(pairs: list[Pair], valid: list[int], **options):
    return across(pairs, PATHS, LABELS, CLASSES, np.array(valid), **options)


def test_only_pairs_that_the_split_separates_count(tmp_path):
    pairs = [Pair(0, 1, 0.99), Pair(1, 2, 0.9), Pair(3, 4, 0.8), Pair(4, 5, 0.7)]
    seen = found(pairs, [1, 4])
    assert seen.indices == ((0, 1), (2, 1), (3, 4), (5, 4))
    seen.save(tmp_path / "pairs.csv")
    with (tmp_path / "pairs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[1] == {
        "likeness": "0.900", "train": "cat/2.jpg", "train_class": "cat", "valid": "cat/1.jpg", "valid_class": "cat"
    }  # fmt: skip
    assert found([Pair(0, 2, 0.9)], [1, 4]).rows == ()


def test_the_error_is_too_low_by_at_most_the_share_of_the_validation_images_that_are_known():
    seen = found([Pair(0, 1, 0.9), Pair(1, 2, 0.9)], [1, 3, 4, 5])
    assert seen.hidden == 0.25
    assert seen.text("pairs.csv") == (
        "2 near-duplicate pairs across the split (named in pairs.csv), with 25.0 % of the validation images: their "
        "error may be up to 25.0 points too low"
    )


def test_pairs_of_two_classes_hide_no_error_and_may_be_wrong_labels():
    seen = found([Pair(0, 3, 0.9)], [3])
    assert seen.hidden == 0
    assert seen.text("pairs.csv").endswith("; 1 pair of two classes, which may be wrong labels")


def test_what_to_do_depends_on_whose_split_it_is():
    assert "--group duplicates" in found([Pair(0, 1, 0.9)], [1]).remedy
    assert "--group" not in found([Pair(0, 1, 0.9)], [1], own_split=True).remedy


@pytest.fixture
def folder(tmp_path):
    """Two classes of ten photos, each twice; the second time it is darker and saved with more loss."""
    rng = np.random.default_rng(0)
    for name in CLASSES:
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(10):
            coarse = Image.fromarray(rng.integers(0, 256, (8, 10, 3), dtype=np.uint8))
            photo = coarse.resize((120, 96), Image.Resampling.BICUBIC)
            photo.save(tmp_path / "data" / name / f"{number}.jpg")
            photo.point(lambda value: value * 0.8).save(tmp_path / "data" / name / f"{number}_dark.jpg", quality=60)
    return tmp_path / "data"


def test_a_search_tells_of_them_before_it_begins_unless_they_are_grouped(folder, tmp_path, capsys):
    images = presize(find_images(folder), 64, cache=tmp_path / "cache")
    say_near_duplicates(images, 0, tmp_path / "run" / "pairs.csv")
    said = capsys.readouterr().out
    assert said.startswith("warning: ") and "(named in " in said and "--group duplicates keeps such images" in said
    assert (tmp_path / "run" / "pairs.csv").is_file()
    images = presize(grouped(find_images(folder), "duplicates").images, 64, cache=tmp_path / "cache")
    say_near_duplicates(images, 0, tmp_path / "none" / "pairs.csv")
    assert capsys.readouterr().out == "" and not (tmp_path / "none").exists()


def test_it_does_not_look_where_images_would_have_to_be_decoded_for_it(folder, tmp_path):
    images = presize(find_images(folder), 64, storage="jpeg", cache=tmp_path / "cache")
    assert in_presized(images, 0) is None
