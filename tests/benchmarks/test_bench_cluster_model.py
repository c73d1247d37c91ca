"""The model of a head with many trials: it names what gives way first, and its costs are measured here in small."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "bench"))

import cluster_model  # noqa: E402
from cluster_head import (  # noqa: E402
    Costs,
    Head,
    Line,
    Load,
    Simulation,
    Work,
    demands,
    largest,
    seconds_to_start,
    shortest_epoch,
)

HEAD = Head(cores=4, memory_gb=64, disk_mb=100, network_mb=100)
LOAD = Load(epoch_seconds=10, epochs=10, checkpoint_mb=1, search=0)


def costs(seconds: float, **others) -> Costs:
    """Of a driver that takes so many seconds for each result."""
    return Costs(result={"table": Line(seconds)}, trial={}, save=Line(0), **others)


def first(costs: Costs, head: Head = HEAD, load: Load = LOAD) -> str:
    most = largest(costs, head, load)
    return min(most, key=most.get)


def test_a_driver_that_takes_a_second_for_a_result_is_what_gives_way_first():
    slow = costs(1.0)
    assert first(slow) == "driver" and largest(slow, HEAD, LOAD)["driver"] == 10
    assert shortest_epoch(slow, LOAD, 100) == 100
    found = Simulation(slow, HEAD, LOAD, 100, seed=0).run()
    assert found["driver"] == pytest.approx(1, abs=0.01)
    assert found["results_per_second"] == pytest.approx(1, rel=0.01)
    assert found["delay_p50"] > 60  # a hundred trials take turns, and each trains for ten seconds of its turn


def test_twice_the_costs_halve_the_trials():
    once, twice = (largest(costs(seconds), HEAD, LOAD)["driver"] for seconds in (0.05, 0.1))
    assert (once, twice) == (200, 100)
    heavy = {"epochs": 1, "checkpoint_mb": 50.0}
    once, twice = (largest(costs(0.001), HEAD, replace(LOAD, epoch_seconds=s, **heavy))["disk"] for s in (20, 10))
    assert once == 2 * twice == 40


def test_each_resource_can_be_the_first_one():
    assert first(costs(0.001), load=replace(LOAD, checkpoint_mb=200.0)) in ("disk", "network")
    assert first(costs(0.001, actor_mb=200.0), head=replace(HEAD, memory_gb=16)) == "memory"
    assert first(costs(0.001, actors=Work(per_result=1.0))) == "cores"
    assert first(costs(0.0001), load=replace(LOAD, checkpoint_mb=0.1)) == "places"
    kept = costs(0.001, checkpoint_copies=1.0, actor_mb=100.0)
    most = largest(kept, HEAD, replace(LOAD, checkpoint_mb=300.0, epoch_seconds=10**4))["memory"]
    assert most == pytest.approx(0.95 * 64_000 / 400, rel=0.02)


def test_costs_that_grow_with_the_trials_count():
    growing = Costs(result={"table": Line(0.01, per_known=1e-4)}, trial={}, save=Line(0.0, per_running=1e-3))
    at_ten, at_thousand = (demands(growing, HEAD, replace(LOAD, search=n), 10)["driver"] for n in (10, 1000))
    assert at_ten == pytest.approx(0.011 + 0.01 / 1.01) and at_thousand == pytest.approx(0.11 + 0.01 / 1.01)
    points = [(10, 10), (10, 1000), (1000, 1000), (100, 100)]
    fitted = Line.fit([(n, known, 3 + 0.2 * n + 0.1 * known) for n, known in points])
    assert (fitted.constant, fitted.per_running, fitted.per_known) == pytest.approx((3, 0.2, 0.1))
    assert Line.fit([(n, known, 5 - 0.001 * n) for n, known in points]).per_running == 0


def test_the_simulation_is_the_same_for_a_seed_and_agrees_with_the_demands():
    some = Costs(result={"table": Line(0.02)}, trial={"searcher": Line(0.1)}, save=Line(0.05), latency=0.01)
    found = Simulation(some, HEAD, LOAD, 100, seed=3).run()
    assert found == Simulation(some, HEAD, LOAD, 100, seed=3).run()
    assert found != Simulation(some, HEAD, LOAD, 100, seed=4).run()
    assert found["driver"] == pytest.approx(demands(some, HEAD, LOAD, 100)["driver"], rel=0.03)
    assert found["results_per_second"] == pytest.approx(10, rel=0.02)
    on_the_way = 0.02 + 0.01 + 1 / 100 + 1 / 100  # the driver, the latency, network and disk
    assert on_the_way < found["delay_p50"] < on_the_way + 0.05 < found["delay_p95"]


def test_trials_that_end_while_others_start_hold_up_the_search():
    slow = costs(0.001, start_seconds=3.0)
    long, short = (replace(LOAD, checkpoint_mb=0.1, epochs=epochs) for epochs in (1000, 10))
    assert seconds_to_start(slow, long, 100) == pytest.approx(300, rel=0.03)
    assert seconds_to_start(slow, short, 100) > 600
    assert first(slow, load=short) == "starts" and largest(slow, HEAD, short)["starts"] == 33


@pytest.mark.ray
def test_costs_are_measured_and_the_table_names_the_bottleneck(tmp_path, monkeypatch):
    sizes = ("--sizes", "2", "6", "--results", "20", "--trials", "2", "20", "--search", "6", "--epochs", "4")
    run = ("--calibration-trials", "2", "--check-trials", "3", "--scale", "0.1")
    result, table = bench(tmp_path, monkeypatch, *sizes, *run)
    named = result["first_bottleneck"]
    assert result["largest"][named] == min(result["largest"].values()) > 0
    assert f"First bottleneck: {named}, above {result['largest'][named]} trials" in table
    costs = result["costs"]
    assert {"table", "searcher", "scheduler", "tensorboard", "tune", "ray"} == set(costs["result"])
    assert all(row["seconds"] > sum(row["result"].values()) > 0 for row in result["measured"]["driver"])
    assert 50 < costs["actor_mb"] < 500 and 0.5 < costs["checkpoint_copies"] < 4
    for phase in result["check"]:
        predicted, measured = phase["pairs"]["results per second"]
        assert 0.3 < predicted / measured < 3
    saved = ("--costs", str(tmp_path / "cluster_model.json"), "--memory-gb", "1.5", "--arch", "resnet18")
    again, table = bench(tmp_path / "again", monkeypatch, *saved)
    assert again["measured"] == result["measured"] and again["first_bottleneck"] == "memory"
    assert "**First bottleneck: memory" in table


def bench(out: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> tuple[dict, str]:
    """What the benchmark found, and its table; neither names a folder of this machine. Its arms are processes."""
    monkeypatch.setattr("sys.argv", [str(ROOT / "bench/cluster_model.py"), *options, "--out", str(out)])
    cluster_model.main()
    texts = [(out / f"cluster_model.{suffix}").read_text() for suffix in ("json", "md")]
    assert not any(str(place) in text for text in texts for place in (out, ROOT))
    return json.loads(texts[0]), texts[1]
