"""What a look at every image finds: unreadable files, copies, classes too small, and nothing where all is well."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainables.data.groups import grouped
from trainables.data.inspection import ImageFile, Inspection, find_folder, findings, inspect, split_readable
from trainables.data.labelled_images import DataError, ImageFolder
from trainables.data.layouts import find_images
from trainables.data.presize import presize

ORIENTATION = 0x0112


def draw(file: Path, *, seed: int, size: tuple[int, int] = (24, 20), **options) -> Path:
    """Noise of (width, height) `size`; another `seed` gives another content."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, **options)
    return file


def class_folders(root: Path, **counts: int) -> Path:
    """`counts` images of each class, no two alike."""
    for label, (name, count) in enumerate(counts.items()):
        for i in range(count):
            draw(root / name / f"{i:03}.jpg", seed=1000 * label + i)
    return root


def split_folders(root: Path, train: dict[str, int], valid: dict[str, int]) -> Path:
    class_folders(root / "train", **train)
    for label, (name, count) in enumerate(valid.items()):
        for i in range(count):
            draw(root / "valid" / name / f"{i:03}.jpg", seed=500_000 + 1000 * label + i)
    return root


def look(root: Path, **options):
    return inspect(find_folder(root), size=16, **options)


def problems(root: Path) -> list[str]:
    return [finding.text for finding in findings(look(root)) if finding.spoils]


def warnings_of(root: Path) -> list[str]:
    return [finding.text for finding in findings(look(root)) if not finding.spoils]


def test_sound_data_have_no_findings_and_are_split_as_trials_split_them(tmp_path):
    root = class_folders(tmp_path / "data", cat=20, dog=15)
    seen = look(root, split_seed=3)
    assert findings(seen) == []
    train, valid = presize(find_images(root), 16, cache=tmp_path / "cache").split(seed=3)
    assert seen.train.tolist() == train.tolist()
    assert seen.valid.tolist() == valid.tolist()
    assert seen.counts.tolist() == [[16, 4], [12, 3]]


def test_size_is_upright_and_format_is_that_of_the_bytes(tmp_path):
    root = class_folders(tmp_path, cat=2, dog=2)
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # to be turned by 90 degrees
    draw(root / "cat" / "turned.jpg", seed=1, size=(40, 30), exif=exif)
    draw(root / "cat" / "wrong_suffix.jpg", seed=2, size=(40, 30), format="PNG")
    files = {file.path: file for file in look(root).files}
    turned, renamed = files["cat/turned.jpg"], files["cat/wrong_suffix.jpg"]
    assert (turned.width, turned.height, turned.format) == (30, 40, "JPEG")
    assert (renamed.width, renamed.height, renamed.format) == (40, 30, "PNG")


def test_progress_counts_every_image(tmp_path):
    root = class_folders(tmp_path, cat=3, dog=4)
    calls = []
    look(root, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(i, 7) for i in range(1, 8)]


def test_unreadable_files_are_those_that_presizing_leaves_out(tmp_path):
    root = class_folders(tmp_path / "data", cat=150, dog=150)
    whole = (root / "cat" / "007.jpg").read_bytes()
    (root / "cat" / "007.jpg").write_bytes(whole[:-60])
    (root / "dog" / "008.jpg").write_text("no picture")
    (root / "dog" / "link.jpg").symlink_to(tmp_path / "nowhere.jpg")
    seen = look(root)
    images = presize(find_images(root), 16, cache=tmp_path / "cache")
    assert [file.path for file in seen.unreadable] == list(images.unreadable)
    assert [file.path.split("/")[1] for file in seen.unreadable] == ["007.jpg", "008.jpg", "link.jpg"]
    reasons = [file.problem for file in seen.unreadable]
    for reason, word in zip(reasons, ("truncated", "cannot identify image file", "No such file"), strict=True):
        assert word in reason
        assert str(tmp_path) not in reason, "the path stands before the reason already"
    train, valid = images.split()
    assert [seen.files[i].path for i in seen.train] == [images.paths[i] for i in train]
    assert [seen.files[i].path for i in seen.valid] == [images.paths[i] for i in valid]
    assert problems(root) == []
    assert warnings_of(root) == ["3 of 301 images cannot be read and will be skipped"]


def test_more_than_one_percent_unreadable_is_a_problem_as_it_is_for_presizing(tmp_path):
    root = class_folders(tmp_path / "data", cat=50, dog=50)
    (root / "cat" / "007.jpg").write_bytes(b"")
    assert problems(root) == []
    (root / "cat" / "008.jpg").write_bytes(b"")
    assert problems(root) == ["2 of 100 images cannot be read, more than the 1 % that --max-unreadable allows"]
    with pytest.raises(DataError):
        presize(find_images(root), 16, cache=tmp_path / "cache")


def test_copies_within_a_class_are_a_warning(tmp_path):
    root = split_folders(tmp_path, {"cat": 12, "dog": 12}, {"cat": 3, "dog": 3})
    for i in (90, 91):
        shutil.copy(root / "train/cat/000.jpg", root / f"train/cat/{i}.jpg")
    (copies,) = look(root).copies
    assert (len(copies.indices), copies.across_splits, copies.labels) == (3, False, (0,))
    assert problems(root) == []
    assert warnings_of(root) == ["1 image occurs more than once within one class and split"]


def test_copies_across_the_splits_are_a_problem(tmp_path):
    root = split_folders(tmp_path, {"cat": 12, "dog": 12}, {"cat": 3, "dog": 3})
    shutil.copy(root / "train/cat/000.jpg", root / "valid/cat/again.jpg")
    assert problems(root) == ["1 image is both in training and in validation, as exact copies"]


def test_the_split_that_trials_draw_keeps_copies_together(tmp_path):
    root = class_folders(tmp_path, cat=20, dog=20)
    shutil.copy(root / "cat/000.jpg", root / "cat/100.jpg")
    together = grouped(find_folder(root), None).images
    for seed in range(12):
        seen = inspect(together, size=16, split_seed=seed)
        assert [copies.across_splits for copies in seen.copies] == [False]
        train, valid = presize(together, 16, cache=tmp_path / "cache").split(seed=seed)
        assert (seen.train.tolist(), seen.valid.tolist()) == (train.tolist(), valid.tolist())


def test_one_content_under_two_classes_is_a_problem(tmp_path):
    root = split_folders(tmp_path, {"cat": 12, "dog": 12}, {"cat": 3, "dog": 3})
    shutil.copy(root / "train/cat/000.jpg", root / "train/dog/again.jpg")
    assert look(root).copies[0].labels == (0, 1)
    assert problems(root) == ["1 image lies under more than one class"]


def test_unreadable_files_are_no_copies(tmp_path):
    root = class_folders(tmp_path, cat=12, dog=12)
    for name in ("cat/a.jpg", "dog/b.jpg"):
        (root / name).write_bytes(b"")
    assert look(root).copies == []


def test_images_that_only_look_alike_are_no_copies(tmp_path):
    root = class_folders(tmp_path, cat=12, dog=12)
    draw(root / "cat/other.jpg", seed=0, quality=50)  # cat/000.jpg at another quality
    assert look(root).copies == []


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda root: class_folders(root, cat=12, dog=1), "1 class ('dog') has fewer than two readable images"),
        (lambda root: class_folders(root, cat=12), "there is only one class, 'cat'"),
        (
            lambda root: split_folders(root, {"cat": 12}, {"cat": 3, "dog": 3}),
            "1 class ('dog') has validation images but no training image",
        ),
    ],
)
def test_classes_that_no_search_would_take_are_problems(tmp_path, make, expected):
    root = make(tmp_path)
    assert problems(root) == [expected]
    with pytest.raises(DataError):
        find_images(root)


def test_a_class_that_unreadable_files_make_too_small_is_named(tmp_path):
    root = class_folders(tmp_path / "data", cat=110, dog=2)
    (root / "dog" / "000.jpg").write_bytes(b"")
    assert problems(root) == ["1 class ('dog') has fewer than two readable images"]
    with pytest.raises(DataError, match="dog"):
        presize(find_images(root), 16, cache=tmp_path / "cache")


def test_a_validation_folder_without_a_readable_image_is_a_problem(tmp_path):
    root = split_folders(tmp_path, {"cat": 150, "dog": 150}, {"cat": 1})
    (root / "valid/cat/000.jpg").write_bytes(b"")
    assert problems(root) == ["there is no validation image"]


def test_all_problems_are_told_at_once_and_before_the_warnings(tmp_path):
    root = class_folders(tmp_path, cat=12, dog=1, eel=1, fox=12)
    shutil.copy(root / "cat/000.jpg", root / "fox/again.jpg")
    found = findings(look(root))
    spoiling = [finding.spoils for finding in found]
    assert spoiling == sorted(spoiling, reverse=True)
    assert sum(spoiling) >= 2
    assert not all(spoiling)
    assert all(finding.remedy for finding in found)
    assert "2 classes ('dog', 'eel') have fewer than two readable images" in problems(root)


def test_small_and_unequal_classes_are_warnings(tmp_path):
    root = split_folders(tmp_path, {"cat": 95, "dog": 9}, {"cat": 3})
    assert problems(root) == []
    assert warnings_of(root) == [
        "1 class ('dog') has no validation image",
        "1 class ('dog') has fewer than 10 training images",
        "the classes are imbalanced: 'cat' has 95 training images and 'dog' has 9, 11 times fewer",
    ]


def test_ten_training_images_and_ten_times_as_many_need_no_warning(tmp_path):
    root = split_folders(tmp_path, {"cat": 100, "dog": 10}, {"cat": 3, "dog": 3})
    assert findings(look(root)) == []


def test_a_thousand_tiny_classes_are_told_in_a_line_that_names_five():
    labels = tuple(np.repeat(np.arange(1000), 2).tolist())
    paths = tuple(f"{label:03}/{n}.jpg" for n, label in enumerate(labels))
    folder = ImageFolder(Path("data"), "class folders", paths, labels, tuple(f"{label:03}" for label in range(1000)))
    files = tuple(ImageFile(path, path.encode()) for path in paths)
    found = findings(Inspection(folder, files, *split_readable(folder, files, seed=0)))
    few = "1000 classes ('000', '001', '002', '003', '004', ...) have fewer than 10 training images"
    assert few in [finding.text for finding in found]
    assert not any(finding.spoils for finding in found)
    assert max(len(finding.text) for finding in found) < 200


def test_find_folder_raises_where_there_is_nothing_to_look_at(tmp_path):
    with pytest.raises(DataError, match="no images"):
        find_folder(tmp_path)
