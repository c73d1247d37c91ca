"""Exports a trained model as files that run without this project: ONNX, and torch.export's program.

Both take RGB pixels in 0..1, float32 (batch, 3, side, side) of any batch size, normalise them inside, and give the
logits, float32 (batch, classes), over the temperature: a caller can forget neither the normalisation nor the
calibration. Both contain the labels and the preprocessing, and compute in fp32, whatever precision training validated
in.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from trainables.inference.model_folder import ModelFolder
from trainables.training.checkpoint import WEIGHTS_FILE

if TYPE_CHECKING:
    import torch
    from torch import nn

Floats = npt.NDArray[np.float32]
Graph = Callable[[Floats], Floats]
"""Pixels in 0..1 (batch, 3, side, side) -> logits (batch, classes)."""
ONNX_FILE, PROGRAM_FILE = "model.onnx", "model.pt2"
FILES = {"safetensors": WEIGHTS_FILE, "onnx": ONNX_FILE, "pt2": PROGRAM_FILE}
"""The file of each format."""
INPUT, OUTPUT = "images", "logits"
OPSET = 18
"""Of the ONNX model: torch's exporter writes it without a conversion; ONNX Runtime has it since 1.14 (2023)."""
PACKAGES = ("onnx", "onnxruntime", "onnxscript")
"""What the extra `onnx` installs."""


def parse_formats(text: str) -> tuple[str, ...]:
    """The formats in a list such as safetensors,onnx; safetensors is always included. Raises `ValueError`."""
    asked = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := [name for name in asked if name not in FILES]:
        raise ValueError(f"--format {unknown[0]} is unknown. Known: {', '.join(FILES)}.")
    return tuple(name for name in FILES if name in asked or name == "safetensors")


def require_packages(formats: tuple[str, ...]) -> None:
    """Raises `ValueError` if a package is missing that a format needs."""
    missing = [name for name in PACKAGES if "onnx" in formats and not _installed(name)]
    if missing:
        raise ValueError(f"--format onnx needs {' and '.join(missing)}: pip install {' '.join(PACKAGES)}")


def write_formats(folder: ModelFolder, model: nn.Module, formats: tuple[str, ...], out: Path) -> None:
    """Write the model in `folder` to the folder `out` in all `formats` except safetensors.

    Raises `ValueError` if torch cannot export this architecture.
    """
    asked = [name for name in WRITERS if name in formats]
    if not asked:
        return
    try:
        with _quiet():
            program = exported_program(folder, model)
            for name in asked:
                WRITERS[name](program, metadata(folder), out / FILES[name])
    except OSError:
        raise  # such as a full disk, which is not about the architecture
    except Exception as error:  # the exporters have no common base class
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{folder.recipe.arch} cannot be exported as {' or '.join(asked)}: {reason} Remove it from --format."
        ) from error


def metadata(folder: ModelFolder) -> dict[str, str]:
    """Metadata of both files, as JSON by name: properties in ONNX, extra files named <name>.json in pt2."""
    takes = "RGB pixels in 0..1, float32 (batch, 3, image_size, image_size); normalised inside by mean and std"
    preprocessing = folder.preprocessing.to_dict() | {"input": takes}
    return {"labels": json.dumps(folder.labels), "preprocessing": json.dumps(preprocessing)}


def write_program(program: torch.export.ExportedProgram, metadata: dict[str, str], path: Path) -> None:
    import torch

    torch.export.save(program, path, extra_files={f"{name}.json": value for name, value in metadata.items()})


def write_onnx(program: torch.export.ExportedProgram, metadata: dict[str, str], path: Path) -> None:
    """A single file that includes the weights."""
    import torch

    onnx_program = torch.onnx.export(
        program,
        input_names=[INPUT],
        output_names=[OUTPUT],
        dynamic_shapes={INPUT: {0: "batch"}},  # names the dimension that the program has
        opset_version=OPSET,
        dynamo=True,
        verbose=False,
    )
    assert onnx_program is not None  # as it is with dynamo=True
    onnx_program.model.metadata_props.update(metadata)
    onnx_program.save(path, external_data=False)


WRITERS = {"onnx": write_onnx, "pt2": write_program}


def exported_program(folder: ModelFolder, model: nn.Module) -> torch.export.ExportedProgram:
    """`model` with its normalisation, for any batch size."""
    import torch

    side = folder.preprocessing.image_size
    whole = with_normalization(folder, model).eval()
    example = torch.rand(2, 3, side, side)  # with 1, torch would fix the batch size
    with torch.no_grad():
        return torch.export.export(whole, (example,), dynamic_shapes={INPUT: {0: torch.export.Dim("batch")}})


def with_normalization(folder: ModelFolder, model: nn.Module) -> nn.Module:
    """RGB pixels in 0..1 -> logits."""
    import torch
    from torch import nn

    class Normalized(nn.Module):
        mean: torch.Tensor
        std: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.model = model
            for name in ("mean", "std"):
                values = torch.tensor(getattr(folder.preprocessing, name)).view(1, 3, 1, 1)
                self.register_buffer(name, values)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.model((images - self.mean) / self.std)
            return logits

    return Normalized()


def open_onnx(path: Path) -> Graph:
    """The model as a function of pixels in 0..1, on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(images: Floats) -> Floats:
        (logits,) = session.run([OUTPUT], {INPUT: images})
        return np.asarray(logits)

    return run


def open_program(path: Path) -> Graph:
    """A torch.export program as a function of pixels in 0..1, on the CPU."""
    import torch

    model = torch.export.load(path).module()

    def run(images: Floats) -> Floats:
        with torch.inference_mode():
            return np.asarray(model(torch.from_numpy(images)))

    return run


OPENERS = {"onnx": open_onnx, "pt2": open_program}


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences torch's exporters, which report their steps and deprecations in torch itself."""
    names = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")
    before = {name: logging.getLogger(name).level for name in names}
    try:
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # `sys.modules` holds something else under this name
        return False
