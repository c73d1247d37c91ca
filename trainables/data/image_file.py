"""One image file -> RGB pixels: decoding, turning upright, resizing. Imports no torch."""

import io
import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile, ImageOps

T = TypeVar("T")
Pixels = npt.NDArray[np.uint8]
"""(height, width, 3) RGB, unless stated otherwise."""
Source = Path | str | io.BytesIO


class Images(Protocol):
    """Images by index, such as a list of arrays or `PresizedImages`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Pixels: ...


WHITE_16_BIT = 65535
MAX_PIXELS = 178_956_970  # Pillow's own limit against decompression bombs
MAX_ASPECT = 4.0
NO_DATA = 1e30
"""Maps mark pixels without a value by numbers as large as this."""
NUM_SAMPLED = 64
"""Images that are read to find how many of their 16 bits a data set uses."""
ORIENTATION = 0x0112  # the EXIF tag


class UnreadableImage(ValueError):
    """A file that cannot be decoded; the message says why."""


def _readable_formats() -> tuple[str, ...]:
    """Pillow's names of the formats that it decodes, with the plugins for HEIC and JPEG XL if they are installed.

    Excludes EPS, which runs a program, and what Pillow recognizes but cannot decode.
    """
    with suppress(ImportError):
        from pillow_heif import register_heif_opener

        register_heif_opener()
    with suppress(ImportError):
        import pillow_jxl  # noqa: F401
    Image.init()
    stubs = {
        name
        for name, (factory, _) in Image.OPEN.items()
        if isinstance(factory, type) and issubclass(factory, ImageFile.StubImageFile)
    }
    return tuple(sorted(Image.OPEN.keys() - stubs - {"EPS", "MPEG"}))


READABLE = _readable_formats()
SURE = tuple(name for name in READABLE if Image.OPEN[name][1] is not None)
"""Formats that Pillow knows by their first bytes: they are read under any suffix."""
SUFFIXES = tuple(suffix for suffix, name in Image.registered_extensions().items() if name in (*READABLE, "MPO"))
"""The suffixes of images, in lower case."""


def formats_of(file: Source) -> tuple[str, ...]:
    """The formats to try. Almost any bytes can be a TGA, so formats like that are tried only by their own suffix."""
    suffix = "" if isinstance(file, io.BytesIO) else Path(file).suffix.lower()
    own = Image.registered_extensions().get(suffix)
    return (*SURE, own) if own in READABLE and own not in SURE else SURE


@dataclass(frozen=True)
class DecodedImage:
    """An upright image and what its file says of it."""

    pixels: Pixels
    format: str
    """Pillow's name of the format, found by content and not by suffix."""
    width: int
    height: int
    """Of the file; `pixels` may have fewer."""


def read_image(path: Path | str, size: int | None = None, white: int = WHITE_16_BIT) -> Pixels:
    """The pixels of an image file, see `decode`."""
    return decode(path, size, white).pixels


def decode(path: Path | str, size: int | None = None, white: int = WHITE_16_BIT) -> DecodedImage:
    """Decodes an image file to RGB, turned upright by its EXIF orientation.

    With `size`, a JPEG is decoded at 1/2, 1/4 or 1/8 of its scale as long as its shorter side stays at least `size`.
    Transparent images get a white background; only the first frame of an animation counts. Images of more than 8 bits
    are scaled so that `white` becomes 255, see `white_level`. Raises `UnreadableImage` for anything else, including
    truncated files and decompression bombs.
    """
    try:
        return _without_long_text(lambda file: _decode(file, size, white), path)
    except UnreadableImage:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise UnreadableImage(f"{type(error).__name__}: {error}") from error


def _decode(file: Source, size: int | None, white: int) -> DecodedImage:
    with Image.open(file, formats=formats_of(file)) as image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise UnreadableImage(f"{width} x {height} pixels, more than the limit of {MAX_PIXELS}")
        if size is not None:
            image.draft(None, (size, size))
        shallow = _eight_bits(image, file, white)
        shallow.load()
        with suppress(Exception):  # the EXIF data may be damaged while the pixels are not
            if image.getexif().get(ORIENTATION) in (5, 6, 7, 8):
                width, height = height, width
            ImageOps.exif_transpose(shallow, in_place=True)  # it turns the image before it can fail
        return DecodedImage(np.ascontiguousarray(_to_rgb(shallow)), image.format or "", width, height)


def _without_long_text(read: Callable[[Source], T], path: Path | str) -> T:
    """`read` of a file, or of a copy without text if it is a PNG with more text than Pillow accepts."""
    try:
        return read(path)
    except ValueError as error:
        if "MAX_TEXT" not in str(error):
            raise
    return read(io.BytesIO(_without_text(Path(path).read_bytes())))


def _without_text(png: bytes) -> bytes:
    """A PNG file without its text and colour profile. A chunk is length and name, content, checksum."""
    kept, place = [png[:8]], 8
    while place < len(png):
        end = place + 12 + int.from_bytes(png[place : place + 4], "big")
        if png[place + 4 : place + 8] not in (b"tEXt", b"zTXt", b"iTXt", b"iCCP"):
            kept.append(png[place:end])
        place = end
    return b"".join(kept)


# --- More than 8 bits -------------------------------------------------------------------------------------------------


def white_level(root: Path, paths: Sequence[str]) -> int:
    """The value of white in the images of more than 8 bits among `paths`: the highest that their bits can hold.

    Cameras and scanners write 10, 12 or 14 bits into files of 16. The largest value in a sample tells how many; the
    sample depends only on the paths, so all nodes agree. 65535 if there are no such images; 1 if all values are
    fractions.
    """
    largest = 0.0
    for path in _sample(paths):
        with suppress(Exception), warnings.catch_warnings(action="ignore"):
            largest = max(largest, _without_long_text(_largest_value, root / path))
    return 2 ** math.ceil(math.log2(largest + 1)) - 1 if largest else WHITE_16_BIT


def _largest_value(file: Source) -> float:
    """Of an image with more than 8 bits per channel: at least 255 unless all values are fractions. 0 for others."""
    with Image.open(file, formats=formats_of(file)) as image:
        deep = _deep_pixels(image, file) if math.prod(image.size) <= MAX_PIXELS else None
    if deep is None:
        return 0
    if deep.dtype.kind != "f":
        return max(float(deep.max()), 255)
    values = deep[np.isfinite(deep) & (np.abs(deep) < NO_DATA)]
    # Fractions may overshoot where resampling met an edge.
    largest = float(np.percentile(values, 99)) if values.size else 0
    return largest if largest <= 1 else max(float(values.max()), 255)


def _sample(paths: Sequence[str]) -> list[str]:
    """NUM_SAMPLED paths spread evenly over all, and as many over those whose suffix allows more than 8 bits."""
    likely = [path for path in paths if not path.lower().endswith((".jpg", ".jpeg", ".webp", ".gif", ".bmp"))]
    return list(dict.fromkeys(each for part in (likely, paths) for each in part[:: max(1, len(part) // NUM_SAMPLED)]))


def _eight_bits(image: Image.Image, file: Source, white: int) -> Image.Image:
    """`image` with 8 bits per channel."""
    if (deep := _deep_pixels(image, file)) is None:
        return image
    scaled = np.nan_to_num(np.clip(deep.astype(np.float64) * (255 / white), 0, 255))
    shallow = Image.fromarray(np.rint(scaled).astype(np.uint8))
    with suppress(Exception):  # the EXIF data may be damaged while the pixels are not
        shallow.getexif()[ORIENTATION] = image.getexif().get(ORIENTATION, 1)
    return shallow


def _deep_pixels(image: Image.Image, file: Source) -> npt.NDArray[Any] | None:
    """(height, width) or (height, width, channels) of an image with more than 8 bits per channel, else None."""
    if image.mode[0] in "IF":
        return np.asarray(image)
    if image.format not in ("PNG", "TIFF") or not any(";16" in str(tile.args) for tile in getattr(image, "tile", ())):
        return None
    import cv2  # Pillow keeps only the upper 8 bits of colours

    content = file.getvalue() if isinstance(file, io.BytesIO) else Path(file).read_bytes()
    found = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    if found is None or found.dtype != np.uint16 or found.ndim != 3:
        return None
    return cv2.cvtColor(found, cv2.COLOR_BGRA2RGBA if found.shape[2] == 4 else cv2.COLOR_BGR2RGB)


def _to_rgb(image: Image.Image) -> Pixels:
    if "transparency" in image.info or image.mode in ("RGBA", "RGBa", "LA", "La", "PA"):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return np.asarray(image.convert("RGB"))


def resize_shorter_side(image: Pixels, size: int) -> Pixels:
    """Resizes the whole rectangle so that its shorter side is `size`.

    Images longer than MAX_ASPECT times their width are cut to their centre first: a thin strip would take as much room
    as hundreds of images.
    """
    height, width = image.shape[:2]
    short = min(height, width)
    longest = round(MAX_ASPECT * short)
    top, left = max(0, height - longest) // 2, max(0, width - longest) // 2
    image = image[top : top + longest, left : left + longest]
    height, width = (max(size, round(side * size / short)) for side in image.shape[:2])
    return _resized(image, height, width)


def resize(image: Pixels, size: int, method: str = "crop") -> Pixels:
    """Resizes as fastai's `Resize` does, without its cropping and padding, which augmentation does.

    `method` crop makes the shorter side `size`, pad the longer side, squish both.
    """
    if method == "crop":
        return resize_shorter_side(image, size)
    if method == "squish":
        return _resized(image, size, size)
    height, width = (max(1, round(side * size / max(image.shape[:2]))) for side in image.shape[:2])
    return _resized(image, height, width)


def _resized(image: Pixels, height: int, width: int) -> Pixels:
    """By Pillow's bilinear filter, as in fastai: when it shrinks it averages, so that no pixel is skipped."""
    if image.shape[:2] == (height, width):
        return np.ascontiguousarray(image)
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
