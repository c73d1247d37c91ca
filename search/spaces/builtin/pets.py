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
        # The probe's head fits the pretrained statistics: batch statistics would shift what it was computed for.
        "train_bn": "never",
        "lr_max": 3e-4,
        "lr_ratio": 3.0,
        "presize": 460,
        "image_size": 224,
    },
    dimensions={
        "arch": Choice(("resnet18.tv_in1k", "resnet34.tv_in1k", "resnet50.tv_in1k", "resnet101.tv_in1k")),
        "head": Choice(("linear", "mlp")),
        "hidden": Choice((256, 512, 1024)),
        "epochs": Range(3, 15),
        "lr_max": Range(3e-5, 3e-3, log=True),
        "lr_ratio": Range(1, 100, log=True),
        "head_softening": Range(0.0, 0.8),
        "train_bn": Choice(("never", "unfrozen")),
        "mixup_alpha": Range(0.05, 0.4, off=True),
        "smoothing": Range(0.0, 0.2),
    },
    first=({"train_bn": "unfrozen", "lr_max": 1e-3, "smoothing": 0.1},),  # for many images
    recipes={"book": fastai_book.PETS},
    num_trials=40,
)
