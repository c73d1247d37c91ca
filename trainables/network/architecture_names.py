"""The architectures that a pattern such as `convnext_*` stands for: those of timm that have pretrained weights.

`names_like` imports no torch; a child process does. What it finds is kept for this version of timm.
"""

import json
import logging
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from difflib import get_close_matches
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

from trainables.system.cache import cache_dir
from trainables.system.new_process import run_module
from trainables.system.text import last_line

logger = logging.getLogger(__name__)

WILDCARDS = "*?["
"""The characters of `fnmatch` that make a name a pattern."""
NUM_NEAR = 8
"""Names that are suggested for a pattern that matches none."""


def is_pattern(name: str) -> bool:
    return any(wildcard in name for wildcard in WILDCARDS)


def names_like(patterns: Sequence[str]) -> dict[str, list[str]]:
    """Pattern -> the names that it matches, each with its weight tag, in timm's order; see `matching`.

    Raises one `ValueError`, with similar names, for all patterns that match nothing.
    """
    found = {pattern: names for pattern in patterns if (names := _kept(pattern))}
    if unknown := [pattern for pattern in patterns if pattern not in found]:
        logger.info("looking up architectures: %s", ", ".join(unknown))
        child = run_module("trainables.network.architecture_names", stdin=json.dumps(unknown))
        if child.returncode:
            raise ValueError(
                f"arch={','.join(unknown)} could not be looked up: the process for it ended with exit code "
                f"{child.returncode}"
            )
        found |= _checked(**json.loads(last_line(child.stdout)))
        for pattern in unknown:
            _keep(pattern, found[pattern])
    return {pattern: found[pattern] for pattern in patterns}


def _checked(names: dict[str, list[str]], near: dict[str, list[str]]) -> dict[str, list[str]]:
    problems = [
        f"arch={pattern!r} matches no architecture that timm {version('timm')} has pretrained weights for. Names like "
        f"it: {', '.join(others) or 'none'}."
        for pattern, others in near.items()
    ]
    if problems:
        raise ValueError(" ".join(problems))
    return names


def _file(pattern: str) -> Path:
    """The file that keeps what `pattern` has matched in this version of timm."""
    of = json.dumps([version("timm"), pattern])
    return cache_dir() / "architectures" / f"{sha256(of.encode()).hexdigest()[:32]}.json"


def _kept(pattern: str) -> list[str]:
    """What `pattern` has matched before; empty if that is not known."""
    with suppress(OSError, ValueError):
        names = json.loads(_file(pattern).read_text())
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            return names
    return []


def _keep(pattern: str, names: list[str]) -> None:
    with suppress(OSError):  # without it, the pattern is looked up again next time
        _file(pattern).parent.mkdir(parents=True, exist_ok=True)
        _file(pattern).write_text(json.dumps(names))


# --- In the child process ---------------------------------------------------------------------------------------------


def main() -> None:
    """The child process of `names_like`: patterns as JSON on stdin, prints their names, or names near to them."""
    names = {pattern: matching(pattern) for pattern in json.load(sys.stdin)}
    print(json.dumps({"names": names, "near": {pattern: near(pattern) for pattern in names if not names[pattern]}}))


def matching(pattern: str) -> list[str]:
    """The names, with their weight tags, that `pattern` matches and that can be fine-tuned. Imports timm.

    Without a dot it matches architectures, each with its default weights; with one, names and their tags. Networks that
    only make features, and those with several classifiers (distilled ones), are left out.
    """
    import timm

    if "." in pattern:
        names = timm.list_models(pattern, pretrained=True)
    else:
        archs = [arch for arch in timm.list_models(pattern) if timm.is_model_pretrained(arch)]
        tags = {arch: config.tag for arch in archs if (config := timm.get_pretrained_cfg(arch))}
        names = [f"{arch}.{tag}" if tag else arch for arch, tag in tags.items()]
    return [name for name in names if isinstance(timm.get_pretrained_cfg_value(name, "classifier"), str)]


def near(pattern: str) -> list[str]:
    """Names that resemble a pattern that matches none."""
    import timm

    wanted = re.sub(r"[*?]|\[[^]]*\]?", "", pattern)
    names = timm.list_models(pretrained=True) if "." in pattern else timm.list_models()
    return get_close_matches(wanted, names, n=NUM_NEAR, cutoff=0.4)


if __name__ == "__main__":
    main()
