"""Any folder of images: a dozen modern backbones in three sizes, fine-tuned from a converged head.

The backbone decides more than all other settings together, so this space has one of each kind that does well in
comparisons, rather than many depths of one kind. In the largest of them (Goldblum et al. 2023, "Battle of the
Backbones", arXiv:2310.19909), supervised ConvNeXts with more than ImageNet-1k in their pretraining and CLIP lead, and
self-supervised networks come close. From each family those weights were taken that have seen the most images:

- ResNet-D (He et al. 2019, arXiv:1812.01187), trained with today's recipes (Wightman et al. 2021, arXiv:2110.00476)
- MobileNetV4 (Qin et al. 2024, arXiv:2404.10518), the quickest ones
- EfficientNetV2 (Tan and Le 2021, arXiv:2104.00298), from ImageNet-21k where there are such weights
- ConvNeXt (Liu et al. 2022, arXiv:2201.03545), from ImageNet-12k, and the base one from CLIP's training on LAION-2B
  (Cherti et al. 2023, arXiv:2212.07143)
- ViT with registers, from DINOv2 (Oquab et al. 2023, arXiv:2304.07193; Darcet et al. 2023, arXiv:2309.16588), whose
  frozen features alone do well on small sets

All weights are Apache-2.0, as timm states it. DINOv3's have a licence with conditions of its own, and those of
ConvNeXt V2, EUPE and MetaCLIP are not for commercial use: none of them is here.
"""

from search.spaces.epochs import TYPICAL_IMAGES, epochs_for, middle
from search.spaces.space import OWN_IMAGES, Choice, Range, Space

SMALL = (
    "mobilenetv4_conv_small.e2400_r224_in1k",
    "tf_efficientnetv2_b0.in1k",
    "resnet18d.ra4_e3600_r224_in1k",
    "convnext_nano.in12k_ft_in1k",
)
"""0.2 to 2.4 billion multiplications per image of 224 px, 3 to 15 million parameters."""
MEDIUM = (
    "mobilenetv4_conv_medium.e500_r256_in1k",
    "tf_efficientnetv2_s.in21k_ft_in1k",
    "resnet50d.ra4_e3600_r224_in1k",
    "convnext_tiny.in12k_ft_in1k",
    "vit_small_patch14_reg4_dinov2.lvd142m",
)
"""0.8 to 6 billion, 9 to 28 million parameters."""
LARGE = (
    "tf_efficientnetv2_m.in21k_ft_in1k",
    "convnext_base.clip_laion2b_augreg_ft_in12k_in1k",
    "vit_base_patch14_reg4_dinov2.lvd142m",
)
"""5 to 24 billion, 53 to 88 million parameters."""

SPACE = Space(
    name=OWN_IMAGES,
    doc="your own images (--data) from modern pretrained backbones",
    dataset="",
    settings={
        "arch": "convnext_nano.in12k_ft_in1k",
        # "Fine-tuning can distort pretrained features" (Kumar et al. 2022, arXiv:2202.10054) less from such a head.
        "head_init": "probe",
        "probe_views": 2,
        "freeze_epochs": 0,
        "epochs": middle(epochs_for(TYPICAL_IMAGES)),
        "batch_size": 32,
        "lr_max": 3e-4,
        "lr_ratio": 3.0,
        "frozen_layers": 0.5,
        "train_bn": "never",
        "presize": 320,
        "image_size": 224,
        "wise_ft": True,
        # It would take half an epoch of every trial, and decides nothing.
        "tta_views": 0,
    },
    dimensions={
        "arch": Choice((*SMALL, *MEDIUM, *LARGE)),
        # Multiples of 32, of which the ViTs' patches of 14 px leave out at most 8 px.
        "image_size": Choice((160, 224, 288)),
        "epochs": epochs_for(TYPICAL_IMAGES),
        "lr_max": Range(3e-5, 3e-3, log=True),
        "lr_ratio": Range(1, 100, log=True),
        "frozen_layers": Range(0.1, 0.8, off=True),
        "head_softening": Range(0.0, 0.8),
        "train_bn": Choice(("never", "unfrozen")),
        "mixup_alpha": Range(0.05, 0.4, off=True),
        "smoothing": Range(0.0, 0.2),
    },
    # Few images that are like ImageNet's hardly move from the probe; many, or other ones, learn features of their own.
    first=({"lr_max": 1e-3}, {"lr_max": 1e-4, "head_softening": 0.0}, {"lr_max": 1e-3, "frozen_layers": 0.0}),
    epochs_of=TYPICAL_IMAGES,
    num_trials=40,
)
