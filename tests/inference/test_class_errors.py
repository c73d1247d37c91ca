"""The errors of each class: what is counted, how sure it is, and which classes a model never predicts."""

import csv

import numpy as np
import pytest

from search.runs.statistics import wilson_interval
from trainables.inference.class_errors import class_errors, never_predicted, save_class_errors

CLASSES = ("cat", "dog", "emu", "fox", "gnu")
COUNTS = np.array([[8, 2, 0, 0, 0], [3, 7, 0, 0, 0], [1, 2, 0, 0, 0], [0, 0, 0, 4, 0], [0, 0, 0, 0, 0]])


def test_the_worst_class_comes_first_and_says_what_it_is_taken_for():
    found = class_errors(CLASSES, COUNTS, np.array([80, 40, 9, 16, 5]))
    rows = [
        (each.name, each.train_images, each.images, each.wrong, each.confused_with, each.confused) for each in found
    ]
    assert rows == [
        ("emu", 9, 3, 3, "dog", 2),
        ("dog", 40, 10, 3, "cat", 3),
        ("cat", 80, 10, 2, "dog", 2),
        ("fox", 16, 4, 0, "", 0),
    ]  # no image shows a gnu
    assert [each.error_rate for each in found] == [1, 0.3, 0.2, 0]


def test_the_interval_is_wilsons():
    of = {each.name: each for each in class_errors(CLASSES, COUNTS)}
    assert of["cat"].interval == pytest.approx((0.0567, 0.5098), abs=5e-5)  # 2 of 10, as in textbooks
    for each in of.values():
        assert each.interval == pytest.approx(wilson_interval(each.error_rate, each.images), abs=1e-9)
        assert each.train_images is None


def test_equal_errors_are_ordered_by_the_number_of_wrong_images_and_then_as_the_classes_are():
    counts = np.array([[1, 1, 0], [2, 2, 0], [0, 1, 1]])
    assert [each.name for each in class_errors(("a", "b", "c"), counts)] == ["b", "a", "c"]


def test_a_class_is_never_predicted_if_it_has_images_and_no_image_is_taken_for_it():
    assert never_predicted(CLASSES, COUNTS) == ["emu"]
    assert never_predicted(CLASSES, np.eye(5, dtype=np.int64)) == []
    assert never_predicted(("a", "b"), np.array([[0, 3], [0, 0]])) == ["a"]


def test_the_table_has_a_row_for_each_class(tmp_path):
    found = class_errors(("d\udcffg", "emu"), np.array([[1, 3], [0, 2]]), np.array([7, 8]))
    save_class_errors(tmp_path / "classes.csv", found)
    with (tmp_path / "classes.csv").open(newline="", errors="surrogateescape") as file:
        first, second = csv.DictReader(file)
    low, high = found[0].interval
    assert first == {
        "class": "d\udcffg",
        "train_images": "7",
        "images": "4",
        "wrong": "3",
        "error_rate": "0.750000",
        "low": f"{low:.6f}",
        "high": f"{high:.6f}",
        "confused_with": "emu",
        "confused_images": "3",
    }
    assert (second["wrong"], second["confused_with"]) == ("0", "")
