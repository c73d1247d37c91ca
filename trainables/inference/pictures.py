"""A grid of labelled images as one PNG file. Imports neither torch nor pyplot."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from trainables.data.image_file import Pixels

DPI = 100
MIN_CELL = 160  # px; smaller images are enlarged by a whole factor, so that a label fits above
MAX_CELL = 512  # px; larger images are shrunk
GAP = 12  # px between images and at the edges
LINE = 20  # px for one line of a title
FONT = 10.5  # points
MIN_FONT = 7.5
TEXT_COLOUR = "#222222"


def save_grid(
    path: Path | str,
    images: Sequence[Pixels],
    titles: Sequence[str],
    *,
    columns: int = 6,
    colours: Sequence[str | None] | None = None,
) -> None:
    """Writes square `images` of one size to the PNG file `path`, row by row.

    `titles` go above the images and may have several lines; a line that is too wide is set smaller, then shortened.
    `colours` are matplotlib's, for the titles; None is the default. Pixels are not interpolated at sizes of MIN_CELL to
    MAX_CELL. Raises `ValueError` if images, titles and colours do not match.
    """
    colours = [None] * len(titles) if colours is None else colours
    _check(images, titles, colours, columns)
    cells = [_cell(image) for image in images]
    columns, side = min(columns, len(cells)), cells[0].shape[0]
    rows, title = -(-len(cells) // columns), LINE * max(text.count("\n") + 1 for text in titles)
    width = GAP + columns * (side + GAP)
    height = GAP + rows * (title + side + GAP)
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
    renderer = FigureCanvasAgg(figure).get_renderer()  # type: ignore[no-untyped-call]  # matplotlib has no hint
    for index, (cell, text, colour) in enumerate(zip(cells, titles, colours, strict=True)):
        row, column = divmod(index, columns)
        left = GAP + column * (side + GAP)
        top = GAP + row * (title + side + GAP)  # from the upper edge; matplotlib counts from the lower one
        figure.figimage(cell, left, height - top - title - side)
        for line, part in enumerate(reversed(text.split("\n"))):
            x, y = (left + side / 2) / width, (height - top - title + 6 + line * LINE) / height
            _fit(figure.text(x, y, part, ha="center", color=colour or TEXT_COLOUR, parse_math=False), side, renderer)
    _write(figure, Path(path))


def _check(images: Sequence[Pixels], titles: Sequence[str], colours: Sequence[str | None], columns: int) -> None:
    if not len(images) == len(titles) == len(colours) or not len(images):
        raise ValueError(
            f"{len(images)} images, {len(titles)} titles and {len(colours)} colours; expected equal numbers, 1 or more"
        )
    if columns < 1:
        raise ValueError(f"columns is {columns}; expected 1 or more, such as 6")
    for image in images:
        if image.dtype != np.uint8 or image.shape != (len(images[0]), len(images[0]), 3):
            raise ValueError(
                f"an image is {image.dtype} of shape {image.shape}; expected uint8 (size, size, 3), all of one size"
            )


def _cell(image: Pixels) -> Pixels:
    """`image` enlarged by a whole factor, or shrunk if it is very large."""
    size = image.shape[0]
    if size > MAX_CELL:
        return cv2.resize(image, (MAX_CELL, MAX_CELL), interpolation=cv2.INTER_AREA).astype(np.uint8)
    return enlarged(image, MIN_CELL)


def enlarged(image: Pixels, min_side: int) -> Pixels:
    """`image` with each pixel repeated so that its side is at least `min_side`."""
    times = -(-min_side // len(image))
    return image.repeat(times, axis=0).repeat(times, axis=1)


def _fit(text: Text, width: int, renderer: RendererAgg) -> None:
    """Makes `text` at most `width` pixels wide: first by a smaller font, then without its middle."""
    with without_glyph_warnings():
        text.set_fontsize(FONT)
        if (needed := text.get_window_extent(renderer).width) > width:
            text.set_fontsize(max(MIN_FONT, FONT * width / needed))
        words = text.get_text()
        kept = len(words)
        while text.get_window_extent(renderer).width > width and kept > 2:
            kept -= 1
            text.set_text(f"{words[: kept - kept // 2]}…{words[len(words) - kept // 2 :]}")


def _write(figure: Figure, path: Path) -> None:
    """A kill leaves the old picture or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    with without_glyph_warnings():
        figure.savefig(partial, format="png", dpi=DPI)
    partial.replace(path)


@contextmanager
def without_glyph_warnings() -> Iterator[None]:
    """Draws letters that matplotlib's font lacks as boxes without a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph \d+")
        yield
