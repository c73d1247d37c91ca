"""Searches replayed on learning curves: what answers a proposal, what is counted, and the benchmark as a whole."""

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from in_process import run_here

from search.options.strategy import Strategy
from search.spaces.space import Choice, Range, Space

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "bench"))

import quality_replay  # noqa: E402
import search_quality  # noqa: E402

SPACE = Space(
    name="small",
    doc="for tests",
    dataset="quickstart",
    settings={"arch": "a", "image_size": 96, "presize": 128, "freeze_epochs": 1, "epochs": 2},
    dimensions={
        "arch": Choice(("resnet18", "resnet34")),
        "image_size": Choice((96,)),
        "epochs": Range(1, 3),
        "lr_max": Range(1e-4, 1e-2, log=True),
    },
    first=(),
)


def error(lr_max: float, epochs: int, seed: int) -> float:
    return round(0.1 + abs(lr_max - 3e-3) * 50 + 0.02 * (3 - epochs) + 0.001 * seed, 6)


def rows() -> pd.DataFrame:
    """Curves that fall to an error that only the rate, the epochs and the seed decide."""
    found = []
    for arch in ("resnet18", "resnet34"):
        for lr_max in (1e-4, 1e-3, 3e-3, 1e-2):
            for epochs, seed in ((e, s) for e in (1, 2, 3) for s in (0, 1)):
                for epoch in range(1, epochs + 2):
                    unfrozen = epoch > 1
                    found.append(
                        {
                            "arch": arch,
                            "image_size": 96,
                            "epochs": epochs,
                            "lr_max": lr_max,
                            "seed": seed,
                            "epoch": epoch,
                            "stage": "unfrozen" if unfrozen else "frozen",
                            "progress": 100 * (epoch - 1) // epochs,
                            "error_rate": error(lr_max, epochs, seed) + 0.1 * (epochs + 1 - epoch),
                            "valid_loss": 1.0,
                            "seconds": 1.0 + unfrozen,
                            "failure": None,
                        }
                    )
    return pd.DataFrame(found)


@pytest.fixture(scope="module")
def table():
    return quality_replay.CurveTable(rows(), SPACE)


def test_a_configuration_of_the_table_is_answered_by_its_own_trainings(table):
    config = {"arch": "resnet34", "image_size": 96, "epochs": 2, "lr_max": 1e-3}
    assert [training.error_rate[-1] for training in table.answers(config)] == [error(1e-3, 2, 0), error(1e-3, 2, 1)]
    assert table.error(config) == pytest.approx(error(1e-3, 2, 0) + 0.0005)


def test_another_one_is_answered_by_the_nearest_of_as_many_epochs(table):
    answer, _ = table.answers({"arch": "resnet18", "image_size": 96, "epochs": 3, "lr_max": 2.5e-3})
    assert (len(answer), answer.error_rate[-1]) == (4, error(3e-3, 3, 0))


def test_a_dimension_without_influence_weighs_nothing(table):
    weights = dict(zip(table.others, table.weights, strict=True))
    assert weights["lr_max"] > weights["arch"]


@pytest.mark.parametrize("slots", [1, 4])
def test_a_replay_spends_its_budget_and_gives_the_same_trials_again(table, slots):
    once, again = (
        quality_replay.replay(Strategy(scheduler="rungs"), table, seed=3, slots=slots, budget=40) for _ in range(2)
    )
    assert once.epochs == sum(trial.epochs_done for trial in once.trials) == 40
    assert [trial.config for trial in once.trials] == [trial.config for trial in again.trials]
    assert sum(not (trial.completed or trial.stopped) for trial in once.trials) <= slots
    seen = [best.final_error for _, best in once.incumbents]
    assert seen == sorted(seen, reverse=True)
    assert seen[-1] == min(trial.final_error for trial in once.trials if trial.completed)


def test_rungs_stop_bad_trials_and_none_stops_none(table):
    stopped = {
        name: sum(
            trial.stopped
            for trial in quality_replay.replay(
                Strategy(searcher="random", scheduler=name), table, seed=0, slots=1, budget=120
            ).trials
        )
        for name in ("rungs", "median", "none")
    }
    assert stopped["rungs"] > 0 < stopped["median"] and stopped["none"] == 0


def test_halving_trains_the_best_third_for_longer(table):
    done = quality_replay.replay(Strategy(searcher="random", scheduler="halving"), table, seed=0, slots=1, budget=60)
    longest = [trial.config for trial in done.trials if trial.config["epochs"] == 3]
    short = [trial.config for trial in done.trials if trial.config["epochs"] == 1]
    assert 0 < len(longest) <= len(short) / 3
    assert all(config | {"epochs": 1} in short for config in longest)
    assert sum(trial.stopped for trial in done.trials) == len(short) - len(longest)


def test_after_one_epoch_the_best_are_trained_to_their_ends(table):
    done = quality_replay.replay_top_k(table, seed=0, budget=60)
    assert (done.epochs, len(done.trials)) == (60, 40)
    longer = [trial for trial in done.trials if trial.epochs_done > 1]
    worst = max(trial.training.error_rate[0] for trial in longer)
    assert all(trial.training.error_rate[0] >= worst for trial in done.trials if trial.stopped)


def test_where_the_rung_shows_the_end_tau_is_1_and_what_it_says_is_what_the_curves_say(table):
    pairs = quality_replay.short_and_long(table)
    assert search_quality.tau(*zip(*pairs, strict=True)) == pytest.approx(1)
    again = {"table": table, "seed": 0, "slots": 1, "budget": 60}
    plain = quality_replay.replay(Strategy(scheduler="rungs"), **again, forecasts=False).rung_and_final
    assert len(plain) == 16  # the trainings of three epochs
    assert {round(rung - final, 6) for rung, final in plain} == {0.1}  # the last epoch but one
    assert quality_replay.replay(Strategy(scheduler="none"), **again).rung_and_final == []


def test_a_forecast_knows_more_of_the_end_than_the_rung_does():
    """Where the error at a rung is the higher, the higher the rate, and the end is not."""
    curves = rows()
    at_rung = curves["progress"].between(1, 99)
    curves.loc[at_rung, "error_rate"] += 0.3 * np.log10(curves["lr_max"] / 1e-4)
    again = {"table": quality_replay.CurveTable(curves, SPACE), "seed": 0, "slots": 1, "budget": 120}
    plain, forecast = (
        quality_replay.replay(Strategy(scheduler="rungs"), **again, forecasts=forecasts).rung_and_final
        for forecasts in (False, True)
    )
    tau_plain, tau_forecast = (search_quality.tau(*zip(*pairs, strict=True)) for pairs in (plain, forecast))
    assert tau_plain < 0.5 and tau_forecast > tau_plain + 0.2


def test_the_setting_that_decides_is_known_and_named(table):
    assert table.decisive() == "lr_max"
    done = quality_replay.replay(Strategy(searcher="random", scheduler="none"), table, seed=0, slots=1, budget=120)
    assert len(done.completed) == sum(trial.completed for trial in done.trials)
    assert quality_replay.most_important(done.completed, 0.5) == "lr_max"
    assert quality_replay.most_important(done.completed[:4], 0.5) is None


@pytest.mark.slow
def test_the_benchmark_runs_and_writes_its_results(tmp_path):
    options = ["--seeds", "2", "--budget", "16"]
    options += ["--methods", "tpe", "tpe, halving", search_quality.TOP_K, "--jobs", "1", "--out", str(tmp_path)]
    done = run_here(search_quality.main, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "search_quality.json").read_text())
    assert {"random", "random, 4 at once", "tpe", "tpe, halving, 4 at once", search_quality.TOP_K} <= set(
        result["methods"]
    )
    for row in result["methods"].values():
        assert 0 < row["final_error_median"] < 1 and 0 <= row["best_stopped_share"] <= 1
    assert result["methods"]["tpe"]["kendall_tau"] is None
    assert result["methods"]["tpe, halving"]["kendall_tau"] > 0.3
    assert result["table"]["configurations"] >= 150
    assert result["importance"]["decisive"] == "lr_max"
    assert (tmp_path / "search_quality.png").stat().st_size > 10_000
    table = (tmp_path / "search_quality.md").read_text()
    assert str(tmp_path) not in table


def test_the_published_results_are_of_the_default_that_there_is():
    published = json.loads((ROOT / "results/bench/search_quality.json").read_text())
    assert published["default"] == search_quality.DEFAULT in published["methods"]
    assert published["seeds"] >= 20
