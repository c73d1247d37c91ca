"""Labels from a table, as a user has it. Image files are empty here: only names matter."""

import json
import os
from pathlib import Path

import pytest
from files import fill
from folder_layouts import refused

from trainables.data.address import DataAddress
from trainables.data.labelled_images import DataError, ImageFolder, fingerprint
from trainables.data.layouts import find_images, find_unchecked, root_of
from trainables.data.source import images_digest, images_of

PHOTOS = tuple(f"{name}{n}.jpg" for name in ("cat", "dog") for n in (1, 2, 3))


def labelled(folder: ImageFolder) -> dict[str, str]:
    return {path: folder.classes[label] for path, label in zip(folder.paths, folder.labels, strict=True)}


def write(file: Path, *lines: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return file


def table(root: Path, *, header: str = "file_name,label", name: str = "labels.csv", photos=PHOTOS) -> Path:
    """Cats and dogs, labelled by the first letters of their names."""
    fill(root, *photos)
    return write(root / name, header, *(f"{photo},{Path(photo).name[:3]}" for photo in photos))


# --- Tables -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("header", ["path,label", "File Name,Class", "IMAGE,breed", "image-path,target"])
def test_columns_with_usual_names_need_no_options(tmp_path, header):
    found = find_images(table(tmp_path, header=header))
    assert labelled(found) == {photo: photo[:3] for photo in PHOTOS}
    assert (found.layout, found.classes, found.valid, found.groups) == ("label table", ("cat", "dog"), None, None)
    path, label = header.split(",")
    assert f"label table layout, 6 images, 2 classes in {tmp_path}/labels.csv?path={path}&label" in found.describe()
    assert found.given.endswith(f"&label={label}")


@pytest.mark.parametrize("ending", ["csv", "CSV", "tsv", "jsonl", "parquet", "semicolons", "bom"])
def test_the_formats_say_the_same(tmp_path, ending):
    fill(tmp_path, *PHOTOS)
    rows = [(photo, f"0{1 + (photo[0] == 'd')}") for photo in PHOTOS]
    file = tmp_path / f"labels.{ending if ending not in ('semicolons', 'bom') else 'csv'}"
    if ending == "jsonl":
        write(file, *(json.dumps({"path": path, "label": label, "box": [1, 2]}) for path, label in rows), "")
    elif ending == "parquet":
        pandas = pytest.importorskip("pandas")
        pandas.DataFrame(rows, columns=["path", "label"]).to_parquet(file)
    else:
        separator = {"tsv": "\t", "semicolons": ";"}.get(ending, ",")
        first = "\ufeffpath" if ending == "bom" else "path"
        write(file, separator.join((first, "label")), *(separator.join(row) for row in rows))
    found = find_images(file)
    assert labelled(found) == dict(rows) and found.classes == ("01", "02")  # numbers stay as they are written


def test_numbers_of_typed_tables_are_labels_too(tmp_path):
    pandas = pytest.importorskip("pandas")
    fill(tmp_path, *PHOTOS)
    numbers = [10 + (photo[0] == "d") for photo in PHOTOS]
    pandas.DataFrame({"path": PHOTOS, "label": numbers}).to_parquet(tmp_path / "a.parquet")
    lines = (f'{{"path": "{path}", "label": {number}.50}}' for path, number in zip(PHOTOS, numbers, strict=True))
    write(tmp_path / "b.jsonl", *lines)
    assert find_images(tmp_path / "a.parquet").classes == ("10", "11")
    assert find_images(tmp_path / "b.jsonl").classes == ("10.50", "11.50")


@pytest.mark.parametrize("label", ["a/b", 'say "x", y', "ca fé", "?label=x&y", "-", "../..", "#1"])
def test_labels_may_have_any_characters(tmp_path, label):
    fill(tmp_path, *PHOTOS)
    quoted = '"' + label.replace('"', '""') + '"'
    file = write(tmp_path / "labels.csv", "path,label", *(f"{p},{quoted if p[0] == 'c' else 'dog'}" for p in PHOTOS))
    assert set(find_images(file).classes) == {label, "dog"}


def test_columns_are_named_and_the_address_finds_the_same_again(tmp_path):
    photos = tuple(f"pics/{photo}" for photo in PHOTOS)
    fill(tmp_path, *photos)
    rows = (f"{photo[5:]},x{n},{photo[5:8]},{n}" for n, photo in enumerate(photos))
    file = write(tmp_path / "labels.csv", "file,label,My breed & co/100%,patient", *rows)
    address = DataAddress(path=file, options={"label": "My breed & co/100%", "images": str(tmp_path / "pics")})
    found = find_images(str(address))
    assert labelled(found) == {photo: photo[:3] for photo in PHOTOS}
    assert found.groups == tuple("012345")
    for again in (found.given, Path(found.given), str(Path(found.given))):
        assert find_images(again) == found
    assert images_of(found.given, images_digest(found)) == found
    assert root_of(found.given) == found.root == tmp_path / "pics"


def test_a_folder_of_images_in_the_address_is_relative_to_the_table(tmp_path, monkeypatch):
    fill(tmp_path / "pics", *PHOTOS)
    file = write(tmp_path / "labels.csv", "path,label", *(f"{photo},{photo[:3]}" for photo in PHOTOS))
    monkeypatch.chdir(tmp_path.parent)
    assert find_images(f"{file}?images=pics").root == tmp_path / "pics"
    refused(f"{file}?images=pictures", "There is no folder", "pictures")


def test_a_table_with_a_question_mark_in_its_name_is_that_table(tmp_path):
    assert len(find_images(table(tmp_path, name="labels.csv?label=x.csv")).paths) == 6


def test_paths_may_be_absolute_or_lead_elsewhere_or_come_from_windows_or_lack_the_suffix(tmp_path):
    fill(tmp_path, "here/cat1.jpg", "there/cat2.jpg", "far/dog.1.png", "far/dog2.PNG", "here/caf\u00e9.jpg")
    file = write(tmp_path / "here/labels.csv", "path,label", f"{tmp_path}/here/cat1.jpg,cat", "../there/cat2.jpg,cat",
                 f"{tmp_path}/far/dog.1,dog", "..\\far\\dog2.PNG,dog", "./cafe\u0301.jpg,cat")  # fmt: skip
    found = find_images(file)
    assert labelled(found) == {"cat1.jpg": "cat", "../there/cat2.jpg": "cat", "caf\u00e9.jpg": "cat",
                               f"{tmp_path}/far/dog.1.png": "dog", "../far/dog2.PNG": "dog"}  # fmt: skip
    assert all((found.root / path).is_file() for path in found.paths)


def test_the_fingerprint_notices_another_label_and_survives_a_move(tmp_path):
    root = tmp_path / "a"
    first = names_of(find_images(table(root)))
    root = root.rename(tmp_path / "b")
    assert names_of(find_images(root / "labels.csv")) == first
    rows = (root / "labels.csv").read_text().replace("cat3.jpg,cat", "cat3.jpg,dog")
    (root / "labels.csv").write_text(rows)
    changed = names_of(find_images(root / "labels.csv"))
    assert changed[0] != first[0] and changed[1] != first[1]


def names_of(images: ImageFolder) -> tuple[str, str]:
    return fingerprint(images), images_digest(images)


# --- Split and groups -------------------------------------------------------------------------------------------------


def with_split(root: Path, parts: list[str], header: str = "path,label,split") -> Path:
    fill(root, *PHOTOS)
    return write(root / "labels.csv", header, *(f"{p},{p[:3]},{s}" for p, s in zip(PHOTOS, parts * 2, strict=True)))


@pytest.mark.parametrize(
    ("header", "parts"),
    [
        ("path,label,split", ["train", "val", "test"]),
        ("path,label,Subset", ["Training", "Validation", "Testing"]),
        ("path,label,set", ["TRAIN", "valid", "test_set"]),
    ],
)
def test_the_split_column_decides_and_test_rows_are_left_for_the_end(tmp_path, header, parts):
    found = find_images(with_split(tmp_path, parts, header))
    assert found.paths == ("cat1.jpg", "cat2.jpg", "dog1.jpg", "dog2.jpg")
    assert found.valid == (False, True, False, True)
    assert "4 images (2 for training, 2 for validation)" in found.describe()
    (unused,) = found.unused
    assert (unused.what, unused.names) == ("2 test images", ("cat3.jpg", "dog3.jpg"))
    test = unused.advice.split("'")[1]
    assert find_unchecked(test).paths == ("cat3.jpg", "dog3.jpg") and find_unchecked(test).valid is None


def test_without_validation_rows_the_training_rows_are_split(tmp_path):
    found = find_images(with_split(tmp_path, ["train", "train", "test"]))
    assert (len(found.paths), found.valid) == (4, None)


def test_test_rows_need_no_labels(tmp_path):
    fill(tmp_path, *PHOTOS, "new.jpg")
    rows = (f"{photo},{photo[:3]},train" for photo in PHOTOS)
    found = find_images(write(tmp_path / "labels.csv", "path,label,split", *rows, "new.jpg,,test"))
    assert "1 test image ('new.jpg'; they have no labels of these classes; search.predict" in found.describe()


def test_fastais_is_valid_column(tmp_path):
    found = find_images(with_split(tmp_path, ["False", "True", "0"], "path,label,is_valid"))
    assert found.valid == (False, True, False) * 2


def test_numbered_folds_are_no_split_and_a_column_can_be_ignored(tmp_path):
    file = with_split(tmp_path, ["0", "1", "2"], "path,label,fold")
    assert find_images(file).valid is None
    refused(f"{file}?split=fold", "6 rows", "line 2 has the split '0', expected train, valid or test")
    file = with_split(tmp_path, ["train", "valid", "unknown"])
    refused(file, "2 rows", "line 4 has the split 'unknown'", "line 7")
    assert find_images(f"{file}?split=").valid is None
    assert find_images(find_images(f"{file}?split=").given).valid is None


@pytest.mark.parametrize("part", ["val", "test"])
def test_paths_in_folders_of_a_split_keep_it(tmp_path, part):
    photos = [f"{folder}/{photo}" for folder in ("train", part) for photo in PHOTOS]
    file = table(tmp_path, photos=photos)
    found = find_images(file)
    assert (found.valid is None) == (part == "test")
    assert [p for i, p in enumerate(found.paths) if not found.valid or not found.valid[i]] == photos[:6]
    assert len(find_images(f"{file}?split=").paths) == 12


def test_groups_stay_with_their_images(tmp_path):
    fill(tmp_path, *PHOTOS)
    rows = [f"{photo},{photo[:3]},p{n}" for n, photo in enumerate(PHOTOS)]
    found = find_images(write(tmp_path / "labels.csv", "path,label,Patient ID", *reversed(rows)))
    assert found.groups == ("p0", "p1", "p2", "p3", "p4", "p5")
    assert found.only([4, 1]).groups == ("p4", "p1")
    assert find_images(f"{tmp_path}/labels.csv?group=").groups is None
    write(tmp_path / "labels.csv", "path,label,patient", *rows, "cat1.jpg,cat,p9", "cat2.jpg,cat,")
    refused(tmp_path / "labels.csv", "2 rows", "line 8 gives 'cat1.jpg' the group 'p9', and line 2 'p0'",
            "line 9 has no patient")  # fmt: skip


# --- What is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ("a,b", ["none of its columns is called like the path", "like the label", "are 'a', 'b'", "--columns path="]),
        ("path,label,class", ["the label may be in its column 'label' or 'class'", "columns are 'path', 'label'"]),
        ("path,label,set,split", ["the split may be in its column 'set' or 'split' ('split=' alone ignores both)"]),
        ("path,path,label", ["the path may be in its column 'path' or 'path'"]),
        ("", ["is empty"]),
        ("path,label", ["it has no rows below"]),
    ],
)
def test_columns_that_are_missing_or_ambiguous_are_listed_with_what_to_do(tmp_path, given, parts):
    refused(write(tmp_path / "labels.csv", *([given] if given else [])), f"{tmp_path}/labels.csv", *parts)


def test_a_named_column_that_is_not_there(tmp_path):
    refused(f"{table(tmp_path)}?label=breed", "it has no column 'breed'", "'file_name', 'label'")


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ("label=", "expected a name after label="),
        ("colour=red", "expected path=, label=, split=, group=, images=, rows="),
        ("label=a&label=b", "label= is there twice"),
        ("rows=some", "expected one of train, valid, test"),
    ],
)
def test_options_in_an_address_are_checked(tmp_path, options, part):
    refused(f"{table(tmp_path)}?{options}", part)


def test_all_wrong_rows_are_named_together(tmp_path):
    fill(tmp_path, *PHOTOS, "notes.txt", "folder/x.jpg", "two.jpg", "two.png")
    rows = [f"{photo},{photo[:3]}" for photo in PHOTOS]
    wrong = ["cat1.jpg,", "cat1.jpg,dog", "notes.txt,cat", ",cat", "folder,cat", "cat2.jpg", "two,dog", "a\0.jpg,cat"]
    text = refused(write(tmp_path / "labels.csv", "path,label", *rows, *wrong), "8 rows of", "and 5 more")
    assert "line 10 names 'notes.txt', which is not an image that can be read (.txt); line 11 names no file" in text
    for row, why in zip(wrong, ["has no label", "gives 'cat1.jpg' the label 'dog', and line 2 'cat'", "(.txt)",
                                "names no file", "is a folder", "has 1 fields, expected 2",
                                "may be 'two.jpg' or 'two.png'", "no file can be called"], strict=True):  # fmt: skip
        refused(write(tmp_path / "labels.csv", "path,label", *rows, row), "1 row of", f"line 8 {why}"[:7], why)


def test_an_image_that_is_named_twice_alike_counts_once(tmp_path):
    fill(tmp_path, *PHOTOS)
    rows = [f"{photo},{photo[:3]}" for photo in PHOTOS]
    found = find_images(write(tmp_path / "labels.csv", "path,label", *rows, "./cat1.jpg,cat", "", ",,"[:1]))
    assert len(found.paths) == 6


def test_an_image_in_training_and_validation_is_refused(tmp_path):
    file = with_split(tmp_path, ["train", "valid", "train"])
    with file.open("a") as out:
        out.write("cat1.jpg,cat,valid\n")
    refused(file, "line 8 gives 'cat1.jpg' the part 'valid', and line 2 'train'")


def test_a_few_missing_files_count_as_unreadable_and_many_are_refused(tmp_path):
    file = table(tmp_path)
    (tmp_path / "dog2.jpg").unlink()
    found = find_images(file)
    assert "dog2.jpg" in found.paths and "1 missing file ('line 6: dog2.jpg'; these count" in found.describe()
    for photo in PHOTOS[:4]:
        (tmp_path / photo).unlink()
    refused(file, "5 of 6 files that the column 'file_name' of", f"are not in {tmp_path} (line 2: 'cat1.jpg', ",
            "and 2 more", "--images DIR")  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("labels.csv", b"path,label\ncat1.jpg,cat\ncat2.jpg,caf\xe9\n", ["is not UTF-8 text (line 3)"]),
        ("labels.csv", b'path,label\ncat1.jpg,"cat\n', ["line 2 is not CSV"]),
        ("labels.jsonl", b'{"path": "cat1.jpg", "label": "a"}\n{"path"\n[1]\n', ["line 2 is not JSON", "line 3"]),
        ("labels.jsonl", b'{"path": "cat1.jpg", "label": ["a"]}\n', ["line 1 has no text in 'label', but a list"]),
        ("labels.parquet", b"PAR1 nothing", ["cannot be read as Parquet"]),
        ("labels.parquet", b"", ["cannot be read as Parquet"]),
    ],
)
def test_a_damaged_table_is_refused_with_the_place(tmp_path, name, content, parts):
    fill(tmp_path, *PHOTOS)
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, name, *parts)


def test_images_inside_of_a_table_are_no_paths(tmp_path):
    pandas = pytest.importorskip("pandas")
    images = [{"bytes": b"x", "path": None}] * 2
    pandas.DataFrame({"image": images, "label": ["a", "b"]}).to_parquet(tmp_path / "train.parquet")
    refused(tmp_path / "train.parquet", "2 rows", "row 1 has no text in 'image', but several fields")


def test_what_is_wrong_with_the_classes_is_said_of_the_table(tmp_path):
    fill(tmp_path, *PHOTOS)
    file = write(tmp_path / "labels.csv", "path,label,kind", *(f"{photo},x,{n}" for n, photo in enumerate(PHOTOS)))
    refused(file, "labels.csv?path=path&label=label (label table layout) has only one class, 'x'", "label=NAME")
    refused(f"{file}?label=kind", "fewer than two images in 6 classes")


# --- Folders with metadata --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [".", "data"])
def test_a_folder_with_metadata_is_read_as_hugging_face_does(tmp_path, given):
    root = tmp_path if given == "." else tmp_path / "data"
    table(root, name="metadata.csv", header="file_name,label")
    fill(root, "extra/other.jpg")
    found = find_images(tmp_path)
    prefix = "" if given == "." else "data/"
    assert found.layout == "imagefolder"
    assert labelled(found) == {f"{prefix}{photo}": photo[:3] for photo in PHOTOS}
    assert [str(unused) for unused in found.unused] == [f"1 image that no table names ('{prefix}extra/other.jpg')"]
    assert find_images(found.given) == found


def test_split_folders_with_metadata_each(tmp_path):
    for part in ("train", "validation", "test"):
        fill(tmp_path / part, *PHOTOS)
        lines = (json.dumps({"file_name": photo, "label": photo[:3], "text": ""}) for photo in PHOTOS)
        write(tmp_path / part / "metadata.jsonl", *lines)
    found = find_images(tmp_path)
    assert found.paths == tuple(f"{part}/{photo}" for part in ("train", "validation") for photo in PHOTOS)
    assert found.valid == (False,) * 6 + (True,) * 6
    assert "6 test images" in found.describe() and "rows=test" in found.describe()
    for part in ("test", "train"):
        write(tmp_path / part / "metadata.jsonl", *(json.dumps({"file_name": photo}) for photo in PHOTOS))
        if part == "test":
            assert "they have no labels of these classes" in find_images(tmp_path).describe()
    refused(tmp_path, "6 rows", "train/metadata.jsonl, line 1 has no label")


def test_metadata_about_something_else_leaves_class_folders_alone(tmp_path):
    names = [f"{name}/{n}.jpg" for name in ("cat", "dog") for n in (1, 2)]
    fill(tmp_path, *names)
    write(tmp_path / "metadata.csv", "file_name,text", *(f"{name},a photo" for name in names))
    assert find_images(tmp_path).layout == "class folders"
    refused(f"{tmp_path}?label=text", "(imagefolder layout) has only one class, 'a photo'")
    (tmp_path / "metadata.csv").write_bytes(b"\xff\xfe")
    assert find_images(tmp_path).layout == "class folders"
    write(tmp_path / "metadata.csv", "file_name,label", *(f"{name},{name[4]}" for name in names))
    assert find_images(tmp_path).classes == ("1", "2")
    assert find_images(f"{tmp_path}/*").classes == ("cat", "dog")


def test_a_table_beside_images_is_pointed_out(tmp_path):
    table(tmp_path)
    refused(tmp_path, f"If labels.csv has their labels, give {tmp_path}/labels.csv.")
    refused(f"{tmp_path}?label=label", "there is no table in")
    (tmp_path / "metadata.csv").touch()
    (tmp_path / "metadata.jsonl").touch()
    refused(tmp_path, "has metadata.csv and metadata.jsonl")


def test_links_to_a_table_keep_to_the_folder_that_they_lie_in(tmp_path):
    fill(tmp_path / "data", *PHOTOS)
    table(tmp_path / "elsewhere")
    (tmp_path / "data/labels.csv").symlink_to("../elsewhere/labels.csv")
    assert find_images(tmp_path / "data/labels.csv").root == tmp_path / "data"
    os.remove(tmp_path / "elsewhere/labels.csv")  # noqa: PTH107
    refused(tmp_path / "data/labels.csv", "There is no file")


# --- Several labels ---------------------------------------------------------------------------------------------------


def test_a_table_of_which_one_row_has_several_labels_is_one_of_label_sets(tmp_path):
    fill(tmp_path, *PHOTOS)
    cells = ["dog;indoors", *["dog"] * (len(PHOTOS) - 3), "indoors", ""]
    file = write(tmp_path / "labels.csv", "path,label", *(f"{p},{c}" for p, c in zip(PHOTOS, cells, strict=False)))
    found = find_images(file)
    assert found.classes == ("dog", "indoors")
    assert {len(own) for own in found.label_sets} == {0, 1, 2}
    assert labelled_sets(found)[PHOTOS[0]] == {"dog", "indoors"}
    assert find_images(found.given).label_sets == found.label_sets
    with pytest.raises(DataError, match="1 cell cannot be read as labels: line 3, '\\[1\\]'"):
        find_images(write(tmp_path / "labels.csv", "path,label", f"{PHOTOS[0]},a;b", f"{PHOTOS[1]},[1]"))


def labelled_sets(found) -> dict[str, set[str]]:
    sets = zip(found.paths, found.label_sets, strict=True)
    return {path: {found.classes[label] for label in own} for path, own in sets}
