"""Where images and weights come from: a path, a URI, or a known data set, the same on every node."""

import shutil
from pathlib import Path
from socket import gethostname

import pytest
from tiny_run import draw_images

from search.options.preparation import check_weights, find_data, pinned
from search.options.search_options import SearchOptions
from search.spaces.space import load_space
from trainables.data.labelled_images import DataError
from trainables.data.layouts import find_images
from trainables.data.source import folder_of, images_digest, images_of, pinned_source
from trainables.network.pretrained_weights import WeightsError


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
    with pytest.raises(DataError, match=rf"on the node {gethostname()} .* are not those that the search started with"):
        images_of(str(birds), digest)


def test_a_copy_with_other_times_elsewhere_is_the_same(birds, tmp_path):
    shutil.copytree(birds, tmp_path / "copy" / "birds", copy_function=shutil.copyfile)
    assert images_digest(find_images(tmp_path / "copy" / "birds")) == images_digest(find_images(birds))


def test_a_search_that_goes_on_gets_what_it_began_with(birds):
    options = SearchOptions(space="quickstart", data=birds.as_uri())
    found = find_data(load_space("quickstart"), options.data)
    options = pinned(options)
    assert "#sha256=" in options.data
    shutil.rmtree(birds)  # the cache has it
    assert images_digest(find_data(load_space("quickstart"), options.data)) == images_digest(found)


def test_weights_by_uri_are_looked_for_where_they_were_fetched(cache, tmp_path):
    space = load_space("pets").with_settings(["arch=resnet18.tv_in1k,resnet34.tv_in1k"])
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "resnet18.tv_in1k.safetensors").write_bytes(b"")
    with pytest.raises(WeightsError, match=rf"--weights {folder.as_uri()} has .* resnet34\.tv_in1k \(looked for"):
        check_weights(space, folder.as_uri())
    check_weights(space.with_settings(["pretrained=false"]), folder.as_uri())  # needs none
    assert [path.name for path in folder_of(folder.as_uri()).iterdir()] == ["resnet18.tv_in1k.safetensors"]


def test_an_image_that_was_cut_short_on_one_node_is_found_out_though_its_name_is_right(birds):
    digest = images_digest(find_images(birds))
    photo = birds / "wren" / "3.jpg"
    photo.write_bytes(photo.read_bytes()[:-100])
    with pytest.raises(DataError, match="names, classes or file sizes differ"):
        images_of(str(birds), digest)


def test_the_level_of_the_classes_travels_with_a_path_and_with_a_uri(birds):
    for name in ("left", "right"):
        shutil.copytree(birds, birds.parent / "views" / name)
    source = (birds.parent / "views").as_uri()
    for given in (f"{birds.parent}/views/*/*", f"{source}/*/*", pinned_source(f"{source}/*/*")):
        found = images_of(given)
        assert (found.num_classes, len(found.paths)) == (3, 24)
    assert images_of(f"{birds.parent}/views/*").classes == ("left", "right")
