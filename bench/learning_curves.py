"""Whole learning curves of many configurations of the quickstart space, which bench/search_quality.py replays.

    python bench/learning_curves.py
    python bench/learning_curves.py --data DIR --weights DIR --name flowers17

Each point of the other dimensions is trained with every number of epochs, so that what a short recipe says of a long
one is in the table as well, and all of it with two seeds, so that the table knows how much of a difference is chance.
Without Ray; a training takes about a minute of one core, or a few seconds on a GPU that several share. Ctrl-C keeps
the trainings that have ended: the same command goes on.

With `--data`, the curves are of the space `images` and of a folder's images, see image_curves.py.
"""

import argparse
import csv
import gzip
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import image_curves
from common import CPUS, RESULTS
from empty_trials import BEFORE_PROBES

FILE = "learning_curves.csv.gz"
METRICS = ("epoch", "stage", "progress", "train_loss", "valid_loss", "error_rate")
SEEDS = 2
"""Trainings of each configuration."""
DIMENSIONS = ("arch", "image_size", "epochs", "lr_max_frozen", "lr_max", "lr_ratio", "mixup_alpha", "smoothing")
Config = dict[str, Any]


def space():
    """The quickstart's as it was before trials started from probes: the published curves are of that space. In fp32
    everywhere, which is what it has on a CPU."""
    from search.spaces.space import load_space

    found = load_space("quickstart")
    found = replace(found, settings=found.settings | {"seed": found.seed, "tta_views": 0, "precision": "fp32"})
    found = found.with_settings(BEFORE_PROBES)
    return replace(found, dimensions={name: found.dimensions[name] for name in DIMENSIONS})


def configurations(points: int, seed: int) -> list[Config]:
    """Trial 0, then points of a scrambled Sobol sequence, which fill the space more evenly than random ones; each with
    every number of epochs."""
    import optuna

    from search.tuning.study_configs import params_of, propose

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    quickstart = space()
    study = optuna.create_study(sampler=optuna.samplers.QMCSampler(seed=seed, scramble=True))
    study.enqueue_trial(params_of(quickstart, quickstart.first_configs()[0]))
    lengths, found = quickstart.dimensions["epochs"], []
    for _ in range(points):
        trial = study.ask()
        config = propose(trial, quickstart)
        study.tell(trial, 0.0)
        found += [config | {"epochs": epochs} for epochs in range(lengths.low, lengths.high + 1)]
    return found


def seeded(configs: Sequence[Config]) -> list[Config]:
    """All of them with the space's seed, as `search.run` trains them, then all with the next one, and so on."""
    first = space().seed
    return [config | {"seed": seed} for seed in range(first, first + SEEDS) for config in configs]


def train(job: tuple[int, Config, str]) -> tuple[int, Config, list[Config], str]:
    """Number, configuration, an entry an epoch, and the reason where it diverged."""
    import torch

    from trainables.data.datasets import prepare
    from trainables.data.layouts import find_images
    from trainables.data.presize import presize
    from trainables.recipe import Recipe
    from trainables.training.fine_tune import Diverged, FineTune

    torch.set_num_threads(1)
    number, config, device = job
    recipe = Recipe.from_dict(space().settings | config)
    images = presize(find_images(prepare("quickstart")), recipe.presize, recipe.resize_method)
    training = FineTune(recipe, images, device=device, num_threads=1, split_seed=space().split_seed)
    epochs, failure = [], ""
    try:
        for _ in range(recipe.total_epochs):
            started = time.perf_counter()
            metrics = training.run_epoch()
            epochs.append({name: metrics[name] for name in METRICS} | {"seconds": time.perf_counter() - started})
    except Diverged as error:
        failure = str(error)
    finally:
        training.close()
    return number, config, epochs, failure


def train_all(function: Callable, jobs: Sequence[tuple], processes: int, partial: Path) -> Iterator[tuple]:
    with multiprocessing.get_context("spawn").Pool(processes) as pool, partial.open("a") as file:
        for ended in pool.imap_unordered(function, jobs):
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


def write_table(file: Path, rows: list[Config], columns: Sequence[str]) -> None:
    with gzip.GzipFile(file, "wb", mtime=0) as out, gzip.io.TextIOWrapper(out, newline="") as text:
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({n: f"{v:.6g}" if isinstance(v, float) else v for n, v in row.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=128, help="of the dimensions but epochs (128 without it)")
    parser.add_argument("--seed", type=int, default=0, help="of the configurations (0 without it)")
    parser.add_argument("--jobs", type=int, default=CPUS, help="trainings at once (one a core without it)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(cpu without it)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    image_curves.add_arguments(parser)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    jobs: list[tuple]
    if args.data:
        function, columns = image_curves.train, image_curves.COLUMNS
        file = args.out / FILE.replace(".csv", f"_{args.name or args.data.name}.csv")
        shared: tuple = (args.device, image_curves.options(args))
        jobs = [(number, config, *shared) for number, config in enumerate(image_curves.configurations(args))]
    else:
        function, columns = train, ("number", "seed", *space().dimensions, *METRICS, "seconds", "failure")
        file = args.out / FILE
        configs = seeded(configurations(args.points, args.seed))
        jobs = [(number, config, args.device) for number, config in enumerate(configs)]
    partial = file.with_name(file.name.replace(".csv.gz", ".partial"))
    ended = [json.loads(line) for line in partial.read_text().splitlines()] if partial.is_file() else []
    if any(config != jobs[number][1] for number, config, *_ in ended if number < len(jobs)):
        parser.error(f"{partial} is of other configurations: remove it, or go on with those")
    have = {one[0] for one in ended}
    todo = [job for job in jobs if job[0] not in have]
    started = time.monotonic()
    for count, one in enumerate(train_all(function, todo, args.jobs, partial), start=1):
        ended.append(one)
        left = (time.monotonic() - started) / count * (len(todo) - count)
        became = f"error {one[2][-1]['error_rate']:.3f}" if not one[3] else one[3]
        print(f"{len(ended)}/{len(jobs)}  configuration {one[0]}: {became}  {left / 60:.0f} min left", flush=True)
    write_table(file, table(ended), columns)
    partial.unlink()


if __name__ == "__main__":
    main()
