"""Which of timm's families train here: the smallest members of each make one frozen and one unfrozen step on the CPU.

    python bench/architectures.py [--families N] [--members N] [--size PX]

Networks start from random weights, on a few drawn images, at --size and, where they do not take that, at the size that
timm gives for them. Beside what happens the table has what `trainables.network.architecture` says before a search:
whatever it lets pass must train (exit code 1 otherwise), and what it refuses is refused in one sentence. Writes
architectures.json and architectures.md.
"""

import argparse
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from common import RESULTS, command_line, footer, hardware, versions, write
from PIL import Image
from torch import nn

from trainables.data.layouts import find_images
from trainables.data.presize import presize
from trainables.network.architecture import try_out
from trainables.recipe import Recipe
from trainables.training.fine_tune import FineTune

NUM_CLASSES, IMAGES_EACH, BATCH_SIZE = 3, 3, 4


def families(members: int) -> dict[str, list[str]]:
    """Family (timm's module) -> its smallest members."""
    found = {}
    for family in timm.list_modules():
        sizes = {arch: num_parameters(meta_network(arch)) for arch in timm.list_models(module=family)}
        found[family] = sorted(sizes, key=sizes.get)[:members]
    return {family: archs for family, archs in found.items() if archs}


def meta_network(arch: str) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(arch)


def num_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def draw_images(root: Path) -> Path:
    rng = np.random.default_rng(0)
    (root / "images").mkdir(parents=True)
    for label in range(NUM_CLASSES):
        for number in range(IMAGES_EACH):
            image = Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8))
            image.save(root / "images" / f"class{label}_{number}.jpg")
    return root


def recipe_of(arch: str, size: int) -> Recipe:
    settings = {"arch": arch, "pretrained": False, "image_size": size, "presize": max(64, size), "tta_views": 0}
    return Recipe(**settings, batch_size=BATCH_SIZE, freeze_epochs=1, epochs=1, precision="fp32")


def refusal(recipe: Recipe) -> str | None:
    """The words in which a search refuses the recipe before it starts, if it does."""
    try:
        return try_out(recipe)
    except ValueError as error:
        return str(error)


def failure(recipe: Recipe, data: Path, cache: Path) -> str | None:
    """What goes wrong in one epoch of each stage, if anything does."""
    try:
        images = presize(find_images(data), recipe.presize, cache=cache)
        training = FineTune(recipe, images, num_threads=1)
        for _ in range(recipe.total_epochs):
            training.run_epoch()  # which raises where a loss is not finite
        training.close()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def tried(arch: str, args: argparse.Namespace, data: Path) -> list[dict[str, Any]]:
    """One row for each size that is tried."""
    rows, parameters = [], num_parameters(meta_network(arch))
    for size in dict.fromkeys((args.size, timm.get_pretrained_cfg(arch).input_size[-1])):
        recipe, started = recipe_of(arch, size), time.process_time()
        row = {"arch": arch, "parameters": parameters, "size": size, "refused": refusal(recipe), "failed": None}
        row |= {"check_seconds": time.process_time() - started}
        row["trained"] = parameters <= args.max_parameters * 1e6 and size <= args.max_size
        if row["trained"]:
            row["failed"] = failure(recipe, data, data / "cache")
        rows.append(row | {"seconds": time.process_time() - started})
        if row["refused"] is None:
            break
    return rows


def verdict(row: dict[str, Any]) -> str:
    if not row["trained"]:
        return "passes, not trained here: too large" if row["refused"] is None else "refused"
    if row["refused"] is None:
        return "FAILS" if row["failed"] else "trains"
    return "refused" if row["failed"] else "refused, would train"


def line(row: dict[str, Any]) -> str:
    words = " ".join((row["refused"] or row["failed"] or "").replace("|", "/").split())
    size = f"{row['parameters'] / 1e6:.1f} | {row['size']}"
    return f"| {row['family']} | {row['arch']} | {size} | {verdict(row)} | {words} |"


def markdown(result: dict[str, Any]) -> str:
    used, rows = result["settings"], result["rows"]
    last = {row["arch"]: row for row in rows}
    train = sum(verdict(row) == "trains" for row in last.values())
    return f"""# Which of timm's architectures train

`{result["command"]}`

{len(last)} architectures: the smallest of each of timm's families (its modules), n = {used["members"]}. They make one
frozen and one unfrozen step of {BATCH_SIZE} drawn images from random weights, and an evaluation after each, at
{used["size"]} px and, where that is refused, at the size that timm gives; seed 0. **{train} train.** The
others are refused before a search starts, in the words of the last column, or were too large to be tried here.
{result["seconds"] / 60:.0f} minutes of one core.

| family | architecture | parameters, M | px | what happens | in which words |
|---|---|---|---|---|---|
{chr(10).join(map(line, rows))}

{footer(result)}"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", type=int, metavar="N", help="only the first N by name (default: all)")
    parser.add_argument("--members", type=int, default=1, metavar="N", help="smallest members of each family (1)")
    parser.add_argument("--arch", nargs="+", metavar="NAME", help="these architectures instead")
    parser.add_argument("--size", type=int, default=64, metavar="PX", help="image_size that is tried first (64)")
    parser.add_argument("--max-parameters", type=int, default=150, metavar="M", help="train no larger network (150)")
    parser.add_argument("--max-size", type=int, default=400, metavar="PX", help="train at no larger size (400)")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    started, rows = time.process_time(), []
    found = {"": args.arch} if args.arch else families(args.members)
    with tempfile.TemporaryDirectory() as root:
        data = draw_images(Path(root) / "data")
        for family, members in list(found.items())[: args.families]:
            for arch in members:
                rows += [{"family": family} | row for row in tried(arch, args, data)]
                print(f"{rows[-1]['seconds']:6.1f} s  {arch} at {rows[-1]['size']} px: {verdict(rows[-1])}", flush=True)
    result = {
        "command": command_line(),
        "settings": {"members": args.members, "size": args.size},
        "hardware": hardware(),
        "versions": versions("torch", "timm"),
        "seconds": time.process_time() - started,
        "rows": rows,
    }
    write(args.out, "architectures", result, markdown(result))
    return int(any(verdict(row) == "FAILS" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
