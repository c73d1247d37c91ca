"""Everything about a search that can be found out and checked before Ray starts: settings, images, weights.

What is decided here for a search (names for patterns, architectures that are left out, epochs for the images) becomes
part of its options, as further `--set`s, so that a resumed search has the same space.
"""

import itertools
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from search.cli.messages import say
from search.options.search_options import SearchOptions
from search.spaces.space import Space, load_space
from trainables.system.text import many

if TYPE_CHECKING:
    from trainables.data.labelled_images import ImageFolder
    from trainables.data.presized_images import PresizedImages


def space_of(name: str, settings: Sequence[str], *, seed: int | None = None, recipes: str | None = None) -> Space:
    """The space with the command line's `--set`s, seed and recipes; all their problems in one `ValueError`."""
    space, settings = load_space(name), with_names(settings)
    seed = space.seed if seed is None else seed
    space = replace(space, seed=seed, settings=space.settings | {"seed": seed})
    return space.of_recipes(recipes, settings) if recipes else space.with_settings(settings)


def searched_space(options: SearchOptions) -> Space:
    """The space that a search is asked for, likewise."""
    return space_of(options.space or "", options.set, seed=options.seed, recipes=options.recipes)


def find_data(space: Space, data: Path | str | None, left_out: Collection[str] = ()) -> "ImageFolder":
    """The images in `data`, or the space's own, without those `left_out`; says what they are. Raises `ValueError` where
    there are none, or where those left out are not among them."""
    from trainables.data.datasets import prepare_in_subprocess
    from trainables.data.layouts import find_images
    from trainables.data.left_out_images import leave_out_for_training
    from trainables.data.source import folder_of

    images = find_images(folder_of(str(data)) if data else prepare_in_subprocess(own_dataset(space)))
    say(f"data: {images.describe()}")
    if left_out:
        images = leave_out_for_training(images, left_out)
        say(f"left out: {many(len(left_out), 'image')}; {len(images.paths)} are used")
    return images


def with_groups(images: "ImageFolder", group: str | None) -> "ImageFolder":
    """The images with their groups by `--group`, and exact copies together; says what they are."""
    from rich.progress import Progress

    from trainables.data.groups import DUPLICATES, grouped

    with Progress(transient=True, disable=group != DUPLICATES) as progress:
        task = progress.add_task("comparing images", total=None)
        found = grouped(images, group, lambda done, total: progress.update(task, completed=done, total=total))
    for line in found.lines:
        say(line)
    return found.images


def own_dataset(space: Space) -> str:
    """The name of the space's own data set; raises `ValueError` where the user must give images."""
    if not space.dataset:
        raise ValueError(f"--space {space.name} needs --data DIR, a folder of your own images.")
    return space.dataset


def say_depth(images: "ImageFolder") -> None:
    """Say how images of more than 8 bits are read, where they do not use all of their 16."""
    if depth := images.describe_depth():
        say(f"depth: {depth}")


def check_weights(space: Space, weights: Path | str | None) -> None:
    """Raises `WeightsError` where an architecture has no pretrained weights to start from."""
    from trainables.network.pretrained_weights import require_weights

    if setting_values(space, "pretrained") != [False]:
        require_weights(setting_values(space, "arch"), *_folder_and_name(weights))


def _folder_and_name(weights: Path | str | None) -> tuple[Path | None, str | None]:
    """The folder of `--weights`, and what messages call it."""
    from trainables.data.fetch import is_uri
    from trainables.data.source import folder_of
    from trainables.system.file_systems import shown

    if not weights:
        return None, None
    given = str(weights)
    return folder_of(given), shown(given) if is_uri(given) else given


def pinned(options: SearchOptions) -> SearchOptions:
    """The options with the checksum of what was fetched in `--data` and `--weights` that are URIs: every node, and a
    resumed search, gets the same bytes or an error."""
    from trainables.data.fetch import is_uri
    from trainables.data.source import pinned_source

    def pin(source: Path | str | None) -> Path | str | None:
        return pinned_source(source) if isinstance(source, str) and is_uri(source) else source

    return replace(options, data=pin(options.data), weights=pin(options.weights))


# --- What becomes part of the options ---------------------------------------------------------------------------------


def with_names(settings: Sequence[str]) -> tuple[str, ...]:
    """The `--set`s with names in place of patterns of architectures; says which names these are.

    Raises `ValueError` where a pattern matches none.
    """
    return tuple(_with_names(setting) for setting in settings)


def has_pattern(settings: Iterable[str]) -> bool:
    """Whether one of the `--set`s names architectures by a pattern."""
    return any(map(_patterns, settings))


def _patterns(setting: str) -> list[str]:
    from trainables.network.architecture_names import is_pattern

    name, _, value = setting.partition("=")
    return [part.strip() for part in value.split(",") if is_pattern(part)] if name.strip() == "arch" else []


def _with_names(setting: str) -> str:
    if not (patterns := _patterns(setting)):
        return setting
    from trainables.network.architecture_names import names_like

    found = names_like(patterns)
    for pattern, names in found.items():
        say(f"architectures: {len(names)} match {pattern}: {', '.join(names)}")
    parts = [part.strip() for part in setting.partition("=")[2].split(",")]
    return f"arch={','.join(dict.fromkeys(name for part in parts for name in found.get(part, [part])))}"


def without_untrainable(options: SearchOptions, space: Space, *, by_pattern: bool) -> tuple[SearchOptions, Space]:
    """Options and space without the architectures that cannot be trained as the space says, where a pattern has found
    them. Raises `ValueError` where the user has named them, or where none is left."""
    from search.spaces.architectures import refused

    problems = refused(space)
    if not problems:
        return options, space
    if not by_pattern or not _may_leave_out(options, space, problems):
        raise ValueError(" ".join(problems.values()))
    first = next(iter(problems.values()))
    return _leave_out(options, space, problems, f"cannot be trained (the first of them: {first.rstrip('.')})")


def with_weights(options: SearchOptions, space: Space) -> tuple[SearchOptions, Space]:
    """Options and space without the architectures that have no pretrained weights to start from.

    Raises `WeightsError` where none is left, for the single architecture that a user asks for, and in a resumed search.
    """
    from trainables.network.pretrained_weights import weights_error, without_weights

    if setting_values(space, "pretrained") == [False]:
        return options, space
    folder, called = _folder_and_name(options.weights)
    problems = without_weights(setting_values(space, "arch"), folder, called)
    if not problems:
        return options, space
    if not _may_leave_out(options, space, problems):
        raise weights_error(problems, folder, called)
    where = f"--weights {called} has none" if called else f"the first of them: {next(iter(problems.values()))}"
    return _leave_out(options, space, problems, f"no pretrained weights ({where.rstrip('.')})")


def _may_leave_out(options: SearchOptions, space: Space, archs: Iterable[str]) -> bool:
    """Whether others are left. A resumed search keeps its architectures, and named recipes are run as they are."""
    others = set(setting_values(space, "arch")) - set(archs)
    return bool(others) and not options.resume and not options.recipes


def _leave_out(options: SearchOptions, space: Space, archs: Iterable[str], why: str) -> tuple[SearchOptions, Space]:
    left_out = list(archs)
    kept = [arch for arch in setting_values(space, "arch") if arch not in left_out]
    say(f"left out: {', '.join(left_out)}: {why}")
    return _with_sets(options, f"arch={','.join(kept)}")


def with_epochs(options: SearchOptions, space: Space, images: "ImageFolder") -> tuple[SearchOptions, Space]:
    """Options and space with epochs for the number of training images, where they depend on it."""
    from search.spaces.epochs import epochs_for, middle
    from trainables.data.splits import train_and_valid

    if not space.epochs_of:
        return options, space
    count = len(train_and_valid(images.labels, images.valid, images.groups, seed=space.split_seed)[0])
    epochs = epochs_for(count)
    say(f"epochs: {epochs}, for {count} training images")
    return _with_sets(options, f"epochs={middle(epochs)}", f"epochs={epochs}")


def with_metric(options: SearchOptions, space: Space, images: "ImageFolder") -> tuple[SearchOptions, Space]:
    """Options and space for the metric that suits the images, where the user leaves it open; with adjusted logits where
    all classes count the same. Raises `ValueError` where the images have too few classes for the metric."""
    import numpy as np

    from trainables.training.metrics import CLASS_METRICS, SEVERAL_LABELS, median_class, suitable_metric

    if images.label_sets is not None:
        return _with_metric_of_label_sets(options), space
    if options.metric in SEVERAL_LABELS:
        raise ValueError(f"--metric {options.metric} is of images with several labels, and each of these has one")
    metric, counts = options.metric, np.bincount(images.labels)
    if metric == "auto":
        metric = suitable_metric(counts)
        if metric != "error_rate":
            say(
                f"metric: {metric}, since the largest class has {counts.max()} images and the median one "
                f"{median_class(counts)}; --metric error_rate counts every image the same"
            )
    if metric == "top5_error" and len(counts) <= 5:
        raise ValueError(f"--metric top5_error: the images have {len(counts)} classes, expected more than 5")
    options = replace(options, metric=metric)
    ways = {"logit_adjustment": 0.0, "class_weights": "none", "sampler": "uniform"}
    chosen = {*space.pinned, *space.dimensions} | {n for n, off in ways.items() if space.full_settings[n] != off}
    if metric not in CLASS_METRICS or chosen & set(ways) or options.recipes:
        return options, space
    return _with_sets(options, "logit_adjustment=1")


def _with_metric_of_label_sets(options: SearchOptions) -> SearchOptions:
    """The same where an image may have several labels. Their thresholds make up for small classes, so logits are not
    adjusted."""
    from trainables.training.metrics import ONE_LABEL

    if options.metric in ONE_LABEL:
        raise ValueError(
            f"--metric {options.metric} is of images with one label each, and these may have several; expected "
            "macro_f1, map, auroc, log_loss or error_rate"
        )
    if options.metric != "auto":
        return options
    say(
        "metric: macro_f1, since an image may have several labels; --metric error_rate counts an image as wrong unless "
        "all of its labels are right"
    )
    return replace(options, metric="macro_f1")


def _with_sets(options: SearchOptions, *settings: str) -> tuple[SearchOptions, Space]:
    options = replace(options, set=(*options.set, *settings))
    return options, searched_space(options)


# --- On this machine --------------------------------------------------------------------------------------------------


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
