"""One image file -> RGB pixels: decoding, turning upright, resizing. Imports no torch."""

import math
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # whatever the suffix says; no format that runs programs
MAX_PIXELS = 178_956_970  # Pillow's own limit against decompression bombs
MAX_ASPECT = 4.0


class UnreadableImage(ValueError):
    """A file that cannot be decoded; the message says why."""


def read_image(path: Path | str, size: int | None = None) -> np.ndarray:
    """Decodes an image to uint8 (height, width, 3) RGB, turned upright by its EXIF orientation.

    With `size`, a JPEG is decoded at 1/2, 1/4 or 1/8 of its scale as long as its shorter side stays `size` or more.
    Transparent images are laid on white, 16-bit ones scaled to 8 bits, and of animations the first frame is taken.
    Raises UnreadableImage for anything else, truncated files and decompression bombs included.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            if math.prod(image.size) > MAX_PIXELS:
                raise UnreadableImage(f"{image.size[0]} x {image.size[1]} pixels, at most {MAX_PIXELS} are read")
            if size is not None:
                image.draft(None, (size, size))
            image.load()
            with suppress(Exception):  # damaged EXIF data beside sound pixels
                ImageOps.exif_transpose(image, in_place=True)  # turns it before anything else there can fail
            return np.ascontiguousarray(_to_rgb(image))
    except UnreadableImage:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise UnreadableImage(f"{type(error).__name__}: {error}") from error


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):  # 16 bits a pixel; convert("RGB") would clip them to white
        gray = np.clip(np.asarray(image, dtype=np.int64), 0, 65535) // 257
        return np.repeat(gray.astype(np.uint8)[..., None], 3, axis=2)
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
