"""The floating-point type in which a network computes."""

import torch

from trainables.recipe import Recipe

MIN_CPU_BF16_SIZE = 160
"""px; an EfficientNet-Lite trains no faster in bf16 on smaller images."""


def autocast_dtype(recipe: Recipe, device: torch.device) -> torch.dtype | None:
    """The type of the forward pass under `torch.autocast`; None for plain fp32."""
    precision = recipe.precision
    if precision == "auto" and device.type == "cuda":
        precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif precision == "auto":
        # Small images gain nothing on a CPU. At 32 px they would even lose: where a network shrinks them to 1 x 1,
        # oneDNN leaves most of the weight gradient of a 3 x 3 convolution unset in bf16 (torch 2.14).
        has, smallest = torch.cpu.get_capabilities(), min(recipe.start_size or recipe.image_size, recipe.image_size)
        has_bf16 = has.get("avx512_bf16") or has.get("amx_bf16")
        precision = "bf16" if has_bf16 and smallest >= MIN_CPU_BF16_SIZE else "fp32"
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
