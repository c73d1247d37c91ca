"""Imagenette: ten easy classes of ImageNet, as in chapter 7 of fastai's book."""

from search.space import Choice, Range, Space

SPACE = Space(
    name="imagenette",
    doc="Imagenette (10 classes of ImageNet) from scratch",
    dataset="imagenette",
    settings={
        "arch": "resnet50d",
        "pretrained": False,
        "epochs": 5,
        "freeze_epochs": 0,
        "batch_size": 64,
        "lr_max": 3e-3,
        "lr_ratio": 1.0,
        "div": 25.0,
        "pct_start": 0.25,
        "presize": 256,
        "image_size": 128,
        "min_scale": 0.35,
    },
    dimensions={
        "arch": Choice(("resnet18d", "resnet34d", "resnet50d")),
        "epochs": Range(5, 20),
        "lr_max": Range(5e-4, 2e-2, log=True),
        "mixup_alpha": Range(0.0, 0.4),
        "smoothing": Range(0.0, 0.2),
    },
    num_trials=40,
)
