"""Fine-tune one network: freeze, then unfreeze, epoch by epoch. Plain PyTorch, alone or under torchrun.

python -m trainables.finetune --data DIR --set arch=resnet18.tv_in1k --set epochs=3
torchrun --nproc-per-node 2 -m trainables.finetune --data DIR
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from trainables.data import groups
from trainables.data.address import add_table_options, with_table_options
from trainables.data.labelled_images import MAX_UNREADABLE
from trainables.data.layouts import find_images
from trainables.data.left_out_images import leave_out_for_training, read_left_out
from trainables.data.presize import STORAGES, presize
from trainables.network.architecture import try_out
from trainables.network.pretrained_weights import require_weights
from trainables.recipe import Recipe, parse_value
from trainables.system.command_line import run_cli
from trainables.system.text import printable
from trainables.training.distributed import init_from_environment
from trainables.training.fine_tune import FineTune


def main() -> None:
    """Fine-tune one network on a folder of images and print one line per epoch."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--data", type=Path, required=True, help="labelled images: a folder, a table or an archive")
    add_table_options(parser)
    parser.add_argument("--weights", type=Path, help="folder with <arch>.safetensors; the only place that is searched")
    leave_out = "a CSV file whose column path names images that are not used, such as the suspects.csv of a search"
    parser.add_argument("--leave-out", type=Path, metavar="FILE", help=leave_out)
    share = f"of the images that may be unreadable; default {MAX_UNREADABLE:g}"
    parser.add_argument("--max-unreadable", type=float, default=MAX_UNREADABLE, metavar="SHARE", help=share)
    parser.add_argument("--group", metavar="|".join((*groups.WAYS, "REGEX")), help=groups.HELP)
    parser.add_argument("--cache", choices=STORAGES, default="auto", help="how presized images are kept; default auto")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the recipe")
    args = parser.parse_args()
    try:
        recipe = Recipe(**dict(_parse_setting(text) for text in args.set))
        try_out(recipe)
        if recipe.pretrained and args.weights:
            require_weights([recipe.arch], args.weights)
        args.group = args.group and groups.checked_group(args.group)
        images_of = find_images(str(with_table_options(args.data, args.columns, args.images)))
        found = groups.grouped(leave_out_for_training(images_of, read_left_out(args.leave_out)), args.group)
        if int(os.environ.get("RANK", 0)) == 0:
            for line in (f"data: {found.images.describe()}", *found.lines):
                print(printable(line), file=sys.stderr)
        sizes = recipe.presize, recipe.resize_method
        images = presize(found.images, *sizes, storage=args.cache, max_unreadable=args.max_unreadable)
    except ValueError as error:
        parser.error(str(error))
    device = init_from_environment()
    try:
        training = FineTune(recipe, images, weights=args.weights, device=device)
    except ValueError as error:
        parser.error(str(error))
    for _ in range(recipe.before_first_epoch, recipe.total_epochs):
        metrics = training.run_epoch()
        if training.world.rank == 0:
            print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in metrics.items()))
    training.close()
    if dist.is_initialized():
        dist.destroy_process_group()


def _parse_setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--set {text!r} is not NAME=VALUE")
    return name.strip(), parse_value(name.strip(), value)


if __name__ == "__main__":
    run_cli(main)
