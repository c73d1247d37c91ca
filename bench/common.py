"""What the benchmarks share: the machine they ran on, the command as run, and the files they write."""

import json
import os
import platform
import re
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

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
