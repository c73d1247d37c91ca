"""Which parts of an image speak for a class, as heat maps for any timm network. Imports torch only to compute them.

HiResCAM (Draelos and Carin 2020, arXiv:2011.08891): the features that the head reads, times the gradient of the class's
logit with respect to them, summed over channels. Where the head averages the features, as in most CNNs, this is
Grad-CAM (Selvaraju et al. 2017, arXiv:1610.02391) up to a factor. A transformer's head may read only the class token.
Then the features are the input of the last attention, from which that token gathers what it knows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import numpy.typing as npt

from trainables.inference.model_folder import ModelFolder, read_json
from trainables.inference.predictor import Predictor

if TYPE_CHECKING:
    import torch
    from torch import nn

    from trainables.data.image_file import Images, Pixels

HeatMap = npt.NDArray[np.float32]
"""(side, side) from 0 to 1, or an array of them; the image is as wide as `side` features of the network."""
HEAT_MAPS_FILE = "heat_maps.json"
STRENGTH = 0.6
"""The share of the colour where the heat is greatest."""


def heat_maps(
    folder: ModelFolder, images: Images, classes: npt.NDArray[np.int64], *, device: str | None = None
) -> HeatMap:
    """(n, m, side, side): what speaks for each of the m `classes` (n, m) of n presized images, in their centre views.

    The maps of one image have one scale, so that a class that less speaks for has a fainter one. What speaks against a
    class is 0. `device` is the predictor's. Raises `ValueError` if the network has no square map of features.
    """
    predictor = Predictor(folder, device=device)
    predictor.model.requires_grad_(False)  # gradients end at the features
    maps: list[HeatMap] = []
    for batch in predictor.batches(images):
        done = sum(map(len, maps))
        evidence = _evidence(predictor, batch, classes[done : done + len(batch)]).clamp(min=0)
        largest = evidence.amax(dim=(1, 2, 3), keepdim=True)
        maps.append((evidence / largest.masked_fill(largest == 0, 1)).cpu().numpy())
    return np.concatenate(maps)


def _evidence(predictor: Predictor, batch: torch.Tensor, classes: npt.NDArray[np.int64]) -> torch.Tensor:
    """(n, m, side, side): the terms of a first-order expansion of the classes' logits."""
    import torch

    model: Any = predictor.model
    features: list[torch.Tensor] = []

    def watched(tensor: torch.Tensor) -> torch.Tensor:
        features.append(tensor if tensor.requires_grad else tensor.detach().requires_grad_())
        return features[-1]

    def network(x: torch.Tensor) -> torch.Tensor:
        last = model.forward_features(x)
        if not isinstance(last, torch.Tensor) or last.ndim not in (3, 4):
            raise ValueError(f"the features of {_arch(model)} are no map")
        logits: torch.Tensor = model.forward_head(watched(last))
        return logits

    with _watching_attention(model, watched):
        logits = predictor.forward(network, batch)
    # A softmax ignores what is added to all logits, so the mean, which says nothing of a class, is left out.
    scores = logits.gather(1, torch.as_tensor(classes, device=logits.device)) - logits.mean(dim=1, keepdim=True)
    found = []
    for score in scores.sum(dim=0):
        gradients = torch.autograd.grad(score, features, retain_graph=True)
        *attended, last = (x.detach().float() * g.float() for x, g in zip(features, gradients, strict=True))
        terms = _on_grid(model, last)
        if attended and not terms.any():  # the head reads only the class token
            terms = _on_grid(model, *attended)
        found.append(terms)
    return torch.stack(found, dim=1)


@contextmanager
def _watching_attention(model: Any, watched: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Within it, the input of a transformer's last attention passes through `watched`."""
    blocks = getattr(model, "blocks", None)
    attention: nn.Module | None = getattr(blocks[-1], "attn", None) if blocks else None
    if attention is None:
        yield
        return
    hook = attention.register_forward_pre_hook(lambda module, inputs: (watched(inputs[0]), *inputs[1:]))
    try:
        yield
    finally:
        hook.remove()


def _on_grid(model: Any, terms: torch.Tensor) -> torch.Tensor:
    """(n, side, side): the sums over channels of features as (n, channels, side, side), (n, side, side, channels), or
    (n, tokens, channels), which begin with those that are no patches, unless these are added later."""
    if terms.ndim == 4:
        sums = terms.sum(dim=1 if terms.shape[2] == terms.shape[3] else 3)
    else:
        count = terms.shape[1]
        sides = ((n, math.isqrt(count - n)) for n in (getattr(model, "num_prefix_tokens", 0), 0))
        first, side = next(((n, side) for n, side in sides if side**2 == count - n), (count - 1, 1))
        sums = terms[:, first:].sum(dim=2).unflatten(1, (side, side))
    if sums.shape[1] != sums.shape[2] or sums.shape[1] < 2:
        shape = " x ".join(map(str, terms.shape[1:]))
        raise ValueError(f"the features of {_arch(model)} are {shape}, and no square map of 2 x 2 or more")
    return sums


def _arch(model: Any) -> str:
    return str(model.pretrained_cfg["architecture"])


def overlay(view: Pixels, heat: HeatMap) -> Pixels:
    """`view` (size, size, 3) under a heat map (side, side): yellow where that is 1, as it is where that is 0."""
    smooth = np.clip(cv2.resize(heat, view.shape[:2], interpolation=cv2.INTER_CUBIC), 0, 1)
    colours = cv2.applyColorMap(np.rint(255 * smooth).astype(np.uint8), cv2.COLORMAP_INFERNO)[..., ::-1]
    share = STRENGTH * smooth[..., None]
    return np.rint((1 - share) * view + share * colours).astype(np.uint8)


# --- File -------------------------------------------------------------------------------------------------------------


def save_heat_maps(file: Path, paths: Sequence[str], maps: HeatMap | None, problem: str = "") -> None:
    """As JSON; `maps` (n, 2, side, side) are of the predicted and of the actual class of the images `paths`. Without
    them, `problem` says why there are none."""
    rounded = [] if maps is None else maps.astype(np.float64).round(3).tolist()
    images = [{"path": path, "predicted": of[0], "actual": of[1]} for path, of in zip(paths, rounded, strict=False)]
    file.write_text(json.dumps({"problem": problem, "images": images}), encoding="utf-8")


def read_heat_maps(file: Path) -> tuple[dict[str, tuple[HeatMap, HeatMap]], str]:
    """The maps of the predicted and of the actual class, by path, and why there are none. Raises `ValueError`."""
    saved = read_json(file)
    try:
        images = saved["images"]
        maps = {each["path"]: (_array(each["predicted"]), _array(each["actual"])) for each in images}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error!r})") from error
    return maps, str(saved.get("problem", ""))


def _array(rows: list[list[float]]) -> HeatMap:
    return np.array(rows, dtype=np.float32)
