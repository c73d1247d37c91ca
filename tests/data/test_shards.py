"""Labelled images in WebDataset's archives. Image files are empty here: only names and labels matter."""

import gzip
import io
import json
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from threading import Thread

import folder_layouts
import pytest
from files import fill

from trainables.data.labelled_images import DataError, ImageFolder, fingerprint
from trainables.data.layouts import find_images, find_unchecked, root_of
from trainables.data.source import images_digest, images_of
from trainables.system.cache import cache_dir


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("FINETUNE_SEARCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def tar(file: Path, files: dict[str, bytes | str], mode: str = "w") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            content = content if isinstance(content, bytes) else content.encode()
            member.size, member.mtime = len(content), 1_700_000_000
            archive.addfile(member, io.BytesIO(content))
    return file


def samples(*keys: str, labels: Sequence[str] = "01") -> dict[str, bytes | str]:
    """An image and a label for each key; the labels take turns."""
    found: dict[str, bytes | str] = {}
    for n, key in enumerate(keys):
        found |= {f"{key}.jpg": b"image " * n, f"{key}.cls": labels[n % len(labels)]}
    return found


def labelled(folder: ImageFolder) -> dict[str, str]:
    return {path: folder.classes[label] for path, label in zip(folder.paths, folder.labels, strict=True)}


def refused(given: object, *parts: str) -> str:
    """The one paragraph with which archives are refused; nothing of them stays in the cache."""
    text = folder_layouts.refused(given, *parts)
    left = [path for path in (cache_dir() / "shards").glob("*") if path.suffix != ".lock"]
    assert left == []
    return text


# --- Reading ----------------------------------------------------------------------------------------------------------


def test_a_folder_of_archives_is_unpacked_once_and_read_like_any_other(tmp_path):
    root = tmp_path / "birds"
    tar(root / "birds-000.tar", samples("a/1", "a/2"))
    tar(root / "birds-001.tar", samples("a/1", "b/2") | {"notes.txt": "no sample", "._a.jpg": b""})
    found = find_images(root)
    paths = ("birds-000/a/1.jpg", "birds-000/a/2.jpg", "birds-001/a/1.jpg", "birds-001/b/2.jpg")
    assert labelled(found) == dict(zip(paths, "0101", strict=True))
    assert found.layout == "WebDataset" and found.given == str(root)
    assert f"WebDataset layout, 4 images, 2 classes in {root}" in found.describe()
    assert (found.root / "birds-000/a/2.jpg").read_bytes() == b"image "
    assert root_of(found.given) == found.root
    before = os.stat(found.root).st_ctime_ns  # noqa: PTH116
    assert images_of(str(root), images_digest(found)) == found
    assert os.stat(found.root).st_ctime_ns == before  # noqa: PTH116


def test_one_archive_with_names_of_classes(tmp_path):
    file = tar(tmp_path / "birds.tar", samples("1", "2", "3", "4"))
    (tmp_path / "classnames.txt").write_text("wren\nblack/white bird\n")
    found = find_images(file)
    assert labelled(found) == {f"birds/{n}.jpg": ("wren", "black/white bird")[(n - 1) % 2] for n in (1, 2, 3, 4)}
    assert found.given == str(file) and find_images(found.given) == found
    (tmp_path / "classnames.txt").write_text("wren\nrobin\n")
    assert find_images(file).classes == ("robin", "wren")
    (tmp_path / "classnames.txt").write_text("crane\ncrane\n")
    with pytest.raises(DataError, match=r"classnames.txt gives 1 name \('crane'\) to several classes"):
        find_images(file)


def test_text_labels_and_compressed_archives(tmp_path):
    file = tar(tmp_path / "birds.tar.gz", samples("1", "2", "3", "4", labels=("wren", " robin\n")), "w:gz")
    assert find_images(file).classes == ("robin", "wren")


def test_labels_in_json(tmp_path):
    files = {}
    for n in range(4):
        said = {"label": f"0{n % 2}", "kind": n % 2, "box": [1]}
        files |= {f"{n}.png": b"", f"{n}.json": json.dumps(said)}
    both = tar(tmp_path / "both.tar", files | {f"{n}.cls": str(n // 2) for n in range(4)})
    assert labelled(find_images(both)) == {f"both/{n}.png": str(n // 2) for n in range(4)}
    assert labelled(find_images(f"{both}?label=label")) == {f"both/{n}.png": f"0{n % 2}" for n in range(4)}
    file = tar(tmp_path / "birds.tar", files)
    assert find_images(file).classes == ("00", "01")
    assert find_images(f"{file}?label=kind").classes == ("0", "1")
    with pytest.raises(DataError, match="no label, or several, among its fields 'label', 'kind', 'box'"):
        find_images(f"{file}?label=colour")
    with pytest.raises(DataError, match="has no text or number as its 'box'"):
        find_images(f"{file}?label=box")
    with pytest.raises(DataError, match="path= does not go with WebDataset's archives"):
        find_images(f"{file}?path=x")


@pytest.mark.parametrize(
    "names",
    [("train-0.tar", "val-0.tar", "test-0.tar"), ("train/0.tar", "valid/0.tar", "test/0.tar"),
     ("birds-train-00.tar", "birds-validation-00.tar", "birds-test-00.tar")],
)  # fmt: skip
def test_archives_that_are_parts_of_a_split_keep_it(tmp_path, names):
    for name in names:
        tar(tmp_path / "data" / name, samples("1", "2", "3", "4"))
    found = find_images(tmp_path / "data")
    assert found.valid == (False,) * 4 + (True,) * 4
    test = found.unused[0].advice.split("'")[1]
    assert test == f"{tmp_path}/data?rows=test"
    assert all(path.startswith(names[2].removesuffix(".tar")) for path in find_unchecked(test).paths)


def test_a_folder_of_test_archives_alone_can_test(tmp_path):
    tar(tmp_path / "data/test-0.tar", samples("1", "2", "3", "4"))
    tar(tmp_path / "data/test-1.tar", samples("1", "2", "3", "4"))
    assert len(find_images(tmp_path / "data").paths) == 8


def test_other_archives_are_unpacked_again_and_the_same_ones_are_not_new_data(tmp_path, cache):
    file = tar(tmp_path / "data/a.tar", samples("1", "2", "3", "4"))
    first = find_images(file)
    again = find_images(file)
    assert first == again and fingerprint(first) == fingerprint(again)
    for path in (cache / "shards").iterdir():
        path.rename(cache / f"old-{path.name}")
    assert fingerprint(find_images(file)) == fingerprint(first)  # so the presized images stay valid
    tar(file, samples("1", "2", "3", "4", "5", labels="10"))
    changed = find_images(file)
    assert len(changed.paths) == 5 and changed.root != first.root


def test_processes_wait_for_the_one_that_unpacks(tmp_path, cache):
    file = tar(tmp_path / "data/a.tar", samples(*map(str, range(300))))
    found: list[ImageFolder] = []
    threads = [Thread(target=lambda: found.append(find_images(file))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and all(each == found[0] for each in found) and len(found[0].paths) == 300
    assert len([path for path in (cache / "shards").iterdir() if path.suffix != ".lock"]) == 1


def test_archives_beside_images_are_not_the_data_set(tmp_path):
    fill(tmp_path, *(f"{name}/{n}.jpg" for name in ("cat", "dog") for n in (1, 2)))
    tar(tmp_path / "backup.tar", samples("1", "2"))
    assert find_images(tmp_path).layout == "class folders"


def test_an_archive_that_was_fetched_from_an_address_is_read_too(tmp_path):
    file = tar(tmp_path / "birds.tar", samples("a/1", "a/2", "b/3", "b/4"))
    found = images_of(file.as_uri())
    assert found.layout == "WebDataset" and labelled(found) == dict(zip(
        ("a/1.jpg", "a/2.jpg", "b/3.jpg", "b/4.jpg"), "0101", strict=True))  # fmt: skip
    (found.root / "classes.txt").write_text("wren\nrobin")
    assert find_images(found.given).classes == ("robin", "wren")
    (found.root / "a/1.cls").unlink()
    with pytest.raises(DataError, match=r"1 sample of 4 .*: 'a/1' has no label"):
        find_images(found.given)


def test_what_a_data_set_came_in_is_not_unpacked_by_looking_at_its_folder(tmp_path, cache):
    tar(tmp_path / "pets/images.tar.gz", samples("1", "2", "3", "4"), "w:gz")
    with pytest.raises(DataError, match="no images that can be read"):
        find_images(tmp_path)
    assert not cache.exists()


# --- What is refused --------------------------------------------------------------------------------------------------


def damaged(file: Path, change) -> Path:
    file.write_bytes(change(file.read_bytes()))
    return file


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content[:2050],  # within the content of a file
        lambda content: content[:2560],  # between two files
        lambda content: content[:2660],  # within a header
        lambda content: content[:2570] + bytes([255] * 100) + content[2670:],  # a damaged header
        lambda content: b"",
        lambda content: b"no archive" * 100,
        lambda content: gzip.compress(content)[:-20],
        lambda content: gzip.compress(content)[:-8] + b"12345678",
    ],
)
def test_a_damaged_archive_is_refused_and_not_read_to_where_it_breaks(tmp_path, change):
    file = tar(tmp_path / "data/a.tar", samples("1", "2", "3", "4"))
    refused(damaged(file, change), f"The archive {file} is damaged")


@pytest.mark.parametrize("name", ["../1.jpg", "/../1.jpg", "a/../../1.jpg"])
def test_members_outside_of_the_folder_are_refused(tmp_path, name):
    file = tar(tmp_path / "data/a.tar", samples("1", "2") | {name: b"x"})
    refused(file, f"{file} is refused", "outside")
    assert not (tmp_path / "1.jpg").exists()


@pytest.mark.parametrize("target", ["/etc/passwd", "1.jpg"])
def test_links_are_refused(tmp_path, target):
    file = tar(tmp_path / "data/a.tar", samples("1", "2"))
    with tarfile.open(file, "a") as archive:
        link = tarfile.TarInfo("3.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, target
        archive.addfile(link)
    refused(file, f"{file} is refused")


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ({"5.jpg": b""}, "'5' in a.tar has no label"),
        ({"5.cls": "1"}, "'5' in a.tar has 0 images, expected one"),
        ({"5.jpg": b"", "5.png": b"", "5.cls": "1"}, "'5' in a.tar has 2 images"),
        ({"5.jpg": b"", "5.cls": " "}, "'5' in a.tar has an empty label"),
        ({"5.jpg": b"", "5.cls": b"\xff"}, "'5' in a.tar has a label that is not UTF-8"),
        ({"5.jpg": b"", "5.json": "{"}, "'5' in a.tar has no JSON"),
        ({"5.jpg": b"", "5.json": "[1]"}, "'5' in a.tar has no label"),
        ({"5.jpg": b"", "5.cls": "7"}, "'5' in a.tar has the label 7, for which"),
    ],
)
def test_samples_without_one_image_and_one_label_are_named(tmp_path, files, why):
    file = tar(tmp_path / "data/a.tar", samples("1", "2", "3", "4") | files)
    (tmp_path / "data/classes.txt").write_text("wren\nrobin\n")
    refused(file, "1 sample of 5 in", why)


def test_an_archive_of_class_folders_is_told_to_be_unpacked(tmp_path):
    file = tar(tmp_path / "data/a.tar", {f"{name}/{n}.jpg": b"" for name in ("cat", "dog") for n in range(9)})
    refused(file, "18 samples of 18", "and 15 more", "An archive of another layout must be unpacked first")
    refused(tar(tmp_path / "data/b.tar", {"readme.md": "hello"}), "There are no images in the archives")


def test_archives_that_are_only_partly_a_split_are_refused(tmp_path):
    for name in ("train-0.tar", "more-0.tar"):
        tar(tmp_path / "data" / name, samples("1", "2"))
    refused(tmp_path / "data", "parts of a split, such as 'train-0.tar', and others, such as 'more-0.tar'")
    (tmp_path / "data/more-0.tar").rename(tmp_path / "data/cats-test.tar")
    refused(tmp_path / "data", "several data sets")


def test_a_disk_without_room_is_named(tmp_path, monkeypatch):
    (tmp_path / "blocked").touch()
    monkeypatch.setenv("FINETUNE_SEARCH_CACHE", str(tmp_path / "blocked"))
    file = tar(tmp_path / "data/a.tar", samples("1", "2", "3", "4"))
    with pytest.raises(DataError, match=r"cannot be unpacked into .*/blocked .*FINETUNE_SEARCH_CACHE"):
        find_images(file)
