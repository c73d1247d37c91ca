"""`--test-split`: images held out of a whole search and read once at its end, for the winner and for trial 0."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from search.cli.errors import errors_said, told
from search.cli.messages import say
from search.options.arguments import resume_command
from search.runs.command import CommandRecord
from search.runs.statistics import wilson_interval
from trainables.data.held_out_images import WithoutTestImages, held_share, set_aside, without_test_images
from trainables.data.labelled_images import DataError, ImageFolder
from trainables.data.layouts import find_images, find_unchecked
from trainables.inference.model_folder import read_json, read_model
from trainables.system.text import many, percent, some

if TYPE_CHECKING:
    from search.runs.paths import RunFolder

CHANCE = 0.05
"""A difference that chance makes as often as this, or more often, counts as noise."""


# --- Before the search ------------------------------------------------------------------------------------------------


def hold_out(
    images: ImageFolder, test_split: float | Path | str | None, seed: int, *, read: bool = False
) -> ImageFolder:
    """The images that the search may know; says how many it may not, and whether they have been `read` already. Raises
    `DataError` where that cannot be."""
    if test_split is None:
        return images
    test = held_out(images, test_split, seed)
    when = "they have been read, and are not read again" if read else "they are opened once, when the search has ended"
    say(f"test: {len(test.paths)} images held out; {when}")
    return without_test_images(images, held_share(test_split), seed)


def source_of(source: str, test_split: float | Path | None, seed: int) -> str | WithoutTestImages:
    """Where every node gets the images from that the search may know."""
    share = held_share(test_split)
    return source if share is None else WithoutTestImages(source, share, seed)


def held_out(images: ImageFolder, test_split: float | Path | str, seed: int) -> ImageFolder:
    """The test images: a share of all `images`, or a folder with others of the same classes."""
    if held_share(test_split) is not None:
        return set_aside(images, test_split, seed)[1]
    test = find_unchecked(test_split)
    if different := sorted(set(images.classes) ^ set(test.classes)):
        raise DataError(
            f"--test-split {test.root} has other classes than {images.root}: only one of the two has "
            f"{some(different, 'class', 'classes')}. Class names are compared letter by letter."
        )
    if both := len(_identities(test) & _identities(images)):
        raise DataError(
            f"--test-split {test.root}: {both} of its images are among those to train and validate on, in "
            f"{images.root}. Give a folder of other images, or a share such as 0.2 of these."
        )
    return test


def _identities(images: ImageFolder) -> set[tuple[int, int]]:
    """Of the files themselves, whatever links lead to them."""
    found = [images.root / path for path in images.paths]
    return {(status.st_dev, status.st_ino) for status in (path.stat() for path in found if path.exists())}


# --- After it ---------------------------------------------------------------------------------------------------------


def read_once(folder: "RunFolder", digest: str | None) -> None:
    """Label the test images with the winner and with trial 0, and keep the outcome in the run's test.json.

    Does nothing where that is there already, or none were held out. `digest` is that of the images that the search
    knew. Whatever goes wrong, such as running out of memory, the search has its results: it is said.
    """
    from search.runs.atomic_files import write_atomically

    command = CommandRecord.load(folder.path)
    if command.arguments.test_split is None or folder.test.is_file():
        return
    once_more = resume_command(folder.path, command.arguments.address)
    try:
        with errors_said("no test", once_more):
            outcome = measure(folder, _test_images(command, digest))
            write_atomically(folder.test, json.dumps(outcome, indent=2) + "\n")
    except KeyboardInterrupt:
        say(f"test left out. Once more: {once_more}")


def _test_images(command: CommandRecord, digest: str | None) -> ImageFolder:
    from trainables.data.source import images_digest

    images, options, seed = find_images(command.data), command.arguments, command.split_seed
    if images_digest(without_test_images(images, options.held_out_share, seed)) != digest:
        raise DataError(
            f"the images in {images.root} are others than when the search began, so some may have been trained on"
        )
    return held_out(images, options.test_split, seed)


def measure(folder: "RunFolder", test: ImageFolder) -> dict[str, Any]:
    """What test.json holds, see `results/README.md`. Raises `DataError` where no test image can be read."""
    from trainables.system.new_process import in_new_process

    models = {_number(model): model for model in (folder.first, folder.best) if model.is_dir()}
    winner = _number(folder.best)
    say(f"labelling the {len(test.paths)} test images with {' and '.join(f'trial {n}' for n in sorted(models))}")
    found = in_new_process(label, list(models.values()), test)
    if not (readable := [answers for answers in zip(*found, strict=True) if None not in answers]):
        raise DataError(f"none of the {len(test.paths)} test images in {test.root} can be read")
    right = dict(zip(models, zip(*readable, strict=True), strict=True))
    both = len(right) == 2
    return {
        "unreadable": len(test.paths) - len(readable),
        "winner": score(winner, right[winner]),
        "trial_0": score(0, right[0]) if both else None,
        "pair": compare(right[winner], right[0]) if both else None,
    }


def label(models: Sequence[Path], test: ImageFolder) -> list[list[bool | None]]:
    """For each model, whether it labels each image right, as validation in training would; None: it cannot be read.

    Runs in a process of its own. Raises `ValueError` alone: torch's errors are nothing that the one which asks could
    read without importing torch.
    """
    from trainables.inference.predictor import Predictor

    files, truth = [test.root / path for path in test.paths], [test.classes[i] for i in test.labels]
    try:
        predictions = (Predictor(read_model(model)).predict_each(files, top=1) for model in models)
        return [
            [None if found.problem else found.labels[0] == name for found, name in zip(each, truth, strict=True)]
            for each in predictions
        ]
    except Exception as error:
        raise ValueError(told(error)) from None


def score(number: int, right: Sequence[bool]) -> dict[str, Any]:
    """The error of a trial on the images that it has right or wrong, with its 95 % Wilson interval."""
    wrong, total = len(right) - sum(right), len(right)
    error_rate = wrong / total
    interval = wilson_interval(error_rate, total)
    return {"trial": number, "wrong": wrong, "total": total, "error_rate": error_rate, "interval": interval}


def compare(winner: Sequence[bool], first: Sequence[bool]) -> dict[str, Any]:
    """How many images only one of the two has right, and the p-value of the exact McNemar test (two-sided)."""
    only_winner = sum(a and not b for a, b in zip(winner, first, strict=True))
    only_first = sum(b and not a for a, b in zip(winner, first, strict=True))
    return {
        "only_winner_right": only_winner,
        "only_trial_0_right": only_first,
        "p_value": mcnemar(only_winner, only_first),
    }


def mcnemar(one: int, other: int) -> float:
    """How often chance would make two counts so different, or more, were each image as likely in either (McNemar
    1947, by the binomial distribution)."""
    both = one + other
    return min(1.0, 2 * sum(math.comb(both, k) for k in range(min(one, other) + 1)) / 2**both)


def _number(model: Path) -> int:
    return read_json(model / "metrics.json")["number"]


# --- In words ---------------------------------------------------------------------------------------------------------


def read_test(folder: "RunFolder") -> dict[str, Any] | None:
    """What the run's test.json holds, or None where the test images have not been read."""
    return read_json(folder.test) if folder.test.is_file() else None


def lines(folder: "RunFolder") -> list[str]:
    """What test.json says, in words; none where there is none yet."""
    if (found := read_test(folder)) is None:
        return []
    winner, first = found["winner"], found["trial_0"]
    texts = [f"{said(winner)}; {said(first)}" if first else said(winner)]
    if first:
        texts.append(_difference(winner["trial"], found["pair"]))
    if found["unreadable"]:
        texts.append(f"{many(found['unreadable'], 'image')} left out, which could not be read")
    if folder.best.is_dir() and (number := _number(folder.best)) != winner["trial"]:
        texts.append(f"trial {number} has won since, and has no test: the images are read once")
    return [f"test: {text}" for text in texts]


def said(scored: dict[str, Any]) -> str:
    """The error of one trial, with its interval."""
    low, high = (100 * end for end in scored["interval"])
    return (
        f"trial {scored['trial']} has {scored['wrong']} of {scored['total']} wrong "
        f"({percent(scored['error_rate'])}, 95 % interval {low:.1f} to {high:.1f} %)"
    )


def _difference(number: int, pair: dict[str, Any]) -> str:
    ours, theirs = pair["only_winner_right"], pair["only_trial_0_right"]
    counts = f"{ours} images only trial {number} has right, {theirs} only trial 0 (McNemar's p {pair['p_value']:.2g})"
    if pair["p_value"] >= CHANCE:
        return f"{counts}: the difference may be noise"
    better, worse = (number, 0) if ours > theirs else (0, number)
    return f"{counts}: trial {better} is better than trial {worse} by more than noise"
