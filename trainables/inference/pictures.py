"""Pictures for people: a grid of labelled images as one PNG file. Imports no torch and no pyplot."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

DPI = 100
MIN_CELL = 160  # px; smaller images are shown at a whole multiple of their size, so that a label fits above
MAX_CELL = 512  # px; larger ones are shrunk
GAP = 12  # px between images and at the edges
LINE = 20  # px for one line of a title
FONT = 10.5  # points
SMALLEST_FONT = 7.5
TEXT_COLOUR = "#222222"


def save_grid(
    path: Path | str,
    images: Sequence[np.ndarray],
    titles: Sequence[str],
    *,
    columns: int = 6,
    colours: Sequence[str | None] | None = None,
) -> None:
    """Writes `images`, each uint8 (size, size, 3) RGB of one size, to the PNG file `path`, row by row.

    `titles` stand above the images, in several lines where they hold newlines; a line that is too wide is set smaller,
    then cut. `colours` are the titles' colours as matplotlib knows them, None for the usual one. Pixels are copied, not
    interpolated, at sizes of MIN_CELL to MAX_CELL. Raises `ValueError` where images, titles and colours do not match.
    """
    colours = [None] * len(titles) if colours is None else colours
    _check(images, titles, colours, columns)
    cells = [_cell(image) for image in images]
    columns, side = min(columns, len(cells)), cells[0].shape[0]
    rows, title = -(-len(cells) // columns), LINE * max(text.count("\n") + 1 for text in titles)
    width = GAP + columns * (side + GAP)
    height = GAP + rows * (title + side + GAP)
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
    renderer = FigureCanvasAgg(figure).get_renderer()
    for index, (cell, text, colour) in enumerate(zip(cells, titles, colours, strict=True)):
        row, column = divmod(index, columns)
        left = GAP + column * (side + GAP)
        top = GAP + row * (title + side + GAP)  # from the upper edge; matplotlib counts from the lower one
        figure.figimage(cell, left, height - top - title - side)
        for line, part in enumerate(reversed(text.split("\n"))):
            x, y = (left + side / 2) / width, (height - top - title + 6 + line * LINE) / height
            _fit(figure.text(x, y, part, ha="center", color=colour or TEXT_COLOUR, parse_math=False), side, renderer)
    _write(figure, Path(path))


def _check(images: Sequence, titles: Sequence, colours: Sequence, columns: int) -> None:
    if not len(images) == len(titles) == len(colours) or not len(images):
        raise ValueError(
            f"{len(images)} images, {len(titles)} titles and {len(colours)} colours; give as many of each, one at least"
        )
    if columns < 1:
        raise ValueError(f"columns is {columns}; expected 1 or more, such as 6")
    for image in images:
        if image.dtype != np.uint8 or image.shape != (len(images[0]), len(images[0]), 3):
            raise ValueError(
                f"an image is {image.dtype} of shape {image.shape}; expected uint8 (size, size, 3), all of one size"
            )


def _cell(image: np.ndarray) -> np.ndarray:
    """`image` at the size that it is shown at: each pixel as a square of pixels, or shrunk where it is very large."""
    size = image.shape[0]
    if size > MAX_CELL:
        return cv2.resize(image, (MAX_CELL, MAX_CELL), interpolation=cv2.INTER_AREA)
    times = -(-MIN_CELL // size)
    return image.repeat(times, axis=0).repeat(times, axis=1)


def _fit(text: Text, width: int, renderer: RendererAgg) -> None:
    """Makes `text` at most `width` pixels wide: smaller first, then without its middle."""
    with _quiet():
        text.set_fontsize(FONT)
        if (needed := text.get_window_extent(renderer).width) > width:
            text.set_fontsize(max(SMALLEST_FONT, FONT * width / needed))
        words = text.get_text()
        kept = len(words)
        while text.get_window_extent(renderer).width > width and kept > 2:
            kept -= 1
            text.set_text(f"{words[: kept - kept // 2]}…{words[len(words) - kept // 2 :]}")


def _write(figure: Figure, path: Path) -> None:
    """A kill leaves the old picture or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    with _quiet():
        figure.savefig(partial, format="png", dpi=DPI)
    partial.replace(path)


@contextmanager
def _quiet() -> Iterator[None]:
    """Letters that matplotlib's font lacks become boxes, without a warning for each."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph \d+")
        yield
