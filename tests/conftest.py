"""Fixtures that several test files share, such as a small set of drawn images and a Ray; and who runs which tests."""

import ast
import functools
import os
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainables.system.allocator import keep_freed_memory

# Before torch is imported: threads that spin while they wait would take the cores from the other processes of a test.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Ray lets all else on the machine go before its workers. What a test waits for must not wait for that.
os.environ.setdefault("RAY_worker_niceness", "0")
# How often Ray Train looks whether workers are lost or have ended; 2 s without it.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")

keep_freed_memory()  # as the commands do

# What hypothesis remembers does not belong into the repository.
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", f"{tempfile.gettempdir()}/hypothesis")

COLOURS = {"amber": (220, 40, 40), "fern": (40, 220, 40), "lake": (40, 40, 220)}
"""Class name -> colour of nearly all of its pixels; label i is the class whose channel i is the largest."""


@pytest.fixture(scope="session")
def search_cache(tmp_path_factory) -> Path:
    """FINETUNE_SEARCH_CACHE for the whole session, child processes included."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FINETUNE_SEARCH_CACHE", str(cache))
        yield cache


@pytest.fixture(scope="session")
def colour_folder(tmp_path_factory) -> Path:
    """36 images in the Pets layout, 12 for each of 3 classes, 64 px or a little more; the colour tells the class."""
    root = tmp_path_factory.mktemp("colours")
    (root / "images").mkdir()
    rng = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        for n in range(12):
            height, width = (64, 64 + n) if n % 2 else (64 + n, 64)
            image = np.clip(rng.normal(colour, 12, (height, width, 3)), 0, 255).astype(np.uint8)
            top, left = rng.integers(0, 48, 2)
            image[top : top + 16, left : left + 16] = 128
            Image.fromarray(image).save(root / "images" / f"{name}_{n}.jpg", quality=95)
    return root


@pytest.fixture(scope="session")
def colour_images(colour_folder, search_cache):
    """The presized images of `colour_folder`, 48 px."""
    from trainables.data.layouts import find_images
    from trainables.data.presize import presize

    return presize(find_images(colour_folder), 48)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """FINETUNE_SEARCH_CACHE for one file's tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FINETUNE_SEARCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def data(cache, tmp_path_factory) -> Path:
    """Drawn birds as class folders, to make a tiny run of."""
    from tiny_run import draw_images  # imports torch

    return draw_images(tmp_path_factory.mktemp("data") / "birds")


@pytest.fixture(scope="session")
def ray_head(search_cache) -> str:
    """The address of a Ray that searches connect to with `--address`, where its start and its end are not the point.

    Two CPUs, whatever the machine has; without a dashboard, which takes as long to start as all the rest.
    """
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    yield cluster.address
    cluster.shutdown()


@pytest.fixture
def no_new_process(monkeypatch):
    """What labels images in a process of its own does it in this one, which has torch already."""
    for module in ("search.exporting.verification", "trainables.system.new_process"):
        monkeypatch.setattr(f"{module}.in_new_process", lambda function, *arguments: function(*arguments))


@pytest.fixture(scope="module")
def one_thread():
    """torch computes with one thread, so that sums have one order."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.hookimpl(tryfirst=True)  # before anything is deselected
def pytest_collection_modifyitems(items):
    """What starts Ray or a browser, compares with fastai or measures is slow. The slowest come first, so that the
    processes end together."""
    for item in items:
        measures = item.path.parent.name == "benchmarks"
        if measures or any(item.get_closest_marker(name) for name in ("ray", "oracle", "browser")):
            item.add_marker("slow")
    items.sort(key=lambda item: (not item.get_closest_marker("slow"), item.path.parent.name != "whole"))


@functools.cache
def tests_with_ray(file: Path) -> set[str]:
    """By the file's text: the process that shares the tests out knows no more of them than their names."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    tests = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    marked = ast.unparse([node for node in tree.body if isinstance(node, ast.Assign)])
    if re.search(r"^pytestmark = .*pytest\.mark\.ray\b", marked, re.MULTILINE):
        return {test.name for test in tests}
    return {test.name for test in tests if "pytest.mark.ray" in map(ast.unparse, test.decorator_list)}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """`pytest -n 2`: one process begins with the tests that start Ray, the other one with the rest, each file by file.
    Which has none left helps the other."""
    from xdist.scheduler import LoadFileScheduling

    class RayInOneProcess(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file, _, test = nodeid.partition("::")
            return f"ray: {file}" if test.partition("[")[0] in tests_with_ray(config.rootpath / file) else file

        def _assign_work_unit(self, node) -> None:
            with_ray = node is next(iter(self.assigned_work))
            fitting = (scope for scope in self.workqueue if scope.startswith("ray: ") == with_ray)
            self.workqueue.move_to_end(next(fitting, next(iter(self.workqueue))), last=False)
            super()._assign_work_unit(node)

    config.option.loadscopereorder = False  # as sorted above
    return RayInOneProcess(config, log)


def pytest_addoption(parser):
    parser.addoption("--screenshots", type=Path, metavar="DIR", help="keep the browser tests' pictures here")


@pytest.fixture(scope="session")
def screenshots(request, tmp_path_factory) -> Path:
    """The folder for a browser's pictures."""
    folder = request.config.getoption("--screenshots") or tmp_path_factory.mktemp("screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder
