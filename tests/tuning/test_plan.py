"""What a search would do: as many trainings, epochs and image passes as it then makes, in the time that they take."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from search.options.search_options import SearchOptions
from search.runs.paths import RunFolder
from search.spaces.space import Choice, Range, Space
from search.tuning.plan import PROBES, REFITTED, RETRAININGS, TRIALS, Features, Plan, plan_search
from search.tuning.tuner import RunOptions
from trainables.ray.worker_group import GroupSize

ARCHS = ("resnet18", "resnet34")
SPACE = Space(
    name="small",
    doc="for tests",
    dataset="quickstart",
    settings={
        "arch": ARCHS[0], "image_size": 96, "epochs": 2, "freeze_epochs": 0, "head_init": "probe", "probe_views": 1,
        "batch_size": 30, "tta_views": 4,
    },
    dimensions={"arch": Choice(ARCHS), "lr_max": Range(1e-4, 1e-2, log=True)},
)  # fmt: skip
TRAIN, VALID = 100, 20
OF_TRIAL = 2 * VALID + 5 * VALID
"""Forward passes of a trial with cached features: two epochs are validated, and the last one by five views."""


@dataclass(frozen=True)
class Costs:
    """An image takes 1 ms forward with the first architecture and 2 ms with the other, and 3 times as much to train."""

    start: float = 10.0
    end: float = 5.0
    fitting: float = 0.5

    def forward(self, arch: str, size: int) -> float:
        return 0.001 * (1 + ARCHS.index(arch)) * (size / 96) ** 2

    def training(self, arch: str, size: int) -> float:
        return 3 * self.forward(arch, size)

    def building(self, arch: str) -> float:
        return 0.1

    def judging(self, arch: str) -> float:
        return 0.0


@pytest.fixture
def weights(tmp_path) -> Path:
    for place, arch in enumerate(ARCHS, start=1):
        (tmp_path / f"{arch}.safetensors").write_bytes(bytes(1000 * place))
    return tmp_path


def planned(
    weights: Path, space: Space = SPACE, *, at_once: int = 1, limit: float | None = None, seed: int = 0,
    features: Features | None = None, **options,
) -> Plan:  # fmt: skip
    asked = SearchOptions(**{"space": "quickstart", "weights": weights, "trials": 3, "metric": "error_rate"} | options)
    run = RunOptions(
        options=asked, space=space, folder=RunFolder(weights / "run"), data="", labels=["a", "b"],
        group_size=GroupSize(),
    )  # fmt: skip
    how = {"at_once": at_once, "limit": limit, "seed": seed, "features": features}
    return plan_search(run, Costs(), (TRAIN, VALID), **how)


def test_a_search_begins_with_its_screen_and_ends_with_the_winner_on_all_images(weights):
    plan = planned(weights)
    assert plan.counts == {PROBES: 3, TRIALS: 3, REFITTED: 1}
    assert plan.work[PROBES].forward == 2 * (TRAIN + VALID) + TRAIN  # of both architectures, then views of the best
    assert (plan.work[TRIALS].epochs, plan.work[REFITTED].epochs) == (6, 2)


@pytest.mark.parametrize("seed", range(4))
def test_whole_batches_train_and_views_are_computed_once_for_an_architecture(weights, seed):
    plan = planned(weights, seed=seed, trials=12)
    assert plan.work[TRIALS].training == 12 * 2 * 90
    assert plan.work[TRIALS].forward == 12 * OF_TRIAL + TRAIN  # the views of the other architecture
    assert plan.work[REFITTED].training == 2 * 120
    assert plan.work[REFITTED].forward == OF_TRIAL + VALID  # the views of those for validation


def test_what_is_planned_is_what_the_parts_take(weights):
    space = SPACE.with_settings(["arch=resnet18"])
    plan = planned(weights, space, trials=2)
    probes = 0.1 + 0.12 + 0.5 + 0.1 + 0.1 + 0.5  # features and a fit, then views and a fit with them
    trials = 2 * (0.1 + 2 * 90 * 0.003 + OF_TRIAL * 0.001)
    assert plan.work[PROBES].seconds == pytest.approx(probes)
    assert plan.work[TRIALS].seconds == pytest.approx(trials)
    assert plan.seconds == pytest.approx(10 + probes + trials + plan.work[REFITTED].seconds + 5)


def test_frozen_epochs_are_forward_passes_and_small_images_of_progressive_resizing_are_quicker(weights):
    settings = ["head_init=zeros", "freeze_epochs=1", "epochs=3", "arch=resnet18", "tta_views=0"]
    plan = planned(weights, SPACE.with_settings(settings), trials=1, refit="off")
    assert plan.counts == {TRIALS: 1}
    assert (plan.total.epochs, plan.total.training, plan.total.forward) == (4, 3 * 90, 90 + 4 * VALID)
    small = planned(weights, SPACE.with_settings([*settings, "start_size=48"]), trials=1, refit="off")
    assert small.total.seconds < plan.total.seconds and small.total.epochs == 4


def test_features_that_are_cached_are_not_computed_again(weights):
    cached = Counter({("resnet18", 96, False, TRAIN + VALID): 1, ("resnet18", 96, True, TRAIN): 1})
    plan = planned(weights, SPACE.with_settings(["arch=resnet18"]), features=cached)
    assert plan.work[PROBES].forward == 0 and plan.work[TRIALS].forward == 3 * OF_TRIAL
    assert cached.total() == 2  # it is the caller's


def test_the_best_are_trained_again_with_other_seeds_or_in_other_folds(weights):
    assert planned(weights, confirm=2).counts[RETRAININGS] == 2 * 3
    folds = planned(weights, SPACE.with_settings(["arch=resnet18"]), folds=4, confirm=1)
    assert folds.counts[RETRAININGS] == 3
    assert folds.work[RETRAININGS].training == 3 * 2 * 90  # 90 of 120 images train
    assert folds.work[RETRAININGS].forward == 3 * (2 * 30 + 5 * 30 + 90)  # each fold has views of its own


def test_trials_at_once_share_the_time_and_not_the_work(weights):
    one, two = planned(weights, trials=12), planned(weights, trials=12, at_once=2)
    assert two.total.training == one.total.training
    assert 0.4 < (two.seconds - 15) / (one.seconds - 15) < 0.7


def test_a_time_budget_ends_it_and_says_how_many_trials_fit(weights):
    plans = [planned(weights, trials=100, limit=limit) for limit in (20.0, 40.0)]
    assert 0 < plans[0].counts[TRIALS] < plans[1].counts[TRIALS] < 100
    assert all(plan.seconds <= limit + 5 for plan, limit in zip(plans, (20, 40), strict=True))
    assert all(plan.seconds > 0.75 * limit for plan, limit in zip(plans, (20, 40), strict=True))


def test_a_budget_that_the_start_takes_leaves_nothing(weights):
    assert planned(weights, limit=9.0).counts == {}


def test_halving_promotes_what_it_would_train_again(weights):
    space = SPACE.with_settings(["epochs=1..9", "lr_max=1e-4..1e-2"])
    plan = planned(weights, space, trials=12, scheduler="halving", screen="off")
    assert plan.counts[TRIALS] == 12
    assert 12 < plan.total.epochs < 12 * 9


def test_of_a_screen_that_keeps_one_architecture_only_that_one_is_trained(weights):
    forward = [planned(weights, seed=seed, screen="1").work[TRIALS] for seed in range(8)]
    assert len({round(work.seconds, 6) for work in forward}) == 2  # by which of the two is best
