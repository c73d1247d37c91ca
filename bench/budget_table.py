"""What bench/budget.py makes of its results: which of a method's models counts at a time, means, and the tables."""

from collections.abc import Sequence
from statistics import fmean, median, stdev
from typing import Any

from budget_methods import Record
from common import footer

ANYTIME = ("probe", "fastai")
"""One run, read at all times; the others are told how long they have, and run once for each time."""
ROWS = {
    "search": "this project",
    "before": "this project, before",
    "probe_best": "logistic regression on frozen features: the best by validation",
    "probe_median": "logistic regression on frozen features: the median",
    "fastai": "fastai, `fine_tune` again and again",
    "autogluon": "AutoGluon MultiModal",
}
HOW = {
    "search": "A search for each time. What is in `best/` when the minutes are over counts; its `--time-budget` is\n"
    "  {margin:g} s shorter, for its start and its end.",
    "before": "An earlier checkout, in the same way, with all of the time as its `--time-budget`.",
    "probe": "scikit-learn. Sizes from small to large, at each the architectures in this order, in bf16 where the CPU\n"
    "  has it; standardised features, C chosen by validation (a stratified fifth). The best by validation, and the\n"
    "  median, of those that are ready.",
    "fastai": "`vision_learner(...).fine_tune(1)`, then 2, 4, 8 ... epochs at the valley of `lr_find`. The best by\n"
    "  validation (the same fifth) of those that have ended.",
    "autogluon": "`MultiModalPredictor` at its defaults, in a Python of its own. It is told the time that is left\n"
    "  after its imports, and counts even if it ends late.",
}
"""What a method does with its arguments."""


def key_of(job: Record) -> tuple[Any, ...]:
    return tuple(job[name] for name in ("set", "split", "method", "minutes"))


def covers(record: Record, job: Record) -> bool:
    """Whether a result has what a job would give; one that is read at all times also has the shorter ones."""
    longer = record["method"] in ANYTIME and record["minutes"] > job["minutes"]
    return key_of(record | {"minutes": job["minutes"]} if longer else record) == key_of(job)


def rank(model: Record) -> tuple[float, float]:
    """Sorts models, the best by validation first."""
    return model["valid_error"], model.get("valid_loss", 0.0)


def errors_at(record: Record, minutes: float) -> dict[str, tuple[float, bool]]:
    """By row of the table: the test error after so many minutes, and whether there was a model."""
    method, models = record["method"], record["models"]
    if method in ANYTIME:
        models = [model for model in models if model["seconds"] <= 60 * minutes]
    best, middle = (record["majority_error"], False), (record["majority_error"], False)
    if models:
        best = min(models, key=rank)["test_error"], True
        middle = median(model["test_error"] for model in models), True
    return {"probe_best": best, "probe_median": middle} if method == "probe" else {method: best}


def summarise(records: Sequence[Record], minutes: Sequence[float]) -> Record:
    """set -> minutes -> row -> mean, standard error (None for one split) and median over the splits."""
    found: dict[str, dict[str, dict[str, list[tuple[float, bool]]]]] = {}
    jobs = sorted({key_of(record | {"minutes": each}) for record in records for each in minutes})
    for name, number, method, each in jobs:
        job = {"set": name, "split": number, "method": method, "minutes": each}
        if having := [record for record in records if covers(record, job)]:
            for row, outcome in errors_at(having[-1], each).items():
                found.setdefault(name, {}).setdefault(f"{each:g}", {}).setdefault(row, []).append(outcome)
    return {
        name: {each: {row: statistics(outcomes) for row, outcomes in rows.items()} for each, rows in times.items()}
        for name, times in found.items()
    }


def statistics(outcomes: Sequence[tuple[float, bool]]) -> Record:
    errors = [error for error, _ in outcomes]
    return {
        "error_mean": fmean(errors),
        "error_sem": stdev(errors) / len(errors) ** 0.5 if len(errors) > 1 else None,
        "error_median": median(errors),
        "splits": len(errors),
        "no_model": sum(not there for _, there in outcomes),
        "errors": errors,
    }


def cell(found: Record | None) -> str:
    if not found:
        return "-"
    spread = "" if found["error_sem"] is None else f" ± {100 * found['error_sem']:.1f}"
    none = f" (no model: {found['no_model']} of {found['splits']})" if found["no_model"] else ""
    return f"{100 * found['error_mean']:.1f}{spread}{none}"


def table(name: str, times: Record, records: Sequence[Record]) -> str:
    """Of one set; `times` as `summarise` gives them."""
    of_set = [record for record in records if record["set"] == name]
    first, splits = of_set[0], len({record["split"] for record in of_set})
    columns = sorted(times, key=float)
    rows = [
        f"| {words} | {' | '.join(cell(times[each].get(row)) for each in columns)} |"
        for row, words in ROWS.items()
        if any(row in times[each] for each in columns)
    ]
    line = "\n"
    return f"""## {name}

{first["train_images"]} images to train and choose by, {first["test_images"]} to test; n = {splits} splits.

| test error in % after | {" | ".join(f"{each} min" for each in columns)} |
|---{"|---" * len(columns)}|
{line.join(rows)}
"""


def how(method: str, records: Sequence[Record], margin: float) -> str:
    """How a method ran: its arguments, for each set if they differ, and what it does with them."""
    command = "python -m search.run " if method in ("search", "before") else ""
    sets: dict[str, list[str]] = {}
    for record in records:
        if record["method"] == method and record["set"] not in sets.setdefault(record["words"], []):
            sets[record["words"]].append(record["set"])
    lines = [
        f"  `{command}{words}`" + (f" ({', '.join(names)})" if len(sets) > 1 else "") for words, names in sets.items()
    ]
    title = ROWS.get(method, "logistic regression on frozen features")
    return "\n".join([f"- {title}:", *lines, f"  {HOW[method].format(margin=margin)}"])


def markdown(result: Record) -> str:
    runs = result["runs"]
    names, methods = sorted({run["set"] for run in runs} & result.keys()), {run["method"] for run in runs}
    ways = [how(method, runs, result["margin"]) for method in HOW if method in methods]
    if "autogluon" not in methods:
        ways.append("- AutoGluon MultiModal was left out.")
    line = "\n"
    return f"""# Test error after so many minutes of one command

```
{result["command"]}
```

Mean ± standard error of the mean over the splits. A quarter of the images, drawn anew for each split and seen by no
method, is the test. The clock starts with the command: imports, Ray's start, decoding and presizing count; labelling
the test images does not. All files had been read once before. A command that has no model by then counts as one that
always answers with the most frequent class of its training images.

{line.join(table(name, result[name], runs) for name in names)}
## How each one ran

{line.join(ways)}

{result["date"]}. {footer(result)}"""
