"""How many images a second `Predictor.predict` labels from files, beside the bare model on a batch that is ready.

    python bench/predict.py [--data DIR] [--arch NAME ...]

Both take turns in one process, on the same threads, with the same batch size and precision. The weights are random,
which changes no time. Without --data the photos are drawn, of the size of those of Oxford-IIIT Pets. Writes
predict.json and predict.md. Wants a machine with nothing else to do.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import safetensors.torch
import torch
from common import RESULTS, command_line, draw_photos, footer, hardware, versions, write

from search.predict import Predictor, find_files
from trainables.batches.loader import normalized
from trainables.network.model import build
from trainables.recipe import Recipe

NUM_CLASSES = 37


def model_folder(folder: Path, recipe: Recipe) -> Path:
    """What the predictor reads of an export, with random weights."""
    folder.mkdir()
    network = build(recipe, NUM_CLASSES)
    safetensors.torch.save_file(network.model.state_dict(), folder / "model.safetensors")
    preprocessing = {name: getattr(recipe, name) for name in ("presize", "image_size", "resize_method")}
    contents = {
        "recipe": recipe.to_dict(),
        "labels": [f"class {i}" for i in range(NUM_CLASSES)],
        "preprocessing": preprocessing | {"mean": network.mean, "std": network.std},
    }
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def bare_rate(predictor: Predictor, num_images: int) -> float:
    """Images a second of the model alone, on one normalised batch again and again."""
    side, batch_size = predictor.preprocessing.image_size, min(predictor.batch_size, num_images)
    pixels = torch.randint(0, 256, (batch_size, 3, side, side), dtype=torch.uint8, device=predictor.device)
    batch, steps = normalized(pixels, predictor.mean, predictor.std), max(1, num_images // batch_size)
    batch = batch.contiguous(memory_format=torch.channels_last)
    started = time.perf_counter()
    with (
        torch.inference_mode(),
        torch.autocast(predictor.device.type, predictor.amp_dtype, enabled=predictor.amp_dtype is not None),
    ):
        for _ in range(steps):
            last = predictor.model(batch)
    last.sum().item()  # it must be there now
    return steps * batch_size / (time.perf_counter() - started)


def predict_rate(predictor: Predictor, paths: list[Path]) -> float:
    """Images a second from files to labels."""
    started = time.perf_counter()
    found = predictor.predict(paths, top=1)
    seconds = time.perf_counter() - started
    if problems := [prediction.problem for prediction in found if prediction.problem]:
        raise ValueError(f"{len(problems)} images could not be read: {problems[0]}")
    return len(paths) / seconds


def start_seconds(folder: Path, image: Path) -> float:
    """Of the whole command for one image, imports and all."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "search.predict", str(folder), str(image)]
    subprocess.run(command, check=True, capture_output=True, cwd=Path(__file__).parents[1])
    return time.perf_counter() - started


def measure(archs: list[str], paths: list[Path], args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as root:
        return {arch: measure_one(arch, Path(root) / arch, paths, args) for arch in archs}


def measure_one(arch: str, folder: Path, paths: list[Path], args: argparse.Namespace) -> dict[str, Any]:
    settings = {"arch": arch, "pretrained": False, "image_size": args.image_size, "presize": args.presize}
    predictor = Predictor(model_folder(folder, Recipe.from_dict(settings)), batch_size=args.batch_size)
    timers = {"bare": lambda: bare_rate(predictor, len(paths)), "predict": lambda: predict_rate(predictor, paths)}
    runs = []
    for repeat in range(args.repeats + 1):  # the first is not counted
        order = [*timers][:: -1 if repeat % 2 else 1]
        run = {side: timers[side]() for side in order}
        rates = f"predict {run['predict']:7.1f}  bare {run['bare']:7.1f} images/s"
        print(f"{arch}  {f'repeat {repeat}' if repeat else 'warm-up':9}  {rates}", flush=True)
        runs.append(run)
    found = {side: median(run[side] for run in runs[1:]) for side in ("predict", "bare")}
    found |= {"ratio": median(run["predict"] / run["bare"] for run in runs[1:])}
    found |= {"precision": str(predictor.amp_dtype or torch.float32).removeprefix("torch.")}
    return found | {"start_seconds": start_seconds(folder, paths[0]), "runs": runs[1:]}


def markdown(result: dict[str, Any]) -> str:
    used, models = result["settings"], result["models"]
    lines = [
        f"| {arch} | {found['predict']:.1f} | {found['bare']:.1f} | {found['ratio']:.2f} | {found['precision']} "
        f"| {found['start_seconds']:.1f} |"
        for arch, found in models.items()
    ]
    return f"""# Images per second of prediction, from files to labels

`{result["command"]}`

{result["images"]} JPEG files of {result["data"]}, {used["image_size"]} px by way of {used["presize"]} px, batch size
{used["batch_size"]}. Beside it the bare model on one normalised batch, again and again. Medians of
n = {used["repeats"]} repeats, in which both take turns; seed {used["seed"]}. The last column is
`python -m search.predict` for one image, once.

| model | predict, images/s | bare model, images/s | ratio | precision | whole command, s |
|---|---|---|---|---|---|
{chr(10).join(lines)}

{footer(result)}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of images (default: drawn photos)")
    parser.add_argument("--images", type=int, default=384, metavar="N", help="drawn photos (384)")
    parser.add_argument("--arch", nargs="+", default=["tf_efficientnet_lite0", "resnet18", "resnet34"], metavar="NAME")
    parser.add_argument("--repeats", type=int, default=5, metavar="N")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N")
    parser.add_argument("--presize", type=int, default=460, metavar="PX")
    parser.add_argument("--image-size", type=int, default=224, metavar="PX")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the drawn photos (0)")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        data = args.data or draw_photos(Path(root) / "photos", args.images, args.seed)
        paths = find_files(str(data))
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        names = ("repeats", "batch_size", "presize", "image_size", "seed")
        result = {
            "command": command_line(),
            "data": args.data.name if args.data else "drawn photos, 500 x 375 px",
            "images": len(paths),
            "settings": {name: getattr(args, name) for name in names},
            "hardware": hardware(gpu),
            "versions": versions("torch", "timm", "numpy", "opencv-python-headless", "pillow"),
            "models": measure(args.arch, paths, args),
        }
    write(args.out, "predict", result, markdown(result))


if __name__ == "__main__":
    main()
