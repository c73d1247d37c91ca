"""The runs of fastai's book, chapters 5 and 7, as recipes, with the errors that were published for them.

"Deep Learning for Coders with fastai and PyTorch" (Howard and Gugger 2020), the notebooks `05_pet_breeds.ipynb` and
`07_sizing_and_tta.ipynb` of the repository fastai/fastbook. Two recipes for Pets come from elsewhere, see `source`.
"""

import re
from typing import Any

from search.spaces.space import NamedRecipe

CHAPTER_5 = "fastai's book, chapter 5"
CHAPTER_7 = "fastai's book, chapter 7"

LEARNER: dict[str, Any] = {
    "arch": "resnet34.tv_in1k",
    "pretrained": True,
    "head": "mlp",
    "concat_pool": True,
    "hidden": 512,
    "dropout": 0.5,
    "head_init": "zeros",
    "normalize": "auto",
    "batch_size": 64,
    "layer_groups": "fastai",
    "train_bn": "always",
    "div_frozen": 25.0,
    "div_final": 1e5,
    "weight_decay": 0.01,
    "mixup_alpha": 0.0,
    "smoothing": 0.0,
    "presize": 460,
    "resize_method": "crop",
    "image_size": 224,
    "start_size": 0,
    "min_scale": 0.75,
}
"""The defaults of `vision_learner`, with the book's presizing."""


def fine_tune(epochs: int, *, base_lr: float = 2e-3, freeze_epochs: int = 1) -> dict[str, Any]:
    """Settings of `learn.fine_tune(epochs, base_lr, freeze_epochs)`."""
    stages = {"freeze_epochs": freeze_epochs, "epochs": epochs}
    frozen = {"lr_max_frozen": base_lr, "lr_ratio_frozen": 10.0, "pct_start_frozen": 0.99}
    unfrozen = {"lr_max": base_lr / 2, "lr_ratio": 100.0, "pct_start": 0.3, "div": 5.0}
    return LEARNER | stages | frozen | unfrozen


def two_fits(freeze_epochs: int, lr_frozen: float, epochs: int, lr_min: float, lr_max: float) -> dict[str, Any]:
    """Settings of `fit_one_cycle(freeze_epochs, lr_frozen)`, then unfrozen
    `fit_one_cycle(epochs, slice(lr_min, lr_max))`."""
    stages = {"freeze_epochs": freeze_epochs, "epochs": epochs}
    frozen = {"lr_max_frozen": lr_frozen, "lr_ratio_frozen": 1.0, "pct_start_frozen": 0.25}
    unfrozen = {"lr_max": lr_max, "lr_ratio": round(lr_max / lr_min, 6), "pct_start": 0.25, "div": 25.0}
    return LEARNER | stages | frozen | unfrozen


PETS = (
    NamedRecipe(name="ResNet-34, 2 epochs", settings=fine_tune(2), error_rate=0.080514, source=CHAPTER_5),
    NamedRecipe(
        name="rate of the finder, 3e-3", settings=fine_tune(2, base_lr=3e-3), error_rate=0.083221, source=CHAPTER_5
    ),
    NamedRecipe(
        name="3 frozen + 6 at 1e-5", settings=two_fits(3, 3e-3, 6, 1e-5, 1e-5), error_rate=0.059540, source=CHAPTER_5
    ),
    NamedRecipe(
        name="3 + 12, 1e-6 to 1e-4", settings=two_fits(3, 3e-3, 12, 1e-6, 1e-4), error_rate=0.054127, source=CHAPTER_5
    ),
    NamedRecipe(
        name="3 + 12, 4e-6 to 4e-4",
        settings=two_fits(3, 2.5e-3, 12, 4e-6, 4e-4),
        error_rate=0.048714,
        source="a reader's notes on chapter 5 (2021), frozen at the finder's 2.5e-3",
    ),
    NamedRecipe(
        name="ResNet-50, mixed precision, 3 + 6",
        settings=fine_tune(6, freeze_epochs=3) | {"arch": "resnet50.tv_in1k"},
        error_rate=0.054804,
        source=CHAPTER_5,
    ),
    NamedRecipe(
        name="4 frozen at 3e-3, then 1e-6 to 1e-4",
        settings=two_fits(4, 3e-3, 2, 1e-6, 1e-4),
        error_rate=0.053227,
        source="fastai's course v3, lecture 1",
    ),
)

FROM_SCRATCH: dict[str, Any] = LEARNER | {
    "arch": "resnet50d",
    "pretrained": False,
    "head": "linear",
    "concat_pool": False,
    "freeze_epochs": 0,
    "epochs": 5,
    "lr_max": 3e-3,
    "lr_ratio": 1.0,
    "pct_start": 0.25,
    "div": 25.0,
}
"""`Learner(dls, xresnet50()).fit_one_cycle(5, 3e-3)`; timm's resnet50d is that network."""

PROGRESSIVE: dict[str, Any] = {"epochs": 10, "start_size": 128, "start_share": 0.4, "start_batch_size": 128}
"""4 epochs at 128 px and 6 at 224 px. The book starts a new cycle at 224 px, its first epoch frozen."""

IMAGENETTE = (
    NamedRecipe(
        name="plain, normalized",
        settings=FROM_SCRATCH,
        error_rate=0.175504,
        source=CHAPTER_7,
    ),
    NamedRecipe(name="mixup", settings=FROM_SCRATCH | {"mixup_alpha": 0.4}, source=CHAPTER_7),
    NamedRecipe(name="label smoothing", settings=FROM_SCRATCH | {"smoothing": 0.1}, source=CHAPTER_7),
    NamedRecipe(
        name="128 to 224 px",
        settings=FROM_SCRATCH | PROGRESSIVE,
        error_rate=0.136669,
        tta_error_rate=0.126214,
        source=CHAPTER_7,
    ),
    NamedRecipe(
        name="mixup, label smoothing, 128 to 224 px",
        settings=FROM_SCRATCH | PROGRESSIVE | {"mixup_alpha": 0.4, "smoothing": 0.1},
        source=CHAPTER_7,
    ),
)


def scaled_down(recipe: NamedRecipe, archs: dict[str, str], **sizes: int) -> NamedRecipe:
    """The same schedule with smaller networks and images, for which no error was published."""
    arch = archs[recipe.settings["arch"]]
    name = re.sub(r"ResNet-\d+", arch, recipe.name)
    return NamedRecipe(name=name, settings=recipe.settings | {"arch": arch, **sizes}, source=recipe.source)
