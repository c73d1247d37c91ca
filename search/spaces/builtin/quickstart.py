"""The pets space at a size that fits two CPU cores, on drawn animals and with small pretrained networks."""

from search.spaces import fastai_book
from search.spaces.space import Choice, Range, Space

ARCHS = {"resnet34.tv_in1k": "tf_efficientnet_lite0", "resnet50.tv_in1k": "tf_efficientnet_lite2"}
SIZES = {"batch_size": 32, "presize": 160, "image_size": 96}

SPACE = Space(
    name="quickstart",
    doc="drawn animals (12 breeds, made on first use) from pretrained EfficientNet-Lites, for two CPU cores",
    dataset="quickstart",
    settings={
        "arch": "tf_efficientnet_lite0",
        "head_init": "probe",
        "probe_views": 1,
        "head_softening": 0.7,  # drawn animals are unlike ImageNet's
        "epochs": 2,
        "freeze_epochs": 0,
        **SIZES,
        "train_bn": "never",
        "lr_max": 1e-3,
        "lr_ratio": 1.0,
    },
    dimensions={
        "arch": Choice(("tf_efficientnet_lite0", "tf_efficientnet_lite1", "tf_efficientnet_lite2")),
        "image_size": Choice((96, 112, 128)),
        "epochs": Range(1, 3),
        "lr_max": Range(1e-4, 3e-3, log=True),
        "lr_ratio": Range(1, 30, log=True),
        "head_softening": Range(0.0, 0.8),
        "mixup_alpha": Range(0.0, 0.4),
        "smoothing": Range(0.0, 0.2),
    },
    recipes={"book": tuple(fastai_book.scaled_down(recipe, ARCHS, **SIZES) for recipe in fastai_book.PETS)},
    num_trials=8,
    seed=6,
)
