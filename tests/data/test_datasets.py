"""Known data sets as a user meets them: drawn, placed by hand or downloaded. Files are empty: only names matter."""

import dataclasses
import functools
import hashlib
import http.server
import subprocess
import tarfile
import threading
import time
from pathlib import Path

import pytest
from filelock import FileLock

from trainables.data import datasets
from trainables.data.datasets import DATASETS, prepare, prepare_in_subprocess
from trainables.data.labelled_images import DataError, fingerprint
from trainables.data.layouts import find_images

DEAD_URL = "http://127.0.0.1:9/images.tar.gz"  # nothing listens on the discard port


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("FINETUNE_SEARCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def fill(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def test_an_unknown_data_set_is_refused_with_the_known_ones():
    with pytest.raises(DataError, match=r"'cars'.*quickstart, pets, imagenette"):
        prepare_in_subprocess("cars")


@pytest.fixture
def small_pets(monkeypatch):
    """The Pets data set as if it had four images, so that tests can place all of it."""

    def configure(url: str) -> None:
        monkeypatch.setitem(DATASETS, "pets", dataclasses.replace(DATASETS["pets"], num_images=4, url=url))

    configure(DEAD_URL)
    return configure


BREEDS = [f"images/{breed}_{n}.jpg" for breed in ("pug", "boxer") for n in (1, 2)]


def test_without_network_the_error_says_what_was_tried_where_to_put_it_and_the_ways_on(cache, monkeypatch):
    # Sends the child process to a dead proxy: a real failure of the network, at once.
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    started = time.monotonic()
    with pytest.raises(DataError) as caught:
        prepare_in_subprocess("pets")
    assert time.monotonic() - started < 20
    message = str(caught.value)
    for part in (
        "https://www.robots.ox.ac.uk/~vgg/data/pets/data/images.tar.gz failed: [Errno 111] Connection refused",
        f"0 of 7390 images were found as {cache}/data/pets/oxford-iiit-pet/images/<breed>_<number>.jpg",
        "--data DIR",
        "by hand from https://www.robots.ox.ac.uk/~vgg/data/pets/",
        "--space quickstart",
    ):
        assert part in message
    assert "\n" not in message and "Traceback" not in message


def test_a_server_that_never_answers_is_given_up(small_pets, monkeypatch):
    monkeypatch.setattr(datasets, "CONNECT_SECONDS", 0.5)
    with http.server.HTTPServer(
        ("127.0.0.1", 0), http.server.BaseHTTPRequestHandler
    ) as silent:  # accepts, never serves
        small_pets(f"http://127.0.0.1:{silent.server_port}/images.tar.gz")
        with pytest.raises(DataError, match=r"timed out|no answer within"):
            prepare("pets")


def test_a_data_set_that_was_placed_by_hand_is_used_without_network(cache, small_pets):
    fill(cache / "data/pets", *BREEDS[:3])
    with pytest.raises(DataError, match="3 of 4 images were found"):
        prepare("pets", download=False)
    fill(cache / "data/pets", *BREEDS)
    assert prepare_in_subprocess("pets") == cache / "data/pets"
    assert len(find_images(prepare("pets")).paths) == 4


def test_a_second_process_waits_for_the_first_to_download_and_says_so(cache, small_pets, caplog):
    root = cache / "data/pets"
    root.mkdir(parents=True)
    caplog.set_level("INFO")
    locked = threading.Event()

    def first() -> None:
        with FileLock(root.with_name(".pets.lock")):
            locked.set()
            while "waiting" not in caplog.text:
                time.sleep(0.01)
            fill(root, *BREEDS)

    thread = threading.Thread(target=first, daemon=True)
    thread.start()
    assert locked.wait(10)
    assert prepare("pets") == root
    thread.join()
    assert "waiting for another process that prepares Oxford-IIIT Pet" in caplog.text


def test_a_failing_child_process_is_an_error_and_not_a_silent_success(small_pets, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], -9, stdout=""))
    with pytest.raises(DataError, match="exit code -9"):
        prepare_in_subprocess("pets")


def test_download_unpacks_checks_and_repairs_a_half_unpacked_data_set(tmp_path, cache, small_pets, monkeypatch):
    torchvision = pytest.importorskip("torchvision")
    pets = torchvision.datasets.OxfordIIITPet
    assert pets._RESOURCES[0][0] == "https://www.robots.ox.ac.uk/~vgg/data/pets/data/images.tar.gz"
    assert torchvision.datasets.Imagenette._ARCHIVES["320px"][0] == DATASETS["imagenette"].url
    served = tmp_path / "served"
    fill(served, *BREEDS, "annotations/trainval.txt")
    for name in ("images", "annotations"):
        with tarfile.open(served / f"{name}.tar.gz", "w:gz") as archive:
            archive.add(served / name, arcname=name)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(served))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_port}"
        small_pets(f"{base}/images.tar.gz")
        sums = {
            name: hashlib.md5((served / f"{name}.tar.gz").read_bytes()).hexdigest()
            for name in ("images", "annotations")
        }
        monkeypatch.setattr(pets, "_RESOURCES", [(f"{base}/{name}.tar.gz", "0" * 32) for name in sums])
        with pytest.raises(DataError, match=r"corrupted.*0 of 4 images"):
            prepare("pets")
        monkeypatch.setattr(pets, "_RESOURCES", [(f"{base}/{name}.tar.gz", md5) for name, md5 in sums.items()])
        assert len(find_images(prepare("pets")).paths) == 4
        server.shutdown()
    root = cache / "data/pets/oxford-iiit-pet"
    assert not list(root.glob("*.tar.gz"))  # 800 MB that nobody needs any more
    # Killed while it unpacked: the archives are there, the images are not all.
    (root / BREEDS[0]).unlink()
    for name in ("images", "annotations"):
        (served / f"{name}.tar.gz").rename(root / f"{name}.tar.gz")
    assert len(find_images(prepare("pets")).paths) == 4


@pytest.mark.slow
def test_the_quickstart_set_is_drawn_here_and_once():
    root = prepare_in_subprocess("quickstart")
    found = find_images(root)
    assert found.layout == "Oxford Pets" and found.num_classes >= 12
    before = fingerprint(found)
    assert fingerprint(find_images(prepare_in_subprocess("quickstart"))) == before
