"""Several labels for an image: read from a table's cells, split, kept in caches, and told apart from other images."""

from dataclasses import replace

import numpy as np
import pytest
from several_labels import draw_lights

from trainables.data import inspection, labelled_images, presize
from trainables.data.held_out_images import set_aside
from trainables.data.label_sets import from_cells, multi_hot, rarest, to_cell
from trainables.data.labelled_images import DataError, check_classes
from trainables.data.source import images_digest

pytestmark = pytest.mark.usefixtures("search_cache")


@pytest.fixture(scope="module")
def lights(tmp_path_factory):
    return draw_lights(tmp_path_factory.mktemp("lights"))


# --- Cells ------------------------------------------------------------------------------------------------------------


def test_labels_are_separated_by_semicolons_or_a_json_list():
    classes, labels, label_sets = from_cells(["cat; indoors", '["indoors", "a;b"]', "dog;", "", "[]", "dog;cat;dog"])
    assert classes == ("a;b", "cat", "dog", "indoors")
    assert label_sets == ((1, 3), (0, 3), (2,), (), (), (1, 2))
    assert labels == (1, 0, 2, 1, 1, 1)


def test_another_separator_may_be_given():
    assert from_cells(["a|b;c", "b;c"], separator="|")[0] == ("a", "b;c")


def test_all_cells_that_are_no_labels_are_named_together():
    with pytest.raises(ValueError, match="2 cells cannot be read as labels") as raised:
        from_cells(["cat", '["dog"', '["cat", 3]'])
    for part in ("cell 2, '[\"dog\"', starts like a JSON list", "cell 3, '[\"cat\", 3]', is a JSON list of something"):
        assert part in str(raised.value)


def test_a_table_without_any_label_is_refused():
    with pytest.raises(ValueError, match="all 2 cells are empty"):
        from_cells(["", " ; "])


@pytest.mark.parametrize("names", [(), ("cat",), ("cat", "in doors"), ("a;b", "c"), ("[x]",)])
def test_what_is_written_as_a_cell_is_read_as_the_same_labels(names):
    classes, _, label_sets = from_cells([to_cell(names), "other"])
    assert {classes[label] for label in label_sets[0]} == set(names)


# --- Splits -----------------------------------------------------------------------------------------------------------


def test_an_image_stands_for_the_rarest_of_its_classes_and_for_the_largest_without_any():
    truth = multi_hot([(0, 1), (0, 1, 2), (0,), (), (1,)], 3)
    assert rarest(truth).tolist() == [0, 2, 0, 0, 1]


def test_every_class_has_its_share_of_the_validation_images(lights):
    valid = labelled_images.split(lights.labels)[1]
    assert len(valid) == round(0.2 * len(lights.paths))
    shares = lights.only(valid).class_counts / lights.class_counts
    assert (abs(shares - 0.2) < 0.08).all()
    kept, test = set_aside(lights, 0.25, seed=0)
    assert len(test.paths) == 16 and len(kept.label_sets) == 48
    assert (test.class_counts >= 5).all()


def test_a_class_is_as_large_as_the_number_of_images_that_have_it(lights):
    assert lights.class_counts.tolist() == [32, 32, 32]
    check_classes(lights)
    rare = replace(lights, classes=(*lights.classes, "red"), label_sets=((0, 3), *lights.label_sets[1:]))
    with pytest.raises(DataError, match=r"fewer than two images in 1 class \('red'\)"):
        check_classes(rare)


# --- Caches and digests -----------------------------------------------------------------------------------------------


def test_a_cache_keeps_the_label_sets_of_the_images_that_can_be_read(lights, tmp_path):
    (lights.root / "broken.png").write_bytes(b"no image")
    paths = (*lights.paths, "broken.png")
    folder = replace(lights, paths=paths, labels=(*lights.labels, 0), label_sets=(*lights.label_sets, (0, 1)))
    images = presize.presize(folder, 32, cache=tmp_path, max_unreadable=0.1)
    assert images.label_sets == lights.label_sets
    assert images.truth.tolist() == multi_hot(lights.label_sets, 3).tolist()
    assert images.label_names(len(images) - 1) == "amber; blue; green"


def test_other_label_sets_are_other_images(lights, tmp_path):
    last = replace(lights, label_sets=(*lights.label_sets[:-1], (0,)))
    without = replace(lights, label_sets=None)
    folders = (lights, last, without)
    for digest in (labelled_images.fingerprint, images_digest):
        assert len({digest(folder) for folder in folders}) == 3
    images = [presize.presize(folder, 32, cache=tmp_path) for folder in folders]
    assert len({each.digest for each in images}) == len({each.path for each in images}) == 3
    assert images[2].label_sets is None and images[2].truth is images[2].labels


def test_the_check_counts_all_labels_and_finds_copies_with_other_labels(lights, tmp_path):
    folder = draw_lights(tmp_path, each=12)
    (tmp_path / folder.paths[0]).write_bytes((tmp_path / folder.paths[-1]).read_bytes())
    found = inspection.inspect(folder, size=32)
    assert found.counts.sum(1).tolist() == folder.class_counts.tolist()
    texts = [finding.text for finding in inspection.findings(found)]
    assert "1 image has other labels in an exact copy" in texts
    assert np.any(found.counts[:, 1] > 0)
