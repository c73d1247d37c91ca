"""The network of one trial: a timm backbone, its head, its layer groups, and the pretrained weights in it."""

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import safe_open
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from trainables.network.dropout import share_position_dropout
from trainables.network.pretrained_weights import (
    Channels,
    WeightsError,
    WeightsFile,
    find_weights,
    in_timm_names,
    no_weights_message,
)
from trainables.recipe import Recipe

FASTAI_NORMS = (_BatchNorm, _InstanceNorm, nn.LayerNorm)
"""What fastai trains in a frozen backbone."""


@dataclass(frozen=True)
class Network:
    """A model and the statistics of its inputs."""

    model: nn.Module
    mean: Channels  # per RGB channel, of pixels in 0..1
    std: Channels

    @property
    def classifier(self) -> nn.Module:
        """The module that maps pooled features to classes; a list of them if the network averages several."""
        modules = [self.model.get_submodule(name) for name in classifier_names(self.model)]
        return modules[0] if len(modules) == 1 else nn.ModuleList(modules)

    def layer_groups(self, kind: str) -> list[list[nn.Parameter]]:
        """Parameters from the earliest layers to the head, which is the last group.

        `kind` blocks splits the backbone as timm's `group_matcher` (coarse), which covers all architectures; fastai
        splits a ResNet after its second stage, as fastai's `_resnet_split`, and no other backbone.
        """
        parameters = dict(self.model.named_parameters())
        head = tuple(f"{name}." for name in classifier_names(self.model))
        body = [name for name in parameters if not name.startswith(head)]
        groups = _by_depth(self.model, body) if kind == "blocks" else _as_fastai(self.model, body)
        groups.append([name for name in parameters if name.startswith(head)])
        return [[parameters[name] for name in names] for names in groups if names]

    def freeze_backbone(self, train_bn: str) -> None:
        """Only the head trains, and with `train_bn` always the backbone's norms."""
        self.model.requires_grad_(False)
        if train_bn == "always":
            for module in self.model.modules():
                if isinstance(module, FASTAI_NORMS):
                    module.requires_grad_(True)
        self.classifier.requires_grad_(True)

    def unfreeze(self, frozen_layers: float = 0.0, kind: str = "blocks") -> None:
        """All train but the first layer groups of the backbone, a share of them; `kind` as for `layer_groups`."""
        self.model.requires_grad_(True)
        *body, _ = self.layer_groups(kind)
        for group in body[: round(frozen_layers * len(body))]:
            for parameter in group:
                parameter.requires_grad_(False)

    def train(self, *, frozen: bool, train_bn: str) -> None:
        """Training mode; a frozen backbone whose batch norms do not train, and those of frozen layers, stay in
        evaluation mode."""
        self.model.train(not frozen or train_bn == "always")
        for module in _batch_norms(self.model):
            if train_bn == "never" or not all(parameter.requires_grad for parameter in module.parameters()):
                module.eval()
        self.classifier.train()

    def with_model(self, model: nn.Module) -> "Network":
        return dataclasses.replace(self, model=model)


def build(recipe: Recipe, num_classes: int, weights: Path | None = None, *, load_pretrained: bool = True) -> Network:
    """The network of a recipe with a new head; `load_pretrained=False` if a checkpoint will be loaded into it.

    Raises `ValueError` for an architecture or a pooling that timm does not have, `WeightsError` if there are no weights
    or they do not fit the architecture.
    """
    check_architecture(recipe.arch)
    torch.manual_seed(recipe.seed)  # initialises the head
    source = find_weights(recipe.arch, weights) if recipe.pretrained else None
    options: dict[str, Any] = {"num_classes": num_classes}
    if recipe.concat_pool:
        options["global_pool"] = "catavgmax"
    if timm.get_pretrained_cfg_value(recipe.arch, "fixed_input_size"):
        if recipe.start_size:
            raise ValueError(f"{recipe.arch} accepts images of only one size, expected start_size=0")
        options["img_size"] = recipe.image_size  # position embeddings of transformers; timm resizes pretrained ones
    if recipe.pretrained and load_pretrained:
        options["pretrained"] = True
        if source:
            options["pretrained_cfg_overlay"] = {"file": str(in_timm_names(source))}
    model = _create(recipe, options, source)
    share_position_dropout(model)
    for batch_norm in _batch_norms(model):
        batch_norm.momentum = recipe.bn_momentum
    if recipe.head == "mlp":
        _replace_classifier(model, recipe, num_classes)
    elif recipe.pretrained:
        # Zeros (Kolesnikov et al. 2020), so that all classes start equal: some timm heads start so large that the first
        # epochs only unlearn them.
        for name in classifier_names(model):
            for parameter in model.get_submodule(name).parameters():
                nn.init.zeros_(parameter)
    if source and source.mean and source.std:
        return Network(model, source.mean, source.std)
    config = _config(model)
    return Network(model, tuple(config["mean"]), tuple(config["std"]))


def check_probed(network: Network, recipe: Recipe) -> None:
    """Raises `ValueError` unless one linear layer or mlp head maps pooled features to classes, as a probe needs it."""
    classifier = network.classifier
    if recipe.head == "mlp" or (isinstance(classifier, nn.Linear) and classifier.bias is not None):
        return
    if isinstance(classifier, nn.ModuleList):
        kind = f"{len(classifier)} classifiers"
    else:
        kind = type(classifier).__name__ + (" without bias" if isinstance(classifier, nn.Linear) else "")
    raise ValueError(
        f"head_init=probe needs one linear classifier with a bias, but {recipe.arch} has {kind}; expected "
        "head_init=zeros"
    )


def check_architecture(arch: str) -> None:
    """Raises `ValueError`, with similar names or the known tags, if timm has no such architecture or weight tag."""
    name, _, tag = arch.partition(".")
    if not timm.is_model(name):
        near = get_close_matches(name, timm.list_models(), n=8)
        raise ValueError(f"arch={arch!r} is not a timm architecture. Names like it: {', '.join(near) or 'none'}.")
    tagged = timm.models.get_arch_pretrained_cfgs(name)
    if tag and tagged and arch not in tagged:
        raise ValueError(f"arch={arch!r} has an unknown weight tag. Known: {', '.join(tagged)}.")


def _create(recipe: Recipe, options: dict[str, Any], source: WeightsFile | None) -> nn.Module:
    try:
        model: nn.Module = timm.create_model(recipe.arch, **options)
    except AssertionError as error:
        raise ValueError(f"{recipe.arch} does not accept the options {options}: {error}") from error
    except Exception as error:
        if not options.get("pretrained"):
            raise
        if source is None:
            raise WeightsError(no_weights_message(recipe.arch, error)) from error
        reason = " ".join(str(error).split())[:200]
        raise WeightsError(f"{source.path} cannot be loaded into {recipe.arch}: {reason}") from error
    if options.get("pretrained") and source:
        _check_names(model, source)
    return model


def _check_names(model: nn.Module, source: WeightsFile) -> None:
    """Refuses a file without parameters of `model`, which timm would only log before it trains from scratch."""
    with safe_open(in_timm_names(source), framework="pt") as file:
        names = set(file.keys())
    if names.isdisjoint(model.state_dict()):
        arch = _config(model)["architecture"]
        raise WeightsError(
            f"{source.path} holds none of the parameters of {arch}, expected timm's names such as "
            f"{next(iter(model.state_dict()))}; it has {', '.join(sorted(names)[:3])}"
        )


def _config(model: nn.Module) -> dict[str, Any]:
    """timm's description of a model."""
    config: Any = model.pretrained_cfg
    return dict(config)


def classifier_names(model: nn.Module) -> list[str]:
    """Dotted names of the modules that map pooled features to classes: one, or several whose logits are averaged."""
    found = _config(model).get("classifier") or ()
    names = [found] if isinstance(found, str) else list(found)
    modules = dict(model.named_modules())
    if not names or not all(name in modules for name in names):
        raise ValueError(f"{_config(model).get('architecture')} has no classifier, it only makes features")
    return names


def divide_logits(model: nn.Module, temperature: float) -> None:
    """Divides the logits by `temperature` in the weights of the last layer. Raises `ValueError` if it is not linear."""
    for name in classifier_names(model):
        layers = [module for module in model.get_submodule(name).modules() if isinstance(module, nn.Linear | nn.Conv2d)]
        if not layers:
            raise ValueError(f"{_config(model).get('architecture')} has a classifier without a linear layer: {name}")
        with torch.no_grad():
            for parameter in layers[-1].parameters():
                parameter.div_(temperature)


def _by_depth(model: nn.Module, names: list[str]) -> list[list[str]]:
    body = set(names)
    timm_model: Any = model
    try:
        matcher = timm_model.group_matcher(coarse=True)
    except (AttributeError, AssertionError):  # some of timm's have none, and RDNet has no coarse one
        return [list(group) for _, group in itertools.groupby(names, key=_part_of)]
    groups = timm.models.group_parameters(model, matcher).values()
    return [[name for name in group if name in body] for group in groups]


def _part_of(name: str) -> str:
    """The part of a network that a parameter belongs to: stem, stages.0, stages.1 and the like."""
    first, second, *_ = [*name.split("."), ""]
    return f"{first}.{second}" if second.isdigit() else first


def _as_fastai(model: nn.Module, names: list[str]) -> list[list[str]]:
    if not isinstance(model, timm.models.ResNet):
        return [names]
    late = [name for name in names if name.startswith(("layer3.", "layer4."))]
    return [[name for name in names if name not in late], late]


def _batch_norms(model: nn.Module) -> Iterator[_BatchNorm]:
    return (module for module in model.modules() if isinstance(module, _BatchNorm))


def _replace_classifier(model: nn.Module, recipe: Recipe, num_classes: int) -> None:
    first, *others = classifier_names(model)
    linear = model.get_submodule(first)
    if others or not isinstance(linear, nn.Linear):
        has = f"{1 + len(others)} classifiers" if others else type(linear).__name__
        raise ValueError(
            f"head=mlp needs a linear classifier to replace, but {recipe.arch} has {has}; expected head=linear"
        )
    model.set_submodule(first, mlp_head(linear.in_features, num_classes, recipe))


def mlp_head(in_features: int, num_classes: int, recipe: Recipe) -> nn.Sequential:
    """fastai's `create_head` after the pooling, with its initialisation: norm, dropout, linear, ReLU, and once more."""
    head = nn.Sequential(
        nn.BatchNorm1d(in_features),
        nn.Dropout(recipe.dropout / 2),
        nn.Linear(in_features, recipe.hidden, bias=False),
        nn.ReLU(inplace=True),
        nn.BatchNorm1d(recipe.hidden),
        nn.Dropout(recipe.dropout),
        nn.Linear(recipe.hidden, num_classes, bias=False),
    )
    for layer in head:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight)
        elif isinstance(layer, nn.BatchNorm1d):
            nn.init.constant_(layer.bias, 1e-3)
    return head
