"""How bench/budget.py runs its methods: each a command in a process of its own, whose models label the test images."""

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainables.data.labelled_images import ImageFolder, split

ROOT = Path(__file__).resolve().parents[1]
TEST_SHARE = 0.25
END_SECONDS = 90.0
"""For a command that was interrupted, until it is killed."""
NO_MODEL = "no trial completed"
"""In what a search prints that ran well and has no model."""
Record = dict[str, Any]


class Failed(RuntimeError):
    """A command that ended with an error, which is no result."""


@dataclass(frozen=True)
class Split:
    """Two folders of class folders: one for the method, one that nobody chooses by."""

    number: int
    train: Path
    test: Path

    @property
    def counts(self) -> Record:
        """Images of both, and the test error of whoever always says the most frequent class of `train`."""
        train, test = (Counter(file.parent.name for file in folder.glob("*/*")) for folder in (self.train, self.test))
        majority = 1 - test[max(sorted(train), key=train.__getitem__)] / test.total()
        return {"train_images": train.total(), "test_images": test.total(), "majority_error": majority}


@contextmanager
def split_folders(images: ImageFolder, number: int) -> Iterator[Split]:
    """A stratified split as folders of links; `number` is its seed. All files have been read once."""
    with tempfile.TemporaryDirectory() as folder:
        parts = split(images.labels, valid_fraction=TEST_SHARE, seed=number)
        for name, indices in zip(("train", "test"), parts, strict=True):
            for i in indices:
                source, label = images.root / images.paths[i], images.classes[images.labels[i]]
                source.read_bytes()
                link = Path(folder) / name / label / f"{i:06}_{source.name}"
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(source)
        yield Split(number, Path(folder) / "train", Path(folder) / "test")


# --- A search ---------------------------------------------------------------------------------------------------------


def search(repo: Path, words: Sequence[str], part: Split, *, minutes: float, margin: float) -> Record:
    """`search.run` of a checkout, for so many minutes from the command on: what is in `best/` then is its model.

    `margin` is how many seconds its own `--time-budget` is shorter, for what that does not count: start and end.
    """
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        command = [sys.executable, "-m", "search.run", "--data", str(part.train), *words, "--report", "off"]
        command += ["--time-budget", f"{max(1, 60 * minutes - margin):g}s", "--results", folder, "--name", "run"]
        environment = environment_of(repo) | {"FINETUNE_SEARCH_CACHE": str(scratch / "cache")}
        with begun(command, cwd=repo, env=environment, log=scratch / "log") as (process, started):
            ended = wait(process, started + 60 * minutes)
            seconds = time.monotonic() - started
            model = copied(scratch / "run" / "best", scratch / "model")
        found: Record = {"seconds": seconds, "ended": ended, "exit_code": process.returncode, "models": []}
        if model:
            metrics = json.loads((model / "metrics.json").read_text())
            errors = {"valid_error": metrics["error_rate"], "test_error": predicted_error(repo, model, part.test)}
            found["models"] = [{"seconds": seconds, "number": metrics["number"]} | errors]
        else:
            log = (scratch / "log").read_text()
            if ended and NO_MODEL not in log:
                raise Failed(f"exit code {process.returncode}: {log[-4000:]}")
            found["log"] = log[-2000:].replace(folder, "")
    return found


def copied(best: Path, target: Path) -> Path | None:
    """A copy of a folder that a search may be replacing; None if there is none."""
    for _ in range(20):
        if (best / "model.safetensors").is_file():
            try:
                return Path(shutil.copytree(best, target, dirs_exist_ok=True))
            except (OSError, shutil.Error):
                shutil.rmtree(target, ignore_errors=True)
        time.sleep(0.1)
    return None


def predicted_error(repo: Path, model: Path, test: Path) -> float:
    """Share of the test images whose most probable label is wrong; an image without a label counts as wrong."""
    command = [sys.executable, "-m", "search.predict", str(model), str(test), "--csv"]
    done = subprocess.run(command, cwd=repo, env=environment_of(repo), capture_output=True, text=True, check=True)
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    right = sum(row["label"] == Path(row["path"]).parent.name for row in rows)
    return 1 - right / sum(1 for _ in test.glob("*/*"))


# --- The others -------------------------------------------------------------------------------------------------------


def peer(script: str, words: Sequence[str], part: Split, *, minutes: float, python: str = sys.executable) -> Record:
    """One of the scripts beside this one, which tells each model as it becomes ready and ends after so many minutes."""
    with tempfile.TemporaryDirectory() as folder:
        models, log = Path(folder) / "models.jsonl", Path(folder) / "log"
        command = [python, str(ROOT / "bench" / script), "--train", str(part.train), "--test", str(part.test), *words]
        command += ["--models", str(models), "--seconds", str(60 * minutes), "--started", str(time.monotonic())]
        environment = environment_of(ROOT) | {"FINETUNE_SEARCH_CACHE": f"{folder}/cache"}
        with begun(command, cwd=Path(folder), env=environment, log=log) as (process, started):
            process.wait()
            seconds = time.monotonic() - started
        rows = [json.loads(line) for line in models.read_text().splitlines()] if models.is_file() else []
        found: Record = {"seconds": seconds, "exit_code": process.returncode, "models": rows}
        if process.returncode and not rows:
            raise Failed(f"exit code {process.returncode}: {log.read_text()[-4000:]}")
    return found


# --- Processes --------------------------------------------------------------------------------------------------------


@contextmanager
def begun(
    command: list[str], *, cwd: Path, env: dict[str, str], log: Path
) -> Iterator[tuple[subprocess.Popen[bytes], float]]:
    """A command in a session of its own and when it began; afterwards it has ended, and all of its session."""
    with log.open("wb") as file:
        started = time.monotonic()
        process = subprocess.Popen(
            command, cwd=cwd, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield process, started
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            wait(process, time.monotonic() + END_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait(process: subprocess.Popen[bytes], until: float) -> bool:
    """Waits for its end, but not after `until` (`time.monotonic()`); whether it has ended."""
    try:
        process.wait(max(0.0, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        return False
    return True


def environment_of(repo: Path) -> dict[str, str]:
    """Of a process that imports the packages of the checkout `repo`."""
    return {**os.environ, "PYTHONPATH": str(repo)}


def warm_up(modules: Sequence[str], repos: Sequence[Path]) -> None:
    """Compiles the checkouts, and brings what the methods import into memory, so that no method pays for the first."""
    for repo in repos:
        command = [sys.executable, "-m", "compileall", "-q", "search", "trainables"]
        subprocess.run(command, cwd=repo, check=False)
    subprocess.run([sys.executable, "-W", "ignore", "-c", f"import {', '.join(modules)}"], cwd=ROOT, check=True)
