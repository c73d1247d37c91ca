"""Heat maps: they are hot where the reason for the class lies, in networks of all kinds, and nothing breaks without."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from in_process import run_here
from PIL import Image
from tiny_run import make_run
from torch import nn

from trainables import interpret as command
from trainables.data.layouts import find_images
from trainables.data.presize import presize
from trainables.inference.heat_maps import heat_maps, overlay, read_heat_maps, save_heat_maps
from trainables.inference.interpretation import explain_losses, interpret
from trainables.inference.model_folder import ModelFolder, read_model
from trainables.inference.predictor import load_model
from trainables.network.model import Network, build
from trainables.probe.features import pooled_features
from trainables.recipe import Recipe
from trainables.training.checkpoint import WEIGHTS_FILE, Preprocessing

pytestmark = pytest.mark.usefixtures("cache")

FAMILIES = {  # of all spaces: architecture -> px, for 4 x 4 features
    "resnet18": 128,
    "resnet18d": 128,
    "convnext_nano": 128,
    "tf_efficientnet_lite0": 128,
    "tf_efficientnetv2_b0": 128,
    "mobilenetv4_conv_small": 128,
    "vit_small_patch14_reg4_dinov2": 56,
}
OTHERS = {  # NHWC; tokens without a class token, averaged or pooled by attention; rotary positions; no attention
    "test_mambaout": 128,
    "test_vit2": 64,
    "test_vit3": 64,
    "eva02_tiny_patch14_224": 56,
    "mixer_s32_224": 128,
}
CORNERS = [(0, 0), (0, 1), (1, 0), (1, 1)]
GREY = 128


def noise(rng: np.random.Generator, size: int) -> np.ndarray:
    return rng.integers(100, 156, (size, size, 3), dtype=np.uint8)


def with_square(size: int, corner: tuple[int, int], colour=(230, 40, 40)) -> np.ndarray:
    """Grey, with a square in the middle of one quarter."""
    image = np.full((size, size, 3), GREY, np.uint8)
    top, left = (size // 8 + place * size // 2 for place in corner)
    image[top : top + size // 4, left : left + size // 4] = colour
    return image


def make_model(folder: Path, arch: str, size: int, **settings) -> ModelFolder:
    """A network with random weights that sees only a red square on grey, and a head that tells it from grey alone.

    Grey is 0 for the network, and stays 0 in all features that lie elsewhere, see `make_local`.
    """
    settings = {"pretrained": False, "presize": size, "image_size": size, "precision": "fp32"} | settings
    recipe = Recipe.from_dict(settings | {"arch": arch})
    network = build(recipe, 2)
    network.model.eval().requires_grad_(False)
    make_local(network.model)
    fit_head(network, size)
    safetensors.torch.save_file(network.model.state_dict(), folder / WEIGHTS_FILE)
    mean, std = (GREY / 255,) * 3, (0.5,) * 3
    preprocessing = Preprocessing(presize=size, resize_method="crop", image_size=size, mean=mean, std=std)
    return ModelFolder(path=folder, recipe=recipe, labels=("plain", "square"), preprocessing=preprocessing)


def make_local(model: nn.Module) -> None:
    """Takes away what mixes places, and biases: overlapping kernels keep their centre, attention and the mixing of
    tokens add nothing, but for the attention of a class token to the features of the last block."""
    last = model.blocks[-1].attn if getattr(model, "global_pool", "") == "token" else None
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and module.stride < module.kernel_size:
            height, width = (side // 2 for side in module.kernel_size)
            centre = module.weight[:, :, height, width].clone()
            module.weight.zero_()[:, :, height, width] = centre
        elif name.endswith("attn") and module is not last:
            module.proj.weight.zero_()
        elif name.endswith("mlp_tokens"):
            module.fc2.weight.zero_()
        if getattr(module, "bias", None) is not None:
            module.bias.zero_()
    if isinstance(getattr(model, "pos_embed", None), nn.Parameter):
        model.pos_embed.zero_()


def fit_head(network: Network, size: int) -> None:
    """Sets the weights of the head to the direction from the features of grey to those of squares."""
    images = torch.as_tensor(np.stack([with_square(size, corner) for corner in CORNERS])).permute(0, 3, 1, 2)
    with pooled_features(network) as found:
        network.model((images.float() - GREY) / 127.5)
        network.model(torch.zeros(1, 3, size, size))
    squares, grey = found
    direction, head = squares.mean(0) - grey[0], network.classifier
    if isinstance(head, nn.Sequential):  # mlp
        norm, first, last = head[0], head[2], head[6]
        norm.running_mean.copy_(grey[0])
        first.weight.zero_()[0] = direction
        last.weight.zero_()[:, 0] = torch.tensor([-1.0, 1.0])
    else:
        head.weight.copy_(torch.stack([-direction, direction]))
        head.bias.zero_()


def hottest_quarters(maps: np.ndarray) -> list[tuple[int, int]]:
    """Where each map (side, side) has its largest value."""
    side = maps.shape[-1]
    places = [np.unravel_index(each.argmax(), each.shape) for each in maps]
    return [(int(2 * row // side), int(2 * column // side)) for row, column in places]


# --- The place --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", [*FAMILIES, *OTHERS])
def test_the_hottest_place_is_where_the_object_is_whatever_the_network(tmp_path, arch):
    size = (FAMILIES | OTHERS)[arch]
    model = make_model(tmp_path, arch, size)
    maps = heat_maps(model, [with_square(size, corner) for corner in CORNERS], np.ones((4, 1), int), device="cpu")
    assert maps.shape == (4, 1, 4, 4) and maps.dtype == np.float32
    assert hottest_quarters(maps[:, 0]) == CORNERS and maps.max(axis=(1, 2, 3)).tolist() == [1, 1, 1, 1]
    for heat, (top, left) in zip(maps[:, 0], CORNERS, strict=True):
        heat[2 * top : 2 * top + 2, 2 * left : 2 * left + 2] = 0
    assert np.abs(maps).max() < 1e-3  # nothing is hot elsewhere


@pytest.mark.parametrize("settings", [{"head": "mlp", "hidden": 16}, {"concat_pool": True}])
def test_so_it_is_behind_every_head(tmp_path, settings):
    model = make_model(tmp_path, "test_resnet", 128, **settings)
    maps = heat_maps(model, [with_square(128, corner) for corner in CORNERS], np.ones((4, 1), int), device="cpu")
    assert hottest_quarters(maps[:, 0]) == CORNERS


@pytest.fixture(scope="module")
def trained(cache, tmp_path_factory) -> Path:
    """The folder of a run whose model has learned to tell squares by their colour, wherever they are."""
    root, rng = tmp_path_factory.mktemp("squares"), np.random.default_rng(0)
    for name, colour in {"blue": (40, 40, 230), "red": (230, 40, 40)}.items():
        (root / "data" / name).mkdir(parents=True)
        for i in range(60):
            square = with_square(64, CORNERS[i % 4], colour)
            pixels = np.where(square == GREY, noise(rng, 64), square)
            Image.fromarray(pixels).save(root / "data" / name / f"{i}_{i % 4}.png")
    return make_run(root / "run", root / "data", presize=64, image_size=64, epochs=6)


def test_a_trained_model_looks_at_what_tells_the_classes_apart(trained):
    images = presize(find_images(trained.parent / "data"), 64)
    valid = images.split(seed=3)[1]
    found = interpret(read_model(trained / "best"), images, valid, device="cpu")
    assert found.error_rate == 0
    maps = heat_maps(read_model(trained / "best"), [images[int(i)] for i in valid], found.labels[:, None])
    places = [CORNERS[int(path[-5])] for path in found.paths]
    assert np.mean([a == b for a, b in zip(hottest_quarters(maps[:, 0]), places, strict=True)]) > 0.9


# --- The numbers ------------------------------------------------------------------------------------------------------


def test_where_the_head_averages_features_it_is_grad_cam(tmp_path):
    model = make_model(tmp_path, "test_resnet", 128)
    rng = np.random.default_rng(0)
    images, classes = [noise(rng, 128) for _ in range(3)], np.array([[0, 1], [1, 0], [0, 1]])
    network = load_model(model).eval()
    with torch.inference_mode():
        batch = (torch.as_tensor(np.stack(images)).permute(0, 3, 1, 2).float() - GREY) / 127.5
        features = network.forward_features(batch)  # (3, channels, 4, 4)
        weights = network.fc.weight - network.fc.weight.mean(dim=0)  # the gradients of the logits, but for a factor
        expected = torch.einsum("nkhw,nmk->nmhw", features, weights[torch.as_tensor(classes)]).clamp(min=0).numpy()
    expected /= expected.max(axis=(1, 2, 3), keepdims=True)
    assert heat_maps(model, images, classes, device="cpu") == pytest.approx(expected, abs=1e-4)


def test_images_beyond_one_batch_have_the_maps_of_their_own_classes(tmp_path):
    model = make_model(tmp_path, "test_resnet", 64)
    rng = np.random.default_rng(0)
    images, classes = [noise(rng, 64) for _ in range(70)], rng.integers(0, 2, (70, 2))
    alone = heat_maps(model, images[64:], classes[64:], device="cpu")
    assert heat_maps(model, images, classes, device="cpu")[64:] == pytest.approx(alone, abs=1e-4)


def test_a_class_that_nothing_speaks_for_has_a_cold_map(tmp_path):
    model = make_model(tmp_path, "test_resnet", 64)
    weights = safetensors.torch.load_file(model.weights)
    safetensors.torch.save_file(weights | {"fc.weight": 0 * weights["fc.weight"]}, model.weights)
    maps = heat_maps(model, [noise(np.random.default_rng(0), 64)], np.array([[0, 1]]), device="cpu")
    assert not maps.any() and maps.shape == (1, 2, 2, 2)


def test_a_picture_glows_where_its_map_is_hot_and_is_itself_where_it_is_cold():
    view = np.full((64, 64, 3), 90, np.uint8)
    heat = np.zeros((4, 4), np.float32)
    heat[0, 3] = 1
    picture = overlay(view, heat)
    assert np.abs(picture[32:, :32].astype(int) - 90).max() <= 1
    red, green, blue = picture[4, 60].astype(int)
    assert red > 150 and green > 150 and blue < red
    assert picture.shape == view.shape and picture.dtype == np.uint8


def test_a_file_holds_the_maps_of_each_image_whatever_its_name(tmp_path):
    maps = np.random.default_rng(0).random((2, 2, 3, 3), np.float32)
    save_heat_maps(tmp_path / "maps.json", ["cat/0.jpg", "d\udcffg/1.jpg"], maps)
    found, problem = read_heat_maps(tmp_path / "maps.json")
    assert list(found) == ["cat/0.jpg", "d\udcffg/1.jpg"] and problem == ""
    assert np.stack(list(found.values())) == pytest.approx(maps, abs=6e-4)
    save_heat_maps(tmp_path / "maps.json", ["cat/0.jpg"], None, "no such network")
    assert read_heat_maps(tmp_path / "maps.json") == ({}, "no such network")
    (tmp_path / "maps.json").write_text('{"images": [{"path": "0.jpg"}]}')
    with pytest.raises(ValueError, match=r"maps.json is damaged"):
        read_heat_maps(tmp_path / "maps.json")


# --- The command ------------------------------------------------------------------------------------------------------


def test_the_command_shows_each_top_loss_beside_its_maps(trained, tmp_path):
    data, out = trained.parent / "data", tmp_path / "out"
    child = run_here(command.main, "--model", trained / "best", "--data", data, "--out", out, "--top", "3")
    assert child.returncode == 0, child.stderr
    assert "no heat maps" not in child.stdout
    images, model = presize(find_images(data), 64), read_model(trained / "best")
    found = interpret(model, images, images.split(seed=3)[1])
    maps, problem = read_heat_maps(out / "heat_maps.json")
    assert list(maps) == [found.paths[i] for i in found.top_losses(3)] and problem == ""
    assert np.stack(list(maps.values())) == pytest.approx(explain_losses(found, images, model, 3), abs=6e-4)
    with Image.open(out / "top_losses.png") as picture:
        assert picture.width > 6 * 224 and 2 * 224 < picture.height < 3 * 224 + 250  # two losses in a row


def test_a_network_without_a_map_costs_the_maps_and_nothing_else(tmp_path, data):
    run = make_run(tmp_path / "run", data, epochs=1)  # at 32 px its features are 1 x 1
    child = run_here(command.main, "--model", run / "best", "--data", data, "--out", tmp_path / "out")
    assert child.returncode == 0, child.stderr
    reason = "the features of test_resnet are 96 x 1 x 1, and no square map of 2 x 2 or more"
    assert f"no heat maps: {reason}" in child.stdout
    assert json.loads((tmp_path / "out/heat_maps.json").read_text()) == {"images": [], "problem": reason}
    assert (tmp_path / "out/top_losses.png").is_file()
    with pytest.raises(ValueError, match="96 x 1 x 1"):
        images = presize(find_images(data), 40)
        explain_losses(interpret(read_model(run / "best"), images, range(9)), images, read_model(run / "best"), 3)
