"""The presized cache: built once, verified, shared."""

import json
import logging
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from trainables.data import labelled_images, presize
from trainables.data.image_file import read_image, resize_shorter_side
from trainables.data.labelled_images import DataError
from trainables.data.layouts import find_images
from trainables.data.presize import PresizedImages


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("FINETUNE_SEARCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "presized"


@pytest.fixture
def pets(tmp_path) -> Path:
    """Twelve images of two breeds, portrait and landscape; every one has a colour of its own."""
    root = tmp_path / "pets"
    (root / "images").mkdir(parents=True)
    for n in range(12):
        height, width = (60, 40 + n) if n % 3 else (50 + n, 40)
        Image.new("RGB", (width, height), (20 * n, 255 - 20 * n, 128)).save(
            root / "images" / f"{('pug', 'boxer')[n % 2]}_{n}.jpg", quality=95
        )
    return root


# --- The cache --------------------------------------------------------------------------------------------------------


def test_the_cache_holds_every_image_with_its_label_and_answers_in_microseconds(pets):
    folder = find_images(pets)
    steps = []
    images = presize.presize(folder, 32, progress=lambda done, total: steps.append((done, total)))
    assert steps == [(n, 12) for n in range(1, 13)]
    assert (len(images), images.classes, images.layout) == (12, ("boxer", "pug"), "Oxford Pets")
    assert images.paths == folder.paths and images.labels.tolist() == list(folder.labels)
    assert images.nbytes == sum(image.nbytes for image in map(images.__getitem__, range(12)))
    for i, path in enumerate(folder.paths):
        np.testing.assert_array_equal(images[i], resize_shorter_side(read_image(pets / path, 32), 32))
        assert min(images[i].shape[:2]) == 32 and images[i].flags.c_contiguous
    np.testing.assert_array_equal(images[-1], images[11])
    with pytest.raises(IndexError):
        images[12]
    with pytest.raises(ValueError, match="read-only"):
        images[0][0, 0, 0] = 1
    started = time.perf_counter()
    for _ in range(1000):
        images[5]
    assert (time.perf_counter() - started) / 1000 < 1e-4


def test_the_second_opening_reads_no_image(pets, cache):
    folder = find_images(pets)
    first = presize.presize(folder, 32)
    for path in folder.paths:
        stat = (pets / path).stat()
        (pets / path).write_bytes(b"x" * stat.st_size)
        os.utime(pets / path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    again = presize.presize(find_images(pets), 32)
    np.testing.assert_array_equal(again[3], first[3])
    assert [path.name for path in cache.iterdir() if not path.name.startswith(".")] == [first.path.name]


def test_other_sizes_and_changed_images_get_caches_of_their_own(pets):
    first = presize.presize(find_images(pets), 32)
    assert presize.presize(find_images(pets), 24)[0].shape != first[0].shape
    Image.new("RGB", (40, 40), "black").save(pets / "images" / "pug_0.jpg")
    changed = presize.presize(find_images(pets), 32)
    assert changed.path != first.path
    assert (changed[changed.paths.index("images/pug_0.jpg")] == 0).all()


def test_a_cache_travels_to_other_processes_as_its_path(pets):
    images = presize.presize(find_images(pets), 32)
    packed = pickle.dumps(images)
    assert len(packed) < 500
    np.testing.assert_array_equal(pickle.loads(packed)[7], images[7])


def test_the_split_is_seeded_or_the_one_that_the_folders_give(pets, tmp_path):
    images = presize.presize(find_images(pets), 32)
    train, valid = images.split(seed=3)
    expected = labelled_images.split(images.labels, seed=3)
    assert train.tolist() == expected[0].tolist() and valid.tolist() == expected[1].tolist()
    for n, name in enumerate(("train/cat/1", "train/dog/1", "train/dog/2", "val/cat/7", "val/dog/7")):
        (tmp_path / "given" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9), (n, n, n)).save(tmp_path / "given" / f"{name}.png")
    given = presize.presize(find_images(tmp_path / "given"), 8)
    for seed in (0, 1):
        train, valid = given.split(seed=seed)
        assert [given.paths[i] for i in valid] == ["val/cat/7.png", "val/dog/7.png"]
        assert len(train) == 3


def test_names_with_spaces_quotes_newlines_and_other_alphabets_work(tmp_path):
    names = ["a b", "quo\"te'", "new\nline", "Käuzchen 梟", os.fsdecode(b"latin-\xe4")]
    for name in names:
        (tmp_path / "data" / name).mkdir(parents=True)
        for n in range(2):
            Image.new("RGB", (9, 9)).save(tmp_path / "data" / name / f"{n}.png")
    images = presize.presize(find_images(tmp_path / "data"), 8)
    assert set(images.classes) == set(names)
    assert presize.presize(find_images(tmp_path / "data"), 8).classes == images.classes


# --- The three storages -----------------------------------------------------------------------------------------------


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return 10 * np.log10(255**2 / max(np.square(one.astype(float) - other).mean(), 1e-9))


def test_off_gives_the_same_pixels_and_jpeg_nearly_the_same(pets):
    folder = find_images(pets)
    images = {storage: presize.presize(folder, 32, storage=storage) for storage in ("memory-map", "jpeg", "off")}
    assert len({each.path for each in images.values()}) == 3
    for storage, each in images.items():
        assert (each.storage, len(each), each.classes) == (storage, 12, ("boxer", "pug"))
        assert each.labels.tolist() == images["memory-map"].labels.tolist()
        assert pickle.loads(pickle.dumps(each)).path == each.path
    for i in range(-1, 12):
        np.testing.assert_array_equal(images["off"][i], images["memory-map"][i])
        assert images["jpeg"][i].shape == images["memory-map"][i].shape
        assert psnr(images["jpeg"][i], images["memory-map"][i]) > 40
    sizes = {storage: sum(file.stat().st_size for file in each.path.iterdir()) for storage, each in images.items()}
    assert sizes["off"] < images["memory-map"].nbytes < sizes["memory-map"]


def test_off_reads_the_images_where_they_are_and_says_when_they_are_gone(pets, tmp_path):
    images = presize.presize(find_images(pets), 32, storage="off")
    (pets / images.paths[3]).unlink()
    with pytest.raises(DataError, match="no longer is"):
        images[3]
    Image.new("RGB", (100, 10)).save(pets / images.paths[4])
    with pytest.raises(DataError, match="has changed since"):
        images[4]


@pytest.mark.parametrize(
    ("memory", "disk", "chosen"),
    [(1 << 40, 1 << 40, "memory-map"), (10_000, 1 << 40, "jpeg"), (1 << 40, 30_000, "jpeg")],
)
def test_auto_takes_the_memory_map_while_it_fits_half_of_memory_and_the_disk(
    pets, monkeypatch, caplog, memory, disk, chosen
):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(presize, "total_memory", lambda: memory)
    monkeypatch.setattr(presize.shutil, "disk_usage", lambda _: SimpleNamespace(free=disk))
    images = presize.presize(find_images(pets), 32)
    assert images.storage == chosen
    assert f"cache: {chosen} chosen" in caplog.text
    monkeypatch.undo()
    monkeypatch.setenv("FINETUNE_SEARCH_CACHE", str(images.path.parents[1]))
    assert presize.presize(find_images(pets), 32).path == images.path  # an earlier choice holds


def test_the_size_is_known_before_anything_is_decoded(pets):
    folder = find_images(pets)
    for method in ("crop", "squish", "pad"):
        estimate = presize.estimated_bytes(folder, 32, method)
        assert estimate == pytest.approx(presize.presize(folder, 32, method).nbytes, rel=0.05)


def test_an_unknown_storage_is_refused(pets):
    with pytest.raises(ValueError, match=r"storage is 'ram'; expected one of auto, memory-map, jpeg, off"):
        presize.presize(find_images(pets), 32, storage="ram")


# --- Unreadable images ------------------------------------------------------------------------------------------------


def tiny_class_folders(root: Path, num: int) -> Path:
    for n in range(num):
        folder = root / ("cat", "dog")[n % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (n % 256, 0, 0)).save(folder / f"{n:04}.png")
    return root


def test_up_to_one_percent_of_unreadable_images_are_left_out_and_named(tmp_path, caplog):
    root = tiny_class_folders(tmp_path / "data", 200)
    (root / "cat/0004.png").write_text("no image")
    (root / "dog/0007.png").unlink()
    (root / "dog/0007.png").symlink_to("gone.png")
    images = presize.presize(find_images(root), 8)
    assert images.unreadable == ("cat/0004.png", "dog/0007.png")
    assert len(images) == 198 and not set(images.unreadable) & set(images.paths)
    assert images[images.paths.index("cat/0006.png")][0, 0].tolist() == [6, 0, 0]  # what follows a gap is not shifted
    [warning] = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "skipped 2 of 200" in warning.message and "cat/0004.png" in warning.message
    assert "No such file" in warning.message
    train, valid = images.split()
    assert (len(train), len(valid)) == (158, 40)
    assert presize.presize(find_images(root), 8).unreadable == images.unreadable


def test_bad_files_are_left_out_each_with_its_reason_and_odd_ones_are_kept(tmp_path, caplog):
    root = tiny_class_folders(tmp_path / "data", 4)
    cat = root / "cat"
    whole = (cat / "0000.png").read_bytes()
    header = b"IHDR" + 2 * (20_000).to_bytes(4, "big") + whole[24:29]
    (cat / "bomb.jpg").write_bytes(whole[:12] + header + zlib.crc32(header).to_bytes(4, "big") + whole[33:])
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(cat / "cut.jpg")
    os.truncate(cat / "cut.jpg", (cat / "cut.jpg").stat().st_size - 200)
    (cat / "empty.jpg").touch()
    (cat / "loop.jpg").symlink_to("loop.jpg")
    (cat / "text.jpg").write_text("no image")
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(cat / "moving.webp", save_all=True, append_images=frames[1:], lossless=True)
    Image.fromarray(np.full((8, 8), 32896, np.uint16)).save(cat / "sixteen bit.png")
    images = presize.presize(find_images(root), 8, max_unreadable=0.9)
    assert images.unreadable == tuple(f"cat/{name}.jpg" for name in ("bomb", "cut", "empty", "loop", "text"))
    assert images[images.paths.index("cat/moving.webp")][0, 0].tolist() == [255, 0, 0]
    assert images[images.paths.index("cat/sixteen bit.png")][0, 0].tolist() == [128, 128, 128]
    reasons = {"bomb": "pixels", "cut": "truncated", "empty": "cannot identify", "loop": "symbolic links"}
    for name, reason in reasons.items():
        assert re.search(f"'cat/{name}.jpg': [^;]*{reason}", caplog.text)


def test_more_than_one_percent_of_unreadable_images_is_an_error_that_names_five(tmp_path, cache):
    root = tiny_class_folders(tmp_path / "data", 200)
    for n in range(0, 6, 2):
        (root / f"cat/{n:04}.png").write_text("no image")
    with pytest.raises(DataError, match=r"3 of 200 images"):
        presize.presize(find_images(root), 8)
    for n in range(6, 14, 2):
        (root / f"cat/{n:04}.png").write_text("no image")
    with pytest.raises(DataError, match=r"7 of 200 images .* 1 %.*cat/0000.png.*cannot identify.*cat/0008.png"):
        presize.presize(find_images(root), 8)
    assert not [path for path in cache.iterdir() if path.is_dir()]


def test_all_unreadable_images_are_in_the_file_that_the_message_names(tmp_path):
    root = tiny_class_folders(tmp_path / "data", 200)
    for n in range(0, 90, 2):
        (root / f"cat/{n:04}.png").write_text("no image")
    with pytest.raises(DataError, match=r"45 of 200 images .* all listed in (\S+\.txt)\)\. Repair") as caught:
        presize.presize(find_images(root), 8)
    lines = Path(re.search(r"listed in (\S+\.txt)", str(caught.value))[1]).read_text().splitlines()
    assert len(lines) == 45 and all(re.match(r"'cat/00\d\d\.png'\tUnidentifiedImageError: \w+", line) for line in lines)


def test_a_share_of_unreadable_images_is_tolerated_where_it_is_asked_for_and_only_there(tmp_path):
    root = tiny_class_folders(tmp_path / "data", 200)
    for n in range(0, 20, 2):
        (root / f"cat/{n:04}.png").write_text("no image")
    images = presize.presize(find_images(root), 8, max_unreadable=0.05)
    assert (len(images), len(images.unreadable)) == (190, 10)
    assert len(images.unreadable_list.read_text().splitlines()) == 10
    with pytest.raises(DataError, match=r"10 of 200 images .* more than the 1 % .*'cat/0000.png'"):
        presize.presize(find_images(root), 8)  # though the cache is there
    with pytest.raises(ValueError, match="max_unreadable is 5; expected a share from 0 to 1"):
        presize.presize(find_images(root), 8, max_unreadable=5)


@pytest.mark.parametrize("storage", ["memory-map", "jpeg", "off"])
def test_twelve_bits_keep_their_shades_in_every_storage(tmp_path, storage):
    for name, value in (("dark", 16), ("light", 4095)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for n in (1, 2):
            Image.fromarray(np.full((8, 8), value, np.uint16)).save(tmp_path / "data" / name / f"{n}.png")
    folder = find_images(tmp_path / "data")
    images = presize.presize(folder, 8, storage=storage)
    assert (images.white_level, folder.describe_depth().split(" use ")[1]) == (4095, "12 bits: 4095 becomes white")
    assert [images[i][0, 0].tolist() for i in (0, 2)] == [[1] * 3, [255] * 3]


def test_a_class_that_loses_its_images_is_an_error(tmp_path):
    root = tiny_class_folders(tmp_path / "data", 200)
    (root / "owl").mkdir()
    Image.new("RGB", (8, 8)).save(root / "owl" / "1.png")
    (root / "owl" / "2.png").write_text("no image")
    with pytest.raises(DataError, match=r"\(1 unreadable image skipped\) in 1 class \('owl'\)"):
        presize.presize(find_images(root), 8)


# --- Damage, kills and company ----------------------------------------------------------------------------------------


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "flipped byte in the index": lambda path: flip_byte(path / "index.json"),
    "flipped byte in the checksum": lambda path: flip_byte(path / "index.sha256"),
    "truncated pixels": lambda path: os.truncate(path / "pixels.u8", 1000),
    "no pixels": lambda path: os.truncate(path / "pixels.u8", 0),
    "lost pixels": lambda path: (path / "pixels.u8").unlink(),
    "lost index": lambda path: (path / "index.json").unlink(),
    "empty index": lambda path: (path / "index.json").write_text(""),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_noticed_and_built_again(pets, damage, caplog):
    images = presize.presize(find_images(pets), 32)
    expected = images[5].copy()
    DAMAGES[damage](images.path)
    again = presize.presize(find_images(pets), 32)
    np.testing.assert_array_equal(again[5], expected)
    assert "damaged and will be rebuilt" in caplog.text


@pytest.mark.parametrize("instead", ["zeros", "another image"])
def test_a_stored_jpeg_that_is_damaged_is_named_with_what_to_do(pets, instead):
    images = presize.presize(find_images(pets), 32, storage="jpeg")
    file = images.path / "images.jpeg"
    content = file.read_bytes()
    sixth, ninth = (slice(*images.offsets[i : i + 2]) for i in (5, 8))
    other = b"" if instead == "zeros" else content[ninth]
    length = sixth.stop - sixth.start
    file.write_bytes(content[: sixth.start] + other.ljust(length, b"\0")[:length] + content[sixth.stop :])
    damaged = PresizedImages(images.path)
    with pytest.raises(presize.DamagedCache, match=f"{damaged.path}: .*'{damaged.paths[5]}' .* Remove this folder"):
        damaged[5]
    assert damaged[6].shape == images.shapes[6]


def test_an_index_that_lies_about_sizes_is_refused(pets):
    path = presize.presize(find_images(pets), 32).path
    index = json.loads((path / "index.json").read_text())
    index["heights"][0] += 1
    text = json.dumps(index).encode()
    (path / "index.json").write_bytes(text)
    (path / "index.sha256").write_text(presize.sha256(text).hexdigest())
    with pytest.raises(presize.DamagedCache, match="other sizes"):
        PresizedImages(path)


def count_and_presize(root: Path, log: Path, barrier) -> None:
    build = presize._build

    def counted(*arguments) -> None:
        with log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        build(*arguments)
        time.sleep(0.2)  # so that the other process surely meets the lock

    presize._build = counted
    barrier.wait(30)
    assert len(presize.presize(find_images(root), 32)) == 12


def test_two_processes_at_once_build_one_cache(pets, tmp_path):
    spawn = multiprocessing.get_context("spawn")
    barrier = spawn.Barrier(2)
    log = tmp_path / "builds"
    processes = [spawn.Process(target=count_and_presize, args=(pets, log, barrier)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(log.read_text().split()) == 1


def open_and_read(path: Path, barrier, added) -> None:
    """A trial: opens the cache, reads all of it, and tells how much memory that took while both trials have it."""
    before = proportional_set_size()
    images = PresizedImages(path)
    assert sum(int(images[i].max()) for i in range(len(images))) > 0
    barrier.wait(60)
    added.put(proportional_set_size() - before)
    barrier.wait(60)


def proportional_set_size() -> int:
    """Bytes of this process's memory; a page that n processes share counts 1/n."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's smaps_rollup")
def test_a_second_trial_adds_less_than_a_tenth_of_the_cache_to_memory(pets):
    images = presize.presize(find_images(pets), 1024)
    assert images.nbytes > 30e6
    spawn = multiprocessing.get_context("spawn")
    barrier, added = spawn.Barrier(2), spawn.Queue()
    processes = [spawn.Process(target=open_and_read, args=(images.path, barrier, added)) for _ in range(2)]
    for process in processes:
        process.start()
    both = sum(added.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert 0.9 * images.nbytes < both < 1.1 * images.nbytes  # the pages once, and next to nothing for each trial


def build_slowly(root: Path, halfway) -> None:
    def stop(done: int, total: int) -> None:
        if done == total // 2:
            halfway.set()
            time.sleep(60)

    presize.presize(find_images(root), 32, progress=stop)


def test_a_killed_build_leaves_nothing_that_is_used(pets, cache):
    spawn = multiprocessing.get_context("spawn")
    halfway = spawn.Event()
    process = spawn.Process(target=build_slowly, args=(pets, halfway))
    process.start()
    assert halfway.wait(30)
    os.kill(process.pid, signal.SIGKILL)
    process.join(10)
    [left] = [path.name for path in cache.iterdir() if path.is_dir()]
    assert left.endswith(".partial")
    images = presize.presize(find_images(pets), 32)
    assert len(images) == 12
    assert [path for path in cache.iterdir() if path.is_dir()] == [images.path]


def test_a_cache_is_on_the_disk_before_it_has_its_name(pets, monkeypatch):
    """Otherwise a power cut may leave a cache whose pages are empty."""
    synced, sync = {}, os.fsync

    def watch(file: int) -> None:
        sync(file)
        synced[os.fstat(file).st_ino] = os.fstat(file).st_size

    monkeypatch.setattr(os, "fsync", watch)
    images = presize.presize(find_images(pets), 32)
    assert {file.stat().st_ino: file.stat().st_size for file in images.path.iterdir()} == synced


@pytest.mark.parametrize("when", ["before", "while writing"])
def test_a_full_disk_is_a_clear_error_and_leaves_nothing_behind(pets, cache, monkeypatch, when):
    if when == "before":
        monkeypatch.setattr(presize.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    else:
        monkeypatch.setattr(presize, "flush", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(DataError, match=r"cannot be written to .*No space left.*FINETUNE_SEARCH_CACHE"):
        presize.presize(find_images(pets), 32)
    assert not [path for path in cache.iterdir() if path.is_dir()]


def test_a_size_without_pixels_is_refused(pets):
    with pytest.raises(ValueError, match="size is 0"):
        presize.presize(find_images(pets), 0)


def test_presizing_imports_no_torch():
    code = "import sys, trainables.data.presize; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "trainables.data.presize" in loaded and not {"torch", "torchvision", "ray"} & set(loaded)
