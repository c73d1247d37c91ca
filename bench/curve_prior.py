"""The prior of the forecasts of learning curves, from published tables; and how good forecasts of a set are whose
table the prior has not seen.

    python bench/curve_prior.py

Writes search/tuning/curve_prior.json. Each table is a few searches of their own, since a search knows only some
trials: the incumbent, to which trials are compared, is the best of some drawn ones. A hierarchical linear model (EM)
gives the mean and the deviation of the coefficients over searches.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from common import RESULTS, command_line

from search.tuning.curve_forecast import (
    FEATURES,
    KNOTS,
    LEAST_NOISE,
    PRIOR_FILE,
    ROWS_PER_TRIAL,
    Curve,
    Level,
    Prior,
    binomial,
    hats_at,
    progress_of,
    redrawn,
    rows,
    targets,
)

REFERENCES = (1, 1, 2, 3, 5, 8, 12, 20)
"""How many trials the incumbent of each search is the best of."""
WEAK = 1.0
"""Deviation of the mean coefficients, before any table is seen."""
DEVIATION, SETS = 0.1, 2.0
"""What is expected of the deviations, and how many sets that counts as: a few tables cannot tell how sets differ."""
ITERATIONS = 30
FIRST_NOISE = (0.15, 0.1, 0.06, 0.03)


def curves_of(table: pd.DataFrame) -> list[Curve]:
    """The whole trainings; without coordinates in a space, whose effect differs from set to set."""
    found = []
    for _, epochs in table.groupby("number"):
        epochs = epochs.sort_values("epoch")
        if "failure" in epochs and epochs["failure"].notna().any():
            continue
        columns = epochs[["epoch", "progress", "error_rate", "valid_loss"]].itertuples(index=False)
        results = [(int(number), int(progress), error, loss) for number, progress, error, loss in columns]
        first = epochs.iloc[0]
        probe = first["error_rate"] if first["stage"] == "probe" else None
        num_images = int(first.get("valid_images", 0)) or 120
        found.append(Curve([], first["lr_max"], results[:-1], probe, num_images, results[-1][2:]))
    return found


def searches(curves: Sequence[Curve], seed: int = 0) -> list[tuple[np.ndarray, ...]]:
    """Rows, targets, progress, binomial variances and weights of the epochs, one for each drawn incumbent."""
    rng = np.random.default_rng(seed)
    progress = np.concatenate([progress_of(curve) for curve in curves])
    changes = np.concatenate([targets(curve) for curve in curves])
    counts = [len(curve.epochs) for curve in curves]
    noise = np.repeat([binomial(curve.final_metric, curve.num_images) for curve in curves], counts)
    weights = np.repeat(ROWS_PER_TRIAL / np.array(counts), counts)
    found = []
    for count in REFERENCES:
        drawn = rng.choice(len(curves), min(count, len(curves)), replace=False)
        level = Level.of(min((curves[i] for i in drawn), key=lambda curve: curve.final))
        x = np.concatenate([rows(curve, level) for curve in curves])
        found.append((x, changes, progress, redrawn(progress) * noise, weights))
    return found


def fit(tables: Mapping[str, Sequence[Curve]]) -> Prior:
    """Each table counts as much as any other, however many trainings it has."""
    groups = [(search, 60 / len(curves)) for curves in tables.values() for search in searches(curves)]
    size = len(KNOTS) * len(FEATURES)
    mean, variance, own = np.zeros(size), np.full(size, 0.1), np.array(FIRST_NOISE)
    heights = [hats_at(search[2]) for search, _ in groups]
    for _ in range(ITERATIONS):
        means, spreads, above, below = [], [], np.zeros(len(KNOTS)), np.zeros(len(KNOTS))
        for (search, share), height in zip(groups, heights, strict=True):
            x, y, _, chance, weights = search
            w = min(1.0, share) * weights / (height @ own + chance + LEAST_NOISE)
            covariance = np.linalg.inv(x.T @ (x * w[:, None]) + np.diag(1 / variance))
            mine = covariance @ (x.T @ (w * y) + mean / variance)
            means.append(mine)
            spreads.append(np.diag(covariance))
            misses = np.square(y - x @ mine) - chance
            above += share * (height * (misses * weights)[:, None]).sum(0)
            below += share * (height * weights[:, None]).sum(0)
        mean = len(tables) * np.mean(means, axis=0) / variance / (len(tables) / variance + 1 / WEAK**2)
        seen = np.mean(np.square(np.array(means) - mean) + spreads, axis=0)
        variance = (SETS * DEVIATION**2 + len(tables) * seen) / (SETS + len(tables))
        own = (above / below).clip(0.001)
    return Prior(mean, np.sqrt(variance), own)


def read(files: Sequence[Path]) -> dict[str, list[Curve]]:
    return {file.name.removeprefix("learning_curves").split(".")[0].strip("_") or "quickstart": curves_of(
        pd.read_csv(file)) for file in files}  # fmt: skip


def to_json(prior: Prior, origin: str) -> str:
    numbers = {name: [round(float(v), 4) for v in getattr(prior, name)] for name in ("mean", "deviation", "noise")}
    entries = {"origin": origin, "knots": KNOTS, "features": FEATURES} | numbers
    return "{\n" + ",\n".join(f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries.items()) + "\n}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", type=Path, nargs="*", default=sorted(RESULTS.glob("learning_curves*.csv.gz")))
    parser.add_argument("--out", type=Path, default=PRIOR_FILE)
    args = parser.parse_args()
    tables = read(args.tables)
    counts = ", ".join(f"{name} ({len(curves)} trainings)" for name, curves in tables.items())
    args.out.write_text(to_json(fit(tables), f"{command_line()}: {counts}"))


if __name__ == "__main__":
    main()
