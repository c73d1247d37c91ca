"""Reading images of every kind and the presized cache: built once, verified, shared."""

import io
import json
import logging
import multiprocessing
import os
import pickle
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

from trainables import data, presize
from trainables.data import DataError, find_images
from trainables.presize import PresizedImages, UnreadableImage, read_image, resize_shorter_side

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("FINETUNE_SEARCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "presized"


def quarters(height: int = 40, width: int = 60) -> np.ndarray:
    """Red top left, green top right, blue bottom left, white bottom right: shows turns, flips and swapped channels."""
    image = np.zeros((height, width, 3), np.uint8)
    image[: height // 2, : width // 2], image[: height // 2, width // 2 :] = RED, GREEN
    image[height // 2 :, : width // 2], image[height // 2 :, width // 2 :] = BLUE, WHITE
    return image


def corners(image: np.ndarray) -> list[tuple[int, ...]]:
    """The four corners' colours, clockwise from the top left, with the noise of JPEG rounded away."""
    height, width = image.shape[:2]
    points = [
        (height // 8, width // 8),
        (height // 8, -width // 8),
        (-height // 8, -width // 8),
        (-height // 8, width // 8),
    ]
    return [tuple(255 if value > 127 else 0 for value in image[point]) for point in points]


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


# --- One image --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [None, 20])
def test_photos_are_turned_upright_as_their_exif_data_says(tmp_path, orientation, size):
    stored = Image.fromarray(quarters(80, 120))
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose members that bring an upright image to this one
    if orientation in undo:
        stored = stored.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "photo.jpg", exif=exif, quality=95, subsampling=0)
    image = read_image(tmp_path / "photo.jpg", size)
    assert image.shape == ((80, 120, 3) if size is None else (20, 30, 3))
    assert corners(image) == [RED, GREEN, WHITE, BLUE]


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_data_does_not_cost_the_image(tmp_path):
    Image.fromarray(quarters()).save(
        tmp_path / "a.jpg", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff garbage", quality=95
    )
    assert corners(read_image(tmp_path / "a.jpg")) == [RED, GREEN, WHITE, BLUE]


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("RGB", "jpg"), ("RGB", "png"), ("RGB", "webp"), ("CMYK", "jpg"), ("P", "png"), ("RGBA", "png"), ("RGBA", "webp")],
)
def test_colours_survive_every_mode(tmp_path, mode, suffix):
    Image.fromarray(quarters()).convert(mode).save(tmp_path / f"image.{suffix}", quality=95)
    image = read_image(tmp_path / f"image.{suffix}")
    assert (image.dtype, image.shape) == (np.uint8, (40, 60, 3))
    assert corners(image) == [RED, GREEN, WHITE, BLUE]


@pytest.mark.parametrize(("mode", "suffix"), [("L", "jpg"), ("L", "png"), ("LA", "png"), ("1", "png")])
def test_gray_images_get_three_equal_channels(tmp_path, mode, suffix):
    gray = np.zeros((40, 60), np.uint8)
    gray[:, 30:] = 255
    Image.fromarray(gray).convert(mode).save(tmp_path / f"image.{suffix}")
    image = read_image(tmp_path / f"image.{suffix}", 10)
    assert corners(image) == [(0, 0, 0), WHITE, WHITE, (0, 0, 0)]


def test_sixteen_bit_images_keep_their_shades(tmp_path):
    ramp = np.tile(np.linspace(0, 65535, 256).astype(np.uint16), (8, 1))
    Image.fromarray(ramp).save(tmp_path / "xray.png")
    np.testing.assert_array_equal(read_image(tmp_path / "xray.png")[0, :, 1], np.arange(256))


def test_transparent_images_are_laid_on_white(tmp_path):
    clear = np.dstack([quarters(), np.zeros((40, 60), np.uint8)])
    Image.fromarray(clear).save(tmp_path / "clear.png")
    assert (read_image(tmp_path / "clear.png") == 255).all()
    palette = Image.fromarray(quarters()).quantize(4)
    palette.save(tmp_path / "palette.png", transparency=palette.getpixel((0, 0)))
    assert corners(read_image(tmp_path / "palette.png")) == [WHITE, GREEN, WHITE, BLUE]


def test_of_animated_images_the_first_frame_is_read(tmp_path):
    frames = [Image.fromarray(quarters()), Image.new("RGB", (60, 40), "black")]
    for suffix in ("gif", "webp", "png"):
        frames[0].save(tmp_path / f"moving.{suffix}", save_all=True, append_images=frames[1:])
        (tmp_path / f"moving.{suffix}").rename(tmp_path / "moving.jpg")  # and the suffix may lie
        assert corners(read_image(tmp_path / "moving.jpg")) == [RED, GREEN, WHITE, BLUE]


def jpeg_bytes(image: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=95)
    return stream.getvalue()


def png_header(width: int, height: int) -> bytes:
    stream = io.BytesIO()
    Image.new("L", (1, 1)).save(stream, "PNG")
    content = bytearray(stream.getvalue())
    content[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


UNREADABLE = {
    "truncated": jpeg_bytes(np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8))[:-4000],
    "text": b"this is not a photo\n" * 50,
    "empty": b"",
    "html": b"<!DOCTYPE html><html><body>404</body></html>",
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n",
    "a format not asked for": b"P6 2 2 255\n" + bytes(12),
    "bomb": png_header(20000, 20000),
    "no pixels": png_header(0, 10),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_cannot_be_decoded_is_one_kind_of_error(tmp_path, kind):
    (tmp_path / "bad.jpg").write_bytes(UNREADABLE[kind])
    with pytest.raises(UnreadableImage, match=r"\w"):
        read_image(tmp_path / "bad.jpg")


def test_a_missing_file_is_unreadable_too(tmp_path):
    with pytest.raises(UnreadableImage, match="No such file"):
        read_image(tmp_path / "gone.jpg")


@pytest.mark.parametrize("size", [16, 60, 97])
@pytest.mark.parametrize(("height", "width"), [(60, 90), (90, 60), (61, 61), (1, 3)])
def test_the_shorter_side_is_exact_and_the_whole_rectangle_stays(height, width, size):
    image = resize_shorter_side(quarters(height, width) if height > 1 else np.zeros((1, 3, 3), np.uint8), size)
    assert min(image.shape[:2]) == size
    assert max(image.shape[:2]) == round(max(height, width) * size / min(height, width))
    if height > 1:
        assert corners(image) == [RED, GREEN, WHITE, BLUE]


def test_of_extremely_long_images_the_centre_is_kept():
    strip = np.zeros((2, 4000, 3), np.uint8)
    strip[:, 1997:2003] = 255
    image = resize_shorter_side(strip, 10)
    assert image.shape == (10, 40, 3)
    assert (image[:, 15:25] == 255).all()


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
    expected = data.split(images.labels, seed=3)
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
    assert "left out 2 of 200" in warning.message and "cat/0004.png" in warning.message
    assert "No such file" in warning.message
    train, valid = images.split()
    assert (len(train), len(valid)) == (158, 40)
    assert presize.presize(find_images(root), 8).unreadable == images.unreadable


def test_more_than_one_percent_of_unreadable_images_is_an_error_that_names_five(tmp_path, cache):
    root = tiny_class_folders(tmp_path / "data", 200)
    for n in range(0, 6, 2):
        (root / f"cat/{n:04}.png").write_text("no image")
    with pytest.raises(DataError, match=r"3 of 200 images"):
        presize.presize(find_images(root), 8)
    for n in range(6, 14, 2):
        (root / f"cat/{n:04}.png").write_text("no image")
    with pytest.raises(DataError, match=r"7 of 200 images .* 1 %.*cat/0000.png.*cannot identify.*cat/0008.png.*\.\.\."):
        presize.presize(find_images(root), 8)
    assert not [path for path in cache.iterdir() if path.is_dir()]


def test_a_class_that_loses_its_images_is_an_error(tmp_path):
    root = tiny_class_folders(tmp_path / "data", 200)
    (root / "owl").mkdir()
    Image.new("RGB", (8, 8)).save(root / "owl" / "1.png")
    (root / "owl" / "2.png").write_text("no image")
    with pytest.raises(DataError, match=r"\(1 unreadable left out\) in 1 class \('owl'\)"):
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
    assert "damaged and is built again" in caplog.text


def test_an_index_that_lies_about_sizes_is_refused(pets):
    path = presize.presize(find_images(pets), 32).path
    index = json.loads((path / "index.json").read_text())
    index["heights"][0] += 1
    text = json.dumps(index).encode()
    (path / "index.json").write_bytes(text)
    (path / "index.sha256").write_text(presize.sha256(text).hexdigest())
    with pytest.raises(presize.DamagedCache, match="bytes, expected"):
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


@pytest.mark.parametrize("when", ["before", "while writing"])
def test_a_full_disk_is_a_clear_error_and_leaves_nothing_behind(pets, cache, monkeypatch, when):
    if when == "before":
        monkeypatch.setattr(presize.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    else:
        monkeypatch.setattr(presize, "_flush", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(DataError, match=r"cannot be written to .*No space left.*FINETUNE_SEARCH_CACHE"):
        presize.presize(find_images(pets), 32)
    assert not [path for path in cache.iterdir() if path.is_dir()]


def test_a_size_without_pixels_is_refused(pets):
    with pytest.raises(ValueError, match="size is 0"):
        presize.presize(find_images(pets), 0)


def test_presizing_imports_no_torch():
    code = "import sys, trainables.presize; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "trainables.presize" in loaded and not {"torch", "torchvision", "ray"} & set(loaded)
