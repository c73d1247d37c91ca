"""Everything about a search that can be found out and checked before Ray starts: settings, images, weights."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from search.cli.messages import say
from search.options.search_options import SearchOptions
from search.spaces.space import Space, load_space

if TYPE_CHECKING:
    from trainables.data.labelled_images import ImageFolder
    from trainables.data.presized_images import PresizedImages


def space_of(name: str, settings: Sequence[str], *, seed: int | None = None, recipes: str | None = None) -> Space:
    """The space with the command line's `--set`s, seed and recipes; all their problems in one `ValueError`."""
    space = load_space(name)
    seed = space.seed if seed is None else seed
    space = replace(space, seed=seed, settings=space.settings | {"seed": seed})
    return space.of_recipes(recipes, settings) if recipes else space.with_settings(settings)


def searched_space(options: SearchOptions) -> Space:
    """The space that a search is asked for, likewise."""
    return space_of(options.space or "", options.set, seed=options.seed, recipes=options.recipes)


def find_data(space: Space, data: Path | str | None) -> "ImageFolder":
    """The images in `data`, or the space's own; says what they are."""
    from trainables.data.datasets import prepare_in_subprocess
    from trainables.data.layouts import find_images
    from trainables.data.source import folder_of

    images = find_images(folder_of(str(data)) if data else prepare_in_subprocess(space.dataset))
    say(f"data: {images.describe()}")
    return images


def say_depth(images: "ImageFolder") -> None:
    """Say how images of more than 8 bits are read, where they do not use all of their 16."""
    if depth := images.describe_depth():
        say(f"depth: {depth}")


def check_weights(space: Space, weights: Path | str | None) -> None:
    """Raises `WeightsError` where an architecture has no pretrained weights to start from."""
    from trainables.data.fetch import is_uri
    from trainables.data.source import folder_of
    from trainables.network.pretrained_weights import require_weights
    from trainables.system.file_systems import shown

    if setting_values(space, "pretrained") != [False]:
        given = str(weights) if weights else None
        called = shown(given) if given and is_uri(given) else given
        require_weights(setting_values(space, "arch"), folder_of(given) if given else None, called)


def pinned(options: SearchOptions) -> SearchOptions:
    """The options with the checksum of what was fetched in `--data` and `--weights` that are URIs: every node, and a
    resumed search, gets the same bytes or an error."""
    from trainables.data.fetch import is_uri
    from trainables.data.source import pinned_source

    def pin(source: Path | str | None) -> Path | str | None:
        return pinned_source(source) if isinstance(source, str) and is_uri(source) else source

    return replace(options, data=pin(options.data), weights=pin(options.weights))


def presize_here(space: Space, images: "ImageFolder", *, cache: str, max_unreadable: float) -> "PresizedImages":
    """Decode the images on this machine now, with progress and errors shown. The nodes of a cluster presize them
    themselves when their first trial starts."""
    from rich.progress import Progress, TaskID

    from trainables.data.presize import presize

    with Progress(transient=True) as progress:
        for size, method in itertools.product(*(setting_values(space, name) for name in ("presize", "resize_method"))):
            task = progress.add_task(f"presizing to {size} px", total=len(images.paths))

            def show(done: int, total: int, task: TaskID = task) -> None:
                progress.update(task, completed=done, total=total)

            presized = presize(images, size, method, storage=cache, max_unreadable=max_unreadable, progress=show)
    kept = f"{presized.storage} of {presized.nbytes / 1e6:.0f} MB in {presized.path}"
    say(f"cache: {'none, images are decoded in every epoch' if presized.storage == 'off' else kept}")
    train, valid = presized.split(seed=space.split_seed)
    skipped = ""
    if presized.unreadable:
        skipped = f", {len(presized.unreadable)} unreadable ones skipped (listed in {presized.unreadable_list})"
    say(f"split: {len(train)} training and {len(valid)} validation images{skipped}")
    return presized


def setting_values(space: Space, name: str) -> list[Any]:
    """The values that a search can give to a setting; of a range only trial 0's."""
    return list(getattr(space.dimensions.get(name), "values", None) or [space.full_settings[name]])
