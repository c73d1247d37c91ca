"""Recipe: all hyperparameters of one fine-tuning, with units and ranges, validated.

Rates, schedule and augmentation default to those of fastai's `fine_tune` and of its book (chapters 5 and 7). The head,
the layer groups and the training of norms of its `vision_learner` are options here, not defaults.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

MIN_SIZE = 16
"""px; of all images."""
WISE_ALPHAS = (0.75, 0.5, 0.25)
"""Shares of the way from a training's start to its end, at which WiSE-FT looks for a lower validation loss."""


def setting(
    default: Any,
    doc: str,
    low: float | None = None,
    high: float | None = None,
    *,
    choices: tuple[str, ...] = (),
    log: bool = False,
    needs: str = "",
) -> Any:
    """A dataclass field with its documentation and range: `low` and `high` are inclusive.

    It has no effect if the setting `needs` is 0 or off or, written NAME=VALUE, has another value.
    """
    metadata = {"doc": doc, "low": low, "high": high, "choices": choices, "log": log, "needs": needs}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All settings of one fine-tuning.

    Args:
        **settings: The fields below, each with its documentation, range and default.

    Raises:
        ValueError: Names every setting that is out of range, and settings that contradict each other.

    Example:
        >>> recipe = Recipe(arch="resnet18.a1_in1k", epochs=3, lr_max=2e-3)
        >>> recipe.total_epochs
        4
    """

    arch: str = setting("resnet34.tv_in1k", "timm architecture, with its weight tag")
    pretrained: bool = setting(True, "start from pretrained weights; false trains from scratch")
    head: str = setting(
        "linear", "linear = timm's own classifier, mlp = fastai's two layers", choices=("linear", "mlp")
    )
    concat_pool: bool = setting(False, "pool by average and maximum, concatenated, instead of timm's default")
    hidden: int = setting(512, "width of the mlp head's hidden layer", 8, 8192, needs="head=mlp")
    dropout: float = setting(
        0.5, "dropout before the mlp head's last layer; half of it before the first", 0, 0.95, needs="head=mlp"
    )
    head_init: str = setting(
        "zeros",
        "zeros = a linear head starts at 0, probe = the head starts as the optimum on frozen features",
        choices=("zeros", "probe"),
        needs="pretrained",
    )
    probe_views: int = setting(
        0,
        "views of each training image, cropped and flipped at random, that the probe learns from besides the centre",
        0,
        10,
        needs="head_init=probe",
    )
    head_softening: float = setting(
        0.5,
        "how unsure a probe's head is when training goes on from it: mean loss of the training images / that of "
        "guessing; 0 = as the probe left it",
        0,
        0.95,
        needs="head_init=probe",
    )
    normalize: str = setting(
        "auto",
        "mean and deviation of the inputs: the weights' own, or computed from the data; auto = data if from scratch",
        choices=("auto", "weights", "data"),
    )

    freeze_epochs: int = setting(1, "epochs that train the head alone, the backbone frozen", 0, 1000)
    epochs: int = setting(5, "epochs that train the whole network, after the frozen ones", 0, 1000)
    batch_size: int = setting(64, "images per optimizer step, over all workers together", 2, 65536)
    layer_groups: str = setting(
        "blocks",
        "what shares a rate: blocks = each of timm's blocks, fastai = three parts of a ResNet, body and head of others",
        choices=("blocks", "fastai"),
    )
    lr_max_frozen: float = setting(
        2e-3, "peak learning rate of the frozen stage", 1e-7, 10, log=True, needs="freeze_epochs"
    )
    lr_ratio_frozen: float = setting(
        10.0,
        "lr_max_frozen / rate of the frozen backbone's norms (train_bn=always)",
        1,
        1e6,
        log=True,
        needs="train_bn=always",
    )
    lr_max: float = setting(1e-3, "peak learning rate of the head once unfrozen", 1e-7, 10, log=True, needs="epochs")
    lr_ratio: float = setting(
        100.0, "lr_max / rate of the earliest layers, geometric between", 1, 1e6, log=True, needs="epochs"
    )
    frozen_layers: float = setting(
        0.0,
        "share of the backbone's layer groups, from the input on, that stay frozen once the others are unfrozen",
        0,
        0.9,
        needs="epochs",
    )
    pct_start_frozen: float = setting(
        0.99, "share of the frozen stage in which the rate rises", 0.01, 0.99, needs="freeze_epochs"
    )
    pct_start: float = setting(0.3, "share of the unfrozen stage in which the rate rises", 0.01, 0.99, needs="epochs")
    div_frozen: float = setting(
        25.0, "peak / first learning rate of the frozen stage", 1, 1e6, log=True, needs="freeze_epochs"
    )
    div: float = setting(5.0, "peak / first learning rate of the unfrozen stage", 1, 1e6, log=True, needs="epochs")
    div_final: float = setting(1e5, "peak / last learning rate of either stage", 1, 1e12, log=True)
    mom_high: float = setting(0.95, "momentum (Adam's first beta) where the rate is lowest", 0, 0.999)
    mom_low: float = setting(0.85, "momentum where the rate is highest", 0, 0.999)
    weight_decay: float = setting(0.01, "decoupled weight decay; none on norms and biases", 0, 10)

    train_bn: str = setting(
        "unfrozen",
        "when the backbone's batch norms train: always = as in fastai while frozen too (layer norms as well), "
        "unfrozen = once unfrozen, never = they keep the pretrained statistics; for small sets",
        choices=("always", "unfrozen", "never"),
    )
    bn_momentum: float = setting(
        0.1, "weight of a batch in the running statistics of the backbone's batch norms", 0.001, 1
    )

    mixup_alpha: float = setting(0.0, "mixup's Beta(alpha, alpha); 0 = no mixup", 0, 10)
    smoothing: float = setting(0.0, "label smoothing epsilon", 0, 0.9)
    class_weights: str = setting(
        "none",
        "weight of an image in the loss, the probe's included, by the number n of its class's training images: "
        "inverse = 1 / n, effective = (1 - 0.999) / (1 - 0.999^n), none = all count the same",
        choices=("none", "inverse", "effective"),
    )
    logit_adjustment: float = setting(
        0.0,
        "how far predictions are freed from the share of each class among the training images: in the loss, also the "
        "probe's, logits have that many times the logarithm of this share added; 1 = a class of few images counts as "
        "one of many",
        0,
        3,
    )
    sampler: str = setting(
        "uniform",
        "what an epoch draws: uniform = every image once, balanced = as many of each class, small ones repeated",
        choices=("uniform", "balanced"),
    )

    presize: int = setting(
        460,
        "px; side of the cached images, before augmentation; each size makes a cache, so search a list (160,192)",
        MIN_SIZE,
        4096,
    )
    resize_method: str = setting(
        "crop",
        "crop = presize is the shorter side, a random square trains and the centre one validates; "
        "squish = to a square; pad = presize is the longer side, reflected to a square",
        choices=("crop", "squish", "pad"),
    )
    image_size: int = setting(224, "px; side of the square that the network sees", MIN_SIZE, 4096)
    start_size: int = setting(0, "px; image_size of the first epochs (progressive resizing); 0 = off", 0, 4096)
    start_share: float = setting(0.4, "share of all epochs at start_size, rounded down", 0, 0.95, needs="start_size")
    start_batch_size: int = setting(
        0, "batch_size at start_size; 0 = batch_size * image_size / start_size", 0, 65536, needs="start_size"
    )

    min_scale: float = setting(0.75, "smallest share of the area that a random crop keeps", 0.01, 1)
    max_aspect: float = setting(1.0, "largest ratio of a random crop's sides; 1 = square", 1, 4, log=True)
    flip: bool = setting(True, "flip half of the training images left to right")
    affine_p: float = setting(0.75, "probability of each of rotation, zoom and warp", 0, 1)
    max_rotate: float = setting(10.0, "degrees; largest rotation either way", 0, 180, needs="affine_p")
    max_zoom: float = setting(1.1, "largest zoom in", 1, 4, needs="affine_p")
    # From about 0.36 on, the horizon of a warp can lie inside the image.
    max_warp: float = setting(0.2, "largest perspective warp", 0, 0.3, needs="affine_p")
    lighting_p: float = setting(0.75, "probability of each of brightness and contrast", 0, 1)
    max_lighting: float = setting(0.2, "largest change of brightness and contrast", 0, 0.9, needs="lighting_p")

    tta_views: int = setting(
        4, "augmented views per image that test-time augmentation adds after the last epoch; 0 = off", 0, 100
    )
    tta_beta: float = setting(0.25, "weight of the centre view; the others have the rest", 0, 1, needs="tta_views")

    wise_ft: bool = setting(
        False,
        "after the last epoch, go back from the last weights towards the first ones, as far as that helps on the "
        "images for validation (WiSE-FT)",
        needs="pretrained",
    )
    precision: str = setting(
        "auto",
        "auto = bf16 on GPUs that have it and, from 160 px on, on CPUs where the network gains from it; fp16 with a "
        "loss scaler on older GPUs, fp32 otherwise",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    seed: int = setting(0, "seed of everything random in this training", 0, 2**31 - 1)

    def __post_init__(self) -> None:
        for name, value in _require_valid(self.to_dict()).items():
            object.__setattr__(self, name, value)
        problem = ""
        if self.epochs + self.freeze_epochs < 1 and not self.starts_with_probe:
            problem = (
                "epochs and freeze_epochs are both 0, expected at least one epoch in one of them, or head_init=probe"
            )
        elif self.image_size > self.presize:
            problem = f"image_size={self.image_size} is larger than presize={self.presize}; raise presize"
        elif self.start_size and not MIN_SIZE <= self.start_size <= self.image_size:
            sizes = f"{MIN_SIZE} to image_size={self.image_size}"
            problem = f"start_size={self.start_size} is out of range, expected 0 (off) or {sizes}"
        elif self.start_batch_size == 1:
            problem = "start_batch_size=1 is too small, expected 0 or at least 2"
        if problem:
            raise ValueError(problem)

    @property
    def lr_min(self) -> float:
        """Peak learning rate of the earliest layer group in the unfrozen stage."""
        return self.lr_max / self.lr_ratio

    @property
    def total_epochs(self) -> int:
        return self.freeze_epochs + self.epochs

    @property
    def starts_with_probe(self) -> bool:
        """Whether epoch 0 computes the head on frozen features, before the epochs that train; without these it is all
        of the training."""
        return self.pretrained and self.head_init == "probe"

    @property
    def before_first_epoch(self) -> int:
        """The number of the epoch before the first one: -1 with a probe, which is epoch 0."""
        return -1 if self.starts_with_probe else 0

    def image_size_at(self, epoch: int) -> int:
        """px; side of the images in epoch 0, 1, ... with progressive resizing, and in a probe (-1)."""
        return self.start_size if self._starting(epoch) else self.image_size

    def batch_size_at(self, epoch: int) -> int:
        """Images per step in epoch 0, 1, ...: smaller images have larger batches, or `start_batch_size`."""
        if not self._starting(epoch):
            return self.batch_size
        return self.start_batch_size or max(2, round(self.batch_size * self.image_size / self.start_size))

    def _starting(self, epoch: int) -> bool:
        return self.start_size > 0 and 0 <= epoch < int(self.start_share * self.total_epochs)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Recipe":
        """A recipe from plain values, as in a config or a saved recipe.json. `ValueError` for unknown names as well."""
        _require_valid(values)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def _require_valid(values: Mapping[str, Any]) -> dict[str, Any]:
    """All `values` as the types of their settings; raises one `ValueError` for all that are invalid."""
    checked, problems = {}, []
    for name, value in values.items():
        try:
            checked[name] = checked_value(name, value)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("; ".join(problems))
    return checked


_SPECS = {spec.name: spec for spec in fields(Recipe)}


def spec_of(name: str) -> dataclasses.Field[Any]:
    """The field called `name`; raises `ValueError` that lists the known names."""
    if name not in _SPECS:
        raise ValueError(f"unknown setting {name!r}, expected one of: {', '.join(_SPECS)}")
    return _SPECS[name]


def has_effect(name: str, values: Mapping[str, Any]) -> bool:
    """Whether setting `name` has an effect in a training whose other settings are `values`."""
    needed, value = needed_by(name), spec_of(name).metadata["needs"].partition("=")[2]
    if not needed:
        return True
    has_it = str(values[needed]) == value if value else bool(values[needed])
    return has_it and has_effect(needed, values)


def needed_by(name: str) -> str:
    """The setting that decides whether `name` has an effect; empty if it always has one."""
    needs: str = spec_of(name).metadata["needs"]
    return needs.partition("=")[0]


def checked_value(name: str, value: Any) -> Any:
    """`value` as the type of setting `name`; raises `ValueError` that names the value and what was expected."""
    spec = spec_of(name)
    expected: Any = spec.type
    meta = spec.metadata
    # 3 is a valid float and 3.0 a valid int; True is neither.
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if is_number and (expected is float or (expected is int and float(value).is_integer())):
        value = expected(value)
    if type(value) is not expected:
        raise ValueError(f"{name}={value!r} is not {_TYPE_WORDS[expected]}")
    if meta["choices"] and value not in meta["choices"]:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(meta['choices'])}")
    # Written so that nan fails too.
    if expected in (int, float) and not meta["low"] <= value <= meta["high"]:
        raise ValueError(f"{name}={value!r} is out of range, expected {meta['low']:g} to {meta['high']:g}")
    return value


def parse_value(name: str, text: str) -> Any:
    """The value of setting `name` from the `text` of a command line; blanks around it do not count."""
    expected: Any = spec_of(name).type
    text = text.strip()
    if expected is bool:
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if text.lower() not in words:
            raise ValueError(f"{name}={text!r} is not true or false")
        return words[text.lower()]
    if expected in (int, float):
        try:
            number = float(text)
        except ValueError:
            raise ValueError(f"{name}={text!r} is not {_TYPE_WORDS[expected]}") from None
        return checked_value(name, number)
    return checked_value(name, text)


_TYPE_WORDS: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
