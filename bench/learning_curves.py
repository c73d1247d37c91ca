"""Whole learning curves of many configurations of the quickstart space, which bench/search_quality.py replays.

    python bench/learning_curves.py

Each point of the other dimensions is trained with every number of epochs, so that what a short recipe says of a long
one is in the table as well. Without Ray, one thread a training, about a minute of one core each. Ctrl-C keeps the
trainings that have ended: the same command goes on.
"""

import argparse
import csv
import gzip
import json
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import CPUS, RESULTS

FILE = "learning_curves.csv.gz"
METRICS = ("epoch", "stage", "progress", "train_loss", "valid_loss", "error_rate")
Config = dict[str, Any]


def space():
    """The quickstart's, with its own seed of the trainings, as `search.run` has it."""
    from search.space import load_space

    found = load_space("quickstart")
    return replace(found, settings=found.settings | {"seed": found.seed, "tta_views": 0})


def configurations(points: int, seed: int) -> list[Config]:
    """Trial 0, then points of a scrambled Sobol sequence, which fill the space more evenly than random ones; each with
    every number of epochs."""
    import optuna

    from search.searcher import _distribution

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    quickstart = space()
    distributions = {name: _distribution(name, d) for name, d in quickstart.dimensions.items()}
    study = optuna.create_study(sampler=optuna.samplers.QMCSampler(seed=seed, scramble=True))
    study.enqueue_trial(quickstart.first_configs()[0])
    lengths, found = quickstart.dimensions["epochs"], []
    for _ in range(points):
        trial = study.ask(distributions)
        study.tell(trial, 0.0)
        found += [trial.params | {"epochs": epochs} for epochs in range(lengths.low, lengths.high + 1)]
    return found


def train(job: tuple[int, Config]) -> tuple[int, Config, list[Config], str]:
    """Number, configuration, an entry an epoch, and the reason where it diverged."""
    import torch

    from trainables.data import find_images
    from trainables.datasets import prepare
    from trainables.finetune import Diverged, FineTune
    from trainables.presize import presize
    from trainables.recipe import Recipe

    torch.set_num_threads(1)
    number, config = job
    recipe = Recipe.from_dict(space().settings | config)
    images = presize(find_images(prepare("quickstart")), recipe.presize, recipe.resize_method)
    training, epochs, failure = FineTune(recipe, images, num_threads=1, split_seed=space().split_seed), [], ""
    try:
        for _ in range(recipe.total_epochs):
            started = time.process_time()
            metrics = training.run_epoch()
            epochs.append({name: metrics[name] for name in METRICS} | {"cpu_seconds": time.process_time() - started})
    except Diverged as error:
        failure = str(error)
    finally:
        training.close()
    return number, config, epochs, failure


def train_all(jobs: Sequence[tuple[int, Config]], processes: int, partial: Path) -> Iterator[tuple]:
    with multiprocessing.get_context("spawn").Pool(processes) as pool, partial.open("a") as file:
        for ended in pool.imap_unordered(train, jobs):
            file.write(json.dumps(ended) + "\n")
            file.flush()
            yield ended


def table(ended: Sequence[Sequence[Any]]) -> list[Config]:
    """A row an epoch, sorted; a configuration that diverged has one more, without metrics."""
    rows = []
    for number, config, epochs, failure in sorted(ended, key=lambda one: one[0]):
        rows += [{"number": number} | config | epoch for epoch in epochs]
        if failure:
            rows.append({"number": number} | config | {"epoch": len(epochs) + 1, "failure": failure})
    return rows


def write_table(file: Path, rows: list[Config]) -> None:
    columns = ["number", *space().dimensions, *METRICS, "cpu_seconds", "failure"]
    with gzip.GzipFile(file, "wb", mtime=0) as out, gzip.io.TextIOWrapper(out, newline="") as text:
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({n: f"{v:.6g}" if isinstance(v, float) else v for n, v in row.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=64, help="of the dimensions but epochs (64 without it)")
    parser.add_argument("--seed", type=int, default=0, help="of the configurations (0 without it)")
    parser.add_argument("--jobs", type=int, default=CPUS, help="trainings at once (one a core without it)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    partial = args.out / "learning_curves.partial"
    ended = [json.loads(line) for line in partial.read_text().splitlines()] if partial.is_file() else []
    have = {one[0] for one in ended}
    jobs = list(enumerate(configurations(args.points, args.seed)))
    todo = [job for job in jobs if job[0] not in have]
    started = time.monotonic()
    for count, one in enumerate(train_all(todo, args.jobs, partial), start=1):
        ended.append(one)
        left = (time.monotonic() - started) / count * (len(todo) - count)
        became = f"error {one[2][-1]['error_rate']:.3f}" if not one[3] else one[3]
        print(f"{len(ended)}/{len(jobs)}  configuration {one[0]}: {became}  {left / 60:.0f} min left", flush=True)
    write_table(args.out / FILE, table(ended))
    partial.unlink()


if __name__ == "__main__":
    main()
