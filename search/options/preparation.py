"""Everything about a search that can be had and checked before Ray starts: settings, images, weights."""

import argparse
import itertools
from dataclasses import replace
from typing import Any

from search.cli.messages import say
from search.spaces.space import Space, load_space


def space_of(args: argparse.Namespace) -> Space:
    """The space with the command line's `--set`s, seed and recipes; all their problems in one `ValueError`."""
    space = load_space(args.space)
    seed = space.seed if args.seed is None else args.seed
    space = replace(space, seed=seed, settings=space.settings | {"seed": seed})
    return space.of_recipes(args.recipes, args.set) if args.recipes else space.with_settings(args.set)


def find_data(space: Space, args: argparse.Namespace):
    from trainables.data.datasets import prepare_in_subprocess
    from trainables.data.layouts import find_images
    from trainables.data.source import folder_of

    images = find_images(folder_of(str(args.data)) if args.data else prepare_in_subprocess(space.dataset))
    say(f"data: {images.describe()}")
    return images


def say_depth(images) -> None:
    """Say how images of more than 8 bits are read, where they do not use all of their 16."""
    if depth := images.describe_depth():
        say(f"depth: {depth}")


def check_weights(space: Space, args: argparse.Namespace) -> None:
    """Raises `WeightsError` where an architecture has none to start from."""
    from trainables.data.fetch import is_uri
    from trainables.data.source import folder_of
    from trainables.network.pretrained_weights import require_weights
    from trainables.system.file_systems import shown

    if setting_values(space, "pretrained") != [False]:
        given = str(args.weights) if args.weights else None
        called = shown(given) if given and is_uri(given) else given
        require_weights(setting_values(space, "arch"), folder_of(given) if given else None, called)


def pin(args: argparse.Namespace) -> None:
    """`--data` and `--weights` that are URIs, with the checksum of what was fetched: every node, and a search that goes
    on later, gets the same bytes or an error."""
    from trainables.data.fetch import is_uri
    from trainables.data.source import pinned_source

    for name in ("data", "weights"):
        value = getattr(args, name)
        if isinstance(value, str) and is_uri(value):
            setattr(args, name, pinned_source(value))


def presize_here(space: Space, images, args: argparse.Namespace):
    """On this machine alone the images are decoded now, with progress and errors shown; a cluster's nodes do it
    themselves when their first trial starts, and then this is None."""
    if args.address is not None:
        return None
    from rich.progress import Progress

    from trainables.data.presize import presize

    with Progress(transient=True) as progress:
        for size, method in itertools.product(*(setting_values(space, name) for name in ("presize", "resize_method"))):
            task = progress.add_task(f"presizing to {size} px", total=len(images.paths))

            def show(done: int, total: int, task=task) -> None:
                progress.update(task, completed=done, total=total)

            presized = presize(
                images, size, method, storage=args.cache, max_unreadable=args.max_unreadable, progress=show
            )
    kept = f"{presized.storage} of {presized.nbytes / 1e6:.0f} MB in {presized.path}"
    say(f"cache: {'none, images are decoded in every epoch' if presized.storage == 'off' else kept}")
    train, valid = presized.split(seed=space.split_seed)
    left_out = ""
    if presized.unreadable:
        left_out = f", {len(presized.unreadable)} unreadable ones left out (listed in {presized.unreadable_list})"
    say(f"split: {len(train)} training and {len(valid)} validation images{left_out}")
    return presized


def setting_values(space: Space, name: str) -> list[Any]:
    """The values that a search can give to a setting; of a range only trial 0's."""
    return list(getattr(space.dimensions.get(name), "values", None) or [space.full_settings[name]])
