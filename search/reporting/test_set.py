"""`--test-split`: images held out of a whole search and read once, at its end, for the winner and trial 0."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from search.cli.errors import error_line, report_errors
from search.cli.messages import say
from search.options.arguments import resume_command
from search.runs.command import CommandRecord
from search.runs.kinds import name_of
from search.runs.statistics import bootstrap_interval, wilson_interval
from trainables.data.held_out_images import ImageSource, WithoutTestImages, held_share, set_aside, without_test_images
from trainables.data.label_sets import multi_hot
from trainables.data.labelled_images import DataError, ImageFolder
from trainables.data.layouts import find_images, find_unchecked
from trainables.inference.model_folder import read_json, read_model
from trainables.system.text import many, percent, some
from trainables.training.label_set_metrics import (
    Thresholds,
    Truth,
    above_thresholds,
    label_set_losses,
    label_set_metrics,
)
from trainables.training.metrics import Floats, Labels, more_metrics

if TYPE_CHECKING:
    from search.runs.paths import RunFolder
    from trainables.inference.predictor import Prediction

SIGNIFICANCE = 0.05  # a larger p-value may be noise
TINY = 1e-12  # probabilities below it count as this in a log loss


# --- Before the search ------------------------------------------------------------------------------------------------


def hold_out(
    images: ImageFolder, test_split: float | Path | str | None, seed: int, *, read: bool = False
) -> ImageFolder:
    """The images that the search may use; prints how many are held out, and whether they were `read` already.

    Raises `DataError` if the test images cannot be held out.
    """
    if test_split is None:
        return images
    test = held_out(images, test_split, seed)
    when = "already read, and not read again" if read else "opened once, after the search"
    say(f"test: {len(test.paths)} images held out; {when}")
    return without_test_images(images, held_share(test_split), seed)


def source_of(
    source: str, test_split: float | Path | None, seed: int, left_out: tuple[str, ...] = (), groups: str = ""
) -> ImageSource:
    """Where every node gets the images that the search may use, with their `groups` as text."""
    share = held_share(test_split)
    plain = share is None and not left_out and not groups
    return source if plain else WithoutTestImages(source, share, seed, left_out, groups)


def held_out(images: ImageFolder, test_split: float | Path | str, seed: int) -> ImageFolder:
    """The test images: a share of all `images`, or a folder with others of the same classes."""
    if isinstance(test_split, float):
        return set_aside(images, test_split, seed)[1]
    test = find_unchecked(test_split)
    if different := sorted(set(images.classes) ^ set(test.classes)):
        raise DataError(
            f"--test-split {test.root} does not have the classes of {images.root}: only one of them has "
            f"{some(different, 'class', 'classes')}. Class names must match exactly."
        )
    if both := len(_identities(test) & _identities(images)):
        raise DataError(
            f"--test-split {test.root}: {both} of its images are among those to train and validate on, in "
            f"{images.root}. Give a folder of other images, or a share such as 0.2 of these."
        )
    return test


def _identities(images: ImageFolder) -> set[tuple[int, int]]:
    """Device and inode of the files, which identify them whatever links lead to them."""
    found = [images.root / path for path in images.paths]
    return {(status.st_dev, status.st_ino) for status in (path.stat() for path in found if path.exists())}


# --- After it ---------------------------------------------------------------------------------------------------------


def read_once(folder: "RunFolder", digest: str | None) -> None:
    """Label the test images with the winner and with trial 0, and save the outcome in the run's test.json.

    Does nothing if test.json exists or no images were held out. `digest` is that of the images that the search used.
    Errors, such as running out of memory, are only printed: the search has its results.
    """
    from search.runs.atomic_files import write_atomically

    command = CommandRecord.load(folder.path)
    if command.arguments.test_split is None or folder.test.is_file():
        return
    retry = resume_command(folder.path, command.arguments.address)
    try:
        with report_errors("no test", retry):
            outcome = measure(folder, _test_images(command, digest), command.arguments.metric)
            write_atomically(folder.test, json.dumps(outcome, indent=2) + "\n")
    except KeyboardInterrupt:
        say(f"test skipped. To run it: {retry}")


def _test_images(command: CommandRecord, digest: str | None) -> ImageFolder:
    from trainables.data.source import images_digest

    images = without_test_images(find_images(command.data), None, 0, command.left_out, command.groups or "")
    options, seed = command.arguments, command.split_seed
    assert options.test_split is not None  # see read_once
    if images_digest(without_test_images(images, options.held_out_share, seed)) != digest:
        raise DataError(
            f"the images in {images.root} have changed since the search began, so it may have trained on some of them"
        )
    return held_out(images, options.test_split, seed)


def measure(folder: "RunFolder", test: ImageFolder, metric: str = "error_rate") -> dict[str, Any]:
    """The content of test.json, see `results/README.md`. Raises `DataError` if no test image can be read."""
    from trainables.system.new_process import in_new_process

    models = {_number(model): model for model in (folder.first, folder.best) if model.is_dir()}
    winner = _number(folder.best)
    say(f"labelling the {len(test.paths)} test images with {' and '.join(map(name_of, sorted(models)))}")
    found = in_new_process(probabilities, list(models.values()), test)
    readable = [i for i, answers in enumerate(zip(*found, strict=True)) if None not in answers]
    if not readable:
        raise DataError(f"none of the {len(test.paths)} test images in {test.root} can be read")
    thresholds = {number: _thresholds(model, test.classes) for number, model in models.items()}
    truth = (np.asarray(test.labels) if None in thresholds.values() else _label_sets(test))[readable]
    answers = {number: np.array([rows[i] for i in readable]) for number, rows in zip(models, found, strict=True)}
    right = {number: are_right(rows, truth, thresholds[number]).tolist() for number, rows in answers.items()}
    more = {number: other_metrics(rows, truth, metric, thresholds[number]) for number, rows in answers.items()}
    scores = {number: score(number, right[number]) | {"metrics": more[number]} for number in models}
    both = len(models) == 2
    return {
        "unreadable": len(test.paths) - len(readable),
        "winner": scores[winner],
        "trial_0": scores[0] if both else None,
        "pair": compare(right[winner], right[0]) if both else None,
    }


def probabilities(models: Sequence[Path], test: ImageFolder) -> list[list[list[float] | None]]:
    """For each model, the probabilities of each image in the order of the test images' classes, as validation in
    training would compute them; None: it is unreadable.

    Runs in a separate process. Raises only `ValueError`: the caller could not unpickle torch's errors without torch.
    """
    from trainables.inference.predictor import Predictor

    files = [test.root / path for path in test.paths]
    try:
        predictions = (Predictor(read_model(model)).predict_each(files) for model in models)
        return [[None if found.problem else _in_order(found, test.classes) for found in each] for each in predictions]
    except Exception as error:
        raise ValueError(error_line(error)) from None


def are_right(answers: Floats, truth: npt.NDArray[Any], thresholds: Thresholds | None) -> npt.NDArray[np.bool_]:
    """(images,) whether probabilities (images, classes) tell the label of an image, or exactly its labels."""
    right: npt.NDArray[np.bool_]
    if thresholds is None:
        right = answers.argmax(1) == truth
        return right
    right = (above_thresholds(answers, thresholds) == truth).all(1)
    return right


def _thresholds(model: Path, classes: Sequence[str]) -> Thresholds | None:
    """Those of a model, in the order of the test images' classes; None where an image has one label."""
    found = read_model(model)
    if (thresholds := found.preprocessing.thresholds) is None:
        return None
    by_name = dict(zip(found.labels, thresholds, strict=True))
    return tuple(by_name[name] for name in classes)


def _label_sets(test: ImageFolder) -> Truth:
    own = [(label,) for label in test.labels] if test.label_sets is None else test.label_sets
    return multi_hot(own, test.num_classes)


def _in_order(found: "Prediction", classes: Sequence[str]) -> list[float]:
    by_name = dict(zip(found.labels, found.probabilities, strict=True))
    return [by_name[name] for name in classes]


def other_metrics(
    answers: Floats, truth: npt.NDArray[Any], metric: str, thresholds: Thresholds | None = None
) -> dict[str, Any]:
    """The metrics besides the error rate, of probabilities (images, classes) and labels (images,), or label sets
    (images, classes) with thresholds; with a 95 % bootstrap interval for the one that the search minimised."""

    def all_of(rows: Labels) -> dict[str, float]:
        if thresholds is not None:
            found = label_set_metrics(answers[rows], truth[rows], thresholds)
            del found["error_rate"]
            return found | {"log_loss": float(label_set_losses(answers[rows], truth[rows]).mean())}
        own = answers[rows, truth[rows]]
        return more_metrics(answers[rows], truth[rows]) | {"log_loss": float(-np.log(np.maximum(own, TINY)).mean())}

    found: dict[str, Any] = dict(all_of(np.arange(len(truth))))
    if metric not in found:
        return found
    low, high = bootstrap_interval(lambda rows: all_of(rows)[metric], len(truth))
    return found | {"minimised": metric, "interval": (low, high)}


def score(number: int, right: Sequence[bool]) -> dict[str, Any]:
    """The error of a trial whose labels are `right` or wrong, with its 95 % Wilson interval."""
    wrong, total = len(right) - sum(right), len(right)
    error_rate = wrong / total
    interval = wilson_interval(error_rate, total)
    return {"trial": number, "wrong": wrong, "total": total, "error_rate": error_rate, "interval": interval}


def compare(winner: Sequence[bool], first: Sequence[bool]) -> dict[str, Any]:
    """How many images only one of the two labels correctly, and the p-value of the exact McNemar test (two-sided)."""
    only_winner = sum(a and not b for a, b in zip(winner, first, strict=True))
    only_first = sum(b and not a for a, b in zip(winner, first, strict=True))
    p_value = mcnemar(only_winner, only_first)
    return {"only_winner_right": only_winner, "only_trial_0_right": only_first, "p_value": p_value}


def mcnemar(one: int, other: int) -> float:
    """How often chance alone would make two counts differ at least this much (McNemar 1947, exact)."""
    from scipy.stats import binomtest  # takes a second to import

    return float(binomtest(one, one + other).pvalue) if one + other else 1.0


def _number(model: Path) -> int:
    return int(read_json(model / "metrics.json")["number"])


# --- In words ---------------------------------------------------------------------------------------------------------


def read_test(folder: "RunFolder") -> dict[str, Any] | None:
    """The content of the run's test.json, or None if the test images have not been read."""
    return read_json(folder.test) if folder.test.is_file() else None


def lines(folder: "RunFolder") -> list[str]:
    """The content of test.json in words; empty if there is none yet."""
    if (found := read_test(folder)) is None:
        return []
    winner, first = found["winner"], found["trial_0"]
    texts = [f"{describe_score(winner)}; {describe_score(first)}" if first else describe_score(winner)]
    if first:
        texts.append(_describe_difference(winner["trial"], found["pair"]))
    if found["unreadable"]:
        texts.append(f"{many(found['unreadable'], 'image')} skipped: unreadable")
    if folder.best.is_dir() and (number := _number(folder.best)) != winner["trial"]:
        texts.append(f"{name_of(number)} has won since, but is not tested: the images are read only once")
    return [f"test: {text}" for text in texts]


def describe_score(scored: dict[str, Any]) -> str:
    """The error of one trial, with its interval."""
    low, high = (100 * end for end in scored["interval"])
    text = (
        f"{name_of(scored['trial'])} has {scored['wrong']} of {scored['total']} wrong "
        f"({percent(scored['error_rate'])}, 95 % interval {low:.1f} to {high:.1f} %)"
    )
    metrics = scored.get("metrics", {})
    if not (name := metrics.get("minimised")):
        return text
    low, high = metrics["interval"]
    return f"{text}, {name.replace('_', ' ')} {metrics[name]:.3f} (95 % bootstrap interval {low:.3f} to {high:.3f})"


def _describe_difference(number: int, pair: dict[str, Any]) -> str:
    ours, theirs = pair["only_winner_right"], pair["only_trial_0_right"]
    p_value = pair["p_value"]
    counts = f"only {name_of(number)} is right on {ours} images, only trial 0 on {theirs} (McNemar's p {p_value:.2g})"
    if p_value >= SIGNIFICANCE:
        return f"{counts}: the difference may be noise"
    better, worse = map(name_of, (number, 0) if ours > theirs else (0, number))
    return f"{counts}: {better} is better than {worse} by more than noise"
