"""The images of a run that may be labelled wrongly, in its suspects.csv: for its report and its summary."""

from dataclasses import dataclass
from pathlib import Path

from search.reporting.error_analysis import thumbnail
from search.runs.paths import RunFolder
from search.runs.run_record import RunRecord
from trainables.data.layouts import root_of
from trainables.inference.model_folder import read_json
from trainables.inference.suspects import Suspect, counted, read_suspects
from trainables.system.text import printable
from trainables.training.checkpoint import PREPROCESSING_FILE

NUM_SHOWN = 24


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A suspect as the report shows it."""

    path: str
    label: str
    suggested: str
    """Empty for an image that is like no other."""
    score: float
    image: str
    """A data URL, empty if the image is not on this machine."""


def effort_of(run: RunRecord, *, asked: bool) -> str | None:
    """How a report looks for the suspects, one of `suspects.EFFORTS`; None where it does not: in a run without
    pretrained backbones or of images with several labels, and where there is a file of them, of which a user may have
    deleted rows."""
    if asked:
        return "always"
    recipe = run.best_recipe
    if run.folder.suspects.exists() or not (recipe and recipe.pretrained) or _several_labels(run):
        return None
    return "cached" if run.command.arguments.time_budget else "quick"


def _several_labels(run: RunRecord) -> bool:
    model = run.folder.best / PREPROCESSING_FILE
    return model.is_file() and "thresholds" in read_json(model)


def pictures(run: RunRecord) -> list[Picture]:
    """The first of the suspects; none where they were not looked for."""
    found = _read(run.folder) or []
    preprocessing = read_json(run.folder.best / PREPROCESSING_FILE) if found else {}
    images = root_of(run.command.data) if found else Path()
    return [
        Picture(
            path=printable(each.path),
            label=printable(each.label),
            suggested=printable(each.suggested),
            score=each.score,
            image=thumbnail(images / each.path, preprocessing),
        )
        for each in found[:NUM_SHOWN]
    ]


def lines(folder: RunFolder) -> list[str]:
    """What suspects.csv says, in a line for the summary; empty where there is none."""
    if (found := _read(folder)) is None:
        return []
    if not found:
        return [f"suspects: {counted(found)}"]
    return [
        f"suspects: {counted(found)}, see {folder}/suspects.csv; delete the rows that are right, then --leave-out "
        f"{folder}/suspects.csv leaves the others out of the next search"
    ]


def _read(folder: RunFolder) -> list[Suspect] | None:
    """The rows of suspects.csv; None without one, or where a user's table program has changed more than the rows."""
    try:
        return read_suspects(folder.suspects)
    except (OSError, ValueError):
        return None
