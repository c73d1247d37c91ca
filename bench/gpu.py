"""How fast does fine-tuning run on a GPU, does the network wait for its images, and is the GPU used well?

    python bench/gpu.py
    python bench/gpu.py --arch resnet50 --precision bf16 --compile --layouts
    python bench/gpu.py --at-once 1,2,4,8

The last one measures something else: how many trials an hour a GPU trains that so many share, see `gpu_at_once`.

Images are drawn, as large and as detailed as those of Oxford-IIIT Pets, and presized once. Measured apart: the pipeline
(`FineTune` plans an epoch, loads, augments and normalizes, and trains nothing), the step (`FineTune` trains again and
again on one batch that is on the device), an epoch of both (the second), and as the device's peak the best square
matrix product, so that no data sheet is needed. Weights are random. Needs what `trainables.finetune` imports, but
neither Ray nor an installed project. Writes gpu.json and gpu.md, after every architecture.
"""

import argparse
import contextlib
import gc
import itertools
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from statistics import median
from typing import Any

import gpu_at_once
import torch
from common import CPUS, RESULTS, command_line, draw_photos, footer, hardware, versions, write
from torch.utils.flop_counter import FlopCounterMode

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where the project is not installed

from trainables.data.layouts import find_images
from trainables.data.presize import PresizedImages, presize
from trainables.network.model import check_architecture
from trainables.recipe import Recipe
from trainables.training.fine_tune import FineTune

ARCHS = ["resnet18", "resnet34", "resnet50", "resnet101"]
ARCHS += ["tf_efficientnet_lite0", "convnext_tiny", "vit_small_patch16_224"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
STAGES = {"frozen": {"freeze_epochs": 3, "epochs": 0}, "unfrozen": {"freeze_epochs": 0, "epochs": 3}}
NUMBERS = {  # option: without it on a GPU, on a CPU
    "image-size": (224, 64), "presize": (460, 96), "batch-size": (64, 8), "images": (1280, 96),
    "steps": (30, 4), "warmup": (10, 2), "matmul": (8192, 512), "epochs": (3, 1), "trials": (3, 1),
}  # fmt: skip
PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow", "opencv-python-headless", "finetune-search")
COLUMNS = {  # key of a row: its heading, form and scale
    "step_images_per_second": ("step, images/s", ".0f", 1),
    "pipeline_over_step": ("pipeline / step", ".2f", 1),
    "epoch_images_per_second": ("epoch, images/s", ".0f", 1),
    "tflops": ("TFLOP/s", ".3g", 1),
    "share_of_peak": ("share of peak, %", ".1f", 100),
    "peak_memory_gb": ("peak memory, GB", ".2f", 1),
}
COMPILED = {
    "compiled_images_per_second": ("compiled, images/s", ".0f", 1),
    "compile_seconds": ("s to compile", ".1f", 1),
    "compile_pays_after_images": ("pays after images", ".0f", 1),
}
LAYOUTS = {"contiguous_images_per_second": ("contiguous, images/s", ".0f", 1)}


def recipe_of(args: argparse.Namespace, arch: str, precision: str, stage: str) -> Recipe:
    """With rates so small that random weights stay finite."""
    return Recipe(
        arch=arch, precision=precision, pretrained=False, normalize="weights", seed=args.seed, tta_views=0,
        presize=args.presize, image_size=args.image_size, batch_size=args.batch_size,
        lr_max=1e-5, lr_max_frozen=1e-5, **STAGES[stage],
    )  # fmt: skip


def fine_tune(args: argparse.Namespace, images: PresizedImages, recipe: Recipe) -> FineTune:
    return FineTune(recipe, images, device=args.device, num_threads=args.threads)


def seconds_of(device: str, work: Callable[[], Any], count: int) -> list[float]:
    """Of each of `count` runs, one right after the other: nothing waits for the device before the last one's end."""

    def mark() -> Any:
        if device == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    marks = [mark()]
    for _ in range(count):
        work()
        marks.append(mark())
    if device == "cpu":
        return [end - start for start, end in itertools.pairwise(marks)]
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1000 for start, end in itertools.pairwise(marks)]


def peaks(args: argparse.Namespace) -> dict[str, float]:
    """TFLOP/s of a matrix product in each precision, and in TF32 where training in fp32 may use it."""
    matmul = torch.backends.cuda.matmul
    before, found = matmul.fp32_precision, {}
    tf32 = "tf32" in (torch.backends.cudnn.conv.fp32_precision, before)
    tf32 = tf32 and args.device == "cuda" and torch.cuda.get_device_capability() >= (8, 0)
    for name in [*args.precision, *(["tf32"] if tf32 and "fp32" in args.precision else [])]:
        matmul.fp32_precision = "tf32" if name == "tf32" else "ieee"
        a, b = torch.randn(2, args.matmul, args.matmul, device=args.device).to(DTYPES.get(name, torch.float32))
        found[name] = 2 * args.matmul**3 / min(seconds_of(args.device, lambda a=a, b=b: a @ b, 20)) / 1e12
        print(f"peak {name}: {found[name]:.3g} TFLOP/s", flush=True)
    matmul.fp32_precision = before
    return found


def pipeline_rate(args: argparse.Namespace, images: PresizedImages) -> float:
    """Images per second ready to be trained on, when nothing trains; the median of three epochs after one."""
    training = fine_tune(args, images, recipe_of(args, args.arch[0], args.precision[0], "unfrozen"))

    def epoch() -> None:
        for _, batch in training.inputs.steps(training._steps(0), training.image_size):
            training.inputs.normalized(batch)

    seconds = median(seconds_of(args.device, epoch, 4)[1:])
    training.close()
    return training.steps_per_epoch * training.batch_size / seconds


def measure(args: argparse.Namespace, images: PresizedImages, row: dict[str, Any], peak: dict[str, float]) -> None:
    """Fills `row`; what was measured before an error stays."""
    training = fine_tune(args, images, recipe_of(args, row["arch"], row["precision"], row["stage"]))
    with contextlib.closing(training):
        [(step, batch)] = training.inputs.steps(itertools.islice(training._steps(0), 1), training.image_size)
        training.network.train(frozen=training.frozen, train_bn=training.recipe.train_bn)

        def step_seconds(batch: torch.Tensor) -> tuple[float, float]:
            """Of one step when warm, and how much longer the first ones took in all."""
            seconds = seconds_of(args.device, lambda: training._step(batch, step), args.warmup + args.steps)
            warm = median(seconds[args.warmup :])
            return warm, max(0, sum(seconds[: args.warmup]) - args.warmup * warm)

        if args.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        eager, _ = step_seconds(batch)
        row["step_images_per_second"] = len(batch) / eager
        row["pipeline_over_step"] = row["pipeline_images_per_second"] / row["step_images_per_second"]
        if args.device == "cuda":
            row["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        # torch does not count what oneDNN computes for a fused convolution.
        with torch.backends.mkldnn.flags(enabled=False), FlopCounterMode(display=False) as counter:
            training._step(batch, step)
        row["gflops_per_image"] = counter.get_total_flops() / len(batch) / 1e9
        row["tflops"] = counter.get_total_flops() / eager / 1e12
        row["peak"] = "tf32" if row["precision"] == "fp32" and "tf32" in peak else row["precision"]
        row["share_of_peak"] = row["tflops"] / peak[row["peak"]]
        row["epoch_images_per_second"] = [training.run_epoch()["images_per_second"] for _ in range(2)][-1]
        training.network.train(frozen=training.frozen, train_bn=training.recipe.train_bn)
        if args.layouts:
            training.network.model.to(memory_format=torch.contiguous_format)
            training._enter_stage()  # a new optimizer, whose moments have the same layout
            row["contiguous_images_per_second"] = len(batch) / step_seconds(batch.contiguous())[0]
            training.network.model.to(memory_format=torch.channels_last)
            training._enter_stage()
        if args.compile:
            with empty_compile_cache():
                training.parallel_model = torch.compile(training.network.model)
                seconds, compiling = step_seconds(batch)
            row |= {"compiled_images_per_second": len(batch) / seconds, "compile_seconds": compiling}
            if seconds < eager:
                row["compile_pays_after_images"] = len(batch) * compiling / (eager - seconds)


@contextlib.contextmanager
def empty_compile_cache() -> Iterator[None]:
    """Nothing that was compiled before makes compiling faster."""
    torch.compiler.reset()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.environ["TRITON_CACHE_DIR"] = cache
        try:
            yield
        finally:
            torch.compiler.reset()  # lets go of the model


def rows_of(args: argparse.Namespace, images: PresizedImages, arch: str, pipeline: float, peak: dict) -> list[dict]:
    """All precisions and stages of an architecture; one that cannot run, for want of memory say, has a `reason`."""
    rows = []
    for precision, stage in itertools.product(args.precision, STAGES):
        row = {"arch": arch, "precision": precision, "stage": stage, "pipeline_images_per_second": pipeline}
        row |= dict.fromkeys([*columns(args), "gflops_per_image", "peak", "reason"])
        try:
            measure(args, images, row, peak)
        except (RuntimeError, ValueError, AssertionError) as error:
            first_line = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            row["reason"] = re.sub(r"(?<![\w.:/])/(?:[^\s/:\"']+/)*", "", first_line)[:200]  # of folders not even names
        gc.collect()
        torch.cuda.empty_cache()
        heads = [head for head, *_ in columns(args).values()]
        cells = "  ".join(f"{head} {text}" for head, text in zip(heads, texts(args, row), strict=True))
        print(f"{arch}  {precision}  {stage:8}  {row['reason'] or cells}", flush=True)
        rows.append(row)
    return rows


def columns(args: argparse.Namespace) -> dict[str, tuple[str, str, float]]:
    return COLUMNS | (COMPILED if args.compile else {}) | (LAYOUTS if args.layouts else {})


def texts(args: argparse.Namespace, row: dict[str, Any]) -> list[str]:
    values = ((row[key], form, scale) for key, (_, form, scale) in columns(args).items())
    return ["-" if value is None else f"{scale * value:{form}}" for value, form, scale in values]


def markdown(args: argparse.Namespace, result: dict[str, Any]) -> str:
    heads = ["arch", "precision", "stage", *(head for head, *_ in columns(args).values())]
    lines = [[row["arch"], row["precision"], row["stage"], *texts(args, row)] for row in result["rows"]]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in [heads, ["---"] * len(heads), *lines])
    failed = [f"- {r['arch']}, {r['precision']}, {r['stage']}: {r['reason']}" for r in result["rows"] if r["reason"]]
    peak = ", ".join(f"{name} {value:.3g}" for name, value in result["peak_tflops"].items())
    used = result["settings"]
    where = result["hardware"]["gpu"] or "the CPU, in small: this shows that the benchmark runs, and no more"
    return f"""# Throughput of fine-tuning

`{result["command"]}`

On {where}. Images of {used["presize"]} px to batches of {used["batch_size"]} at {used["image_size"]} px; random weights.
The pipeline alone: {result["pipeline_images_per_second"]:.0f} images/s with {used["threads"]} threads. Where pipeline / step is below 1, the
network waits for its images. Presizing {used["images"]} images took {result["presize_seconds"]:.1f} s, once.

{table}
{chr(10).join(["", "Not measured to the end:", "", *failed, ""]) if failed else ""}
A step is the median of {used["steps"]} after {used["warmup"]}; frozen, it trains the head alone. TFLOP/s are those of forward and
backward pass, counted by torch. Peaks, the best of 20 products of {used["matmul"]} x {used["matmul"]} matrices: {peak} TFLOP/s.
In fp32, convolutions compute in {used["conv_fp32"]} and matrix products in {used["matmul_fp32"]}; its share is of tf32's peak, if
there is one. Peak memory is all that torch held on the device during the steps.
{footer(result)}"""  # noqa: E501


def installed() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found |= versions(name)
    return found | ({"cuda": torch.version.cuda} if torch.version.cuda else {})


def at_once(args: argparse.Namespace, result: dict[str, Any], folder: Path) -> None:
    """Measures trials that share the GPU, and writes gpu_at_once.json and gpu_at_once.md."""
    pairs = itertools.product(args.arch, args.precision)
    lengths = {"freeze_epochs": 1, "epochs": args.epochs}
    recipes = {pair: recipe_of(args, *pair, "unfrozen").to_dict() | lengths for pair in pairs}
    common = {"device": args.device, "threads": args.threads, "trials": args.trials}
    common |= {"folder": str(folder / "drawn"), "cache": str(folder / "presized")}
    pipe = Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps"), "control")
    result |= {"mps": args.device == "cuda" and pipe.exists()}
    result["rows"] = gpu_at_once.measured(recipes, args.at_once, common)
    gpu_at_once.publish(args.out or RESULTS, result)


def counts(text: str) -> list[int]:
    found = sorted({int(word) if word.isdigit() else 0 for word in text.split(",")})
    if found[0] < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers above 0, such as 1,2,4,8")
    return found


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu = in small, to see that it runs")
    parser.add_argument("--arch", nargs="+", help=f"timm architectures; {', '.join(ARCHS)} without it")
    parser.add_argument("--precision", nargs="+", choices=DTYPES, help="all without it, on a CPU fp32")
    for name, (gpu, cpu) in NUMBERS.items():
        parser.add_argument(f"--{name}", type=int, help=f"{gpu} without it, on a CPU {cpu}")
    parser.add_argument("--threads", type=int, default=CPUS, help="threads that load images; all cores without it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="also with torch.compile, and when that pays")
    parser.add_argument("--at-once", type=counts, metavar="1,2,4,8", help="only: trials an hour with so many at once")
    parser.add_argument("--layouts", action="store_true", help="also with contiguous instead of channels-last memory")
    parser.add_argument("--out", type=Path, help="folder of gpu.json and gpu.md; results/bench without it")
    args = parser.parse_args()
    on_cpu = args.device == "cpu"
    if not on_cpu and not torch.cuda.is_available():
        parser.error("there is no CUDA GPU; --device cpu --out DIR does the same on the CPU, in small")
    if on_cpu and not args.out:
        parser.error("--device cpu needs --out DIR, so that a GPU's results are not overwritten")
    for name, defaults in NUMBERS.items():
        key = name.replace("-", "_")
        setattr(args, key, defaults[on_cpu] if getattr(args, key) is None else getattr(args, key))
    args.arch = args.arch or (ARCHS[:1] if on_cpu else ARCHS)
    args.precision = args.precision or (["fp32"] if on_cpu else list(DTYPES))
    try:
        for arch in args.arch:
            check_architecture(recipe_of(args, arch, args.precision[0], "unfrozen").arch)
    except ValueError as error:
        parser.error(str(error))
    return args


def main() -> None:
    args = parse_args()
    gpu = torch.cuda.get_device_name() if args.device == "cuda" else None
    print(f"on {gpu or 'the CPU'}", flush=True)
    settings = {name: value for name, value in vars(args).items() if name not in ("device", "out", "seed")}
    settings["conv_fp32"] = torch.backends.cudnn.conv.fp32_precision.replace("none", "ieee")
    settings["matmul_fp32"] = torch.backends.cuda.matmul.fp32_precision.replace("none", "ieee")
    settings["cudnn_benchmark"] = torch.backends.cudnn.benchmark
    result = {"device": args.device, "settings": settings, "hardware": hardware(gpu), "versions": installed(),
              "command": command_line(), "seed": args.seed, "rows": []}  # fmt: skip
    if not args.at_once:
        result["peak_tflops"] = peaks(args)
    with tempfile.TemporaryDirectory() as folder:
        found = find_images(draw_photos(Path(folder, "drawn"), args.images, args.seed))
        started = time.perf_counter()
        images = presize(found, args.presize, cache=Path(folder, "presized"))
        result["presize_seconds"] = time.perf_counter() - started
        if args.at_once:
            return at_once(args, result, Path(folder))
        result["pipeline_images_per_second"] = pipeline = pipeline_rate(args, images)
        print(
            f"presized {len(images)} images in {result['presize_seconds']:.1f} s; {pipeline:.0f} images/s", flush=True
        )
        for arch in args.arch:
            result["rows"] += rows_of(args, images, arch, pipeline, result["peak_tflops"])
            with contextlib.redirect_stdout(None) if arch != args.arch[-1] else contextlib.nullcontext():
                write(args.out or RESULTS, "gpu", result, markdown(args, result))


if __name__ == "__main__":
    main()
