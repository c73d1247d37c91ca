"""The README.md of an export: what the model is, how to use it, what it was trained on, and how far to trust it."""

import json
import re
from collections.abc import Sequence
from html import escape
from pathlib import PurePath
from typing import Any

from search.export_formats import INPUT, ONNX_FILE, OUTPUT, PROGRAM_FILE
from search.run_record import RunRecord, wilson_interval
from search.wording import many, percent
from trainables.model_folder import ModelFolder

OURS = """
from search.predict import Predictor

print(Predictor(".").predict(["photo.jpg"])[0].labels[0])
"""
TIMM = """
import timm

model = timm.create_model("local-dir:.", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
"""
READ = """
import json

import numpy as np
from PIL import Image, ImageOps

labels = json.load(open("labels.json"))
photo = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("RGB")
photo = %s
images = np.asarray(photo, np.float32).transpose(2, 0, 1)[None] / 255
"""
SQUARES = {
    "crop": "ImageOps.fit(photo, ({side}, {side}), Image.Resampling.BILINEAR)",
    "squish": "photo.resize(({side}, {side}), Image.Resampling.BILINEAR)",
    "pad": "ImageOps.pad(photo, ({side}, {side}), Image.Resampling.BILINEAR)",
}
ONNX = f"""
import onnxruntime

session = onnxruntime.InferenceSession("{ONNX_FILE}")
(logits,) = session.run(["{OUTPUT}"], {{"{INPUT}": images}})
print(labels[logits[0].argmax()])
"""
PROGRAM = f"""
import torch

model = torch.export.load("{PROGRAM_FILE}").module()
print(labels[model(torch.from_numpy(images))[0].argmax()])
"""
METHODS = {
    "crop": "its centre square is taken",
    "squish": "it is squeezed to a square",
    "pad": "it is made a square by mirroring its edges",
}


def model_card(
    model: ModelFolder,
    metrics: dict[str, Any],
    command: dict[str, Any],
    run: RunRecord | None,
    formats: Sequence[str],
) -> str:
    """The card as Markdown; `run` tells the size of the splits and of the search, and may be missing."""
    parts = [_front_matter(model, metrics), _summary(model, metrics, run), _use(model, formats)]
    parts += [_data(model, command, run), _errors(metrics, run), _preprocessing(model)]
    parts += [_recipe(model), _made_with(command)]
    return "\n\n".join(parts) + "\n"


def text(value: object) -> str:
    """`value` in Markdown as it is, whatever it looks like, in one line."""
    line = re.sub(r"(?<![^\W_])_|_(?![^\W_])|[\\*#\[\]]", r"\\\g<0>", " ".join(str(value).split()))
    return escape(line, quote=False).replace("|", "&#124;").replace("`", "&#96;")


def _front_matter(model: ModelFolder, metrics: dict[str, Any]) -> str:
    """For model hubs: YAML, of which JSON is a part."""
    fields = {
        "library_name": "timm",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "timm", "finetune-search"],
        "base_model": f"timm/{model.recipe.arch}" if model.recipe.pretrained else None,
        "metrics": ["accuracy"],
    }
    lines = [f"{name}: {json.dumps(value)}" for name, value in fields.items() if value is not None]
    return "\n".join(["---", *lines, "---"])


def _summary(model: ModelFolder, metrics: dict[str, Any], run: RunRecord | None) -> str:
    chosen = f", the best of {many(len(run.completed), 'completed trial')}" if run is not None else ""
    started = "from pretrained weights" if model.recipe.pretrained else "from scratch"
    return (
        f"# {text(model.recipe.arch)} for {len(model.labels)} classes\n\n"
        f"An image classifier, fine-tuned {started}{chosen}: {percent(metrics['error_rate'])} wrong on its validation "
        "images."
    )


def _use(model: ModelFolder, formats: Sequence[str]) -> str:
    """Ways to load it; the code runs as it stands, beside this file and an image called photo.jpg."""
    parts = ["## How to use it", "With the project that made it, which reads images as in training:", _code(OURS)]
    if model.recipe.head == "linear":
        parts += ["With timm:", _code(TIMM)]
    else:
        parts.append("timm cannot build its head (head=mlp); the other formats hold all of it.")
    if {"onnx", "pt2"} & set(formats):
        square = SQUARES[model.preprocessing.resize_method].format(side=model.preprocessing.image_size)
        parts += ["The other formats take pixels in 0..1, any number of images at once:", _code(READ % square)]
    if "onnx" in formats:
        parts += ["With ONNX Runtime:", _code(ONNX)]
    if "pt2" in formats:
        parts += ["With torch alone:", _code(PROGRAM)]
    return "\n\n".join(parts)


def _data(model: ModelFolder, command: dict[str, Any], run: RunRecord | None) -> str:
    rows = [("data set", PurePath(command["data"]).name), ("classes", str(len(model.labels)))]
    if run is not None and run.num_train and run.num_valid:
        rows += [("training images", run.num_train), ("validation images", run.num_valid)]
    rows.append(("seed of the split, where the data has none of its own", command.get("split_seed", 0)))
    names = ", ".join(map(text, model.labels))
    return f"## Data\n\n{_table(('', ''), rows)}\n\nClasses: {names}"


def _errors(metrics: dict[str, Any], run: RunRecord | None) -> str:
    error, tta = metrics["error_rate"], metrics.get("tta_error_rate")
    rows = [("validation error", percent(error, 2))]
    if run is not None and run.num_valid:
        low, high = wilson_interval(error, run.num_valid)
        rows.append(("95 % interval (Wilson)", f"{percent(low, 2)} to {percent(high, 2)}"))
    if tta is not None and tta == tta:
        rows.append(("with test-time augmentation", percent(tta, 2)))
    if metrics.get("valid_loss") is not None:
        rows.append(("validation loss", f"{metrics['valid_loss']:.4f}"))
    return (
        f"## Error\n\n{_table(('', ''), rows)}\n\nThe same validation images chose this model among the trials of a "
        "search, so its error on new images of the same kind will be somewhat larger; of images of another kind "
        "nothing is known."
    )


def _preprocessing(model: ModelFolder) -> str:
    found = model.preprocessing
    mean, std = (", ".join(f"{value:.4g}" for value in values) for values in (found.mean, found.std))
    return (
        f"## Preprocessing\n\nAn image is turned upright (EXIF), made RGB, {METHODS[found.resize_method]}, and resized "
        f"to {found.image_size} px, bilinear (by way of {found.presize} px). Pixels in 0..1 are normalised by "
        f"mean ({mean}) and standard deviation ({std}), per RGB channel; inside the model in the ONNX and pt2 formats, "
        "outside of it for timm."
    )


def _recipe(model: ModelFolder) -> str:
    return f"## Recipe\n\n{_table(('setting', 'value'), model.recipe.to_dict().items())}"


def _made_with(command: dict[str, Any]) -> str:
    rows = list(command.get("versions", {}).items())
    rows += [(name, value) for name, value in command.get("hardware", {}).items() if not isinstance(value, list)]
    return f"## Made with\n\n{_table(('', ''), rows)}" if rows else "## Made with\n\nfinetune-search"


def _table(head: tuple[str, str], rows) -> str:
    lines = [f"| {' | '.join(head)} |", "|---|---|", *(f"| {text(name)} | {text(value)} |" for name, value in rows)]
    return "\n".join(lines)


def _code(source: str) -> str:
    return f"```python\n{source.strip()}\n```"
