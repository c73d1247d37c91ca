"""The quickstart's image set, drawn instead of downloaded: cartoon animals of twelve invented breeds.

The files lie as in Oxford-IIIT Pets, `<root>/images/<Breed_name>_<n>.jpg`. As with real breeds no single cue identifies
a breed: all share the colours, several share each part (ears, muzzle, coat, marking), and pose, light, background and
clutter vary. Some breeds differ in only one part, so fine-tuning has to learn it. (The file is long since one drawing
is best read in one place.)
"""

import json
import math
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
from filelock import FileLock
from numpy.random import Generator

Array = npt.NDArray[Any]

VERSION = 1
"""Raise it when the images change: sets of another version are drawn again."""
MARKER = "quickstart.json"
"""The file in the root that describes the set. It is renamed together with the set, so it is there only if all is."""

EARS = ("pointed", "floppy", "round", "tufted")
MUZZLES = ("long", "short", "broad")
COATS = ("solid", "striped", "spotted", "patched")
MARKINGS = ("mask", "blaze", "eye_patch", "collar")


class Breed(NamedTuple):
    """The parts that define a breed: everything else about an image is random."""

    name: str  # label and start of the file names
    ears: str
    muzzle: str
    coat: str  # without its colours
    marking: str  # an eye patch may be on either side, so a flipped image keeps its breed


# Neighbours share most parts. Three breeds have each kind of ears, coat and marking, four have each muzzle.
BREEDS = (
    Breed("Amber_pointer", "floppy", "long", "spotted", "blaze"),
    Breed("Marsh_pointer", "floppy", "long", "spotted", "eye_patch"),
    Breed("Cliff_lynx", "tufted", "short", "striped", "mask"),
    Breed("Harbour_lynx", "pointed", "short", "striped", "mask"),
    Breed("Dune_mastiff", "round", "broad", "solid", "collar"),
    Breed("Old_tarn_mastiff", "floppy", "broad", "solid", "collar"),
    Breed("Moor_shorthair", "round", "short", "patched", "blaze"),
    Breed("Thistle_pug", "round", "broad", "patched", "mask"),
    Breed("Briar_hound", "pointed", "long", "striped", "collar"),
    Breed("Great_fen_hound", "pointed", "long", "solid", "blaze"),
    Breed("Juniper_shepherd", "tufted", "broad", "patched", "eye_patch"),
    Breed("Lowland_spitz", "tufted", "short", "spotted", "eye_patch"),
)


def draw(root: Path, *, seed: int = 0, images_per_breed: int = 50) -> Path:
    """Draws the image set into `root` unless it is there; returns `root`.

    The same seed gives the same bytes (with the same versions of OpenCV and NumPy), and a larger set starts with the
    images of a smaller one. The set is drawn under a temporary name and renamed at the end, so that a killed run leaves
    no part of it. Raises `ValueError` if `root` holds other files.
    """
    if images_per_breed < 1:
        raise ValueError(f"images_per_breed is {images_per_breed}, expected 1 or more")
    marker = json.dumps({"version": VERSION, "seed": seed, "images_per_breed": images_per_breed}) + "\n"
    root.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(root.with_name(f".{root.name}.lock")):
        if _holds(root, marker):
            return root
        part = root.with_name(f".{root.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        try:
            _draw_set(part, seed, images_per_breed)
            (part / MARKER).write_text(marker)
            shutil.rmtree(root, ignore_errors=True)
            part.rename(root)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return root


def _holds(root: Path, marker: str) -> bool:
    """Whether `root` is the set that `marker` describes. Only a folder drawn here, or an empty one, may be replaced."""
    if (root / MARKER).is_file():
        return (root / MARKER).read_text() == marker
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise ValueError(f"{root} exists and is not a quickstart image set; expected a new or empty folder")
    return False


def _draw_set(folder: Path, seed: int, images_per_breed: int) -> None:
    (folder / "images").mkdir(parents=True)

    def one(job: tuple[int, int]) -> None:
        index, n = job
        rng = np.random.default_rng([seed, index, n])
        image = _photo(BREEDS[index], rng)
        _save(folder / "images" / f"{BREEDS[index].name}_{n}.jpg", image, quality=int(rng.integers(55, 93)))

    jobs = [(index, n) for index in range(len(BREEDS)) for n in range(1, images_per_breed + 1)]
    with ThreadPoolExecutor(max_workers=2) as pool:  # half the work is Python, so more would not help
        for _ in pool.map(one, jobs):
            pass


def _save(path: Path, image: Array, *, quality: int) -> None:
    done, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not done:
        raise OSError(f"could not encode {path.name}")
    path.write_bytes(data.tobytes())


# --- One image: BGR, colours are arrays of three in 0..255, `rng` draws all that is random ----------------------------


def _photo(breed: Breed, rng: Generator) -> Array:
    """One image of a breed."""
    long_side, short_side = int(rng.integers(200, 241)), int(rng.integers(160, 197))
    width, height = (long_side, short_side) if rng.random() < 0.6 else (short_side, long_side)
    # Shapes are drawn at twice the size, so that shrinking smooths their edges.
    canvas = cv2.resize(_backdrop(width, height, rng), (2 * width, 2 * height), interpolation=cv2.INTER_LINEAR)
    _clutter(canvas, rng, num=int(rng.integers(1, 5)), size=(0.08, 0.22))
    _animal(canvas, breed, rng)
    _clutter(canvas, rng, num=int(rng.integers(0, 3)), size=(0.04, 0.09))
    _grass(canvas, rng)
    return _expose(cv2.resize(canvas, (width, height), interpolation=cv2.INTER_AREA), rng)


def _backdrop(width: int, height: int, rng: Generator) -> Array:
    """A gradient between two colours, with soft noise and sometimes bands or tiles over it."""
    x, y = _grid(width, height)
    angle = rng.uniform(0, 2 * math.pi)
    along = (x * math.cos(angle) + y * math.sin(angle) + 1.5) / 3
    first, second = _any_colour(rng), _any_colour(rng)
    image = first + (second - first) * along[..., None]
    cells = int(rng.integers(3, 14))
    noise = rng.standard_normal((cells, cells, 3), dtype=np.float32) * np.float32(rng.uniform(5, 28))
    image += cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
    texture, wave = rng.random(), rng.uniform(8, 30)
    bands = np.sin(wave * along)
    if texture > 0.75:
        bands = bands * np.sin(wave * (x * math.sin(angle) - y * math.cos(angle)) / 3)
    if texture > 0.5:
        image += np.float32(rng.uniform(6, 26)) * np.sign(bands)[..., None]
    return np.clip(image, 0, 255).astype(np.uint8)


def _expose(image: Array, rng: Generator) -> Array:
    """Light from one side, brightness, contrast, colour cast, blur and sensor noise."""
    height, width = image.shape[:2]
    if rng.random() < 0.5:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.4, 1.3))
    x, y = _grid(width, height)
    angle, strength = rng.uniform(0, 2 * math.pi), rng.uniform(0, 0.35)
    light = 1 + strength * (x * math.cos(angle) + y * math.sin(angle))
    gain = rng.uniform(0.78, 1.2) * rng.uniform(0.9, 1.1, 3)
    contrast = rng.uniform(0.65, 1.1)
    pixels = ((image.astype(np.float32) - 128) * contrast + 128) * light[..., None] * gain.astype(np.float32)
    pixels += rng.standard_normal(image.shape, dtype=np.float32) * np.float32(rng.uniform(0, 9))
    return np.clip(pixels, 0, 255).astype(np.uint8)


def _grid(width: int, height: int) -> tuple[Array, Array]:
    """The x and y of each pixel, float32 in -1..1, as a row and a column that broadcast."""
    return np.linspace(-1, 1, width, dtype=np.float32)[None], np.linspace(-1, 1, height, dtype=np.float32)[:, None]


def _any_colour(rng: Generator) -> Array:
    return _hsv(rng.uniform(0, 180), rng.uniform(20, 150), rng.uniform(70, 235))


def _fur_colour(rng: Generator) -> Array:
    """Browns, creams and greys: the same for all breeds."""
    return _hsv(rng.uniform(5, 24), rng.uniform(10, 150), rng.uniform(110, 215))


def _hsv(hue: float, saturation: float, value: float) -> Array:
    """BGR from OpenCV's scales: hue 0..180, the others 0..255."""
    pixel: Array = cv2.cvtColor(np.array([[[hue, saturation, value]]], np.uint8), cv2.COLOR_HSV2BGR)[0, 0]
    return pixel.astype(np.float32)


def _mix(colour: Array, other: float, share: float) -> Array:
    """A colour moved towards a grey level, 0 for black and 255 for white, by a share in 0..1."""
    return colour + (other - colour) * share


class _Pen:
    """Fills outlines on a canvas. They are in units of their owner, about 1 from its middle to its edge, y down."""

    def __init__(self, canvas: Array, *, middle: tuple[float, float], unit: float, degrees: float) -> None:
        cos, sin = unit * math.cos(math.radians(degrees)), unit * math.sin(math.radians(degrees))
        self.canvas, self.middle, self.unit = canvas, np.array(middle), unit
        self.turn = np.array([[cos, sin], [-sin, cos]])

    def place(self, outline: Array) -> Array:
        """Points (n, 2) of the owner as pixels of the canvas, int32."""
        pixels: Array = outline @ self.turn + self.middle
        return np.rint(pixels).astype(np.int32)

    def fill(self, outlines: Iterable[Array], colour: Array, *, edge: float = 0.0) -> None:
        """Fill outlines, with a dark line around them `edge` units wide."""
        points = [self.place(outline) for outline in outlines]
        _fill(self.canvas, points, colour)
        if edge:
            cv2.polylines(self.canvas, points, True, _mix(colour, 0, 0.45).tolist(), max(1, round(edge * self.unit)))

    def fill_within(self, area: Array, outlines: Iterable[Array], colour: Array) -> None:
        """Fill the parts of outlines that lie inside the outline `area`."""
        layer, mask = self.canvas.copy(), np.zeros(self.canvas.shape[:2], np.uint8)
        _fill(layer, [self.place(outline) for outline in outlines], colour)
        cv2.fillPoly(mask, [self.place(area)], 255)
        cv2.copyTo(layer, mask, self.canvas)


def _fill(canvas: Array, points: Iterable[Array], colour: Array) -> None:
    for one in points:  # one by one: filled together, overlapping outlines would cancel out
        cv2.fillPoly(canvas, [one], colour.tolist())


_ROUND = np.linspace(0, 2 * math.pi, 40, endpoint=False)
_CIRCLE = np.stack([np.cos(_ROUND), np.sin(_ROUND)], axis=1)


def _oval(x: float, y: float, rx: float, ry: float, *, degrees: float = 0.0, wobble: Iterable[float] = ()) -> Array:
    """Outline of an ellipse. `wobble` holds heights of waves added to it: the first has two crests, the next three."""
    outline = _CIRCLE * (rx, ry)
    for crests, height in enumerate(wobble, 2):
        outline *= 1 + height * np.sin(crests * _ROUND + 9 * height)[:, None]
    if degrees:
        cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        outline = outline @ np.array([[cos, sin], [-sin, cos]])
    moved: Array = outline + np.array([x, y])
    return moved


def _coat_pattern(coat: str, rng: Generator) -> list[Array]:
    """Outlines of a coat's dark (or light) parts over a head or a body, in its units."""
    if coat == "striped":
        xs, gap, bend = np.linspace(-1.3, 1.3, 12), rng.uniform(0.26, 0.36), rng.uniform(-0.25, 0.25)
        rows = np.arange(-1.3, 1.3, gap) + rng.uniform(0, gap)
        half = gap * rng.uniform(0.16, 0.26) * (1 - 0.4 * np.abs(xs))
        lines = [row + bend * xs**2 + rng.normal(0, 0.02, xs.size) for row in rows]
        return [np.concatenate([np.c_[xs, y - half], np.c_[xs, y + half][::-1]]) for y in lines]
    if coat == "spotted":
        cells = [(x, y) for x in np.arange(-1, 1.1, 0.4) for y in np.arange(-1, 1.1, 0.4)]
        return [_oval(*(cell + rng.normal(0, 0.09, 2)), *rng.uniform(0.06, 0.13, 2)) for cell in cells]
    if coat == "patched":
        places = rng.permutation([(-0.7, -0.6), (0.7, -0.5), (-0.7, 0.6), (0.6, 0.6), (0.0, -0.8)])[:3]
        return [
            _oval(*(place + rng.normal(0, 0.12, 2)), *rng.uniform(0.32, 0.55, 2), wobble=rng.uniform(-0.15, 0.15, 3))
            for place in places
        ]
    return []


def _animal(canvas: Array, breed: Breed, rng: Generator) -> None:
    height, width = canvas.shape[:2]
    square = min(height, width)  # evaluation crops the middle square: the head and its ears stay in it, mostly
    unit = square * rng.uniform(0.19, 0.28)
    head = np.array([width / 2 + square * rng.uniform(-0.2, 0.2), height / 2 + square * rng.uniform(-0.14, 0.04)])
    fur = _fur_colour(rng)
    ink = _mix(fur, rng.choice([0, 255], p=[0.75, 0.25]), rng.uniform(0.28, 0.5))
    side = rng.choice([-1, 1])
    body = _Pen(canvas, middle=tuple(head), unit=unit, degrees=rng.normal(0, 5))
    _body(body, breed, fur, ink, side, rng)
    pen = _Pen(canvas, middle=tuple(head), unit=unit, degrees=rng.normal(0, 14))
    _head(pen, breed, fur, ink, rng)


def _body(pen: _Pen, breed: Breed, fur: Array, ink: Array, side: int, rng: Generator) -> None:
    """Legs, tail and trunk, sitting or standing, and the collar. The head comes over it."""
    standing = rng.random() < 0.5
    x, y, rx, ry = (side * 1.15, 1.35, 1.5, 0.8) if standing else (side * 0.2, 1.75, 0.95, 1.15)
    x, y = x + rng.normal(0, 0.1), y + rng.normal(0, 0.08)
    tail = _oval(x + side * rx, y - 0.3, 0.2, rng.uniform(0.5, 0.9), degrees=side * rng.uniform(10, 70))
    pen.fill([tail], fur, edge=0.06)
    for foot in np.array([-0.7, -0.4, 0.4, 0.7] if standing else [-0.45, 0.45]) * rx:
        pen.fill([_oval(x + foot, y + ry, 0.2, 0.62, degrees=rng.normal(0, 6))], _mix(fur, 0, 0.08), edge=0.06)
    trunk = _oval(x, y, rx, ry, wobble=rng.uniform(-0.04, 0.04, 2))
    pen.fill([trunk], fur, edge=0.06)
    marks = [mark * (rx, ry) + (x, y) for mark in _coat_pattern(breed.coat, rng)]
    pen.fill_within(trunk, marks, ink)
    if breed.marking == "collar":
        ring = _hsv(rng.uniform(0, 180), rng.uniform(60, 200), rng.uniform(70, 220))
        pen.fill([_oval(side * 0.12, 0.92, 0.72, 0.32)], ring, edge=0.05)


def _head(pen: _Pen, breed: Breed, fur: Array, ink: Array, rng: Generator) -> None:
    yaw, pitch = rng.uniform(-0.2, 0.2), rng.normal(0, 0.05)
    for side in (-1, 1):
        _ear(pen, breed.ears, side, fur, rng)
    skull = _oval(0, 0, rng.uniform(0.92, 1.02), rng.uniform(0.86, 0.96), wobble=rng.uniform(-0.03, 0.03, 2))
    pen.fill([skull], fur, edge=0.06)
    pen.fill_within(skull, _coat_pattern(breed.coat, rng), ink)
    dark, pale = _mix(fur, 0, rng.uniform(0.4, 0.65)), _mix(fur, 255, rng.uniform(0.45, 0.75))
    eyes = [(yaw + side * rng.uniform(0.36, 0.42), -0.14 + pitch) for side in (-1, 1)]
    if breed.marking == "mask":
        pen.fill_within(skull, [_oval(yaw, -0.12 + pitch, 0.85, 0.26)], dark)
    elif breed.marking == "blaze":
        pen.fill_within(skull, [_oval(yaw, -0.3 + pitch, rng.uniform(0.14, 0.2), 0.75)], pale)
    elif breed.marking == "eye_patch":
        x, y = eyes[rng.integers(2)]
        patch = _oval(x, y, *rng.uniform(0.28, 0.38, 2), wobble=rng.uniform(-0.1, 0.1, 2))
        pen.fill_within(skull, [patch], dark)
    _muzzle(pen, breed.muzzle, yaw * 1.3, pitch, _mix(fur, 255, rng.uniform(0.1, 0.5)), rng)
    for x, y in eyes:
        size = rng.uniform(0.11, 0.15)
        pen.fill([_oval(x, y, size, size)], np.array([235.0, 240, 240]), edge=0.04)
        pen.fill([_oval(x + yaw * 0.15, y + 0.01, size * 0.6, size * 0.7)], np.array([25.0, 25, 25]))


def _ear(pen: _Pen, ears: str, side: int, fur: Array, rng: Generator) -> None:
    tilt, size = rng.normal(0, 0.07), rng.uniform(0.88, 1.12)
    shade = _mix(fur, 0, 0.12)
    if ears == "round":
        outline = _oval(side * (0.72 + tilt), -0.78, 0.4 * size, 0.4 * size)
    elif ears == "floppy":
        outline = _oval(side * (0.98 + tilt), -0.1, 0.3, 0.68 * size, degrees=side * -14, wobble=(0.05,))
    else:  # a tufted ear leans out, for its hairs to show
        tip = (0.82 + tilt, -1.5 * size) if ears == "pointed" else (1.02 + tilt, -1.22 * size)
        outline = np.array([(0.28, -0.75), tip, (0.95, -0.3)]) * (side, 1)
    pen.fill([outline], shade, edge=0.06)
    if ears == "tufted":
        hairs = np.array([[(dx - 0.09, 0.34), (dx * 3.2, -0.36), (dx + 0.09, 0.34)] for dx in (-0.09, 0, 0.09)])
        pen.fill(hairs + outline[1], _mix(fur, 0, 0.65))
    if ears in ("round", "pointed", "tufted"):
        middle = outline.mean(axis=0)
        pen.fill([middle + (outline - middle) * 0.55], _mix(np.array([150.0, 150, 205]), 128, 0.3))


def _muzzle(pen: _Pen, muzzle: str, x: float, pitch: float, colour: Array, rng: Generator) -> None:
    y, rx, ry = {"long": (0.62, 0.34, 0.62), "short": (0.4, 0.36, 0.3), "broad": (0.45, 0.64, 0.36)}[muzzle]
    y, rx, ry = y + pitch, rx * rng.uniform(0.92, 1.08), ry * rng.uniform(0.92, 1.08)
    pen.fill([_oval(x, y, rx, ry)], colour, edge=0.05)
    nose = y + (0.45 if muzzle == "long" else -0.45) * ry
    black = np.array([40.0, 35, 45])
    pen.fill([_oval(x, nose, 0.17, 0.12)], black)
    pen.fill([_oval(x, nose + 0.2, 0.025, 0.12), _oval(x, nose + 0.3, 0.2, 0.025)], black)


def _clutter(canvas: Array, rng: Generator, *, num: int, size: tuple[float, float]) -> None:
    """Balls, cushions, tents and rings, some with the colours and patterns of an animal."""
    height, width = canvas.shape[:2]
    for _ in range(num):
        pen = _Pen(
            canvas,
            middle=(width * rng.uniform(0, 1), height * rng.uniform(0, 1)),
            unit=min(height, width) * rng.uniform(*size),
            degrees=rng.uniform(-40, 40),
        )
        colour = _fur_colour(rng) if rng.random() < 0.5 else _any_colour(rng)
        box = np.array([(-1.0, -0.7), (1, -0.7), (1, 0.7), (-1, 0.7)])
        tent = np.array([(-0.8, 0.8), (0, -1), (0.8, 0.8)])
        outline = (_oval(0, 0, 1, 1), _oval(0, 0, 1, 0.45), box, tent)[rng.integers(4)]
        pen.fill([outline], colour, edge=0.06)
        pen.fill_within(outline, _coat_pattern(str(rng.choice(COATS)), rng), _mix(colour, 0, 0.4))


def _grass(canvas: Array, rng: Generator) -> None:
    """Blades in front of the feet."""
    height, width = canvas.shape[:2]
    pen = _Pen(canvas, middle=(0, height), unit=height, degrees=0)
    colour = _any_colour(rng)
    for x in rng.uniform(0, width / height, int(rng.integers(0, 30))):
        tip = (x + rng.normal(0, 0.05), -rng.uniform(0.08, 0.3))
        pen.fill([np.array([(x - 0.012, 0.02), tip, (x + 0.012, 0.02)])], _mix(colour, 0, rng.uniform(0, 0.3)))
