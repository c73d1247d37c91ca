"""Architectures of all kinds: they train, or a sentence says before the search why not."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from search import check
from search.spaces.architectures import known, to_try
from search.spaces.space import load_space
from trainables import finetune
from trainables.network import architecture
from trainables.network.architecture import require_trainable, try_out, untrainable
from trainables.recipe import Recipe
from trainables.training.fine_tune import FineTune

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = {
    "two heads, no groups of timm's, one size": "pit_ti_distilled_224",
    "a convolution as head": "dla46x_c",
    "no norms": "test_nfnet",
    "stochastic depth and a small stem": "starnet_s050",
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_network_that_passes_trains_in_both_stages(colour_images, kind):
    settings = {"arch": KINDS[kind], "pretrained": False, "presize": 48, "image_size": 32, "batch_size": 12}
    recipe = Recipe(**settings, freeze_epochs=1, epochs=1, tta_views=0)
    try_out(recipe)
    training = FineTune(recipe, colour_images)
    groups = training.network.layer_groups("blocks")
    assert len(groups) >= 3
    assert {id(parameter) for parameter in groups[-1]} == {id(p) for p in training.network.classifier.parameters()}
    assert [training.run_epoch()["stage"] for _ in range(2)] == ["frozen", "unfrozen"]
    training.close()


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"arch": "resnet81"}, "arch='resnet81' is not a timm architecture. Names like it: resnet18"),
        (
            {"arch": "dla46x_c", "image_size": 48},
            r"arch=dla46x_c cannot be trained at image_size=48: the network stops with RuntimeError \(Sizes of tensors "
            r".*\)\. Choose image_size=32 or 64 or another architecture",
        ),
        ({"arch": "gemma4_vit_167m_enc"}, "has no classifier, it only makes features. Choose another architecture"),
        ({"arch": "pit_ti_distilled_224", "head": "mlp"}, "has 2 classifiers; expected head=linear"),
        (
            {"arch": "pit_ti_distilled_224", "head_init": "probe"},
            "needs one linear classifier with a bias, but pit_ti_distilled_224 has 2 classifiers; expected head_i",
        ),
        (
            {"arch": "dla46x_c", "head_init": "probe", "image_size": 64},
            "a bias, but dla46x_c has Conv2d; expected head_i",
        ),
        ({"arch": "test_vit", "concat_pool": True}, "does not accept the options"),
        ({"arch": "test_vit", "start_size": 64}, "at start_size=64: test_vit accepts images of only one size"),
    ],
)
def test_what_cannot_be_trained_is_refused_with_the_reason_and_what_to_choose(settings, problem):
    with pytest.raises(ValueError) as error:
        try_out(Recipe(**settings))
    assert re.search(problem, str(error.value))
    assert "\n" not in str(error.value)


def test_the_projects_own_architectures_start_no_process(monkeypatch):
    monkeypatch.setattr(architecture, "run_module", lambda *args, **kwargs: pytest.fail("started a process"))
    require_trainable(to_try(load_space("images")))
    for name in ("quickstart", "pets", "imagenette"):
        assert load_space(name).settings["arch"] in known()
        require_trainable(to_try(load_space(name)))
        require_trainable(to_try(load_space(name).of_recipes("book")))


def test_architectures_that_train_at_every_size_start_no_process(monkeypatch, search_cache):
    """As long as timm has the version with which they were tried."""
    space = load_space("images").with_settings(["arch=mobilenetv2_050,tf_efficientnet_lite0", "image_size=65,161"])
    with monkeypatch.context() as patch:
        patch.setattr(architecture, "run_module", lambda *args, **kwargs: pytest.fail("started a process"))
        assert untrainable(to_try(space)) == {}
    for name in ("mobilenetv2_050", "tf_efficientnet_lite0"):
        try_out(Recipe(arch=name, image_size=97, head_init="probe"))  # as they do
    tried = []
    monkeypatch.setattr(architecture, "version", lambda package: "0")
    monkeypatch.setattr(architecture, "run_module", lambda module, stdin: tried.extend(json.loads(stdin)) or Refused)
    with pytest.raises(ValueError, match="mobilenetv2_050 could not be checked"):
        untrainable(to_try(space))
    assert {recipe["arch"] for recipe in tried} == {"mobilenetv2_050"}  # the other one is the quickstart's


class Refused:
    returncode = 1


def test_the_architectures_for_ones_own_images_are_tried_with_settings_that_their_space_lacks():
    space = load_space("images")
    vit = space.with_settings(["arch=vit_small_patch14_reg4_dinov2.lvd142m", "image_size=224"])
    assert to_try(vit) == []
    for setting in ("concat_pool=true", "start_size=128", "image_size=100", "head=mlp"):
        assert to_try(vit.with_settings([setting])), setting


def test_an_untrainable_architecture_does_not_hide_that_others_have_passed(search_cache, monkeypatch):
    """The child process answers with problems by architecture; only those are tried again."""

    def tried(module, stdin):
        asked.append([recipe["arch"] for recipe in json.loads(stdin)])
        return subprocess.CompletedProcess([], 0, stdout='{"bad": "arch=bad cannot be trained."}')

    asked: list[list[str]] = []
    monkeypatch.setattr(architecture, "run_module", tried)
    recipes = [{"arch": arch, "image_size": 32} for arch in ("good", "bad")]
    assert architecture.untrainable(recipes) == {"bad": "arch=bad cannot be trained."}
    assert architecture.untrainable(recipes) == {"bad": "arch=bad cannot be trained."}
    assert asked == [["good", "bad"], ["bad"]]


def test_all_heads_and_sizes_of_other_architectures_are_tried():
    space = load_space("pets").with_settings(["arch=resnet34.tv_in1k,convnext_atto", "image_size=96..224"])
    tried = to_try(space)
    assert {recipe["arch"] for recipe in tried} == {"convnext_atto"}
    assert {recipe["head"] for recipe in tried} == {"linear", "mlp"}
    assert {recipe["image_size"] for recipe in tried} == {96, 97, 224}
    assert "probe" in {recipe["head_init"] for recipe in tried}
    without = to_try(space.with_settings(["pretrained=false"]))
    assert {recipe["head_init"] for recipe in without} == {"zeros"}  # a probe has no effect


@pytest.mark.slow
def test_what_has_passed_is_not_tried_again(tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_SEARCH_CACHE", str(tmp_path))
    recipe = {"arch": "test_resnet", "head": "linear", "concat_pool": False, "image_size": 32, "start_size": 0}
    require_trainable([recipe])
    monkeypatch.setattr(architecture, "run_module", lambda *args, **kwargs: pytest.fail("started a process"))
    require_trainable([recipe])


WRONG = ["--set", "arch=resnet81", "--set", "pretrained=false", "--data", str(Path(__file__).parent)]


@pytest.mark.slow
def test_images_are_not_called_ready_for_an_architecture_that_there_is_not(search_cache):
    with pytest.raises(ValueError, match="arch='resnet81' is not a timm architecture"):
        check.main(["--space", "pets", *WRONG])


def test_a_training_without_a_search_refuses_a_wrong_architecture(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["finetune", *WRONG])
    with pytest.raises(SystemExit):
        finetune.main()
    assert "error: arch='resnet81' is not a timm architecture" in capsys.readouterr().err
