"""Folders of images: how they are taken, and why they are refused."""

import pytest

from trainables.data.labelled_images import DataError
from trainables.data.layouts import find_images

PARTS = [
    *(("train", valid) for valid in ("val", "valid", "validation", "Val", "eval", "dev")),
    *[("TRAIN", "VALID"), ("Training", "Validation"), ("train_set", "val_set"), ("trainset", "valset")],
    *[("birds_train", "birds_val"), ("Train Images", "Validation Images"), ("seg_train", "seg_val")],
    *[("train/train", "val/val"), ("train2017", "val2017")],
]

PARTS_WITH_TEST = [
    *[("train", "test"), ("Training", "Testing"), ("seg_train", "seg_test"), ("TRAIN", "TEST")],
    *[("train_set", "test_set"), ("seg_train/seg_train", "seg_test/seg_test"), ("birds-train", "birds-test")],
]

DEEPER = {
    "Food-101": (
        ["images/cat/1.jpg", "images/cat/2.jpg", "images/dog/1.jpg", "images/dog/2.jpg"],
        ["meta/classes.txt"],
    ),
    "CUB": (
        [f"CUB_200_2011/images/{name}/{n}.jpg" for name in ("001.Albatross", "002.Auklet") for n in (1, 2)],
        ["CUB_200_2011/attributes/certainties.txt", "CUB_200_2011/images.txt"],
    ),
    "nested in a folder of its own name": ([f"birds/birds/{name}/{n}.jpg" for name in "ab" for n in (1, 2)], []),
    "masks beside the images": (
        [f"images/{name}/{n}.jpg" for name in ("cat", "dog") for n in (1, 2)],
        [f"masks/{name}/{n}.png" for name in ("cat", "dog") for n in (1, 2)],
    ),
    "masks beside the training images": (
        [f"train/images/{name}/{n}.jpg" for name in ("cat", "dog") for n in (1, 2)],
        [f"train/masks/{name}/{n}.png" for name in ("cat", "dog") for n in (1, 2)],
    ),
    "a split one level deeper": ([f"data/{part}/{name}/1.jpg" for part in ("train", "val") for name in "ab"], []),
}

ERRORS = {
    "missing folder": ([], "nowhere", "There is no folder .*/nowhere"),
    "a file": (["cats.zip"], "cats.zip", "cats.zip is a file.*unpack"),
    "no images": (["cat/notes.txt", ".hidden/1.jpg"], ".", "no images that can be read in"),
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
        r"1 image \('holiday.jpg'\) of 19 .* have no label",
    ),
    "validation class never trained": (
        ["train/cat/1.jpg", "train/dog/1.jpg", "val/cat/1.jpg", "val/dog/1.jpg", "val/owl/1.jpg", "val/owl/2.jpg"],
        ".",
        r"no training images of 1 class \('owl'\)",
    ),
    "no training folder": (
        ["val/cat/1.jpg", "val/dog/1.jpg", "test/cat/1.jpg", "test/dog/1.jpg"],
        ".",
        "look like parts of a split, but no training folder",
    ),
    "split folders without class folders": (
        ["train/1.jpg", "train/2.jpg", "test/1.jpg", "test/2.jpg"],
        ".",
        r"two ways: test/, train/ are the classes; or they are parts of a split whose images have no labels.*/\*",
    ),
    "unlabelled validation images": (
        ["train/cat/1.jpg", "train/dog/1.jpg", "val/images/1.jpg", "val/labels.txt"],
        ".",
        r"val has no class folders .* names of those in .*/train \(cat/, dog/\)",
    ),
    "two training folders": (
        [f"{part}/{name}/1.jpg" for part in ("train", "training", "val") for name in ("cat", "dog")],
        ".",
        "several training folders, train/, training/",
    ),
    "the data set once more inside itself": (
        [f"{base}{name}/{n}.jpg" for base in ("", "PlantVillage/") for name in ("rust", "scab", "sound") for n in "12"],
        ".",
        r"PlantVillage contains folders .* of its neighbours \(3 names \('rust', 'scab', 'sound'\)\): .* second copy",
    ),
    "the training part once more inside itself": (
        [f"{base}/{name}/{n}.jpg" for base in ("train", "train/birds", "val") for name in "abc" for n in "12"],
        ".",
        r"train/birds contains folders .* of its neighbours",
    ),
    "folders in the classes of a training folder": (
        [f"{part}/{name}/{n}/1.jpg" for part in ("train", "test") for name in ("cat", "dog") for n in "12"],
        ".",
        r"train can be read in two ways: .* cat/, dog/.*; or .* 1/, 2/\. Give '.*/train/\*' .* '.*/train/\*/\*'",
    ),
    "parts of a split without labels beside masks": (
        ["train/1.jpg", "train/2.jpg", "test/1.jpg", "test/2.jpg", "train_masks/1.gif", "train_masks/2.gif"],
        ".",
        "two ways: test/, train/, train_masks/ are the classes; or they are parts of a split whose images have no",
    ),
    "a test folder beside class folders": (
        [f"{name}/{n}.jpg" for name in ("cat", "dog", "test") for n in "12"],
        ".",
        r"two ways: cat/, dog/, test/ are the classes; or test/ is a part of a split and not a class\. .* move test",
    ),
    "a split beside a test folder": (
        [*(f"Plants/{part}/{name}/1.jpg" for part in ("train", "valid") for name in "ab"), "test/test/1.jpg"],
        ".",
        r"two ways: Plants/, test/ are the classes; or test/ is a part",
    ),
    "class and part in one name": (
        [f"{name}_{part}/1.jpg" for name in ("cats", "dogs") for part in ("train", "test")],
        ".",
        r"two ways: .*; or they are parts of a split, of cats, dogs",
    ),
    "images and their masks": (
        [f"{folder}/{n}.png" for folder in ("images", "masks") for n in "12"],
        ".",
        r"two ways: images/, masks/ are the classes; or it is a data set for segmentation",
    ),
    "a class called mask beside one with folders": (
        ["mask/1.jpg", "mask/2.jpg", "no_mask/indoor/1.jpg", "no_mask/outdoor/1.jpg"],
        ".",
        r"two ways: mask/, no_mask/ are the classes; or no_mask/ holds the data set",
    ),
    "photos as the camera named them": (
        ["IMG_1.jpg", "IMG_2.jpg", "DSC_1.jpg", "DSC_2.jpg"],
        ".",
        "do not tell two classes",
    ),
    "a class of which only a plugin reads the images beside one with folders": (
        ["cat/a/1.jpg", "cat/b/1.jpg", "dog/1.heic", "dog/2.heic"],
        ".",
        r"dog looks like a class, .* 2 \.heic files",
    ),
    "folds": (
        [f"fold{n}/{name}/1.jpg" for n in (1, 2) for name in ("cat", "dog")],
        ".",
        r"two ways: the classes are fold1/, fold2/.*; or .* one level deeper, cat/, dog/\. .*/\*' .*/\*/\*'",
    ),
    "groups of classes": (
        ["animals/cat/1.jpg", "animals/dog/1.jpg", "vehicles/bus/1.jpg", "vehicles/car/1.jpg"],
        ".",
        r"two ways: .* animals/, vehicles/.*; or .* cat/, dog/, bus/, car/",
    ),
    "a folder of images beside others": (
        [*(f"images/{name}/{n}.jpg" for name in ("cat", "dog") for n in (1, 2)), "drawings/1.jpg", "drawings/2.jpg"],
        ".",
        r"two ways: drawings/, images/ are the classes; or images/ holds the data set",
    ),
    "a training folder beside others": (
        [*(f"train/{name}/{n}.jpg" for name in ("cat", "dog") for n in (1, 2)), "extra/1.jpg", "extra/2.jpg"],
        ".",
        r"two ways: train/, extra/ are the classes; or train/ is the training part of a split, with cat/, dog/",
    ),
    "as many images labelled by name as by folder": (
        [*(f"{name}/{n}.jpg" for name in ("cat", "dog") for n in (1, 2)), *(f"{name}_1.jpg" for name in "abcd")],
        ".",
        r"two ways: 4 images are labelled by their names, such as 'a_1.jpg'; or 4 images .* \(cat/, dog/\)",
    ),
    "a class of a format that needs a plugin": (
        ["cat/1.jpg", "cat/2.jpg", "dog/1.jpg", "dog/2.jpg", "owl/1.heic", "owl/2.HEIC"],
        ".",
        r"owl looks like a class, .* 2 \.heic files \(install pillow-heif",
    ),
    "a validation class of a format that needs a plugin": (
        [*(f"{part}/{name}/1.jpg" for part in ("train", "val") for name in ("cat", "dog")), "train/owl/1.heic"],
        ".",
        r"train/owl looks like a class, .* 1 \.heic file ",
    ),
    "no format that is read": (
        ["cat/1.heic", "dog/1.heic", "dog/1.txt"],
        ".",
        r"no images that can be read in .* \(other files: 2 \.heic, 1 \.txt\)\. \.heic: install pillow-heif",
    ),
    "empty validation folder": (
        ["train/cat/1.jpg", "train/dog/1.jpg", "val/readme.txt"],
        ".",
        "val has no class folders with images",
    ),
}


def refused(given: object, *parts: str) -> str:
    """The one paragraph with which images are refused."""
    with pytest.raises(DataError) as caught:
        find_images(str(given))
    text = str(caught.value)
    assert "\n" not in text
    for part in parts:
        assert part in text
    return text
