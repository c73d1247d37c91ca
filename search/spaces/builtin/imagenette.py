"""Imagenette: ten easy classes of ImageNet, as in chapter 7 of fastai's book."""

from search.spaces import fastai_book
from search.spaces.space import Choice, Range, Space

SPACE = Space(
    name="imagenette",
    doc="Imagenette (10 classes of ImageNet) from scratch",
    dataset="imagenette",
    settings=fastai_book.IMAGENETTE[-1].settings,  # mixup, label smoothing and progressive resizing together
    dimensions={
        "arch": Choice(("resnet18d", "resnet34d", "resnet50d")),
        "epochs": Range(5, 20),
        "lr_max": Range(5e-4, 2e-2, log=True),
        "mixup_alpha": Range(0.05, 0.4, off=True),
        "smoothing": Range(0.0, 0.2),
        "start_size": Choice((0, 128, 160)),
        "start_share": Range(0.1, 0.6),
        "min_scale": Range(0.25, 0.75),
    },
    recipes={"book": fastai_book.IMAGENETTE},
    num_trials=40,
)
