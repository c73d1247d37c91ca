"""The learning-rate finder: `python -m search.lr_find --data DIR --arch A`, and for a search's bounds."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from search.cli.messages import command_name, say
from search.options.arguments import (
    add_cache,
    add_group,
    add_leave_out,
    add_max_unreadable,
    add_space,
    positive,
    search_command,
)
from search.options.search_options import folder_or_uri
from search.spaces.space import Range, Space, space_name
from trainables.data.address import add_table_options, with_table_options
from trainables.system.command_line import run_cli
from trainables.system.text import last_line

if TYPE_CHECKING:
    import ray

    from trainables.data.held_out_images import ImageSource
    from trainables.data.presized_images import PresizedImages
    from trainables.ray.worker_group import GroupSize
    from trainables.recipe import Recipe
    from trainables.training.lr_finder import Curve

STAGES = {"lr_max_frozen": "frozen", "lr_max": "unfrozen"}
"""The setting whose bounds a stage's curve narrows -> the stage."""
TRUSTED = ("valley", "steep", "minimum")
"""Each is too low or too high on some curves, so a range spans them. slide can lie where the loss explodes."""
FACTOR = 2.0
"""A search's rates go from the lowest trusted one / FACTOR to the highest * FACTOR, within the space's bounds."""

EXAMPLES = """
examples:
  python -m search.lr_find --data ~/my_images --arch resnet34.tv_in1k
      train the frozen stage for 100 steps with rates from 1e-7 to 10, and draw how the loss changes
  python -m search.lr_find --data ~/my_images --arch resnet34.tv_in1k --unfrozen
      the same for the whole network, after its frozen stage

A good peak rate lies where the loss falls steadily, well before it explodes. The suggestions are fastai's: valley (its
default), steep, minimum (a tenth of the rate with the lowest loss) and slide.
"""


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=command_name("search.lr_find"),
        description="Find a learning rate: the loss over exponentially growing rates, and what it suggests.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_space(parser)
    parser.add_argument("--data", type=folder_or_uri, metavar="DIR|URI", help="labelled images (default: the space's)")
    add_table_options(parser)
    parser.add_argument("--weights", type=folder_or_uri, metavar="DIR|URI", help=(
        "a folder or URI with <arch>.safetensors files; without it, installed packages and timm's hub are searched"
    ))  # fmt: skip
    parser.add_argument("--arch", help="timm architecture (default: the space's own)")
    parser.add_argument("--unfrozen", action="store_true", help="test the whole network, after its frozen stage")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the recipe")
    parser.add_argument("--num-it", type=positive, default=100, metavar="N", help="steps (default 100)")
    parser.add_argument("--seed", type=int, metavar="N", help="default: the space's")
    add_group(parser)
    add_leave_out(parser)
    add_max_unreadable(parser)
    add_cache(parser)
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: results/lr_find-<arch>-<stage>.png")
    args = parser.parse_args(argv)
    try:
        args.data = with_table_options(args.data, args.columns, args.images)
        args.space = space_name(args.space, args.data)
    except ValueError as error:
        parser.error(str(error))
    return args


def main(argv: list[str] | None = None) -> int:
    from search.options.preparation import check_weights, find_data, presize_here, say_depth, space_of, with_groups
    from search.spaces.architectures import check_architectures
    from trainables.data.left_out_images import read_left_out
    from trainables.data.source import folder_of
    from trainables.recipe import Recipe
    from trainables.system.full_disk import require_writable_file

    args = parse_arguments(argv)
    settings = [*args.set, *([f"arch={args.arch}"] if args.arch else [])]
    space = space_of(args.space, settings, seed=args.seed)
    space = replace(space, settings=space.full_settings, dimensions={})  # trial 0, and no other
    recipe = Recipe.from_dict(space.settings)
    stage = "unfrozen" if args.unfrozen or recipe.freeze_epochs == 0 else "frozen"
    out = args.out or Path("results") / f"lr_find-{recipe.arch}-{stage}.png"
    require_writable_file(out)
    check_architectures(space)
    images = with_groups(find_data(space, args.data, read_left_out(args.leave_out)), args.group)
    say_depth(images)
    check_weights(space, args.weights)
    presized = presize_here(space, images, cache=args.cache, max_unreadable=args.max_unreadable)
    first = f", after {recipe.freeze_epochs} frozen epochs" if stage == "unfrozen" and recipe.freeze_epochs else ""
    say(f"{recipe.arch}, {stage}{first}: {args.num_it} steps of {recipe.batch_size} images")
    options = {"num_it": args.num_it, "split_seed": space.split_seed, "device": best_device()}
    weights = folder_of(str(args.weights)) if args.weights else None
    curve = find(recipe, presized, weights, [stage], **options)[stage]
    found = draw(out, curve, f"{recipe.arch}, {stage}", num_it=args.num_it)
    for name, rate in found.items():
        say(f"{name:8} {rate:.2e}")
    setting = next(name for name, its_stage in STAGES.items() if its_stage == stage)
    trusted = trusted_rates(found)
    say(f"curve: {out}")
    settings.append(f"{setting}={_range(min(trusted), max(trusted))}")
    given = {"data": args.data, "group": args.group, "max_unreadable": args.max_unreadable}
    given |= {"leave_out": args.leave_out}
    say(f"next: {search_command(args.space, settings=settings, **given)}")
    return 0


def best_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def find(
    recipe: Recipe,
    images: PresizedImages,
    weights: Path | None,
    stages: list[str],
    *,
    num_it: int = 100,
    split_seed: int = 0,
    num_threads: int = 2,
    device: str = "cpu",
) -> dict[str, Curve]:
    """Stage -> curve; the frozen stage is trained before the unfrozen one is tested.

    Raises `ValueError` where that training diverges.
    """
    from trainables.training.fine_tune import Diverged, FineTune

    training = FineTune(
        replace(recipe, tta_views=0),
        images,
        weights=weights,
        device=device,
        num_threads=num_threads,
        split_seed=split_seed,
    )
    curves = {}
    if recipe.starts_with_probe:
        training.run_epoch()
    if "frozen" in stages and training.frozen:
        curves["frozen"] = training.lr_range_test(num_it=num_it)
    if "unfrozen" in stages:
        try:
            while training.frozen:
                training.run_epoch()
        except Diverged as error:
            raise ValueError(f"the frozen stage before it diverged ({error}). Lower lr_max_frozen.") from error
        curves["unfrozen"] = training.lr_range_test(num_it=num_it)
    training.close()
    return curves


def draw(path: Path, curve: Curve, title: str, *, num_it: int = 100) -> dict[str, float]:
    """Write the curve as a picture; the suggestions. Raises `ValueError` where the curve is too short for them."""
    from trainables.training.lr_finder import save_curve, suggestions

    path.parent.mkdir(parents=True, exist_ok=True)
    found = suggestions(curve, num_it)
    save_curve(path, curve, found, title)
    return found


def trusted_rates(found: dict[str, float]) -> list[float]:
    return [found[name] for name in TRUSTED]


# --- For a search -----------------------------------------------------------------------------------------------------


def narrowed_rates(
    space: Space,
    data: ImageSource,
    digest: str,
    weights: str | None,
    size: GroupSize,
    folder: Path,
    presizing: Mapping[str, Any],
) -> list[str]:
    """Runs the finder once per architecture, on Ray's workers; the narrowed bounds as `--set`s.

    `data` and `weights` are sources, see `trainables.data.source`; the curves are drawn into `folder`; `presizing` are
    options of `presize`. An architecture for which the finder fails is reported and ignored.
    """
    import ray

    from search.options.preparation import setting_values

    bounds = {name: of for name in STAGES if isinstance(of := space.dimensions.get(name), Range)}
    searched = {name: STAGES[name] for name in bounds}
    if not searched:
        say("learning-rate finder: no learning rate is searched, nothing to narrow")
        return []
    num_gpus = math.ceil(size.gpus_per_worker)  # a whole one where trials will share it: nothing limits its memory here
    task = ray.remote(num_cpus=size.cpus_per_worker, num_gpus=num_gpus, max_retries=1)(_find_on_worker)
    archs = setting_values(space, "arch")
    say(f"learning-rate finder: {', '.join(searched.values())} stage of {len(archs)} architectures")
    device = "cuda" if size.gpus_per_worker else "cpu"
    options = {"split_seed": space.split_seed, "num_threads": max(1, int(size.cpus_per_worker)), "device": device}
    arguments = data, digest, presizing, weights, list(searched.values()), options
    running = {task.remote(space.full_settings | {"arch": arch}, *arguments): arch for arch in archs}
    suggested: dict[str, list[float]] = {name: [] for name in searched}
    while running:
        (done,), _ = ray.wait(list(running), num_returns=1)
        arch = running.pop(done)
        for name, rates in _suggestions_of(arch, done, searched, folder).items():
            suggested[name] += rates
    narrowed = [f"{name}={_around(rates, bounds[name])}" for name, rates in suggested.items() if rates]
    say(f"learning-rate finder: searching {', '.join(narrowed) or 'the bounds of the space'}, curves in {folder}/")
    return narrowed


def _find_on_worker(
    settings: dict[str, Any],
    data: ImageSource,
    digest: str,
    presizing: Mapping[str, Any],
    weights: str | None,
    stages: list[str],
    options: dict[str, Any],
) -> dict[str, Curve]:
    import torch

    from trainables.data.presize import presize
    from trainables.data.source import folder_of, images_of
    from trainables.recipe import Recipe

    torch.set_num_threads(options["num_threads"])
    recipe = Recipe.from_dict(settings)
    images = presize(images_of(data, digest), recipe.presize, recipe.resize_method, **presizing)
    return find(recipe, images, folder_of(weights) if weights else None, stages, **options)


def _suggestions_of(
    arch: str, done: ray.ObjectRef[dict[str, Curve]], searched: dict[str, str], folder: Path
) -> dict[str, list[float]]:
    """Setting -> suggested rates from one architecture's finished task; says what was found."""
    import ray

    rates = {}
    try:
        curves = ray.get(done)
        for name, stage in searched.items():
            if stage in curves:
                found = draw(folder / f"{arch}-{stage}.png", curves[stage], f"{arch}, {stage}")
                rates[name] = trusted_rates(found)
                say(f"  {arch} {stage}: {', '.join(f'{method} {rate:.1e}' for method, rate in found.items())}")
    except (ray.exceptions.RayError, ValueError) as error:
        say(f"  {arch}: no suggestion, {last_line(error) or type(error).__name__}")
    return rates


def _around(rates: list[float], bounds: Range) -> str:
    """The range of a `--set`, from the lowest to the highest rate and a factor more, within `bounds`."""
    low, high = bounds.clip(min(rates)), bounds.clip(max(rates))
    return _range(bounds.clip(low / FACTOR), bounds.clip(high * FACTOR))


def _range(low: float, high: float) -> str:
    """As `--set` takes it: a single value where both round to the same."""
    return "..".join(dict.fromkeys((f"{max(low, 1e-7):.3g}", f"{high:.3g}")))


if __name__ == "__main__":
    run_cli(main)
