"""Finding, labelling and splitting images, as a user meets it. Files are empty here: only names matter."""

import os
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from trainables import data
from trainables.data import DataError, find_images, fingerprint, split


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("FINETUNE_SEARCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def fill(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def labelled(folder: data.ImageFolder) -> dict[str, str]:
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
    assert found.describe() == "Oxford Pets layout, 6 images, 3 classes"


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


@pytest.mark.parametrize("valid", ["val", "valid", "validation", "test", "Val"])
def test_split_folders_keep_the_given_split(tmp_path, valid):
    names = ["train/cat/1.jpg", "train/dog/1.jpg", "train/dog/2.jpg", f"{valid}/cat/1.jpg", f"{valid}/dog/9.jpg"]
    found = find_images(fill(tmp_path, *names))
    assert found.layout == "split folders"
    assert found.classes == ("cat", "dog")
    assert {p for p, held in zip(found.paths, found.valid, strict=True) if held} == set(names[3:])
    assert found.describe() == "split folders layout, 5 images (3 for training, 2 for validation), 2 classes"


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


# --- Errors -----------------------------------------------------------------------------------------------------------

ERRORS = {
    "missing folder": ([], "nowhere", "There is no folder .*/nowhere"),
    "a file": (["cats.zip"], "cats.zip", "cats.zip is a file.*unpack"),
    "no images": (["cat/notes.txt", ".hidden/1.jpg"], ".", "no images in"),
    "names without labels": (["images/a.jpg", "images/b.jpg"], ".", "do not tell two classes apart.*'a.jpg'"),
    "one breed": (["images/pug_1.jpg", "images/pug_2.jpg"], ".", "do not tell two classes apart.*'pug_1.jpg'"),
    "one class": (["cat/1.jpg", "cat/2.jpg"], ".", "only one class, 'cat'"),
    "classes with one image": (
        [f"{name}/1.jpg" for name in "abcdefg"] + ["z/1.jpg", "z/2.jpg"],
        ".",
        r"fewer than two images in 7 classes \('a', 'b', 'c', 'd', 'e', \.\.\.\)",
    ),
    "no label in some names": (
        [f"images/{name}_{n}.jpg" for name in "ab" for n in range(9)] + ["images/holiday.jpg"],
        ".",
        r"1 image \('holiday.jpg'\) of 19 .* carry no label",
    ),
    "validation class never trained": (
        ["train/cat/1.jpg", "train/dog/1.jpg", "val/cat/1.jpg", "val/dog/1.jpg", "val/owl/1.jpg", "val/owl/2.jpg"],
        ".",
        r"no training images of 1 class \('owl'\)",
    ),
    "no validation folder": (["train/cat/1.jpg", "train/dog/1.jpg"], ".", "no validation folder"),
    "empty validation folder": (
        ["train/cat/1.jpg", "train/dog/1.jpg", "val/readme.txt"],
        ".",
        "has no class folders with images",
    ),
}


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


# --- Splitting --------------------------------------------------------------------------------------------------------


def test_the_split_is_the_same_on_every_machine():
    labels = np.arange(40) % 4
    train, valid = split(labels, seed=7)
    assert valid.tolist() == PINNED
    assert sorted([*train, *valid]) == list(range(40))
    assert split(labels, seed=8)[1].tolist() != PINNED


PINNED = [6, 10, 21, 23, 24, 32, 37, 39]


def test_each_class_gives_its_share_to_validation():
    labels = np.repeat(np.arange(5), [100, 50, 23, 11, 2])
    for seed in range(20):
        train, valid = split(labels, seed=seed)
        assert len(valid) == round(0.2 * len(labels))
        held = np.bincount(labels[valid], minlength=5)
        assert (np.abs(held - 0.2 * np.bincount(labels)) < 1).all()
        assert (np.bincount(labels[train], minlength=5) >= 1).all()


def test_a_thousand_classes_of_two_images_all_train_and_the_seed_chooses_which_validate():
    labels = np.repeat(np.arange(1000), 2)
    train, valid = split(labels)
    assert len(valid) == 400
    assert set(labels[train]) == set(range(1000))
    assert 100 < (labels[valid] < 500).sum() < 300  # not just the first or the last names
    assert len(split(labels, valid_fraction=0.9)[1]) == 1000  # never a class's last image


@pytest.mark.parametrize("fraction", [0, 1, -0.1, float("nan")])
def test_a_fraction_that_leaves_one_side_empty_is_refused(fraction):
    with pytest.raises(ValueError, match="valid_fraction"):
        split([0, 0, 1, 1], valid_fraction=fraction)


def test_fingerprint_notices_every_change_and_survives_a_move(tmp_path):
    root = fill(tmp_path / "a", "cat/1.jpg", "cat/2.jpg", "dog/1.jpg", "dog/2.jpg")
    first = fingerprint(find_images(root))
    root = root.rename(tmp_path / "b")
    assert fingerprint(find_images(root)) == first
    seen = {first}
    (root / "cat/1.jpg").write_bytes(b"x")
    seen.add(fingerprint(find_images(root)))
    os.utime(root / "cat/1.jpg", ns=(0, 1))
    seen.add(fingerprint(find_images(root)))
    (root / "cat/2.jpg").rename(root / "cat/3.jpg")
    seen.add(fingerprint(find_images(root)))
    (root / "cat").rename(root / "kitten")
    seen.add(fingerprint(find_images(root)))
    assert len(seen) == 5


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    assert data.cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("FINETUNE_SEARCH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert data.cache_dir() == tmp_path / "xdg/finetune-search"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert data.cache_dir() == Path.home() / ".cache/finetune-search"


def test_finding_images_imports_nothing_heavy():
    heavy = {"torch", "torchvision", "ray", "cv2", "PIL", "pandas"}
    code = "import sys, trainables.data; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "trainables.data" in loaded and not heavy & set(loaded)
