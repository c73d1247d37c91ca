"""Where images and weights come from: a path, a URI, or a known data set, the same on every node."""

import shutil
from argparse import Namespace
from pathlib import Path

import pytest
from tiny_run import draw_images

from search.prepare import check_weights, find_data, pin
from search.space import load_space
from trainables.data import DataError, find_images
from trainables.source import folder_of, images_digest, images_of
from trainables.weights import WeightsError


@pytest.fixture
def birds(cache, tmp_path) -> Path:
    return draw_images(tmp_path / "birds", each=4)


def test_a_path_and_its_uri_are_the_same_images(birds):
    by_path, by_uri = images_of(str(birds)), images_of(birds.as_uri())
    assert by_uri.root != by_path.root
    assert images_digest(by_uri) == images_digest(by_path)


def test_a_node_with_other_images_at_that_path_is_found_out(birds):
    digest = images_digest(find_images(birds))
    assert images_of(str(birds), digest).labels
    (birds / "wren" / "3.jpg").rename(birds / "robin" / "30.jpg")
    with pytest.raises(DataError, match=r"on this node .* are not those that the search was started with"):
        images_of(str(birds), digest)


def test_a_copy_with_other_times_elsewhere_is_the_same(birds, tmp_path):
    shutil.copytree(birds, tmp_path / "copy" / "birds", copy_function=shutil.copyfile)
    assert images_digest(find_images(tmp_path / "copy" / "birds")) == images_digest(find_images(birds))


def test_a_search_that_goes_on_gets_what_it_began_with(birds):
    args = Namespace(data=birds.as_uri(), weights=None)
    found = find_data(load_space("quickstart"), args)
    pin(args)
    assert "#sha256=" in args.data
    shutil.rmtree(birds)  # the cache has it
    assert images_digest(find_data(load_space("quickstart"), args)) == images_digest(found)


def test_weights_by_uri_are_looked_for_where_they_were_fetched(cache, tmp_path):
    space = load_space("pets").with_settings(["arch=resnet18.tv_in1k,resnet34.tv_in1k"])
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "resnet18.tv_in1k.safetensors").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"resnet34\.tv_in1k"):
        check_weights(space, Namespace(weights=folder.as_uri()))
    assert [path.name for path in folder_of(folder.as_uri()).iterdir()] == ["resnet18.tv_in1k.safetensors"]
