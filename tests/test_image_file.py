"""Reading images of every kind, turned upright, in three channels, resized."""

import io
import zlib

import numpy as np
import pytest
from PIL import Image

from trainables.image_file import UnreadableImage, read_image, resize_shorter_side

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
