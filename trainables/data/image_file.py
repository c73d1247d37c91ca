"""One image file -> RGB pixels: decoding, turning upright, resizing. Imports no torch."""

import io
import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageFile, ImageOps

T = TypeVar("T")

WHITE_16_BIT = 65535
MAX_PIXELS = 178_956_970  # Pillow's own limit against decompression bombs
MAX_ASPECT = 4.0
NO_DATA = 1e30
"""Numbers as large as this mark pixels without a value in maps."""
SAMPLED = 64
"""So many images tell how many of their 16 bits a data set uses."""
ORIENTATION = 0x0112  # the EXIF tag


class UnreadableImage(ValueError):
    """A file that cannot be decoded; the message says why."""


def _readable_formats() -> tuple[str, ...]:
    """Pillow's names of what it decodes by itself, and with those plugins for HEIC and JPEG XL that are installed.

    Without EPS, which runs a program, WMF, which only Windows draws, and what Pillow recognizes but cannot decode.
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
"""Formats that their first bytes tell: they are read whatever a file's suffix says."""
SUFFIXES = tuple(suffix for suffix, name in Image.registered_extensions().items() if name in (*READABLE, "MPO"))
"""What the names of images end with, in lower case."""


def formats_of(file: Path | str | io.BytesIO) -> tuple[str, ...]:
    """What a file may be. Nearly any bytes can be a TGA, so only files that are called so are tried as one."""
    suffix = "" if isinstance(file, io.BytesIO) else Path(file).suffix.lower()
    own = Image.registered_extensions().get(suffix)
    return (*SURE, own) if own in READABLE and own not in SURE else SURE


@dataclass(frozen=True)
class DecodedImage:
    pixels: np.ndarray
    """uint8 (height, width, 3) RGB, upright."""
    format: str
    """Pillow's name for what the bytes are, whatever the suffix says."""
    width: int
    height: int
    """Of the file, upright; `pixels` may have fewer."""


def read_image(path: Path | str, size: int | None = None, white: int = WHITE_16_BIT) -> np.ndarray:
    """The pixels of an image file: uint8 (height, width, 3) RGB, see `decode`."""
    return decode(path, size, white).pixels


def decode(path: Path | str, size: int | None = None, white: int = WHITE_16_BIT) -> DecodedImage:
    """Decodes an image file to RGB, turned upright by its EXIF orientation.

    With `size`, a JPEG is decoded at 1/2, 1/4 or 1/8 of its scale as long as its shorter side stays `size` or more.
    Transparent images are laid on white, of animations the first frame is taken. Images of more than 8 bits are scaled
    so that `white` becomes 255, see `white_level`. Raises UnreadableImage for anything else, truncated files and
    decompression bombs included.
    """
    try:
        return _without_long_text(lambda file: _decode(file, size, white), path)
    except UnreadableImage:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise UnreadableImage(f"{type(error).__name__}: {error}") from error


def _decode(file: Path | str | io.BytesIO, size: int | None, white: int) -> DecodedImage:
    with Image.open(file, formats=formats_of(file)) as image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise UnreadableImage(f"{width} x {height} pixels, at most {MAX_PIXELS} are read")
        if size is not None:
            image.draft(None, (size, size))
        shallow = _eight_bits(image, file, white)
        shallow.load()
        with suppress(Exception):  # damaged EXIF data beside sound pixels
            if image.getexif().get(ORIENTATION) in (5, 6, 7, 8):
                width, height = height, width
            ImageOps.exif_transpose(shallow, in_place=True)  # turns it before anything else there can fail
        return DecodedImage(np.ascontiguousarray(_to_rgb(shallow)), image.format or "", width, height)


def _without_long_text(read: Callable[[Path | str | io.BytesIO], T], path: Path | str) -> T:
    """What `read` makes of a file; of a PNG with more text than Pillow takes, the text is left out."""
    try:
        return read(path)
    except ValueError as error:
        if "MAX_TEXT" not in str(error):
            raise
    return read(io.BytesIO(_without_text(Path(path).read_bytes())))


def _without_text(png: bytes) -> bytes:
    """A PNG file without its text and colour profile: pairs of length and name, content and checksum."""
    kept, place = [png[:8]], 8
    while place < len(png):
        end = place + 12 + int.from_bytes(png[place : place + 4], "big")
        if png[place + 4 : place + 8] not in (b"tEXt", b"zTXt", b"iTXt", b"iCCP"):
            kept.append(png[place:end])
        place = end
    return b"".join(kept)


# --- More than 8 bits -------------------------------------------------------------------------------------------------


def white_level(root: Path, paths: Sequence[str]) -> int:
    """The value that is white in the images of more than 8 bits among `paths`: the highest that their bits can hold.

    Cameras and scanners write 10, 12 or 14 bits into files of 16. The bits are those of the largest value in a sample,
    which the paths alone decide, so every node finds the same. 65535 where there are no such images; 1 where all
    values are fractions.
    """
    largest = 0.0
    for path in _sample(paths):
        with suppress(Exception), warnings.catch_warnings(action="ignore"):
            largest = max(largest, _without_long_text(_largest_value, root / path))
    return 2 ** math.ceil(math.log2(largest + 1)) - 1 if largest else WHITE_16_BIT


def _largest_value(file: Path | str | io.BytesIO) -> float:
    """Of an image with more than 8 bits a channel, 255 at least unless all are fractions; 0 of others."""
    with Image.open(file, formats=formats_of(file)) as image:
        deep = _deep_pixels(image, file) if math.prod(image.size) <= MAX_PIXELS else None
    if deep is None:
        return 0
    if deep.dtype.kind != "f":
        return max(float(deep.max()), 255)
    values = deep[np.isfinite(deep) & (np.abs(deep) < NO_DATA)]
    # Fractions may overshoot: resampling does that at edges.
    largest = float(np.percentile(values, 99)) if values.size else 0
    return largest if largest <= 1 else max(float(values.max()), 255)


def _sample(paths: Sequence[str]) -> list[str]:
    """SAMPLED paths spread evenly over all, and as many over those that are not named as files of 8 bits."""
    likely = [path for path in paths if not path.lower().endswith((".jpg", ".jpeg", ".webp", ".gif", ".bmp"))]
    return list(dict.fromkeys(each for part in (likely, paths) for each in part[:: max(1, len(part) // SAMPLED)]))


def _eight_bits(image: Image.Image, file: Path | str | io.BytesIO, white: int) -> Image.Image:
    """`image` with 8 bits a channel."""
    if (deep := _deep_pixels(image, file)) is None:
        return image
    scaled = np.nan_to_num(np.clip(deep.astype(np.float64) * (255 / white), 0, 255))
    shallow = Image.fromarray(np.rint(scaled).astype(np.uint8))
    with suppress(Exception):  # damaged EXIF data beside sound pixels
        shallow.getexif()[ORIENTATION] = image.getexif().get(ORIENTATION, 1)
    return shallow


def _deep_pixels(image: Image.Image, file: Path | str | io.BytesIO) -> np.ndarray | None:
    """(height, width) or (height, width, channels) of an image with more than 8 bits a channel, else None."""
    if image.mode[0] in "IF":
        return np.asarray(image)
    if image.format not in ("PNG", "TIFF") or not any(";16" in str(tile.args) for tile in image.tile):
        return None
    import cv2  # Pillow keeps only the upper 8 bits of colours

    content = file.getvalue() if isinstance(file, io.BytesIO) else Path(file).read_bytes()
    found = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    if found is None or found.dtype != np.uint16 or found.ndim != 3:
        return None
    return cv2.cvtColor(found, cv2.COLOR_BGRA2RGBA if found.shape[2] == 4 else cv2.COLOR_BGR2RGB)


def _to_rgb(image: Image.Image) -> np.ndarray:
    if "transparency" in image.info or image.mode in ("RGBA", "RGBa", "LA", "La", "PA"):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return np.asarray(image.convert("RGB"))


def resize_shorter_side(image: np.ndarray, size: int) -> np.ndarray:
    """Resizes uint8 (h, w, 3) so that its shorter side is `size`, the whole rectangle kept.

    Only of images longer than MAX_ASPECT times their width is a centre piece kept: a thin strip would otherwise take as
    much room as hundreds of images.
    """
    height, width = image.shape[:2]
    short = min(height, width)
    longest = round(MAX_ASPECT * short)
    top, left = max(0, height - longest) // 2, max(0, width - longest) // 2
    image = image[top : top + longest, left : left + longest]
    height, width = (max(size, round(side * size / short)) for side in image.shape[:2])
    return _resized(image, height, width)


def resize(image: np.ndarray, size: int, method: str = "crop") -> np.ndarray:
    """Resizes uint8 (h, w, 3) as fastai's `Resize` does, but for the cutting and padding, which augmentation does.

    `method` crop makes the shorter side `size`, pad the longer side, squish both.
    """
    if method == "crop":
        return resize_shorter_side(image, size)
    longer = max(image.shape[:2])
    sides = (size, size) if method == "squish" else tuple(max(1, round(s * size / longer)) for s in image.shape[:2])
    return _resized(image, *sides)


def _resized(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """By Pillow's bilinear filter, which fastai uses: it widens when shrinking, so that no pixel is skipped."""
    if image.shape[:2] == (height, width):
        return np.ascontiguousarray(image)
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
