"""The data sets that a space can name: where they lie, and how they are drawn or downloaded.

Imports no torch: the search driver uses this module. Only a download needs torchvision, in a process of its own.
"""

import http.client
import logging
import os
import socket
import sys
import tarfile
import threading
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trainables.data.labelled_images import DataError
from trainables.data.layouts import count_images
from trainables.system.cache import cache_dir, locked
from trainables.system.new_process import run_module

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 20.0  # how long a server may be silent, before and during a download


@dataclass(frozen=True, kw_only=True)
class KnownDataset:
    """A data set that a space can name: its content and its origin."""

    title: str
    num_images: int = 0
    url: str = ""
    """What torchvision downloads first; empty if the images are drawn."""
    source: str = ""
    """The official page."""
    files: str = ""
    """Where the images lie in the data set's folder."""
    archives: tuple[str, ...] = ()
    """Where torchvision puts the archives in the data set's folder."""


DATASETS: dict[str, KnownDataset] = {
    "quickstart": KnownDataset(title="the drawn quickstart images"),
    "pets": KnownDataset(
        title="Oxford-IIIT Pet",
        num_images=7390,
        url="https://www.robots.ox.ac.uk/~vgg/data/pets/data/images.tar.gz",
        source="https://www.robots.ox.ac.uk/~vgg/data/pets/",
        files="oxford-iiit-pet/images/<breed>_<number>.jpg",
        archives=("oxford-iiit-pet/images.tar.gz", "oxford-iiit-pet/annotations.tar.gz"),
    ),
    "imagenette": KnownDataset(
        title="Imagenette (320 px)",
        num_images=13394,
        url="https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-320.tgz",
        source="https://github.com/fastai/imagenette",
        files="imagenette2-320/train/<class>/*.JPEG and imagenette2-320/val/<class>/*.JPEG",
        archives=("imagenette2-320.tgz",),
    ),
}


def locate(name: str) -> Path:
    """The folder of a known data set, which may not exist yet."""
    if name not in DATASETS:
        raise DataError(f"There is no known data set {name!r}. Expected one of {', '.join(DATASETS)}.")
    return cache_dir() / "data" / name


def prepare(name: str, *, download: bool = True) -> Path:
    """The folder of a known data set for `find_images`; draws or downloads the data set if it is missing.

    One process of a node downloads while others wait. Only a download imports torchvision.
    """
    root = locate(name)
    try:
        if name == "quickstart":
            from trainables.data import quickstart_images

            return quickstart_images.draw(root)  # has its own lock and its own marker
        settled = _marker(root).exists() or (root.exists() and not os.access(root, os.W_OK))
        if settled and count_images(root) >= DATASETS[name].num_images:
            return root
        root.mkdir(parents=True, exist_ok=True)
        with locked(root.with_name(f".{name}.lock"), f"for another process that prepares {DATASETS[name].title}"):
            if count_images(root) < DATASETS[name].num_images:
                if not download:
                    raise _no_data(name, "it is missing and downloading is off")
                _download(name, root)
            _marker(root).touch()
    except DataError:
        raise
    except (OSError, ValueError) as error:
        raise DataError(
            f"Cannot prepare {DATASETS[name].title} in {root}: {error}. Make room or make it writable, or set "
            "FINETUNE_SEARCH_CACHE to another folder."
        ) from error
    return root


def prepare_in_subprocess(name: str) -> Path:
    """`prepare` for processes that must not import torch: a child process downloads and shows progress."""
    try:
        return prepare(name, download=False)
    except DataError:
        if name not in DATASETS or not DATASETS[name].url:
            raise
    child = run_module("trainables.data.datasets", name)
    if child.returncode == 0:
        return locate(name)
    if child.returncode == 2 and (lines := child.stdout.strip().splitlines()):
        raise DataError(lines[-1])
    raise _no_data(name, f"the process that downloads it ended with exit code {child.returncode}")


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m trainables.data.datasets NAME` prepares a data set; the last line is its folder, or the error."""
    arguments = sys.argv[1:] if arguments is None else arguments
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        if len(arguments) != 1:
            raise DataError(
                f"Expected the name of one data set ({', '.join(DATASETS)}), got {len(arguments)} arguments."
            )
        print(prepare(arguments[0]))
    except DataError as error:
        print(" ".join(str(error).split()))
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _download(name: str, root: Path) -> None:
    dataset = DATASETS[name]
    archives = [root / archive for archive in dataset.archives]
    if not all(archive.exists() for archive in archives):
        # Before torchvision, which takes seconds to import and sets no timeout.
        if problem := _unreachable(dataset.url):
            raise _no_data(name, f"downloading {dataset.url} failed: {problem}")
        logger.info("downloading %s from %s to %s", dataset.title, dataset.source, root)
    from torchvision import datasets
    from torchvision.datasets.utils import extract_archive

    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(CONNECT_SECONDS)
    try:
        if name == "pets":
            datasets.OxfordIIITPet(root, download=True)  # one archive has the images of both splits
        else:
            datasets.Imagenette(root, size="320px", download=True)
        if count_images(root) < dataset.num_images and archives[0].exists():
            extract_archive(archives[0])  # an earlier run was killed while it unpacked
    except (OSError, RuntimeError, EOFError, http.client.HTTPException, tarfile.TarError) as error:
        raise _no_data(name, f"downloading {dataset.url} failed: {error}") from error
    finally:
        socket.setdefaulttimeout(timeout)
    if count_images(root) < dataset.num_images:
        raise _no_data(
            name, "its folder is incomplete, and torchvision does not replace an existing one: remove it first"
        )
    for archive in archives:  # they are unpacked now
        archive.unlink(missing_ok=True)


def _unreachable(url: str) -> str:
    """Why `url` does not answer within CONNECT_SECONDS, or "". In a thread, since a DNS lookup has no timeout."""
    answers = [f"no answer within {CONNECT_SECONDS:.0f} s"]

    def ask() -> None:
        request = urllib.request.Request(url, method="HEAD", headers={"User-Agent": "finetune-search"})
        try:
            urllib.request.urlopen(request, timeout=CONNECT_SECONDS).close()
            answers.append("")
        except urllib.error.HTTPError:  # which is an answer
            answers.append("")
        except (OSError, http.client.HTTPException) as error:
            answers.append(str(getattr(error, "reason", error)) or type(error).__name__)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(CONNECT_SECONDS)
    return answers[-1]


def _no_data(name: str, problem: str) -> DataError:
    dataset, root = DATASETS[name], locate(name)
    return DataError(
        f"The data set {dataset.title} is not available: {problem}. {count_images(root)} of {dataset.num_images} "
        f"images were found as {root}/{dataset.files}. Give another copy, or your own images, with --data DIR; or "
        f"download it by hand from {dataset.source} and unpack it so that the images lie as above; or try --space "
        "quickstart, which draws its images instead of downloading them."
    )


def _marker(root: Path) -> Path:
    return root / ".complete"


if __name__ == "__main__":
    sys.exit(main())
