"""Reading images of every kind, turned upright, in three channels, resized."""

import io
import struct
import subprocess
import sys
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from trainables.data.image_file import SUFFIXES, UnreadableImage, read_image, resize_shorter_side, white_level

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


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


def test_a_photo_is_turned_though_the_rest_of_its_exif_data_is_damaged(tmp_path):
    exif = Image.Exif()
    exif[0x0112], exif[0x011A] = 6, 72.0  # orientation, resolution
    content = exif.tobytes()
    fraction, text = (b"\x01\x1a" + kind for kind in (b"\x00\x05", b"\x00\x02"))
    assert fraction in content
    stored = Image.fromarray(quarters(80, 120)).transpose(Image.Transpose.ROTATE_90)
    stored.save(tmp_path / "photo.jpg", exif=content.replace(fraction, text), quality=95, subsampling=0)
    image = read_image(tmp_path / "photo.jpg")
    assert image.shape == (80, 120, 3) and corners(image) == [RED, GREEN, WHITE, BLUE]


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


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bit_images_keep_their_shades(tmp_path, suffix):
    ramp = np.tile(np.linspace(0, 65535, 256).astype(np.uint16), (8, 1))
    Image.fromarray(ramp).save(tmp_path / f"xray.{suffix}")
    np.testing.assert_array_equal(read_image(tmp_path / f"xray.{suffix}")[0, :, 1], np.arange(256))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bit_images_keep_their_colours(tmp_path, suffix):
    deep = quarters()[..., ::-1].astype(np.uint16) * 257  # OpenCV's order, BGR
    cv2.imwrite(str(tmp_path / f"deep.{suffix}"), deep)
    assert corners(read_image(tmp_path / f"deep.{suffix}")) == [RED, GREEN, WHITE, BLUE]


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_twelve_bits_in_a_file_of_sixteen_keep_their_shades(tmp_path, suffix):
    ramp = np.tile(np.linspace(0, 4095, 256).astype(np.uint16), (8, 1))  # as a camera with 12 bits writes them
    Image.fromarray(ramp).save(tmp_path / f"xray.{suffix}")
    white = white_level(tmp_path, [f"xray.{suffix}"])
    assert white == 4095
    np.testing.assert_array_equal(read_image(tmp_path / f"xray.{suffix}", white=white)[0, :, 1], np.arange(256))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_twelve_bits_of_colour_in_a_file_of_sixteen_keep_their_shades(tmp_path, suffix):
    blue = np.zeros((8, 256, 3), np.uint16)
    blue[..., 0] = np.linspace(0, 4095, 256)  # OpenCV's order, BGR
    cv2.imwrite(str(tmp_path / f"deep.{suffix}"), blue)
    found = read_image(tmp_path / f"deep.{suffix}", white=white_level(tmp_path, [f"deep.{suffix}"]))
    np.testing.assert_array_equal(found[0, :, 2], np.arange(256))
    assert not found[..., :2].any()


def test_a_deep_photo_of_colours_is_turned_upright_too(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    cv2.imwrite(str(tmp_path / "deep.png"), np.rot90(quarters(80, 120)).astype(np.uint16)[..., ::-1] * 257)
    content, block = (tmp_path / "deep.png").read_bytes(), exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(block)) + b"eXIf" + block + struct.pack(">I", zlib.crc32(b"eXIf" + block))
    (tmp_path / "deep.png").write_bytes(content[:33] + chunk + content[33:])
    found = read_image(tmp_path / "deep.png")
    assert found.shape == (80, 120, 3) and corners(found) == [RED, GREEN, WHITE, BLUE]


def test_fractions_are_scaled_from_black_to_white(tmp_path):
    Image.fromarray(np.tile(np.linspace(0, 1, 256, dtype=np.float32), (8, 1))).save(tmp_path / "map.tif")
    assert white_level(tmp_path, ["map.tif"]) == 1
    np.testing.assert_array_equal(read_image(tmp_path / "map.tif", white=1)[0, :, 0], np.arange(256))


def test_fractions_may_overshoot_and_maps_may_have_pixels_without_a_value(tmp_path):
    for name, value in (
        ("overshoot", 1.02),
        ("infinite", np.inf),
        ("none", np.nan),
        ("nodata", -3.4e38),
        ("high", 3.4e38),
    ):
        values = np.tile(np.linspace(0, 1, 256, dtype=np.float32), (8, 1))
        values[0, 0] = value
        Image.fromarray(values).save(tmp_path / f"{name}.tif")
        assert white_level(tmp_path, [f"{name}.tif"]) == 1
        assert read_image(tmp_path / f"{name}.tif", white=1)[4, 200].tolist() == [200] * 3


def test_the_white_of_a_data_set_is_that_of_its_deepest_image_wherever_it_lies(tmp_path):
    for number in range(200):
        deep = np.full((4, 4), 3000 if number == 150 else 200, np.uint16)
        Image.fromarray(deep).save(tmp_path / f"{number:03}.png")
    paths = [f"{number:03}.png" for number in range(200)]
    assert white_level(tmp_path, paths) == 4095
    assert white_level(tmp_path, paths[:100]) == 255
    assert white_level(tmp_path, []) == white_level(tmp_path, ["missing.png"]) == 65535


@pytest.mark.parametrize(
    "format", ["GIF", "PNG", "AVIF", "WEBP", "TIFF", "BMP", "PPM", "ICO", "JPEG2000", "QOI", "SGI"]
)
def test_an_image_is_read_for_what_it_is_though_it_is_called_jpg(tmp_path, format):
    photo = Image.fromarray(quarters())
    if format == "QOI":
        photo = photo.convert("RGBA")
    photo.save(tmp_path / "photo.jpg", format)
    assert corners(read_image(tmp_path / "photo.jpg")) == [RED, GREEN, WHITE, BLUE]


def test_a_format_that_nearly_any_bytes_could_be_is_read_by_its_suffix_alone(tmp_path):
    Image.fromarray(quarters()).save(tmp_path / "photo.tga")
    assert corners(read_image(tmp_path / "photo.tga")) == [RED, GREEN, WHITE, BLUE]
    (tmp_path / "photo.tga").rename(tmp_path / "photo.jpg")
    with pytest.raises(UnreadableImage, match="cannot identify"):
        read_image(tmp_path / "photo.jpg")


def test_suffixes_are_those_that_pillow_reads_without_running_a_program():
    assert {".bmp", ".jfif", ".tif", ".tiff", ".avif", ".jpe", ".webp", ".gif", ".mpo", ".jp2"} <= set(SUFFIXES)
    assert not {".eps", ".ps", ".pdf", ".mpg", ".wmf", ".h5", ".txt"} & set(SUFFIXES)


def test_a_png_with_more_text_than_pillow_takes_keeps_its_pixels(tmp_path):
    long, pixels = PngInfo(), quarters()
    long.add_text("parameters", "a cat, " * 500_000, zip=True)
    Image.fromarray(pixels).save(tmp_path / "generated.png", pnginfo=long)
    np.testing.assert_array_equal(read_image(tmp_path / "generated.png"), pixels)
    behind = png(60, 40, after=(b"zTXt", b"parameters\0\0" + zlib.compress(bytes(3_000_000))))
    (tmp_path / "behind.png").write_bytes(behind)
    assert read_image(tmp_path / "behind.png").shape == (40, 60, 3)


def test_transparent_images_are_laid_on_white(tmp_path):
    clear = np.dstack([quarters(), np.zeros((40, 60), np.uint8)])
    Image.fromarray(clear).save(tmp_path / "clear.png")
    assert (read_image(tmp_path / "clear.png") == 255).all()
    palette = Image.fromarray(quarters()).quantize(4)
    palette.save(tmp_path / "palette.png", transparency=palette.getpixel((0, 0)))
    assert corners(read_image(tmp_path / "palette.png")) == [WHITE, GREEN, WHITE, BLUE]


def test_of_animations_and_of_several_pages_the_first_is_read(tmp_path):
    frames = [Image.fromarray(quarters()), Image.new("RGB", (60, 40), "black")]
    for suffix in ("gif", "webp", "png", "tif"):
        frames[0].save(tmp_path / f"moving.{suffix}", save_all=True, append_images=frames[1:])
        (tmp_path / f"moving.{suffix}").rename(tmp_path / "moving.jpg")  # and the suffix may lie
        assert corners(read_image(tmp_path / "moving.jpg")) == [RED, GREEN, WHITE, BLUE]


def encoded(format: str, image: np.ndarray | None = None, **options) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(quarters() if image is None else image).save(stream, format, **options)
    return stream.getvalue()


def png(width: int, height: int, *, before: tuple[bytes, bytes] = (b"", b""), after: tuple[bytes, bytes] = (b"", b"")):
    """A black one-bit PNG, in a few KB however large it is, with more chunks (name, content) beside its pixels."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    compressor = zlib.compressobj()
    row = bytes(1 + (width + 7) // 8)
    pixels = b"".join([*(compressor.compress(row) for _ in range(height)), compressor.flush()])
    chunks = [(b"IHDR", header), before, (b"IDAT", pixels), after, (b"IEND", b"")]
    written = (
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks
        if name
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(written)


def without_width(format: str, *where: bytes) -> bytes:
    """A file of 60 x 40 pixels whose header says 0 x 40; the bytes of the width follow those of `where`."""
    content = encoded(format)
    for before in where:
        at = content.index(before) + len(before)
        content = content[:at] + b"\0\0" + content[at + 2 :]
    return content


NOISE = np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)
UNREADABLE = {
    "text": b"this is not a photo\n" * 50,
    "empty": b"",
    "html": b"<!DOCTYPE html><html><body>404</body></html>",
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n",
    "a format that Pillow knows and cannot decode": b"GRIB\0\0\0\1" + bytes(100),
    **{f"truncated {name}": encoded(name, NOISE)[:-4000] for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")},
    "truncated JPEG, by little": encoded("JPEG", NOISE)[:-40],
    "header alone": encoded("JPEG", NOISE)[:20],
    "a PNG without width": png(0, 10),
    "a GIF without width": without_width("GIF", b"GIF87a", b",\0\0\0\0"),
    "a BMP without width": without_width("BMP", b"\x28\0\0\0"),
    "a TIFF without width": without_width("TIFF", b"\0\1\4\0\1\0\0\0"),
    "a JPEG without width": without_width("JPEG", b"\xff\xc0\0\x11\x08\0\x28"),
    "a WebP without width": without_width("WEBP", b"\x9d\x01\x2a"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
@pytest.mark.parametrize("size", [None, 20])
def test_what_cannot_be_decoded_is_one_kind_of_error(tmp_path, kind, size):
    (tmp_path / "bad.jpg").write_bytes(UNREADABLE[kind])
    with pytest.raises(UnreadableImage, match=r"\w"):
        read_image(tmp_path / "bad.jpg", size)


def test_a_sound_image_with_a_little_text_is_read(tmp_path):
    (tmp_path / "good.png").write_bytes(png(60, 40, before=(b"tEXt", b"Comment\0hello"), after=(b"zTXt", b"A\0\0")))
    assert read_image(tmp_path / "good.png").shape == (40, 60, 3)


def test_bombs_do_not_get_the_memory_that_they_ask_for(tmp_path):
    text = zlib.compress(bytes(100_000_000))
    bombs = {
        "20000 px": (png(20_000, 20_000), "pixels"),
        "15000 px": (png(15_000, 15_000), "pixels"),
        "text": (png(8, 8, before=(b"zTXt", b"Comment\0\0" + text)), "no error"),
        "text at the end": (png(8, 8, after=(b"iTXt", b"Comment\0\1\0\0\0" + text)), "no error"),
        "profile": (png(8, 8, before=(b"iCCP", b"profile\0\0" + text)), "no error"),
    }
    for name, (content, _) in bombs.items():
        assert len(content) < 200_000
        (tmp_path / f"{name}.jpg").write_bytes(content)
    lines = subprocess.run(
        [sys.executable, "-c", READ_IN_LITTLE_MEMORY, *(str(tmp_path / f"{name}.jpg") for name in bombs)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    for line, (_, expected) in zip(lines, bombs.values(), strict=True):
        growth, reason = line.split(maxsplit=1)
        assert expected in reason
        assert int(growth) < 30_000, "KiB"


READ_IN_LITTLE_MEMORY = """
import sys
from resource import RUSAGE_SELF, getrusage
from trainables.data.image_file import UnreadableImage, read_image

for path in sys.argv[1:]:
    before = getrusage(RUSAGE_SELF).ru_maxrss
    try:
        read_image(path, 460)
        reason = "no error"
    except UnreadableImage as error:
        reason = error
    print(getrusage(RUSAGE_SELF).ru_maxrss - before, reason)
"""


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
