"""Oxford-IIIT Pets from pretrained ResNets, as in chapter 5 of fastai's book."""

from search.spaces import fastai_book
from search.spaces.space import Choice, Range, Space

SPACE = Space(
    name="pets",
    doc="Oxford-IIIT Pets (37 breeds) from pretrained ResNets",
    dataset="pets",
    settings={
        "arch": "resnet34.tv_in1k",
        "head_init": "probe",
        "probe_views": 2,
        "epochs": 6,
        "freeze_epochs": 0,
        "batch_size": 32,
        "lr_max": 1e-3,
        "lr_ratio": 100.0,
        "presize": 460,
        "image_size": 224,
    },
    dimensions={
        "arch": Choice(("resnet18.tv_in1k", "resnet34.tv_in1k", "resnet50.tv_in1k", "resnet101.tv_in1k")),
        "head": Choice(("linear", "mlp")),
        "hidden": Choice((256, 512, 1024)),
        "epochs": Range(3, 15),
        "lr_max": Range(1e-4, 1e-2, log=True),
        "lr_ratio": Range(3, 1000, log=True),
        "train_bn": Choice(("unfrozen", "always", "never")),
        "mixup_alpha": Range(0.05, 0.4, off=True),
        "smoothing": Range(0.0, 0.2),
    },
    # Where there are few images, batch statistics are what spoils the unfrozen stage.
    first=(
        {
            "train_bn": "never",
            "lr_max": 3e-4,
            "lr_ratio": 10.0,
            "smoothing": 0.1,
        },
    ),
    recipes={"book": fastai_book.PETS},
    num_trials=40,
)
