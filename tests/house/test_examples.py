"""The examples in docstrings run, on tiny data: their network is small, their images lie in the folder they run in."""

import doctest
import shutil
from pathlib import Path

import pytest
from tiny_run import draw_images, make_run

from trainables.data.layouts import find_images
from trainables.data.presize import presize
from trainables.inference.model_folder import read_model
from trainables.inference.predictor import Predictor
from trainables.recipe import Recipe
from trainables.training.fine_tune import FineTune

NAMES = {each.__name__: each for each in (FineTune, Path, Predictor, Recipe, find_images, presize, read_model)}
"""What the examples use besides Python itself."""
SMALL = 'arch="test_vit", pretrained=False, presize=48, image_size=32, batch_size=8'


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """birds/, exported/ and cat.jpg, which the examples name."""
    folder = tmp_path_factory.mktemp("examples")
    data = draw_images(folder / "birds", each=8)
    make_run(folder / "run", data)
    (folder / "run" / "best").rename(folder / "exported")
    shutil.copy(next(data.rglob("*.jpg")), folder / "cat.jpg")
    return folder


@pytest.mark.parametrize("documented", [Recipe, presize, FineTune, Predictor], ids=lambda each: each.__name__)
def test_the_example_in_a_docstring_runs(folder, monkeypatch, search_cache, documented):
    monkeypatch.chdir(folder)
    text = documented.__doc__.replace('arch="resnet18.a1_in1k"', SMALL)
    example = doctest.DocTestParser().get_doctest(text, dict(NAMES), documented.__name__, None, None)
    assert example.examples
    problems: list[str] = []
    doctest.DocTestRunner(verbose=False).run(example, out=problems.append)
    assert not problems, "".join(problems)
