"""Finding and labelling images, as a user meets it. Files are empty here: only names matter."""

import os
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from files import fill
from folder_layouts import DEEPER, ERRORS, PARTS, PARTS_WITH_TEST

from trainables.data.labelled_images import DataError, ImageFolder, fingerprint, split
from trainables.data.layouts import find_images


def labelled(folder: ImageFolder) -> dict[str, str]:
    return {path: folder.classes[label] for path, label in zip(folder.paths, folder.labels, strict=True)}


# --- Layouts ----------------------------------------------------------------------------------------------------------


def test_pets_layout_takes_the_breed_from_the_name_with_underscores_and_any_suffix_case(tmp_path):
    names = [
        "shiba_inu_1.jpg",
        "shiba_inu_20.JPG",
        "Bengal_3.jpeg",
        "Bengal_4.JPEG",
        "a b'c_\n_7.jpg",
        "a b'c_\n_8.jpg",
    ]
    found = find_images(fill(tmp_path, *(f"images/{name}" for name in names)))
    assert found.layout == "Oxford Pets"
    assert found.classes == ("Bengal", "a b'c_\n", "shiba_inu")
    assert labelled(found)["images/shiba_inu_20.JPG"] == "shiba_inu"
    assert labelled(found)["images/a b'c_\n_8.jpg"] == "a b'c_\n"
    assert list(found.paths) == sorted(found.paths)
    assert found.valid is None
    assert found.describe() == f"Oxford Pets layout, 6 images, 3 classes in {tmp_path}/images"


@pytest.mark.parametrize("given", [".", "oxford-iiit-pet", "oxford-iiit-pet/images"])
def test_pets_are_found_as_torchvision_unpacks_them_and_from_inside(tmp_path, given):
    breeds = [f"oxford-iiit-pet/images/{breed}_{n}.jpg" for breed in ("pug", "boxer") for n in (1, 2)]
    masks = [f"oxford-iiit-pet/annotations/trimaps/pug_{n}.png" for n in (1, 2)]
    found = find_images(fill(tmp_path, *breeds, *masks) / given)
    assert (found.layout, found.classes, len(found.paths)) == ("Oxford Pets", ("boxer", "pug"), 4)
    assert all((found.root / path).exists() for path in found.paths)


def test_class_folders_with_every_suffix_and_nested_folders(tmp_path):
    names = ["cat/1.jpg", "cat/deep/er/2.PNG", "dog/1.webp", "dog/2.jpeg", "train/1.jpg", "train/2.jpg"]
    found = find_images(fill(tmp_path, *names))
    assert found.layout == "class folders"
    assert labelled(found) == {name: name.split("/")[0] for name in names}
    assert found.labels == (0, 0, 1, 1, 2, 2)


@pytest.mark.parametrize(("train", "valid"), PARTS)
def test_split_folders_keep_the_given_split_and_are_named(tmp_path, train, valid):
    names = [f"{train}/{name}.jpg" for name in ("cat/1", "dog/1", "dog/2")]
    held = [f"{valid}/cat/1.jpg", f"{valid}/dog/9.jpg"]
    found = find_images(fill(tmp_path, *names, *held))
    assert found.layout == "split folders"
    assert found.classes == ("cat", "dog")
    assert {p for p, is_held in zip(found.paths, found.valid, strict=True) if is_held} == set(held)
    parts = f"3 for training in {train.split('/')[0]}/, 2 for validation in {valid.split('/')[0]}/"
    assert found.describe() == f"split folders layout, 5 images ({parts}), 2 classes in {tmp_path}"


@pytest.mark.parametrize(("train", "test"), PARTS_WITH_TEST)
def test_a_test_folder_does_not_validate_and_is_offered_for_test_split(tmp_path, train, test):
    names = [f"{train}/{name}/{n}.jpg" for name in ("cat", "dog") for n in (1, 2)]
    held = [f"{test}/{name}/{n}.jpg" for name in ("cat", "dog") for n in (1, 2, 3)]
    found = find_images(fill(tmp_path, *names, *held))
    assert (found.layout, found.classes, found.valid) == ("class folders", ("cat", "dog"), None)
    assert found.paths == tuple(sorted(names))
    outer = test.split("/")[0]
    assert f"4 images, 2 classes in {tmp_path}/{train}; not used: 6 images in {outer}/" in found.describe()
    assert f"--test-split {tmp_path}/{outer} tests the winner on them" in found.describe()
    assert find_images(tmp_path / outer).classes == ("cat", "dog")  # which is what --test-split reads


def test_test_images_without_labels_are_not_offered_for_test_split(tmp_path):
    fill(tmp_path, *(f"train_images/{name}/{n}.jpg" for name in ("cat", "dog") for n in (1, 2)))
    found = find_images(fill(tmp_path, *(f"test_images/{n}.jpg" for n in range(5))))
    assert "5 images in test_images/" in found.describe() and "search.predict labels them" in found.describe()
    assert "--test-split" not in found.describe()


def test_a_class_called_mask_is_one_within_split_folders(tmp_path):
    names = [
        f"{part}/{name}/1.jpg" for part in ("train", "val") for name in ("mask", "no_mask/indoor", "no_mask/outdoor")
    ]
    assert find_images(fill(tmp_path, *names)).classes == ("mask", "no_mask")


def test_a_test_folder_beside_a_validation_folder_is_named_too(tmp_path):
    names = [f"{part}/{name}/1.jpg" for part in ("train", "test", "val") for name in ("cat", "dog")]
    found = find_images(fill(tmp_path, *names))
    assert [unused.what for unused in found.unused] == ["2 images in test/"]


def test_a_training_folder_alone_is_split(tmp_path):
    found = find_images(fill(tmp_path, *(f"train/{name}/{n}.jpg" for name in ("cat", "dog") for n in (1, 2))))
    assert (found.layout, found.valid, len(found.paths)) == ("class folders", None, 4)
    assert found.describe() == f"class folders layout, 4 images, 2 classes in {tmp_path}/train"


def test_a_val_folder_is_preferred_to_test(tmp_path):
    names = [f"{part}/{name}/1.jpg" for part in ("train", "test", "val") for name in ("cat", "dog")]
    assert not any(path.startswith("test/") for path in find_images(fill(tmp_path, *names)).paths)


def test_imagenette_is_found_as_torchvision_unpacks_it(tmp_path):
    names = [f"imagenette2-320/{part}/{name}/1.JPEG" for part in ("train", "val") for name in ("n01", "n02")]
    found = find_images(fill(tmp_path, *names, "imagenette2-320.tgz", "imagenette2-320/noisy_imagenette.csv"))
    assert (found.layout, found.paths) == ("split folders", tuple(sorted(names)))


def test_files_that_are_no_images_are_ignored(tmp_path):
    images = ["cat/1.jpg", "cat/2.jpg", "dog/1.jpg", "dog/2.jpg"]
    others = ["cat/._1.jpg", "cat/.hidden/1.jpg", "cat/notes.txt", "cat/noext", "__MACOSX/cat/1.jpg", "dog/Thumbs.db"]
    fill(tmp_path, *images, *others, ".git/1.jpg", "empty/readme.md", "cover.jpg")
    os.mkfifo(tmp_path / "dog" / "pipe.jpg")
    assert find_images(tmp_path).paths == tuple(images)


def test_link_loops_end_and_links_to_images_are_followed(tmp_path):
    fill(tmp_path / "data", "cat/1.jpg", "cat/2.jpg", "dog/1.jpg")
    fill(tmp_path / "elsewhere", "3.jpg")
    root = tmp_path / "data"
    for link, target in {
        "cat/up": "..",
        "cat/far_up": "../../..",
        "cat/self": "self",
        "dog/there": "../../elsewhere",
        "elsewhere/back": "../data/dog",
    }.items():
        (tmp_path / link if link.startswith("elsewhere") else root / link).symlink_to(target)
    assert find_images(root).paths == ("cat/1.jpg", "cat/2.jpg", "dog/1.jpg", "dog/there/3.jpg")


def test_a_thousand_classes_of_two_images_are_a_data_set(tmp_path):
    found = find_images(fill(tmp_path, *(f"{label:03}/{n}.jpg" for label in range(1000) for n in (1, 2))))
    assert (found.num_classes, len(found.paths)) == (1000, 2000)
    train, valid = split(found.labels)
    assert (len(train), len(valid)) == (1600, 400)
    assert found.classes[found.labels[train[-1]]] == "999"


def test_a_link_to_itself_with_the_name_of_an_image_is_left_to_be_reported_as_unreadable(tmp_path):
    fill(tmp_path, "cat/1.jpg", "dog/1.jpg", "dog/2.jpg")
    (tmp_path / "cat/loop.jpg").symlink_to("loop.jpg")
    found = find_images(tmp_path)
    assert "cat/loop.jpg" in found.paths
    assert fingerprint(found) == fingerprint(find_images(tmp_path))


def test_classes_that_differ_only_in_case_stay_apart_and_are_pointed_out(tmp_path, caplog):
    found = find_images(fill(tmp_path, "Cat/1.jpg", "Cat/2.jpg", "cat/1.jpg", "cat/2.jpg"))
    assert found.classes == ("Cat", "cat")
    assert "'Cat', 'cat' differ only in case" in caplog.text


# --- At which level ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", DEEPER)
def test_the_level_of_the_classes_is_found(tmp_path, case):
    names, others = DEEPER[case]
    found = find_images(fill(tmp_path, *names, *others))
    assert found.paths == tuple(sorted(names))
    assert set(found.classes) == {name.split("/")[-2] for name in names}
    assert sum(unused.count for unused in found.unused) == len(others)


def test_stars_behind_the_path_say_at_which_level_the_classes_lie(tmp_path):
    names = [f"fold{n}/{name}/{k}.jpg" for n in (1, 2) for name in ("cat", "dog") for k in (1, 2)]
    root = fill(tmp_path, *names)
    assert find_images(f"{root}/*").classes == ("fold1", "fold2")
    deeper = find_images(f"{root}/*/*")
    assert deeper.classes == ("cat", "dog")
    assert deeper.paths == tuple(sorted(names))
    assert find_images(deeper.given) == deeper
    assert "2 classes in" in deeper.describe()


def test_stars_settle_what_is_a_split_and_what_is_a_class(tmp_path):
    fill(tmp_path, "train/1.jpg", "train/2.jpg", "test/1.jpg", "test/2.jpg")
    assert find_images(f"{tmp_path}/*").classes == ("test", "train")


# --- Nothing is left out silently -------------------------------------------------------------------------------------


def test_a_few_loose_images_beside_class_folders_are_counted_not_taken_for_the_data_set(tmp_path):
    names = [f"{name}/{n}.jpg" for name in ("cat", "dog") for n in range(60)]
    found = find_images(fill(tmp_path, *names, *(f"name_{n}.jpg" for n in range(2)), "other_1.jpg", "other_2.jpg"))
    assert (found.layout, len(found.paths)) == ("class folders", 120)
    assert "4 images without a label in the name or folder ('name_0.jpg', 'name_1.jpg'" in found.describe()


@pytest.mark.parametrize(
    "suffix", [".bmp", ".jfif", ".tif", ".TIFF", ".avif", ".jpe", ".WEBP", ".gif", ".JP2", ".ppm", ".mpo", ".tga"]
)
def test_a_class_of_any_format_that_pillow_reads_is_there(tmp_path, suffix):
    found = find_images(fill(tmp_path, "cat/1.jpg", "cat/2.jpg", f"dog/1{suffix}", f"dog/2{suffix}"))
    assert found.classes == ("cat", "dog")


def test_files_that_are_not_used_are_counted_and_named_with_the_reason(tmp_path):
    fill(tmp_path, *(f"{name}/{n}.jpg" for name in ("cat", "dog") for n in range(3)))
    fill(tmp_path, "cat/a.heic", "dog/b.HEIC", "dog/c.cr2", *(f"cat/{n}.txt" for n in range(5)), "README")
    text = find_images(tmp_path).describe()
    assert "2 .heic files ('cat/a.heic', 'dog/b.HEIC'; install pillow-heif to read them)" in text
    assert "1 .cr2 file ('dog/c.cr2'; develop them to JPEG or TIFF)" in text
    assert "6 other files ('README', 'cat/0.txt', 'cat/1.txt', ...)" in text


@pytest.mark.parametrize(
    "folder",
    ["@eaDir", ".AppleDouble", "__MACOSX", "$RECYCLE.BIN", "lost+found", "System Volume Information", "#recycle"],
)
def test_folders_of_systems_are_no_classes_and_their_thumbnails_no_images(tmp_path, folder):
    names = [f"{name}/{n}.jpg" for name in ("cat", "dog") for n in (1, 2)]
    thumbnails = [f"{folder}/1.jpg", f"cat/{folder}/1.jpg/SYNOPHOTO_THUMB_M.jpg"]
    found = find_images(fill(tmp_path, *names, *thumbnails))
    assert found.paths == tuple(names)
    assert [unused.what for unused in found.unused] == ["2 hidden or system images"]


def test_a_folder_of_the_system_that_nobody_may_open_is_no_obstacle(tmp_path, monkeypatch):
    fill(
        tmp_path, *(f"{name}/{n}.jpg" for name in ("cat", "dog") for n in (1, 2)), "lost+found/1.jpg", ".Trashes/1.jpg"
    )
    scandir = os.scandir

    def refuse(path):
        if Path(path).name in ("lost+found", ".Trashes"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # the tests may run as root, who may read everything
    assert len(find_images(tmp_path).paths) == 4


def test_drawings_and_raw_files_beside_the_images_are_named_and_no_obstacle(tmp_path):
    fill(tmp_path, *(f"{name}/{n}.jpg" for name in ("cat", "dog") for n in (1, 2)), "docs/plan.svg", "raw/1.NEF")
    assert "1 .svg file ('docs/plan.svg'; convert them to PNG)" in find_images(tmp_path).describe()


def test_folders_that_link_to_each_other_are_looked_at_once(tmp_path):
    fill(tmp_path, *(f"{name}/{n}.jpg" for name in ("cat", "dog") for n in (1, 2)))
    for a in range(12):
        (tmp_path / "project" / str(a)).mkdir(parents=True)
        for b in range(12):
            (tmp_path / "project" / str(a) / f"to_{b}").symlink_to(f"../{b}")
    started = time.perf_counter()
    assert find_images(tmp_path).classes == ("cat", "dog")
    assert time.perf_counter() - started < 20  # by all paths it would be years


def test_two_spellings_of_one_name_are_one_class(tmp_path):
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    found = find_images(fill(tmp_path, f"{composed}/1.jpg", f"{decomposed}/2.jpg", "tea/1.jpg", "tea/2.jpg"))
    assert found.classes == (composed, "tea")
    assert set(found.paths) == {f"{composed}/1.jpg", f"{decomposed}/2.jpg", "tea/1.jpg", "tea/2.jpg"}
    pets = find_images(fill(tmp_path / "pets", *(f"{name}_1.jpg" for name in (composed, decomposed)),
                            "tea_1.jpg", "tea_2.jpg"))  # fmt: skip
    assert pets.classes == (composed, "tea")


def test_images_that_a_link_leads_to_are_used_and_not_counted_twice(tmp_path):
    fill(tmp_path, *(f"pool/{name}/{n}.jpg" for name in ("cat", "dog") for n in (1, 2)))
    (tmp_path / "data").mkdir()
    for part in ("train", "val"):
        (tmp_path / "data" / part).symlink_to("../pool")
    (tmp_path / "data" / "all").symlink_to("../pool")
    found = find_images(tmp_path / "data")
    assert (found.layout, len(found.paths), found.unused) == ("split folders", 8, ())


# --- Errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ERRORS)
def test_a_folder_that_cannot_be_used_is_refused_in_one_paragraph(tmp_path, case):
    names, given, message = ERRORS[case]
    with pytest.raises(DataError, match=message) as caught:
        find_images(fill(tmp_path, *names) / given)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_a_folder_without_permission_is_named(tmp_path, monkeypatch):
    fill(tmp_path, "cat/1.jpg", "dog/1.jpg")
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "dog":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # the tests may run as root, who may read everything
    with pytest.raises(DataError, match=r"/dog cannot be read \(Permission denied\)"):
        find_images(tmp_path)


@pytest.mark.parametrize(
    ("closed", "given"), [("data", "."), ("data", "data"), ("data", "data/cat"), ("data/cat", "data")]
)
def test_a_folder_that_may_be_listed_but_not_entered_is_an_error_that_says_so(closed, given):
    with someone_else(), tempfile.TemporaryDirectory() as base:
        fill(Path(base), "data/cat/deeper/1.jpg", "data/dog/1.jpg")
        (Path(base) / closed).chmod(0o600)
        try:
            with pytest.raises(DataError, match=rf"{base}/data.* cannot be read \(Permission denied\)"):
                find_images(Path(base) / given)
        finally:
            (Path(base) / closed).chmod(0o700)


@contextmanager
def someone_else():
    """Root may read everything, so the files are made and read by the user `nobody`."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
