"""Which architectures train at every image size with every head: a search does not try these out before it starts.

    python bench/any_size.py [--families PATTERN...] [--out FILE]

Convolutional families of timm; each member that passes `trainables.network.architecture.try_out`, on torch's meta
device, at small, odd and usual sizes with each head is in the list. Writes trainables/network/any_size.json.
"""

import argparse
import fnmatch
import json
import warnings
from pathlib import Path

import timm
import torch
from common import versions

from trainables.network import architecture
from trainables.recipe import Recipe

FAMILIES = (
    "convnext_*", "convnextv2_*", "densenet*", "efficientnet_*", "efficientnetv2_*", "mobilenetv2_*", "mobilenetv3_*",
    "mobilenetv4_*", "regnetx_*", "regnety_*", "resnet[1-9]*", "resnext*", "seresnet*", "tf_efficientnet*",
    "wide_resnet*",
)  # fmt: skip
TRIED = (
    {"image_size": 32},
    {"image_size": 33, "head_init": "probe"},
    {"image_size": 65, "head": "mlp"},
    {"image_size": 161, "head_init": "probe", "concat_pool": True, "start_size": 97},
    {"image_size": 224, "head": "mlp", "head_init": "probe"},
)


def trains_at_any_size(arch: str) -> bool:
    try:
        for settings in TRIED:
            architecture.try_out(Recipe(arch=arch, presize=512, **settings))
    except ValueError as error:
        print(f"not {arch}: {error}", flush=True)
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", metavar="PATTERN", default=FAMILIES, help="patterns of timm's names")
    parser.add_argument("--out", type=Path, default=architecture.ANY_SIZE_FILE, metavar="FILE")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    names = [name for name in timm.list_models() if any(fnmatch.fnmatch(name, family) for family in args.families)]
    found = []
    for number, name in enumerate(names, start=1):
        if trains_at_any_size(name):
            found.append(name)
        print(f"{number}/{len(names)} {name}", flush=True)
    args.out.write_text(json.dumps({"timm": versions("timm")["timm"], "names": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
