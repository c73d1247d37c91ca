"""Feeds damaged images and tables to their readers: `python tests/fuzz.py --seconds 60` for each of them.

Whatever the bytes, an image is read or is an `UnreadableImage`, a table is read or is a `ValueError` that says which
line is damaged, an archive is read or is a `DataError`; none takes long or much memory. What breaks that is kept as a
file, and the exit code is 1.
`tests/whole/test_fuzz.py` does a little of it in every run of the tests.
"""

import argparse
import contextlib
import io
import os
import resource
import signal
import struct
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", f"{tempfile.gettempdir()}/hypothesis")  # not in the repository

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))  # the readers of this checkout, as a script, too

from search.runs.csv_file import as_csv
from search.runs.result_rows import (
    COMPLETED,
    COSTS,
    EPOCH_COLUMNS,
    EPOCH_NEEDED,
    EPOCH_PARSERS,
    FAILED,
    METRICS,
    RUNNING,
    STOPPED,
    TRIAL_NEEDED,
    TRIAL_PARSERS,
    read_epochs,
    read_trials,
)
from search.runs.run_record import _read_table
from trainables.data import image_file
from trainables.data.image_file import UnreadableImage, read_image
from trainables.data.labelled_images import DataError
from trainables.data.shards import _samples
from trainables.data.table_files import columns_of, rows_of

MAX_SECONDS = 10
"""For one input."""
MAX_PIXELS = 4_000_000
"""In place of the readers' own limit, so that what goes beyond it shows in the memory."""
MAX_MEMORY = 300 << 20
"""Bytes that reading may add to the process; MAX_PIXELS take a third of them."""


# --- Damage -----------------------------------------------------------------------------------------------------------


NUM_CHANGES = st.sampled_from((1, 1, 1, 2, 3, 5))
HEAD, ANYWHERE = st.integers(0, 63), st.integers(0, (1 << 16) - 1)
PLACE = HEAD | ANYWHERE  # more often in the header than anywhere else
NUMBER = st.integers(0, (1 << 32) - 1) | st.sampled_from(
    (0, 1, 2, 127, 128, 255, 256, 32767, 32768, 65535, 1 << 24, (1 << 31) - 1, (1 << 32) - 1)
)
WIDTH, ORDER = st.sampled_from((1, 2, 4)), st.sampled_from(("little", "big"))
LENGTH, BIT, BYTES = st.integers(1, 300), st.integers(0, 7), st.binary(max_size=20)


def damaged(originals: list[bytes], pieces: list[bytes]) -> st.SearchStrategy[bytes]:
    """One of the `originals` after a few changes; `pieces` are what is put in, beside what the files hold."""
    files, changes = st.sampled_from(originals), st.sampled_from(CHANGES)
    put_in = st.sampled_from(pieces) | BYTES

    @st.composite
    def strategy(draw) -> bytes:
        content = draw(files)
        for _ in range(draw(NUM_CHANGES)):
            content = draw(changes)(draw, content, files, put_in)
        return content

    return strategy()


def place(draw, content: bytes) -> int:
    return draw(PLACE) % (len(content) + 1)


def flip(draw, content: bytes, files, put_in) -> bytes:
    at = place(draw, content)
    return content[:at] + bytes(byte ^ 1 << draw(BIT) for byte in content[at : at + 1]) + content[at + 1 :]


def overwrite(draw, content: bytes, files, put_in) -> bytes:
    at, width = place(draw, content), draw(WIDTH)
    new = (draw(NUMBER) % (1 << 8 * width)).to_bytes(width, draw(ORDER))
    return content[:at] + new + content[at + width :]


def cut(draw, content: bytes, files, put_in) -> bytes:
    return content[: place(draw, content)]


def remove(draw, content: bytes, files, put_in) -> bytes:
    at = place(draw, content)
    return content[:at] + content[at + draw(LENGTH) :]


def insert(draw, content: bytes, files, put_in) -> bytes:
    at = place(draw, content)
    return content[:at] + draw(put_in) + content[at:]


def repeat(draw, content: bytes, files, put_in) -> bytes:
    begin, at = place(draw, content), place(draw, content)
    return content[:at] + content[begin : begin + draw(LENGTH)] + content[at:]


def splice(draw, content: bytes, files, put_in) -> bytes:
    other = draw(files)
    return content[: place(draw, content)] + other[place(draw, other) :]


CHANGES = (flip, flip, overwrite, overwrite, cut, remove, insert, insert, repeat, splice)


# --- Images -----------------------------------------------------------------------------------------------------------


def images() -> list[bytes]:
    """A small file of every kind that is read: formats, modes, compressions, frames, EXIF and other blocks."""
    noise = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
    noise[:8] = (200, 30, 30)  # something to compress
    picture = Image.fromarray(noise)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E], exif[0x011A] = 6, "a photo", 72.0  # orientation, description, resolution
    exif.get_ifd(0x8769)[0x9003] = "2026:01:31 12:00:00"
    text = b"a profile" * 9
    clear = picture.copy()
    clear.putalpha(Image.linear_gradient("L").resize(picture.size))
    frames = {"save_all": True, "append_images": [picture.rotate(90), picture.rotate(180)]}
    deep = Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
    kinds = [
        *(("JPEG", mode, {}) for mode in ("RGB", "L", "CMYK")),
        ("JPEG", "RGB", {"exif": exif, "icc_profile": text, "comment": "hello", "dpi": (72, 72)}),
        ("JPEG", "RGB", {"progressive": True, "subsampling": 2}),
        ("MPO", "RGB", {"save_all": True, "append_images": [picture]}),
        *(("PNG", mode, {}) for mode in ("RGB", "L", "P", "1", "I;16", "RGBA", "LA")),
        ("PNG", "RGB", {"exif": exif, "icc_profile": text}),
        ("PNG", "P", {"transparency": 3}),
        ("PNG", "RGB", {"transparency": (200, 30, 30)}),
        ("PNG", "RGB", frames),
        ("GIF", "P", {"comment": "hello"}),
        ("GIF", "L", {"interlace": 1}),
        ("GIF", "P", frames | {"transparency": 3, "disposal": 2, "loop": 0}),
        *(("WEBP", mode, {"lossless": lossless}) for mode in ("RGB", "RGBA") for lossless in (True, False)),
        ("WEBP", "RGB", {"exif": exif, "icc_profile": text}),
        ("WEBP", "RGB", frames),
        *(("BMP", mode, {}) for mode in ("RGB", "L", "P", "1", "RGBA")),
        *(
            ("TIFF", mode, {})
            for mode in ("RGB", "L", "P", "1", "I;16", "RGBA", "LA", "CMYK", "I", "F", "YCbCr", "LAB")
        ),
        *(("TIFF", "RGB", {"compression": name}) for name in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")),
        ("TIFF", "1", {"compression": "group4"}),
        ("TIFF", "RGB", {"exif": exif, "icc_profile": text}),
        ("TIFF", "RGB", frames),
        *(("AVIF", mode, {}) for mode in ("RGB", "RGBA")),
        ("AVIF", "RGB", frames),
        *(("JPEG2000", mode, {}) for mode in ("RGB", "L", "I;16", "RGBA")),
        *(("PPM", mode, {}) for mode in ("RGB", "L", "1", "I")),
        *(("SGI", mode, {}) for mode in ("RGB", "L", "RGBA")),
        *(("PCX", mode, {}) for mode in ("RGB", "L", "P", "1")),
        *(("DDS", mode, {}) for mode in ("RGB", "L", "RGBA")),
        ("ICO", "RGBA", {"sizes": [(16, 16)]}),
        *(("QOI", mode, {}) for mode in ("RGB", "RGBA")),
        *(("XBM", "1", {}), ("MSP", "1", {}), ("BLP", "P", {})),
    ]
    deep_colours = (cv2.imencode(suffix, noise.astype(np.uint16) * 257)[1].tobytes() for suffix in (".png", ".tiff"))
    files = [run_length_bitmap(), *deep_colours]
    for format, mode, options in kinds:
        image = clear if mode in ("RGBA", "LA") else deep if mode == "I;16" else picture
        stream = io.BytesIO()
        converted(image, mode).save(stream, format, **options)
        files.append(stream.getvalue())
    return files


def converted(image: Image.Image, mode: str) -> Image.Image:
    if mode == "LAB":  # which Pillow converts with profiles only
        return Image.merge("LAB", image.split())
    return image if image.mode == mode else image.convert(mode)


def run_length_bitmap() -> bytes:
    """8 x 2 pixels; Pillow reads this kind of BMP and does not write it."""
    palette = bytes(range(256)) * 4
    pixels = b"\10\5" + b"\0\0" + b"\0\3\1\2\3\0" + b"\0\2\4\0" + b"\1\0" + b"\0\1"  # run, row, pixels, skip, run, end
    header = struct.pack("<IiiHHIIiiII", 40, 8, 2, 1, 8, 1, len(pixels), 0, 0, 256, 0)
    begin = 14 + len(header) + len(palette)
    return struct.pack("<2sIHHI", b"BM", begin + len(pixels), 0, 0, begin) + header + palette + pixels


def png_chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


PIECES = [
    *(png_chunk(name, b"") for name in (b"IDAT", b"PLTE", b"IEND")),
    png_chunk(b"tRNS", bytes(6)),
    png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2_000_000))),
    png_chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(2_000_000))),
    png_chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0"),
    png_chunk(b"acTL", struct.pack(">II", 1 << 30, 0)),
    png_chunk(b"fcTL", struct.pack(">IIIIIHHBB", 0, 9, 9, 9, 9, 1, 1, 1, 1)),
    b"\xff\xe1\0\x10Exif\0\0II*\0\x08\0\0\0",
    b"\xff\xe2\0\x08MPF\0II",
    b"\xff\xda\0\x08\x01\1\0\0?\0",
    b"\xff\xc2\0\x11\x08\xff\xff\xff\xff\3\1\x22\0\2\x11\1\3\x11\1",
    b"\xff\xdd\0\4\0\1",
    b"!\xfe\xff" + bytes(255),
    b"!\xf9\4\xff\xff\xff\xff\0",
    b",\0\0\0\0\xff\xff\xff\xff\x87",
    b"EXIF\xff\xff\xff\xff",
    b"ANMF\x18\0\0\0" + bytes(24),
    struct.pack("<HHII", 0x0100, 4, 1, 1 << 16),
    struct.pack("<HHII", 0x0112, 3, 1, 6),
    struct.pack("<HHII", 0x8769, 4, 1, 8),
    struct.pack("<HHII", 0x0111, 4, 1 << 20, 0),
]


def with_checksums(content: bytes) -> bytes:
    """A PNG whose chunks have the checksums of what they hold, so that damage reaches what lies behind them."""
    if not content.startswith(b"\x89PNG\r\n\x1a\n"):
        return content
    parts, at = [content[:8]], 8
    while len(content) - at >= 12:
        length = int.from_bytes(content[at : at + 4], "big")
        if length > len(content) - at - 12:
            break
        parts.append(png_chunk(content[at + 4 : at + 8], content[at + 8 : at + 8 + length]))
        at += 12 + length
    return b"".join(parts) + content[at:]


def try_image(file: Path) -> str:
    """Reads a file as presizing and predicting do; says how that ended."""
    outcomes = set()
    for size in (None, 8):
        try:
            pixels = read_image(file, size)
        except UnreadableImage as error:
            assert str(error)
            outcomes.add("unreadable")
            continue
        assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3 and min(pixels.shape) > 0
        image_file.resize(pixels, 8)
        outcomes.add("read")
    return " or ".join(sorted(outcomes))


# --- Tables -----------------------------------------------------------------------------------------------------------

SETTINGS = ["arch", "epochs", "lr_max"]
TRIAL_COLUMNS = ["number", "trial_id", "status", *METRICS, *COSTS, "front", *SETTINGS, "reason"]


def tables(columns: list[str], rows: list[dict]) -> list[bytes]:
    """The table with all of its rows, with one, and with none."""
    return [as_csv(columns, rows[:count]).encode() for count in (len(rows), 1, 0)]


def trials() -> list[bytes]:
    reasons = {
        COMPLETED: "",
        STOPPED: "error_rate 0.5 above, the cut-off",
        FAILED: 'two\nlines and "more"',
        RUNNING: "",
    }
    rows = [
        {"number": number, "trial_id": f"t{number}", "status": status, "error_rate": 0.1 * number, "epochs_done": 2}
        | {"valid_loss": 1e-5, "epochs_total": 3, "seconds": 12.5, "arch": "none", "epochs": 3, "reason": reason}
        for number, (status, reason) in enumerate(reasons.items())
    ]
    return tables(TRIAL_COLUMNS, rows)


def epochs() -> list[bytes]:
    rows = [
        {"number": 0, "trial_id": "t0", "epoch": epoch, "stage": "frozen", "progress": 50, "error_rate": 0.25}
        | {"train_images": 80, "valid_images": 20, "finished_at": "2026-01-31T12:00:00+00:00"}
        for epoch in (1, 2, 3)
    ]
    return tables(EPOCH_COLUMNS, rows)


FIELDS = [b'"', b'""', b",", b",,", b"\n", b"\r", b"\r\n", b"\0", b"\xff", "\ufeff".encode(), "\u2028".encode(), b"nan"]
FIELDS += [b"-inf", b"1e999", b"-1", b"9" * 30, b"9" * 5000, b"x" * 140_000, b"True", b"none", b"1_0", "٣".encode()]


def try_trials(file: Path) -> str:
    return try_table(file, read_trials, (TRIAL_PARSERS, TRIAL_NEEDED, "number"))


def try_epochs(file: Path) -> str:
    return try_table(file, read_epochs, (EPOCH_PARSERS, EPOCH_NEEDED))


def try_table(file: Path, read: Callable[[Path], list], as_frame: tuple) -> str:
    """Reads a table as a search that goes on and as a report do, who must agree; says how that ended."""
    try:
        rows = read(file)
    except ValueError as error:
        assert f"{file} is damaged: line " in str(error)
        rows = None
    try:
        frame = _read_table(file, *as_frame)
    except ValueError as error:
        assert rows is None and f"{file} is damaged: line " in str(error)
        return "damaged"
    assert rows is not None and frame["number"].tolist() == [row["number"] for row in rows]
    return "read"


# --- Labels: tables and archives of images ----------------------------------------------------------------------------


def labels() -> list[bytes]:
    names = enumerate(("a", 'b "c"', "d, e", "f\ng"))
    rows = [{"path": f"{number}.jpg", "label": label} for number, label in names]
    others = [b"file;label\n1.jpg;a,b\n", "\ufeffpath\tlabel\n1.jpg\t01\n".encode()]
    return [*tables(["path", "label"], rows)[:2], *others]


def json_labels() -> list[bytes]:
    return [b'{"path": "1.jpg", "label": "a"}\n\n{"path": "2.jpg", "label": 1.50, "box": null}\n']


def archives() -> list[bytes]:
    files = {"a/1.jpg": b"image", "a/1.cls": b"3", "b" * 90 + "/2.png": b"", "2.json": b"{}"}
    found = []
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=form) as archive:
            for name, content in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        found.append(out.getvalue())
    return found


def try_labels(file: Path) -> str:
    try:
        rows = list(rows_of(file, columns_of(file)))
    except DataError as error:
        assert str(file) in str(error)
        return "damaged"
    assert all(row.place.startswith("line ") for row in rows)
    return "damaged" if any(row.problem for row in rows) else "read"


def try_json_labels(file: Path) -> str:
    named = file.with_suffix(".jsonl")
    named.write_bytes(file.read_bytes())
    return try_labels(named)


def try_archive(file: Path) -> str:
    with tempfile.TemporaryDirectory() as target:
        try:
            _samples(file, Path(target), "images")
        except DataError as error:
            assert str(file) in str(error)
            return "damaged"
    return "read"


# --- Trying many ------------------------------------------------------------------------------------------------------


class Target(NamedTuple):
    """What is damaged, and what reads it."""

    originals: list[bytes]
    inputs: st.SearchStrategy[bytes]
    read: Callable[[Path], str]


def targets() -> Iterator[tuple[str, Target]]:
    originals = images()
    of_images = damaged(originals, PIECES)
    of_images = of_images | of_images.map(with_checksums)
    yield "images", Target(originals, of_images, try_image)
    for name, originals, read in (("trials", trials(), try_trials), ("epochs", epochs(), try_epochs)):
        yield name, Target(originals, damaged(originals, FIELDS), read)
    for name, originals, read in (
        ("labels", labels(), try_labels),
        ("json-labels", json_labels(), try_json_labels),
        ("archives", archives(), try_archive),
    ):
        yield name, Target(originals, damaged(originals, FIELDS), read)


TARGETS = dict(targets())


class Finding(AssertionError):
    """What no input may do."""


def memory() -> int:
    """The most bytes that this process has had in memory."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def checked(read: Callable[[Path], str], content: bytes, file: Path) -> str:
    """Reads one input, which stays in `file` while it is being read, whatever becomes of this process."""
    file.write_bytes(content)
    before, started = memory(), time.perf_counter()
    outcome = read(file)
    if (took := time.perf_counter() - started) > MAX_SECONDS:
        raise Finding(f"it took {took:.1f} s")
    if (more := memory() - before) > MAX_MEMORY:
        raise Finding(f"it took {more / (1 << 20):.0f} MB")
    return outcome


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """libtiff writes to the terminal by itself, Pillow warns; and images have fewer pixels here."""
    pixels, image_file.MAX_PIXELS = image_file.MAX_PIXELS, MAX_PIXELS
    sys.stderr.flush()
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)
        image_file.MAX_PIXELS = pixels


def fuzz(target: str, seconds: float, folder: Path, first_seed: int) -> bool:
    """Tries inputs for so long; returns whether all was well."""
    _, inputs, read = TARGETS[target]
    outcomes: Counter[str] = Counter()
    found: list[Exception] = []
    slowest = 0.0
    before, end = memory(), time.monotonic() + seconds

    def one(content: bytes) -> None:
        nonlocal slowest
        if found or time.monotonic() > end:
            return
        started = time.perf_counter()
        signal.alarm(6 * MAX_SECONDS)  # the end of this process: code that is not Python's cannot be interrupted
        try:
            outcomes[checked(read, content, folder / f"{target}.input")] += 1
        except Exception as error:  # kept at once: hypothesis would go on and try it again
            found.append(error)
        signal.alarm(0)
        slowest = max(slowest, time.perf_counter() - started)

    number = first_seed
    every = settings(
        max_examples=200, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=HealthCheck
    )
    with quiet():
        while not found and time.monotonic() < end:
            seed(number)(every(given(inputs)(one)))()
            number += 1
    result = "nothing found"
    if found:
        result = f"FOUND {type(found[0]).__name__}: {found[0]}; the input is {folder / target}.input"
        traceback.print_exception(found[0])
    tried = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
    print(
        f"{target}: {outcomes.total()} inputs in {seconds:g} s (seeds {first_seed} to {number - 1}): {tried}; slowest "
        f"{slowest:.2f} s, {(memory() - before) / (1 << 20):.0f} MB more memory; {result}",
        flush=True,
    )
    return not found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)}; default: all")
    parser.add_argument("--seconds", type=float, default=60, help="for each target; default 60")
    parser.add_argument("--seed", type=int, default=0, help="of the first 200 inputs; default 0")
    parser.add_argument("--again", type=Path, metavar="FILE", help="try this one input of the one target, and no other")
    args = parser.parse_args()
    if unknown := set(args.targets) - set(TARGETS):
        parser.error(f"{', '.join(unknown)}: no such target")
    names = args.targets or list(TARGETS)
    if args.again:
        print(TARGETS[names[0]].read(args.again))
        return 0
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    print(f"the input that is being tried: {folder}/", flush=True)  # where this process does not survive it
    all_well = [fuzz(target, args.seconds, folder, args.seed) for target in names]
    return 0 if all(all_well) else 1


if __name__ == "__main__":
    sys.exit(main())
