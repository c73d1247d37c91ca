"""Where groups come from, which copies belong together, and that other nodes split as the user's machine does."""

import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from files import fill
from PIL import Image

from search.options.arguments import parse_arguments
from trainables.data.groups import checked_group, copies, grouped, joined, to_text, with_text
from trainables.data.held_out_images import WithoutTestImages, without_test_images
from trainables.data.labelled_images import DataError
from trainables.data.layouts import find_images
from trainables.data.presize import presize
from trainables.data.source import images_digest, images_of
from trainables.inference.split_record import indices_of, known_and_test, part_of, split_file


def draw(file: Path, seed: int) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)
    return file


@pytest.fixture
def scans(tmp_path) -> Path:
    """Two classes of six patients with three images each; a patient's folder lies in the class folder."""
    for label, name in enumerate(("benign", "malign")):
        for number in range(18):
            draw(tmp_path / "scans" / name / f"p{6 * label + number // 3:02}" / f"{number}.jpg", 100 * label + number)
    return tmp_path / "scans"


@pytest.fixture
def birds(tmp_path) -> Path:
    """Two classes of 20 images, no two alike."""
    for label, name in enumerate(("robin", "wren")):
        for number in range(20):
            draw(tmp_path / "birds" / name / f"{number:02}.jpg", 100 * label + number)
    return tmp_path / "birds"


def members(groups: tuple[str, ...] | None) -> list[int]:
    """How many images each group has."""
    return sorted(groups.count(group) for group in set(groups))


# --- Where groups come from -------------------------------------------------------------------------------------------


def test_the_folder_below_the_class_folder_is_the_group(scans):
    found = grouped(find_images(f"{scans}/*"), "parent")
    assert members(found.images.groups) == [3] * 12
    assert found.lines == ("groups: 12 of 36 images, by parent; each is in one split alone",)


def test_a_patient_in_two_classes_is_one_group(tmp_path):
    names = [f"{name}/p{i}/{side}.jpg" for name in ("benign", "malign") for i in range(4) for side in ("left", "right")]
    found = grouped(find_images(f"{fill(tmp_path, *names)}/*"), "parent")
    assert members(found.images.groups) == [4] * 4


def test_an_image_beside_the_folders_of_its_class_is_alone(tmp_path):
    names = [f"{name}/{place}{i}.jpg" for name in ("a", "b") for place in ("", f"{name}1/", f"{name}2/") for i in "12"]
    found = grouped(find_images(f"{fill(tmp_path, *names)}/*"), "parent")
    assert members(found.images.groups) == [1, 1, 1, 1, 2, 2, 2, 2]


def test_parent_is_refused_where_it_would_be_the_class(birds):
    with pytest.raises(DataError, match=r"all images of 2 classes \('robin', 'wren'\) .* lie in one folder"):
        grouped(find_images(birds), "parent")


def test_a_regular_expression_takes_its_group_from_the_path(tmp_path):
    names = [f"{name}/{camera}_{i}.jpg" for name in ("a", "b") for camera in ("north", "south", "west") for i in "123"]
    found = grouped(find_images(fill(tmp_path, *names)), r"/([a-z]+)_\d")
    assert members(found.images.groups) == [6, 6, 6]


def test_images_that_the_expression_does_not_match_are_named(birds):
    with pytest.raises(DataError, match=r"does not match 38 images \('robin/02.jpg', .*\) of 40"):
        grouped(find_images(birds), r"n/(0[01])\.|wren/(?:0[01])")


def test_a_column_of_a_table_is_taken_and_an_empty_cell_is_no_group(birds):
    images = find_images(birds)
    with pytest.raises(DataError, match="no table of labels"):
        grouped(images, "column")
    images = replace(images, groups=tuple(str(i // 4) if i >= 8 else "" for i in range(40)))
    for how in (None, "column"):
        assert members(grouped(images, how).images.groups) == [1] * 8 + [4] * 8


@pytest.mark.parametrize("text", ["parents", "(a)(b)", "("])
def test_what_is_neither_a_word_nor_an_expression_with_one_group_is_refused(text, capsys):
    with pytest.raises(ValueError, match=r"regular expression"):
        checked_group(text)
    with pytest.raises(SystemExit):
        parse_arguments(["--data", "images", "--group", text])
    assert "argument --group" in capsys.readouterr().err
    assert parse_arguments(["--data", "images", "--group", r"(p\d+)%"]).group == r"(p\d+)%"


def test_groups_that_leave_nothing_to_validate_on_are_refused(birds):
    with pytest.raises(DataError, match="leave no images to validate on"):
        grouped(find_images(birds), "^(robin|wren)/")


def test_a_class_of_one_group_and_a_split_that_separates_groups_are_told(birds, tmp_path):
    found = grouped(find_images(birds), r"^(robin|wren/\d)")
    assert found.lines[-1] == "warning: 1 class ('robin') with a single group, which trains: none of them validates"
    names = [f"{part}/{name}/p{i}_{part}.jpg" for part in ("train", "val") for name in "ab" for i in range(3)]
    found = grouped(find_images(fill(tmp_path / "split", *names)), r"(p\d)_")
    assert found.lines[-1].startswith("warning: 3 groups (the first: 'p0') on both sides of the data's own split")


# --- Copies -----------------------------------------------------------------------------------------------------------


def test_copies_of_a_class_are_one_group_unasked(birds):
    for name in ("30.jpg", "31.jpg"):
        shutil.copy(birds / "robin/07.jpg", birds / "robin" / name)
    found = grouped(find_images(birds), None)
    assert found.lines == ("copies: 2 images with the bytes of another, each is kept in the split of that one",)
    same = [found.images.paths.index(f"robin/{name}.jpg") for name in ("07", "30", "31")]
    assert {found.images.groups[i] for i in same} == {"robin/07.jpg"}
    assert members(found.images.groups) == [1] * 39 + [3]


def test_without_copies_and_without_an_option_there_are_no_groups(birds):
    assert grouped(find_images(birds), None).images.groups is None
    assert grouped(find_images(birds), None).lines == ()


def test_copies_under_two_classes_are_a_warning_and_no_group(birds):
    shutil.copy(birds / "robin/07.jpg", birds / "wren/30.jpg")
    found = grouped(find_images(birds), None)
    assert found.images.groups is None
    assert found.lines[0].startswith(
        "warning: 1 image under more than one class, as exact copies (first: 'robin/07.jpg'"
    )


def test_only_files_of_the_same_size_are_read(birds, monkeypatch):
    (birds / "robin/00.jpg").write_bytes((birds / "robin/00.jpg").read_bytes() + b"more")
    read = []
    monkeypatch.setattr("trainables.data.groups._digest", lambda file: read.append(file.name))
    assert list(copies(find_images(birds))) == []
    sizes = [file.stat().st_size for file in birds.rglob("*.jpg")]
    assert len(read) == sum(sizes.count(size) > 1 for size in sizes)


def test_copies_join_the_groups_that_they_lie_in():
    assert joined("abcdef", ("x", "x", "y", "y", "z", "w"), [[1, 2], [4, 5]]) == ("a", "a", "a", "a", "e", "e")
    assert joined("abc", None, []) is None


# --- On other nodes and later -----------------------------------------------------------------------------------------


def test_groups_as_text_are_read_back(birds):
    images = find_images(birds)
    images = replace(images, groups=joined(images.paths, None, [[0, 1, 2, 9], [5, 7], [20, 39]]))
    assert to_text(images.groups) == "0-2 9;5 7;20 39"
    assert with_text(replace(images, groups=None), to_text(images.groups)).groups == images.groups
    assert with_text(images, "").groups is None
    with pytest.raises(DataError, match="some are gone"):
        with_text(images, "3 40")


def test_every_node_and_every_process_has_the_same_split(scans, tmp_path):
    images = grouped(find_images(f"{scans}/*"), "parent").images
    known = without_test_images(images, 0.2, 5)
    shutil.copytree(scans, tmp_path / "node" / "scans")
    source = WithoutTestImages(f"{tmp_path}/node/scans/*", 0.2, 5, groups=to_text(images.groups))
    there = images_of(source, images_digest(known))
    assert (there.paths, there.groups) == (known.paths, known.groups)
    assert str(source) == f"{tmp_path}/node/scans/*"
    here, there = (presize(each, 16, cache=tmp_path / "cache") for each in (known, there))
    valid = here.split(seed=3)[1].tolist()
    assert there.split(seed=3)[1].tolist() == pickle.loads(pickle.dumps(there)).split(seed=3)[1].tolist() == valid
    held = {known.groups[i] for i in valid}
    assert held and held.isdisjoint(known.groups[i] for i in here.split(seed=3)[0])


def test_the_cache_is_the_same_for_all_groups_and_skips_what_cannot_be_read(scans, tmp_path):
    images = grouped(find_images(f"{scans}/*"), "parent").images
    (scans / "benign/p00/0.jpg").write_bytes(b"no image")
    plain, whole = (
        presize(each, 16, cache=tmp_path / "cache", max_unreadable=0.1)
        for each in (replace(images, groups=None), images)
    )
    assert plain.path == whole.path and plain.groups is None
    assert [path.split("/")[1] for path in whole.paths[:3]] == ["p00", "p00", "p01"]
    assert members(whole.groups) == [2] + [3] * 11


def test_a_model_knows_the_split_of_its_groups(scans, tmp_path):
    from trainables.inference.split_record import SPLIT_FILE, read_split

    images = grouped(find_images(f"{scans}/*"), "parent").images
    known = without_test_images(images, 0.2, 5)
    presized = presize(known, 16, cache=tmp_path / "cache")
    text = split_file(presized, images_digest(known), seed=5, test_share=0.2, groups=to_text(images.groups))
    (tmp_path / SPLIT_FILE).write_bytes(text)
    record = read_split(tmp_path)
    again = find_images(f"{scans}/*")
    part = part_of(again, "valid", record, tmp_path)
    found = indices_of(presize(part, 16, cache=tmp_path / "cache"), "valid", record, tmp_path)
    assert found.tolist() == presized.split(seed=5)[1].tolist()
    assert set(known_and_test(again, record)[1].groups).isdisjoint(known.groups)
