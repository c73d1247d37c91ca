"""The learning-rate finder as a command, and how its suggestions narrow a search."""

import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from in_process import run_here
from PIL import Image
from tiny_run import draw_images

from search import lr_find
from search.spaces.space import Range
from trainables.data.layouts import find_images
from trainables.data.presize import presize
from trainables.recipe import Recipe
from trainables.training.lr_finder import suggestions

TINY = [
    "arch=test_resnet",
    "pretrained=false",
    "presize=40",
    "image_size=32",
    "batch_size=8",
    "freeze_epochs=1",
    "epochs=1",
]
RECIPE = Recipe(arch="test_resnet", pretrained=False, presize=40, image_size=32, batch_size=8, freeze_epochs=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return draw_images(tmp_path_factory.mktemp("lr_find") / "data")


@pytest.fixture
def command(data, search_cache, tmp_path):
    def run(*arguments: object) -> subprocess.CompletedProcess:
        settings = [word for text in TINY for word in ("--set", text)]
        return run_here(lr_find.main, "--space", "pets", "--data", data, *settings, *arguments, cwd=tmp_path)

    return run


@pytest.mark.slow
@pytest.mark.parametrize(("options", "stage"), [((), "frozen"), (("--unfrozen",), "unfrozen")])
def test_the_command_draws_the_curve_and_prints_four_suggestions(command, tmp_path, options, stage):
    ended = command(*options)
    assert ended.returncode == 0, ended.stderr
    rates = dict(re.findall(r"^(valley|steep|minimum|slide) +(\S+)$", ended.stdout, re.MULTILINE))
    assert len(rates) == 4
    assert all(1e-9 < float(rate) < 10 for rate in rates.values())
    setting = "lr_max_frozen" if stage == "frozen" else "lr_max"
    assert f"--set {setting}=" in ended.stdout
    picture = np.asarray(Image.open(tmp_path / "results" / f"lr_find-test_resnet-{stage}.png").convert("RGB"))
    assert min(picture.shape[:2]) > 300
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 50


@pytest.mark.slow
def test_a_recipe_without_a_frozen_stage_is_tested_unfrozen(command):
    ended = command("--set", "freeze_epochs=0", "--out", "curve.png")
    assert ended.returncode == 0, ended.stderr
    assert "test_resnet, unfrozen: 100 steps" in ended.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--arch", "resnet7"), "resnet7"),
        (("--set", "epochs=many"), "is not a whole number"),
        (("--num-it", "12"), "the curve has only"),
    ],
)
def test_what_cannot_be_tested_is_told(command, options, message):
    ended = command(*options)
    assert ended.returncode == 2
    assert message in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_curve_that_cannot_be_written_is_refused_before_any_work(command, tmp_path):
    (tmp_path / "taken").touch()
    ended = command("--out", "taken/curve.png")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: ") and "--out" in ended.stderr and "Traceback" not in ended.stderr


@pytest.mark.slow
def test_both_stages_are_tested_in_one_training(data, search_cache):
    curves = lr_find.find(RECIPE, presize(find_images(data), 40), None, ["frozen", "unfrozen"], num_it=60)
    assert list(curves) == ["frozen", "unfrozen"]
    for curve in curves.values():
        assert set(suggestions(curve, 60)) == {"valley", "steep", "minimum", "slide"}
    assert not np.array_equal(curves["frozen"].losses, curves["unfrozen"].losses)


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ([2e-3, 8e-3, 4e-3], "0.001..0.016"),
        ([1e-4, 8e-3], "0.0005..0.016"),  # the space's lower bound
        ([1e-7], "0.0005..0.001"),  # all below the space: its lowest rates
        ([5.0], "0.01..0.02"),
    ],
)
def test_the_bounds_lie_around_the_suggestions_and_within_the_space(rates, expected):
    assert lr_find._around(rates, Range(5e-4, 2e-2, log=True)) == expected


def test_rates_that_round_to_one_are_a_single_value_that_a_search_takes():
    assert lr_find._range(1.0001e-3, 1.0002e-3) == "0.001"
