"""The floating-point type in which a network computes."""

import torch
from torch import nn

from trainables.recipe import Recipe

MIN_CPU_BF16_SIZE = 160
"""px; smaller images gain nothing from bf16 on a CPU."""


def autocast_dtype(recipe: Recipe, device: torch.device, model: nn.Module | None = None) -> torch.dtype | None:
    """The type of the forward pass under `torch.autocast`; None for plain fp32. It depends on the `model`, too, where
    that is known."""
    precision = recipe.precision
    if precision == "auto" and device.type == "cuda":
        precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif precision == "auto":
        # Small images gain nothing on a CPU. At 32 px they would even lose: where a network shrinks them to 1 x 1,
        # oneDNN leaves most of the weight gradient of a 3 x 3 convolution unset in bf16 (torch 2.14).
        has, smallest = torch.cpu.get_capabilities(), min(recipe.start_size or recipe.image_size, recipe.image_size)
        has_bf16 = has.get("avx512_bf16") or has.get("amx_bf16")
        slow = bool(has.get("amx_bf16") and model and _has_depthwise_with_norms(model))
        precision = "bf16" if has_bf16 and smallest >= MIN_CPU_BF16_SIZE and not slow else "fp32"
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)


def _has_depthwise_with_norms(model: nn.Module) -> bool:
    """Whether it is like MobileNet and EfficientNet: on a Xeon with AMX their steps, with fused convolutions, are 1.4
    to 1.7 times as fast in fp32 as in bf16. On an EPYC with AVX512-BF16 alone, EfficientNet-Lite0's are faster in bf16,
    and so are ConvNeXt's, which has no batch norms, on both."""
    modules = list(model.modules())
    has_norms = any(isinstance(module, nn.BatchNorm2d) for module in modules)
    return has_norms and any(isinstance(m, nn.Conv2d) and 1 < m.groups == m.in_channels for m in modules)
