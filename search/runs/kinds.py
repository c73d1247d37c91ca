"""Fine-tuned trials and probes: what tells them apart, and what a person calls them. Imports no Ray."""

from collections.abc import Iterable

from trainables.system.text import many

TRIAL, PROBE = "trial", "probe"


def name_of(number: int) -> str:
    """What a person calls the trial of a number: those of a screen's probes are below 0."""
    return f"probe {-number}" if number < 0 else f"trial {number}"


def short_name(number: int) -> str:
    """The same where it is known to be of a trial: only its number."""
    return name_of(number).removeprefix("trial ")


def how_many(kinds: Iterable[str], trial: str = "trial") -> str:
    """Such as "10 trials", or "9 probes and 10 trials". `trial` is what one is called."""
    found = list(kinds)
    probes = found.count(PROBE)
    trials = len(found) - probes
    shown = [many(probes, "probe")] * bool(probes) + [many(trials, trial)] * bool(trials or not probes)
    return " and ".join(shown)
