"""What the benchmarks share: the machine they ran on, the command as run, and the files they write."""

import json
import os
import platform
import re
import shlex
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

RESULTS = Path(__file__).resolve().parents[1] / "results" / "bench"
CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
EPOCH_COLUMNS = ("train_loss", "valid_loss", "error_rate", "seconds")


def hardware(gpu: str | None = None) -> dict[str, Any]:
    """The processor, its cores that this process may use, and the GPU."""
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = [line.split(":", 1)[1].strip() for line in cpuinfo if line.startswith("model name")]
    return {"cpu": (names or [platform.machine()])[0], "cores": CPUS, "gpu": gpu}


def versions(*packages: str) -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def command_line() -> str:
    """The command as run; of folders only the names."""
    words = (re.sub("[^=]*/", "", word.rstrip("/")) for word in sys.argv[1:])
    return shlex.join(["python", f"bench/{Path(sys.argv[0]).name}", *words])


def draw_photos(root: Path, count: int, seed: int) -> Path:
    """`count` JPEGs in the layout and size of Pets: pieces of one noise field with the spectrum of photographs, about
    90 kB each."""
    (root / "images").mkdir(parents=True)
    rng = np.random.default_rng(seed)
    frequencies = np.hypot(np.fft.fftfreq(2048)[:, None], np.fft.rfftfreq(2048)) + 1 / 2048
    grey, *colours = (np.fft.irfft2(np.fft.rfft2(rng.normal(size=(2048, 2048))) / frequencies) for _ in range(4))
    field = np.stack([grey / grey.std() + 0.4 * colour / colour.std() for colour in colours], axis=2)
    field = np.clip(120 + 55 * field, 0, 255).astype(np.uint8)
    breeds, corners = max(2, min(37, count // 8)), rng.integers(0, 2048 - 500, (count, 2))

    def draw(n: int) -> None:
        (left, top), (width, height) = corners[n], (500, 375) if n % 3 else (375, 500)
        image = Image.fromarray(field[top : top + height, left : left + width])
        image.save(root / "images" / f"breed{n % breeds}_{n}.jpg", quality=90)

    with ThreadPoolExecutor(CPUS) as pool:
        list(pool.map(draw, range(count)))
    return root


def epoch_row(side: str, row: dict[str, Any]) -> dict[str, Any]:
    """What both sides tell of an epoch, printed as it ends."""
    numbers = "  ".join(f"{column} {row[column]:.3f}" for column in EPOCH_COLUMNS)
    print(f"  {side:9}  epoch {row['epoch']}  {row['stage']:8}  {numbers}", flush=True)
    return {name: row[name] for name in ("epoch", "stage", *EPOCH_COLUMNS)}


def footer(result: dict[str, Any]) -> str:
    """The last lines of every table: hardware and versions."""
    machine = result["hardware"]
    packages = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    return f"{machine['cpu']}, {machine['cores']} cores, {machine['gpu'] or 'no GPU'}.\n{packages}.\n"


def write(out: Path, name: str, result: dict[str, Any], markdown: str) -> None:
    """Writes <name>.json and <name>.md to the folder `out`, and prints the table."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    (out / f"{name}.md").write_text(markdown)
    print(markdown)
