"""Images whose label may be wrong, or that are like no other, found with a linear probe of a pretrained backbone.

Each image is judged by probabilities of fits that have not seen it: out of fold for the training images, those of the
probe itself for the validation images.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from trainables.data.presized_images import PresizedImages
from trainables.probe.confident_learning import Probabilities, find_label_issues, thresholds
from trainables.probe.outliers import far_from_all
from trainables.recipe import Recipe
from trainables.system.text import many

if TYPE_CHECKING:
    from trainables.probe.feature_files import FeatureSet
    from trainables.training.fine_tune import FineTune

SUSPECTS_FILE = "suspects.csv"
LABEL, OUTLIER = "label", "outlier"
EFFORTS = ("cached", "quick", "always")
"""When features may be computed that are not cached: never, for few images, or for any number."""
QUICK = {"cpu": 5_000, "cuda": 50_000}
"""How many images are few, by device: about a minute for a small backbone."""


@dataclass(frozen=True, kw_only=True)
class Suspect:
    """One row of suspects.csv."""

    path: str
    """Relative to the data set's folder."""
    label: str
    suggested: str
    """The class that it probably is of; empty for an outlier."""
    score: float
    """0 to 1, low is suspicious: of a label its probability; of an outlier its mean similarity to its nearest
    neighbours, see `outliers.far_from_all`."""
    kind: str
    """label: the label may be wrong. outlier: the image is like no other, such as a broken one or one of no class."""
    split: str
    """train or valid."""


def find_suspects(
    recipe: Recipe, images: PresizedImages, *, weights: Path | None = None, seed: int = 0, effort: str = "always"
) -> list[Suspect]:
    """The suspects among training and validation images, wrong labels first, each kind by score.

    The backbone is that of the `recipe` before its training, with pretrained `weights` as in `FineTune`; `seed` is that
    of the split. Raises `ValueError` for images with several labels, where there is no pretrained backbone, and where
    the features of the images are not cached and `effort`, one of `EFFORTS`, does not allow to compute them.
    """
    if images.label_sets is not None:
        raise ValueError("images with several labels are not looked through for wrong ones")
    training = _probing(recipe, images, weights, seed)
    try:
        features = _features(training, effort)
        probabilities = honest_probabilities(training, features)
    finally:
        training.close()
    return judge(images, features.rows, probabilities, training.valid_indices)


def judge(
    images: PresizedImages,
    features: npt.NDArray[np.floating],
    probabilities: Probabilities,
    valid: npt.NDArray[np.int64],
) -> list[Suspect]:
    """The suspects by the features of all images and `honest_probabilities`; the images `valid` are for validation."""
    known = ~np.isnan(probabilities[:, 0])
    own = probabilities[np.arange(len(images)), images.labels]
    recognised = own >= thresholds(probabilities[known], images.labels[known])[images.labels]
    is_far, similarity = far_from_all(features)
    # What is recognised is of its class, however rare its like is.
    outliers = np.flatnonzero(known & is_far & ~recognised)
    outliers = outliers[np.argsort(similarity[outliers], kind="stable")]
    known[outliers] = False
    judged = np.flatnonzero(known)
    issues = find_label_issues(probabilities[judged], images.labels[judged])
    in_valid = frozenset(valid.tolist())
    found = [
        *zip(judged[issues.indices], (images.classes[i] for i in issues.suggested), issues.scores, repeat(LABEL)),
        *zip(outliers, repeat(""), similarity[outliers].clip(min=0), repeat(OUTLIER)),
    ]
    return [
        Suspect(
            path=images.paths[index],
            label=images.classes[images.labels[index]],
            suggested=suggested,
            score=float(score),
            kind=kind,
            split="valid" if index in in_valid else "train",
        )
        for index, suggested, score, kind in found
    ]


def honest_probabilities(training: "FineTune", features: "FeatureSet") -> Probabilities:
    """(images, classes) of fits that have not seen the image; NaN for images that all fits have seen, which are the
    only ones of their class, or all training images where out-of-fold probabilities are too many to be kept."""
    import torch

    linear = training.probing().linear_probe(features, training.train_indices)
    found = np.full((len(features.rows), training.num_classes), np.nan, dtype=np.float32)
    valid = training.valid_indices
    found[valid] = linear.logits(torch.from_numpy(features.rows[valid])).softmax(1).numpy()
    if linear.out_of_fold is not None:
        found[training.train_indices] = linear.out_of_fold.float().numpy()
    return found


def _probing(recipe: Recipe, images: PresizedImages, weights: Path | None, seed: int) -> "FineTune":
    """A training of the recipe's backbone that has not begun."""
    import torch

    from trainables.training.fine_tune import FineTune

    if not recipe.pretrained:
        raise ValueError("the model was trained from scratch, and only features of a pretrained backbone are compared")
    recipe = replace(recipe, head_init="probe", freeze_epochs=0, epochs=0, start_size=0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return FineTune(recipe, images, weights=weights, device=device, split_seed=seed)


def _features(training: "FineTune", effort: str) -> "FeatureSet":
    """The features of all images. Raises `ValueError` where they are not cached and too many to compute."""
    from trainables.probe.views import centre_view

    probing, count = training.probing(), len(training.images)
    most = {"cached": 0, "quick": QUICK[training.device.type], "always": count}[effort]
    if count > most and not probing.path(centre_view(count, training.recipe)).exists():
        raise ValueError(
            f"the features of the {count} images are not cached on this machine, and computing them takes too long to "
            "be done without asking"
        )
    return probing.features()


def counted(found: Sequence[Suspect]) -> str:
    """Such as "41 images may be labelled wrongly, 2 are like no other"."""
    labels = sum(each.kind == LABEL for each in found)
    outliers = len(found) - labels
    said = [f"{many(labels, 'image')} may be labelled wrongly"] if labels else []
    said += [f"{many(outliers, 'image')} {'is' if outliers == 1 else 'are'} like no other"] if outliers else []
    return ", ".join(said) or "none, no label looks wrong"


# --- Files ------------------------------------------------------------------------------------------------------------


def write_suspects(path: Path, found: Sequence[Suspect]) -> None:
    """One row per suspect."""
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([spec.name for spec in fields(Suspect)])
        writer.writerows(
            [each.path, each.label, each.suggested, f"{each.score:.4f}", each.kind, each.split] for each in found
        )


def read_suspects(path: Path) -> list[Suspect]:
    """The rows that are left in the file. Raises `ValueError` where it is damaged."""
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        try:
            rows = csv.DictReader(file)
            if rows.fieldnames != [spec.name for spec in fields(Suspect)]:
                raise ValueError(f"its columns are {rows.fieldnames}")
            return [Suspect(**{**row, "score": float(row["score"])}) for row in rows]  # type: ignore[arg-type]
        except (KeyError, TypeError, ValueError, csv.Error) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
