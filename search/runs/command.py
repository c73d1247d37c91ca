"""`command.json`: what a run was asked for, and what it found when it started."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from search.options.search_options import OLD_SCHEDULERS, SearchOptions
from search.options.strategy import Strategy
from search.runs.atomic_files import write_atomically
from trainables.inference.model_folder import read_json

FILE = "command.json"
FORMAT = 2
"""Earlier records have no number and count as format 1."""


@dataclass(frozen=True, kw_only=True)
class Resume:
    """One time that a run was resumed, with the options that changed."""

    argv: tuple[str, ...]
    started_at: str
    changed: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ImagesRecord:
    """What tells a run's images from others."""

    digest: str
    names_digest: str  # without the sizes of the files
    count: int
    classes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class FilesRecord:
    """What tells the other files that a run uses from others; None where the run uses none."""

    test_images: str | None = None  # the digest of a folder of test images
    weights: Mapping[str, str] | None = None  # the digest by architecture


@dataclass(frozen=True, kw_only=True)
class CommandRecord:
    """A run's command.json. What a record of an earlier version lacks has its default."""

    format: int = FORMAT
    run_id: str = ""  # stays the same wherever the folder is moved to
    signature: str = ""  # see `trust`
    argv: tuple[str, ...] = ()
    started_at: str = ""
    resumes: tuple[Resume, ...] = ()
    arguments: SearchOptions  # as they are now
    asked: SearchOptions  # as the run was begun
    source: str = ""
    left_out: tuple[str, ...] = ()  # the paths of the images that --leave-out named
    weights: str | None = None
    split_seed: int = 0
    group_size: Mapping[str, Any] = field(default_factory=dict)  # see `GroupSize`
    num_workers: Mapping[str, int] = field(default_factory=dict)
    max_concurrent: int | None = None  # None: as many as fit
    strategy: Strategy | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    images: ImagesRecord | None = None
    files: FilesRecord = FilesRecord()
    data: str = ""  # the images' folder on the machine of the search
    groups: str | None = None  # of these images, see `groups.to_text`; None: an earlier version, which had none
    ray_dashboard: str = ""
    hardware: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path) -> "CommandRecord":
        """The record in a run's folder. Raises `ValueError` where it is missing, damaged or of a later version."""
        file = folder / FILE
        content = read_json(file)
        found = content.get("format", 1)
        if not isinstance(found, int) or found > FORMAT:
            raise ValueError(
                f"{file} has format {found}, and this version of finetune-search reads formats up to {FORMAT}. "
                "Install the version that wrote it, or a later one."
            )
        try:
            return cls._from_json(_upgraded(content) if found < FORMAT else content)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file} is damaged: {error!r}. Restore it from a copy.") from error

    @classmethod
    def _from_json(cls, content: Mapping[str, Any]) -> "CommandRecord":
        arguments = content.get("arguments", {})
        parts = {
            "arguments": SearchOptions.from_record(arguments),
            "asked": SearchOptions.from_record(content.get("asked", arguments)),
            "argv": tuple(content.get("argv", ())),
            "resumes": tuple(
                Resume(argv=tuple(each["argv"]), started_at=each["started_at"], changed=tuple(each["changed"]))
                for each in content.get("resumes", ())
            ),
            "strategy": Strategy(**content["strategy"]) if content.get("strategy") else None,
            "left_out": tuple(content.get("left_out", ())),
            "files": FilesRecord(**content.get("files", {})),
        }
        if images := content.get("images"):
            parts["images"] = ImagesRecord(**images | {"classes": tuple(images["classes"])})
        plain = {spec.name: content[spec.name] for spec in fields(cls) if spec.name in content}
        return cls(**plain | parts)

    def save(self, folder: Path) -> None:
        options = {"arguments": self.arguments.to_record(), "asked": self.asked.to_record()}
        write_atomically(folder / FILE, json.dumps(asdict(self) | options, indent=2) + "\n")


def _upgraded(content: dict[str, Any]) -> dict[str, Any]:
    """A record of format 1 in the terms of format 2."""
    if method := content.get("method"):
        scheduler = method.get("scheduler", "none")
        content = content | {"strategy": method | {"scheduler": OLD_SCHEDULERS.get(scheduler, scheduler)}}
    return {"max_concurrent": 1} | content
