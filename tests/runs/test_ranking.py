"""The order of the trials is kept as they end, and is what sorting all of them would give."""

import math
import random

import pytest

from search.runs.kinds import PROBE, TRIAL
from search.runs.ranking import Order, Ranking, unconfirmed_rank
from search.runs.result_rows import COMPLETED, CONFIRMED, FAILED, RUNNING, UNFINISHED, leaders, pareto_front, rank

NAN = math.nan


def rows(number: int, seed: int = 0) -> list[dict]:
    rng = random.Random(seed)
    return [
        {
            **{"number": i, "trial_id": f"t{i}", "kind": PROBE if i % 9 == 0 else TRIAL},
            **{"status": rng.choice([COMPLETED] * 3 + [FAILED, RUNNING, UNFINISHED]), "front": ""},
            **{"error_rate": round(rng.random(), 2), "valid_loss": rng.random(), "seconds": rng.randrange(20)},
            **{CONFIRMED: rng.choice([NAN, NAN, rng.random()])},
        }
        for i in range(number)
    ]


@pytest.mark.parametrize("key", [rank, unconfirmed_rank])
def test_the_order_is_that_of_sorting_all(key):
    order, seen = Order((), key), []
    for row in rows(200):
        seen.append(row)
        order.update(row)
        row |= {"error_rate": random.Random(row["number"]).random()}  # trained again
        order.update(row)
    assert order.best(1000) == sorted(leaders(seen), key=key)
    for row in seen[::2]:
        row["status"] = FAILED
        order.update(row)
    assert order.best(5) == sorted(leaders(seen), key=key)[:5]


def test_a_row_as_it_will_be_takes_the_place_of_its_own():
    seen = rows(50)
    order = Order(seen)
    worst = order.best(1000)[-1]
    assert order.best(3, worst | {"error_rate": 0.0, CONFIRMED: 0.0})[0]["number"] == worst["number"]
    best = order.best(1)[0]
    assert best not in order.best(3, best | {"status": RUNNING})


def test_what_is_kept_is_what_the_order_of_all_rows_says():
    seen = rows(100)
    ranking = Ranking(keep=3, confirm=4)
    for row in seen:
        ranking.update(row)
    by_error = sorted(leaders(seen), key=unconfirmed_rank)
    probes = [row for row in by_error if row["kind"] == PROBE]
    expected = [row["number"] for row in (*leaders(seen)[:3], *by_error[:4], *probes[:1])]
    assert ranking.kept() == list(dict.fromkeys(expected))


def test_the_front_is_that_of_all_rows_after_each_end():
    ranking, seen = Ranking(front=True), []
    for row in rows(150):
        seen.append(row)
        ranking.update(row)
        assert {r["number"] for r in seen if r["front"]} == {r["number"] for r in pareto_front(seen)}
    gone = next(row for row in seen if row["front"])
    gone["status"] = RUNNING  # its files were lost, and it is trained again
    ranking.update(gone)
    assert {r["number"] for r in seen if r["front"]} == {r["number"] for r in pareto_front(seen)}
