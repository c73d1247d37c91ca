"""`python -m search.check`: what it prints, its exit codes, and the pictures that it leaves."""

import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from search.check import TRAIN_PICTURE, VALID_PICTURE, main, pick
from trainables.data.image_file import read_image
from trainables.data.layouts import find_images
from trainables.inference.pictures import GAP, LINE, save_grid
from trainables.system.text import many

ROOT = Path(__file__).parents[2]
SIDE = 192  # px; how large an image of 48 or 96 px is shown
COLOURS = {"amber_cat": (200, 120, 30), "blue_dog": (30, 60, 200), "fern_eel": (40, 160, 60)}


def draw(file: Path, colour: tuple[int, int, int], *, seed: int) -> None:
    """A noisy 58 x 48 px image with a disc in `colour`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (48, 58, 3), dtype=np.uint8)
    cv2.circle(image, (29, 24), 20, colour, -1)
    image[20:26, 10:50] = rng.integers(0, 256, 3, dtype=np.uint8)
    Image.fromarray(image).save(file, quality=90)


def draw_all(root: Path, name: str, count: int) -> Path:
    """`count` images of each class; `name` is their path with {cls} and {i} in it."""
    for label, (cls, colour) in enumerate(COLOURS.items()):
        for i in range(count):
            draw(root / name.format(cls=cls, i=i), colour, seed=zlib.crc32(f"{name} {label} {i}".encode()))
    return root


@pytest.fixture
def data(tmp_path) -> Path:
    """Three classes of 20 images, 16 to train on and 4 to validate; nothing wrong with them."""
    return draw_all(tmp_path / "data", "{cls}/{i}.jpg", 20)


def check(data: Path, *options: str, capsys) -> tuple[int, str]:
    """Exit code and what is printed; the pictures go beside the data."""
    arguments = ["--space", "quickstart", "--data", str(data), "--out", str(out_of(data)), "--set", "presize=48"]
    code = main([*arguments, "--set", "image_size=48", *options])
    return code, capsys.readouterr().out


def out_of(data: Path) -> Path:
    return data.parent / "look"


def cell(picture: Path, row: int, column: int) -> np.ndarray:
    """The image (SIDE, SIDE, 3) at a place of the grid; every title has one line."""
    top, left = GAP + LINE + row * (SIDE + GAP + LINE), GAP + column * (SIDE + GAP)
    return np.asarray(Image.open(picture).convert("RGB"))[top : top + SIDE, left : left + SIDE]


def test_sound_class_folders_are_ready_to_train(data, capsys):
    code, text = check(data, capsys=capsys)
    assert code == 0
    assert f"data: class folders layout, 60 images, 3 classes in {data}" in text
    assert ["amber_cat", "16", "4", "20"] in [line.split() for line in text.splitlines()]
    assert ["all", "3", "classes", "48", "12", "60"] in [line.split() for line in text.splitlines()]
    assert ["width,", "px", "58", "58", "58"] in [line.split() for line in text.splitlines()]
    assert "formats: 60 JPEG" in text
    assert "unreadable: none" in text
    assert "exact copies: none" in text
    assert "warning" not in text
    assert "problem" not in text
    assert text.splitlines()[-1].startswith("ready to train. Next: python -m search.run --space quickstart --data ")
    assert str(out_of(data) / TRAIN_PICTURE) in text
    assert str(out_of(data) / VALID_PICTURE) in text


def test_sound_split_folders_and_pets_are_ready_to_train(tmp_path, capsys):
    split = draw_all(draw_all(tmp_path / "split", "train/{cls}/{i}.jpg", 12), "val/{cls}/{i}.jpg", 3)
    code, text = check(split, capsys=capsys)
    assert (code, "45 images (36 for training in train/, 9 for validation in val/)" in text) == (0, True)
    assert ["blue_dog", "12", "3", "15"] in [line.split() for line in text.splitlines()]
    pets = draw_all(tmp_path / "pets", "images/{cls}_{i}.jpg", 20)
    code, text = check(pets, capsys=capsys)
    assert (code, "Oxford Pets layout, 60 images, 3 classes" in text) == (0, True)


def test_images_smaller_than_presize_are_counted(data, capsys):
    draw(data / "amber_cat/large.jpg", COLOURS["amber_cat"], seed=1)
    Image.open(data / "amber_cat/large.jpg").resize((80, 70)).save(data / "amber_cat/large.jpg")
    _, text = check(data, capsys=capsys)
    assert "no image has its shorter side below presize=48" in text
    _, text = check(data, "--set", "presize=64", capsys=capsys)
    assert "60 of 61 (98%) have their shorter side below presize=64 and are enlarged" in text
    _, text = check(data, "--set", "presize=64", "--set", "resize_method=pad", capsys=capsys)
    assert "60 of 61 (98%) have their longer side below presize=64 and are enlarged" in text


def test_truncated_files_are_listed_with_their_reasons_and_spoil_it(data, capsys):
    for i in range(2):
        file = data / "blue_dog" / f"{i}.jpg"
        file.write_bytes(file.read_bytes()[:-300])
    code, text = check(data, capsys=capsys)
    assert code == 1
    assert f"unreadable: 2, all listed in {out_of(data)}/unreadable.txt\n  'blue_dog/0.jpg': OSError: image" in text
    assert (
        (out_of(data) / "unreadable.txt").read_text().startswith("'blue_dog/0.jpg'\tOSError: image file is truncated")
    )
    assert "1 problem:\n  1. 2 of 60 images cannot be read, more than the 1 %" in text
    tolerant, text_of_it = check(data, "--max-unreadable", "0.05", capsys=capsys)
    assert tolerant == 0 and "--max-unreadable 0.05" in text_of_it.splitlines()[-1]
    assert "ready to train" not in text
    assert (out_of(data) / TRAIN_PICTURE).is_file(), "what can be read is pictured"


def test_long_lists_end_in_a_count(data, capsys):
    for i in range(23):
        (data / "blue_dog" / f"broken{i}.jpg").write_bytes(b"")
    for i in range(12):
        shutil.copy(data / "amber_cat" / f"{i}.jpg", data / "fern_eel" / f"copy{i}.jpg")
    code, text = check(data, capsys=capsys)
    assert (code, text.count("cannot identify image file")) == (1, 20)
    assert "  ... and 3 more\n" in text
    assert "exact copies: 12 images more than once" in text
    assert text.count(".jpg' (train) = ") + text.count(".jpg' (valid) = ") == 10
    assert "  ... and 2 more\n" in text


def test_copies_across_the_splits_spoil_it(tmp_path, capsys):
    data = draw_all(draw_all(tmp_path / "data", "train/{cls}/{i}.jpg", 12), "valid/{cls}/{i}.jpg", 3)
    shutil.copy(data / "train/blue_dog/3.jpg", data / "valid/blue_dog/again.jpg")
    code, text = check(data, capsys=capsys)
    assert code == 1
    assert "  'train/blue_dog/3.jpg' (train) = 'valid/blue_dog/again.jpg' (valid)\n" in text
    assert "  1. 1 image is both in training and in validation, as exact copies. Remove all copies but one" in text


def scene(file: Path, seed: int, *, shade: float = 1.0) -> None:
    """A photo-like image that few pixels of noise decide, 120 x 96 px."""
    file.parent.mkdir(parents=True, exist_ok=True)
    coarse = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 10, 3), dtype=np.uint8))
    coarse.resize((120, 96), Image.Resampling.BICUBIC).point(lambda value: value * shade).save(file)


def test_near_duplicates_across_the_split_are_told_named_and_pictured_and_can_be_grouped(tmp_path, capsys):
    for label, name in enumerate(COLOURS):
        for i in range(15):
            scene(tmp_path / "data" / name / f"{i:02}.jpg", 100 * label + i)
            if i < 5:
                scene(tmp_path / "data" / name / f"{i:02}_dark.jpg", 100 * label + i, shade=0.8)
    code, text = check(tmp_path / "data", capsys=capsys)
    across = int(re.search(r"near-duplicates: 15 pairs, (\d+) across the split", text)[1])
    assert (code, across > 0) == (0, True)
    assert f"warning: {many(across, 'near-duplicate pair')} across the split (named in " in text
    assert "points too low. --group duplicates keeps such images in one split." in text
    assert len((out_of(tmp_path / "data") / "near_duplicates.csv").read_text().splitlines()) == across + 1
    pictured = np.asarray(Image.open(out_of(tmp_path / "data") / "near_duplicates.png"))
    rows = -(-min(across, 12) // 3)
    assert pictured.shape[:2] == (GAP + rows * (SIDE + GAP + LINE), GAP + min(2 * across, 6) * (SIDE + GAP))
    code, text = check(tmp_path / "data", "--group", "duplicates", capsys=capsys)
    assert code == 0
    assert "groups: 15 pairs of near-duplicates among 30 images; they stay in one split" in text
    assert "near-duplicates: 15 pairs, 0 across the split" in text
    assert "--group duplicates" in text.splitlines()[-1]
    assert not (out_of(tmp_path / "data") / "near_duplicates.csv").exists()


def test_groups_that_the_folder_does_not_have_spoil_it(data, capsys):
    code, text = check(data, "--group", "parent", capsys=capsys)
    assert code == 1
    assert "1 problem:\n  1. --group parent: all images of 3 classes" in text


def test_one_image_under_two_classes_spoils_it(tmp_path, capsys):
    data = draw_all(draw_all(tmp_path / "data", "train/{cls}/{i}.jpg", 12), "valid/{cls}/{i}.jpg", 3)
    shutil.copy(data / "train/blue_dog/3.jpg", data / "train/fern_eel/again.jpg")
    code, text = check(data, capsys=capsys)
    assert (code, "1 problem:\n  1. 1 image lies under more than one class. Keep each in its true" in text) == (1, True)


def test_a_tiny_class_is_a_finding_and_the_rest_is_still_told(data, capsys):
    draw(data / "gnu" / "only.jpg", (90, 90, 90), seed=5)
    code, text = check(data, capsys=capsys)
    assert code == 1
    assert ["gnu", "1", "0", "1"] in [line.split() for line in text.splitlines()]
    assert "1. 1 class ('gnu') has fewer than two readable images. Add images or remove the class" in text
    assert (out_of(data) / VALID_PICTURE).is_file()


def test_warnings_alone_leave_it_ready(data, capsys):
    for i in range(8):
        draw(data / "gnu" / f"{i}.jpg", (90, 90, 90), seed=i)
    code, text = check(data, capsys=capsys)
    assert code == 0
    assert "warning: 1 class ('gnu') has fewer than 10 training images. Add images, and" in text
    assert "ready to train" in text.splitlines()[-1]


def test_a_folder_without_any_layout_is_a_finding(tmp_path, capsys):
    code, text = check(tmp_path, capsys=capsys)
    assert code == 1
    assert f"1 problem:\n  1. There are no images that can be read in {tmp_path}." in text


def test_bad_arguments_are_errors(data, capsys):
    with pytest.raises(ValueError, match="no_such_folder"):
        check(data / "no_such_folder", capsys=capsys)
    with pytest.raises(ValueError, match="image_size=9999 is out of range"):
        check(data, "--set", "image_size=9999", capsys=capsys)
    (data.parent / "file").touch()
    with pytest.raises(ValueError, match="cannot be written there"):
        check(data, "--out", str(data.parent / "file"), capsys=capsys)


def test_wide_sets_show_their_smallest_and_largest_classes(tmp_path, capsys):
    data = tmp_path / "data"
    for label in range(41):
        for i in range(12 + (label > 35) + 2 * (label == 40) - (label == 20)):
            draw(data / f"class [c{label:02}]" / f"{i}.jpg", (label, 99, 9), seed=100 * label + i)
    code, text = check(data, capsys=capsys)
    shown = [line.split("]")[0].split("[c")[1] for line in text.splitlines() if line.startswith("class [")]
    assert code == 0
    assert shown == ["20", *(f"{i:02}" for i in range(9)), "36", "37", "38", "39", "40"]
    assert "... 26 more classes (these are the 10 smallest and the 5 largest)" in text
    assert "all 41 classes" in text


def test_pictures_show_batches_as_the_network_sees_them(data, capsys):
    check(data, capsys=capsys)
    train, valid = out_of(data) / TRAIN_PICTURE, out_of(data) / VALID_PICTURE
    width = GAP + 6 * (SIDE + GAP)
    assert Image.open(train).size == (width, GAP + 4 * (LINE + SIDE + GAP))  # 24 of 48
    assert Image.open(valid).size == (width, GAP + 2 * (LINE + SIDE + GAP))  # all 12
    originals = [centre_square(data / path) for path in find_images(data).paths]
    shown = {"train": [], "valid": []}
    for name, picture, rows in (("train", train, 4), ("valid", valid, 2)):
        for row in range(rows):
            for column in range(6):
                image = cell(picture, row, column)[:: SIDE // 48, :: SIDE // 48]  # each pixel is a square of 4 x 4
                shown[name].append(image)
    assert all(any(np.array_equal(image, original) for original in originals) for image in shown["valid"])
    assert not any(any(np.array_equal(image, original) for original in originals) for image in shown["train"])
    assert min(len(np.unique(image.reshape(-1, 3), axis=0)) for image in shown["train"]) > 200, "none is blank"
    assert len({image.tobytes() for image in shown["train"]}) == 24


def centre_square(file: Path) -> np.ndarray:
    """(48, 48, 3): what validation sees of a 58 x 48 px image at presize = image_size = 48."""
    return read_image(file)[:, 5:53]


def test_pictures_are_the_same_again_and_others_with_another_seed(data, capsys):
    def pictures(*options: str) -> list[bytes]:
        check(data, *options, capsys=capsys)
        return [(out_of(data) / name).read_bytes() for name in (TRAIN_PICTURE, VALID_PICTURE)]

    first = pictures()
    assert pictures() == first
    assert pictures("--seed", "7")[0] != first[0]
    mild = pictures("--set", "affine_p=0", "--set", "lighting_p=0", "--set", "min_scale=1", "--set", "flip=false")
    assert (mild[0] != first[0], mild[1] == first[1]) == (True, True)


def test_a_split_without_images_leaves_no_picture_of_before(tmp_path, capsys):
    data = draw_all(draw_all(tmp_path / "data", "train/{cls}/{i}.jpg", 12), "valid/{cls}/{i}.jpg", 1)
    check(data, capsys=capsys)
    assert (out_of(data) / VALID_PICTURE).is_file()
    for file in (data / "valid").glob("*/*.jpg"):
        file.write_bytes(b"")
    code, text = check(data, capsys=capsys)
    assert (code, (out_of(data) / VALID_PICTURE).exists()) == (1, False)
    assert "no valid_batch.png: there are no validation images" in text


def test_pick_takes_the_classes_in_turn():
    labels = [0] * 50 + [1] * 3 + [2] * 50
    chosen = pick(labels, np.arange(103), 24, seed=0)
    own = [labels[i] for i in chosen]
    assert own == sorted(own)
    assert [own.count(label) for label in range(3)] == pytest.approx([10, 3, 11], abs=1)
    assert own.count(1) == 3
    assert len(set(chosen.tolist())) == 24
    assert sorted(pick(labels, np.array([5, 60]), 24, seed=0).tolist()) == [5, 60]


def test_grid_titles_fit_and_have_their_colours(tmp_path):
    images = [np.zeros((96, 96, 3), np.uint8)] * 3
    titles = ["short", "a_very_long_class_name_" * 4, "two\n$\\frac$"]
    save_grid(tmp_path / "grid.png", images, titles, columns=3, colours=[None, "red", "#00aa00"])
    picture = np.asarray(Image.open(tmp_path / "grid.png").convert("RGB")).astype(int)
    assert picture.shape == (GAP + 2 * LINE + SIDE + GAP, GAP + 3 * (SIDE + GAP), 3)
    above = picture[GAP : GAP + 2 * LINE]
    gaps = [above[:, GAP + i * (SIDE + GAP) - GAP : GAP + i * (SIDE + GAP) - 1] for i in range(4)]
    assert all((gap == 255).all() for gap in gaps), "a title reaches beyond its image"
    red, green = above[:, GAP + SIDE + GAP : -SIDE - 2 * GAP], above[:, -SIDE - GAP : -GAP]
    assert ((red[..., 0] > 200) & (red[..., 1] < 60)).sum() > 100
    assert ((green[:LINE, :, 1] > 120) & (green[:LINE, :, 0] < 60)).any()
    assert ((green[LINE:, :, 1] > 120) & (green[LINE:, :, 0] < 60)).any()
    assert (picture[GAP + 2 * LINE : -GAP, GAP : GAP + SIDE] == 0).all()


def test_grid_says_what_does_not_match(tmp_path):
    image = np.zeros((32, 32, 3), np.uint8)
    for images, titles, word in (
        ([], [], "0 images"),
        ([image], ["a", "b"], "1 images, 2 titles"),
        ([image, image[:16]], ["a", "b"], "of shape"),
        ([image / 255], ["a"], "float64"),
    ):
        with pytest.raises(ValueError, match=word):
            save_grid(tmp_path / "grid.png", images, titles)
    assert list(tmp_path.iterdir()) == []


def test_command_exits_with_2_for_a_missing_folder_and_1_for_a_finding(tmp_path):
    command = [sys.executable, "-m", "search.check", "--space", "quickstart", "--out", str(tmp_path / "out"), "--data"]
    missing = subprocess.run([*command, str(tmp_path / "x")], cwd=ROOT, capture_output=True, text=True)
    assert (missing.returncode, missing.stderr.startswith("error: --data ")) == (2, True)
    empty = subprocess.run([*command, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert (empty.returncode, empty.stderr) == (1, "")


@pytest.mark.slow
def test_the_quickstart_is_ready_to_train_and_torch_is_not_needed(search_cache, tmp_path):
    code = """
import sys
from search.check import main
code = main(["--space", "quickstart"])
print(*sorted({"torch", "torchvision", "timm", "ray", "matplotlib.pyplot"} & set(sys.modules)), file=sys.stderr)
sys.exit(code)
"""
    command = [sys.executable, "-W", "error::UserWarning", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}){code}"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (ran.returncode, ran.stderr.strip()) == (0, "")
    assert "600 images, 12 classes" in ran.stdout
    assert ran.stdout.splitlines()[-1] == "ready to train. Next: python -m search.run --space quickstart"
    for name in (TRAIN_PICTURE, VALID_PICTURE):
        assert Image.open(tmp_path / "results" / "check-quickstart" / name).size == (
            1236,
            GAP + 4 * (LINE + SIDE + GAP),
        )
