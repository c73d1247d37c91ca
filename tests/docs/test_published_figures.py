"""The figures in the documentation are those that the scripts in bench/ have measured."""

import json
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STAGES = ("frozen", "unfrozen")
LITE0 = "tf_efficientnet_lite0"
DEFAULT = "cleanlab's, by default"


@cache
def measured(name: str) -> dict:
    return json.loads((ROOT / "results" / "bench" / f"{name}.json").read_text())


def cells(*numbers: float, digits: int, sign: str = "") -> str:
    """Several numbers in one cell of a table."""
    return " / ".join(f"{number:{sign}.{digits}f}" for number in numbers)


def readme() -> list[str]:
    trial, images, parity, chaos = map(measured, ("trial_overhead", "input_pipeline", "parity", "chaos"))
    speed, epoch = images["images_per_second"], measured("epoch")
    unfrozen = {side: found["median"] for side, found in epoch["archs"][LITE0]["seconds"]["unfrozen"].items()}
    ratio, ratio_fp32 = epoch["unfrozen_ratio"][LITE0], epoch["unfrozen_ratio_fp32"][LITE0]
    ours, fastai = (
        f"{100 * parity[f'{side}_error_mean']:.1f} ± {100 * parity[f'{side}_error_sem']:.1f} %"
        for side in ("ours", "fastai")
    )
    return [
        f"| {trial['ours_1_worker_seconds']:.3f} | {trial['nested_1_worker_seconds']:.1f} (a `TorchTrainer`",
        f"| 1/{trial['ratio_1_worker']:.0f} |",
        f"| {speed['ours']:.0f} | {speed['fastai']:.0f} (fastai) | {images['ratio']:.1f} |",
        f"| {unfrozen['ours']:.1f} in bf16, {unfrozen['ours_fp32']:.1f} in fp32 "
        f"| {unfrozen['fastai']:.1f} (fastai, fp32) | {ratio:.2f}, {ratio_fp32:.2f} |",
        f"| {ours} | {fastai} (fastai) |",
        f"| {chaos['faults']} faults (kills, hangs, full disks) in {chaos['searches']} searches "
        f"| {chaos['searches_finished']} of {chaos['searches']} finished, no trial lost |",
    ]


def performance() -> list[str]:
    trial, images, scale = map(measured, ("trial_overhead", "input_pipeline", "search_scale"))
    speed, seconds, models = images["images_per_second"], images["seconds"], measured("predict")["models"].values()
    largest = measured("cluster_model")["largest"]
    before, now = (measured("startup")[side]["moments"]["batch"] for side in ("before", "now"))
    return [
        f"| {speed['ours']:.0f} | {speed['fastai']:.0f} (fastai) | {images['ratio']:.1f} |",
        f"| {speed['torchvision']:.0f} (torchvision v2) | {images['torchvision_ratio']:.1f} |",
        f"| {seconds['ours_first']:.1f} | {seconds['fastai']:.1f} (fastai) | {images['first_epoch_ratio']:.2f} |",
        *(line for name in measured("epoch")["archs"] for line in epochs_of(name)),
        f"| {trial['ours_1_worker_seconds']:.3f} | {trial['nested_1_worker_seconds']:.1f} (a `TorchTrainer`",
        f"| {trial['ours_2_workers_seconds']:.3f} | {trial['nested_2_workers_seconds']:.1f} "
        f"| 1/{trial['ratio_2_workers']:.0f} |",
        f"| {now:.1f} | {before:.1f} (the version before) | {now / before:.2f} |",
        f"the last 100 of {scale['trials']} trials over the first 100 | {scale['last_over_first']:.2f} times |",
        f"| {cells(*(model['predict'] for model in models), digits=0)} "
        f"| {cells(*(model['bare'] for model in models), digits=0)} (the bare model",
        f"| {cells(*(model['ratio'] for model in models), digits=2)} |",
        f"{largest['memory']} trials), then its disk ({largest['disk']})",
        f"would carry {largest['driver']}.",
        driver_at_once(),
    ]


def driver_at_once() -> str:
    slices = measured("search_at_once")["slices"]
    seconds = sum(row["seconds"] for row in slices)
    rate = sum(row["results"] for row in slices) / seconds
    cores = sum(row["cores"] * row["seconds"] for row in slices) / seconds
    return f"{rate:.1f} results a second with {cores:.2f} cores and {max(row['mb'] for row in slices):.0f} MB."


def epochs_of(arch: str) -> list[str]:
    epoch = measured("epoch")
    seconds = epoch["archs"][arch]["seconds"]
    ours, fastai = (cells(*(seconds[s][side]["median"] for s in STAGES), digits=1) for side in ("ours", "fastai"))
    ratios, ratios_fp32 = (
        cells(*(epoch[f"{stage}_ratio{kind}"][arch] for stage in STAGES), digits=2) for kind in ("", "_fp32")
    )
    return [f"| {ours} | {fastai} (fastai) | {ratios} |", ratios_fp32]


METHODS = {
    "random": "random",
    "**tpe, forecast** (default)": "tpe, forecast",
    "tpe, rungs": "tpe, rungs",
    "the same without a forecast, by the error at the rung": "tpe, rungs that forecast nothing",
    "rungs with Optuna's default, multivariate TPE": "tpe as Optuna has it (multivariate), rungs",
    "tpe, halving": "tpe, halving",
    "tpe, median": "tpe, median",
    "gp": "gp",
}
"""As the page about early stopping calls them, and as the table does."""
TAUS = {
    "the forecast, once a search has spent its epochs": "tpe, rungs",
    "the error at the rung alone": "tpe, rungs that forecast nothing",
    "complete trainings of one epoch, as halving has them": "tpe, halving",
}


def early_stopping() -> list[str]:
    lines = []
    for label, name in METHODS.items():
        both = replayed(name), replayed(f"{name}, 4 at once")
        shares = cells(*(one["epochs_share_at_equal_quality"] for one in both), digits=2)
        stopped = cells(*(100 * one["best_stopped_share"] for one in both), digits=0)
        lines.append(f"| {label} | {shares} | {stopped} % |")
    return lines + [f"| {label} | {replayed(name)['kendall_tau']:.2f} |" for label, name in TAUS.items()]


def early_termination() -> list[str]:
    lines = []
    for name, by_slots in measured("early_termination")["sets"].items():
        for method in ("forecast", "rungs", "median"):
            both = [by_slots[slots][method] for slots in ("1", "4")]
            saved, stopped = (
                cells(*(100 * one[key] for one in both), digits=0) for key in ("epochs_saved", "best_stopped")
            )
            change = cells(*(100 * one["true_error_change"] for one in both), digits=2, sign="+")
            lines.append(f"| {name} | {method} | {saved} % | {stopped} % | {change} |")
    return lines


def replayed(name: str) -> dict:
    return measured("search_quality")["methods"][name]


def reliability() -> list[str]:
    chaos = measured("chaos")
    kinds = chaos["by_kind"]
    return [
        f"| worker killed, hung | {kinds['worker killed']}, {kinds['worker hung']} |",
        f"| {kinds['group host killed']}, {kinds['controller killed']}, {kinds['trial actor killed']} |",
        f"| driver killed, interrupted | {kinds['driver killed']}, {kinds['driver interrupted']} |",
        f"| head, node killed | {kinds['head killed']}, {kinds['node killed']} |",
        f"| searches finished | {chaos['searches_finished']} of {chaos['searches']} |",
        f"weights included | {chaos['searches_equal_to_undisturbed']} |",
        f"took {chaos['minutes']:.0f} minutes",
    ]


def probabilities() -> list[str]:
    names = ("error_rate", "before", "after", "chance")
    return [
        f"| {kind['images']:.0f} | {' | '.join(f'{100 * kind[name]:.1f}' for name in names)} |"
        for kind in measured("calibration")["summary"]
    ]


def data() -> list[str]:
    flowers, caltech = measured("suspects")["sets"].values()
    both = flowers, caltech

    def spread(of: dict, key: str, spread: str) -> str:
        return f"{100 * of[key]:.1f} ± {100 * of[spread]:.1f}"

    precisions = (f"{spread(of, 'precision', 'precision_deviation')} %" for of in both)
    cleanlabs = (f"{100 * of[DEFAULT]:.1f} %" for of in both)
    errors = (f"{100 * of['error_before']:.1f}, {100 * of['error_after']:.1f} %" for of in both)
    gains = (spread(of, "gain", "gain_deviation") for of in both)
    return [f"| {' | '.join(cells)} |" for cells in (precisions, cleanlabs, errors, gains)]


PAGES = {
    "docs/data.md": data(),
    "README.md": readme(),
    "docs/performance.md": performance(),
    "docs/early-stopping.md": early_stopping() + early_termination(),
    "docs/reliability.md": reliability(),
    "docs/results-and-files.md": probabilities(),
}


@pytest.mark.parametrize(("page", "line"), [(page, line) for page, lines in PAGES.items() for line in lines])
def test_a_figure_was_measured(page, line):
    assert line in " ".join((ROOT / page).read_text().split())
