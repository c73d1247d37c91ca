"""The README.md of an export: what the model is, how to use it, what it was trained on, and its limits."""

import math
import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from huggingface_hub import ModelCardData

from search.exporting.export_formats import INPUT, ONNX_FILE, OPSET, OUTPUT, PROGRAM_FILE
from search.reporting.test_set import describe_score, read_test
from search.runs.command import CommandRecord
from search.runs.kept_models import REFIT
from search.runs.kinds import how_many, name_of
from search.runs.result_rows import CALIBRATION, EXPECTED
from search.runs.run_record import RunRecord
from search.runs.statistics import wilson_interval
from trainables.data.address import DataAddress
from trainables.inference.model_folder import ModelFolder
from trainables.recipe import spec_of
from trainables.system.text import percent, printable
from trainables.training.metrics import MORE_METRICS

OURS_SHELL = "python -m search.predict . photo.jpg --top 3"
OURS = """
from search.predict import Predictor

print(*Predictor(".").predict(["photo.jpg"])[0].chosen)
"""
TIMM = """
import timm
import torch
from PIL import Image

model = timm.create_model("local-dir:.", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
with torch.inference_mode():
    logits = model(transform(Image.open("photo.jpg").convert("RGB"))[None])
labels = model.pretrained_cfg["label_names"]
"""
READ = """
import json

import numpy as np
from PIL import Image, ImageOps

with open("labels.json", encoding="utf-8") as file:
    labels = json.load(file)
photo = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("RGB")
%s
photo = photo.resize(({side}, {side}), Image.Resampling.BILINEAR)
images = np.asarray(photo, np.float32).transpose(2, 0, 1)[None] / 255
"""
SQUARES = {
    "crop": "photo = ImageOps.fit(photo, ({presize}, {presize}), Image.Resampling.BILINEAR)",
    "squish": "photo = photo.resize(({presize}, {presize}), Image.Resampling.BILINEAR)",
    "pad": """photo = ImageOps.contain(photo, ({presize}, {presize}), Image.Resampling.BILINEAR)
wide, high = ({presize} - side for side in photo.size)
edges = (high // 2, high - high // 2), (wide // 2, wide - wide // 2), (0, 0)
photo = Image.fromarray(np.pad(photo, edges, mode="reflect"))""",
}
"""Code by Pillow that makes an image a square of the presized side, nearly as in training."""
ONNX = f"""
import onnxruntime

session = onnxruntime.InferenceSession("{ONNX_FILE}")
(logits,) = session.run(["{OUTPUT}"], {{"{INPUT}": images}})
"""
PROGRAM = f"""
import torch

model = torch.export.load("{PROGRAM_FILE}").module()
with torch.inference_mode():
    logits = model(torch.from_numpy(images))
"""
ANSWER = "print(labels[int(logits[0].argmax())])"
"""Of all code above."""
ANSWERS = """
import json

import numpy as np

with open("preprocessing.json", encoding="utf-8") as file:
    thresholds = json.load(file)["thresholds"]
probabilities = 1 / (1 + np.exp(-np.asarray(logits[0])))
print(*(label for label, p, least in zip(labels, probabilities, thresholds) if p > least))
"""
"""The same where an image may have several labels."""
RESIZE_METHODS = {
    "crop": "its shorter side is resized to {presize} px and the centre square taken",
    "squish": "it is squeezed to a square of {presize} px",
    "pad": "its longer side is resized to {presize} px and the rest of the square filled by mirroring the edges",
}
MAX_LABELS = 200  # in the card; labels.json has them all


def model_card(
    model: ModelFolder,
    metrics: dict[str, Any],
    command: CommandRecord,
    run: RunRecord | None,
    formats: Sequence[str],
) -> str:
    """The card as Markdown, with the sizes of the splits and of the search if `run` is known."""
    parts = (
        _front_matter(model),
        _summary(model, metrics, run),
        _usage(model, formats),
        _data(model, command, run),
        _errors(metrics, run),
        _limits(model, metrics),
        _preprocessing(model),
        _recipe(model),
        _versions(command),
    )
    return "\n\n".join(parts) + "\n"


def text(value: object) -> str:
    """`value` in one line, escaped so that Markdown shows it as it is."""
    line = printable(" ".join(str(value).split()))
    line = re.sub(r"(?<![^\W_])_|_(?![^\W_])|[\\*#\[\]~$]", r"\\\g<0>", line)
    line = escape(line, quote=False).replace("|", "&#124;").replace("`", "&#96;")
    # what GitHub and model hubs turn into links
    return line.replace("://", "&#58;//").replace("www.", "www&#46;").replace("@", "&#64;")


def _front_matter(model: ModelFolder) -> str:
    """YAML for model hubs. It names no base model: the weights may come from anywhere."""
    data = ModelCardData(
        # hubs show how to load the model with this library; timm cannot build other heads
        library_name="timm" if model.recipe.head == "linear" else "finetune-search",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", "finetune-search"],
        metrics=["accuracy"],
    )
    return f"---\n{data.to_yaml()}\n---"


def _summary(model: ModelFolder, metrics: dict[str, Any], run: RunRecord | None) -> str:
    chosen = ""
    if run is not None:
        number, best = metrics.get("number"), None if run.best is None else run.best.name
        which = "the best of" if number in (None, best) else f"{name_of(number)} of"
        chosen = f", {which} {how_many(run.completed['kind'], 'completed trial')} ({len(run.trials)} started)"
    made = "fine-tuned from pretrained weights" if model.recipe.pretrained else "fine-tuned from scratch"
    if model.recipe.total_epochs == 0:
        made = "a probe: the frozen features of pretrained weights with a trained head"
    exactly = ", which is not to have exactly the labels that they have" if model.preprocessing.several_labels else ""
    return (
        f"# {text(model.recipe.arch)} for {len(model.labels)} classes\n\n"
        f"An image classifier, {made}{chosen}: {percent(metrics['error_rate'])} wrong on its validation "
        f"images{exactly}."
    )


def _usage(model: ModelFolder, formats: Sequence[str]) -> str:
    """Code that loads and runs the model in each format."""
    parts = ["## How to use it", "Run in this folder, with an image called photo.jpg in it."]
    parts += ["With finetune-search, which reads images as in training, in a shell or from Python:"]
    parts += [_code(OURS_SHELL, "sh"), _code(OURS)]
    answer = ANSWERS if model.preprocessing.several_labels else ANSWER
    if model.preprocessing.several_labels:
        parts.append(
            "An image may have several labels, or none: those whose probability, the sigmoid of the logit, is above "
            "their threshold in preprocessing.json, at which F1 on the validation images is largest."
        )
    if model.recipe.head == "linear":
        parts += ["With timm:", _code(TIMM + answer)]
    else:
        parts.append("timm cannot build its head (head=mlp); the other formats contain the whole model.")
    if {"onnx", "pt2"} & set(formats):
        squash = "sigmoids" if model.preprocessing.several_labels else "softmax"
        side = model.preprocessing.image_size
        read = (READ % SQUARES[model.preprocessing.resize_method]).format(
            side=side, presize=model.preprocessing.presize
        )
        parts += [
            f"The other formats take RGB pixels in 0..1 that are **not** normalised, `{INPUT}`, float32 (batch, 3, "
            f"{side}, {side}), for any number of images, and give `{OUTPUT}`, float32 (batch, {len(model.labels)}), "
            f"whose {squash} are the probabilities. With Pillow, which rounds slightly differently from training, an "
            "image is read like this:",
            _code(read),
        ]
    if "onnx" in formats:
        parts += [
            f"and then run with ONNX Runtime (opset {OPSET}; the labels are also in the file's metadata):",
            _code(ONNX + answer),
        ]
    if "pt2" in formats:
        parts += [
            "or run with torch alone, in the version that wrote the file or a later one:",
            _code(PROGRAM + answer),
        ]
    return "\n\n".join(parts)


def _data(model: ModelFolder, command: CommandRecord, run: RunRecord | None) -> str:
    rows: list[tuple[str, Any]] = [("data set", DataAddress.of(command.data).path.name)]
    rows.append(("classes", len(model.labels)))
    if run is not None and run.num_train and run.num_valid:
        rows += [("training images", run.num_train), ("validation images", run.num_valid)]
    rows.append(("seed of the split, unless the data has its own", command.split_seed))
    if command.arguments.group:
        rows.append(("groups that the split keeps together", command.arguments.group))
    shown = _table(("output", "class"), enumerate(model.labels[:MAX_LABELS]))
    more = len(model.labels) - MAX_LABELS
    rest = f"\n\nand {more} more, in labels.json" if more > 0 else ""
    return f"## Data\n\n{_table(('', ''), rows)}\n\nClasses, in the order of the outputs:\n\n{shown}{rest}"


def _errors(metrics: dict[str, Any], run: RunRecord | None) -> str:
    error, tta = metrics["error_rate"], metrics.get("tta_error_rate")
    rows = [("validation error", percent(error, 2))]
    if run is not None and run.num_valid:
        low, high = wilson_interval(error, run.num_valid)
        rows.append(("95 % interval (Wilson)", f"{percent(low, 2)} to {percent(high, 2)}"))
    if (expected := metrics.get(EXPECTED)) is not None and expected == expected:
        rows.append(("expected on new images, from the probe's error on all images", percent(expected, 2)))
    if tta is not None and tta == tta:
        rows.append(("with test-time augmentation", percent(tta, 2)))
    if metrics.get("valid_loss") is not None:
        rows.append(("validation loss", f"{metrics['valid_loss']:.4f}"))
    for name, value in ((name, metrics.get(name)) for name in MORE_METRICS):
        if value is not None and value == value:
            rows.append((name.replace("_", " "), f"{value:.4f}"))
    if refit := metrics.get(REFIT):
        rows.append(("images that trained it again, those for validation among them", refit["train_images"]))
        if refit.get("averaged", 1) > 1:
            rows.append(
                ("trainings whose weights were averaged (arXiv:2203.05482), this one among them", refit["averaged"])
            )
    rows += _calibration(metrics, run)
    trials = "" if run is None else f" {how_many(run.completed['kind'], 'completed trial')} of"
    epoch = ", and its epoch," if run is not None and run.command.arguments.keep_epoch == "best" else ""
    return (
        f"## Error\n\n{_table(('', ''), rows)}\n\nThe same validation images chose this model{epoch} among{trials} a "
        "search, so the figures are optimistic: expect a somewhat larger error on new images of the same kind. The "
        f"interval reflects the number of images, not the choice.{_refit(metrics)}{_test(metrics, run)}"
    )


def _refit(metrics: dict[str, Any]) -> str:
    """Whose error it is, where the model was trained again on all images."""
    if REFIT not in metrics:
        return ""
    return (
        "\n\nThese are the figures of the same recipe trained without the validation images. This model was trained "
        "again with them, so no images are left to measure its error on. It is expected to be a little lower."
    )


def _calibration(metrics: dict[str, Any], run: RunRecord | None) -> list[tuple[str, str]]:
    """Rows about the temperature; none if an earlier version trained the model."""
    temperature, before, after = (metrics.get(name, math.nan) for name in CALIBRATION)
    if math.isnan(temperature):
        return []
    images = f"{run.num_valid} validation images" if run is not None and run.num_valid else "the validation images"
    return [
        (f"temperature, fitted on {images} and included in the weights", f"{temperature:.4g}"),
        ("expected calibration error before it (15 bins)", percent(before, 2)),
        ("after it, with temperatures fitted on the other half of the images", percent(after, 2)),
    ]


def _test(metrics: dict[str, Any], run: RunRecord | None) -> str:
    """The error on test images that were held out of the search, if any."""
    tested = None if run is None else read_test(run.folder)
    scores = [score for score in (tested["winner"], tested["trial_0"]) if score] if tested else []
    if not (mine := [describe_score(score) for score in scores if score["trial"] == metrics.get("number")]):
        return ""
    return f"\n\nOn test images, which were held out of the search and read once, at its end, {mine[0]}."


def _preprocessing(model: ModelFolder) -> str:
    found = model.preprocessing
    square = RESIZE_METHODS[found.resize_method].format(presize=found.presize)
    mean, std = (", ".join(f"{value:.4g}" for value in values) for values in (found.mean, found.std))
    return (
        f"## Preprocessing\n\nAn image is turned upright (EXIF) and converted to RGB, {square}, and the square is "
        f"resized to {found.image_size} px, always bilinearly. Pixels in 0..1 are normalised by mean ({mean}) and "
        f"standard deviation ({std}) per RGB channel: by the model itself as ONNX and pt2, before it with timm."
    )


LIMITS = """## Limits

The model answers with {answer} whatever the image shows. Its probabilities are {calibrated}. Nothing is known
about its errors on images unlike its training images, such as from another camera, place, crop or time. It shares the
biases of its training images and pretrained weights."""


def _limits(model: ModelFolder, metrics: dict[str, Any]) -> str:
    answer = "labels of its classes alone" if model.preprocessing.several_labels else "one of its classes"
    calibrated = "calibrated on images like those of its validation, and wrong for others"
    known = calibrated if _calibration(metrics, None) else "not calibrated"
    return LIMITS.format(answer=answer, calibrated=known)


def _recipe(model: ModelFolder) -> str:
    rows = [(name, value, spec_of(name).metadata["doc"]) for name, value in model.recipe.to_dict().items()]
    return f"## Recipe\n\n{_table(('setting', 'value', 'meaning'), rows)}"


def _versions(command: CommandRecord) -> str:
    rows = list(command.versions.items())
    rows += [(name, value) for name, value in command.hardware.items() if not isinstance(value, list)]
    return f"## Made with\n\n{_table(('', ''), rows)}" if rows else "## Made with\n\nfinetune-search"


def _table(head: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(map(text, row))} |" for row in rows)])


def _code(source: str, language: str = "python") -> str:
    return f"```{language}\n{source.strip()}\n```"
