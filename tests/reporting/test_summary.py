"""What a search says at its end: who has won, by how much, and what mattered."""

import json

import pandas as pd
import pytest
from run_tables import write_run

from search.reporting.summary import summary
from search.runs.run_record import load


@pytest.fixture
def folder(tmp_path):
    return write_run(tmp_path / "run")


def changed(folder, **columns):
    """The run with other values in trials.csv, by column and number."""
    table = pd.read_csv(folder / "trials.csv", keep_default_na=False, na_values=[""], index_col=0)
    for name, values in columns.items():
        for number, value in values.items():
            table.loc[number, name] = value
    table.to_csv(folder / "trials.csv")
    return load(folder)


def test_the_winner_is_named_beside_trial_0_with_what_its_lead_is_worth(folder):
    run = load(folder)
    first, second, *_ = summary(run)
    assert first.startswith(f"best: trial {run.best.name} with ") and "; trial 0, the space's own recipe: " in first
    assert second == f"noise: {run.lead}" and " points better than trial 0 (95 % interval " in second


def test_named_recipes_are_not_compared_with_trial_0(folder):
    command = json.loads((folder / "command.json").read_text())
    (folder / "command.json").write_text(json.dumps(command | {"arguments": {"recipes": "book"}}))
    lines = summary(load(folder))
    assert "trial 0" not in lines[0] and not any(line.startswith("noise") for line in lines)


def test_the_settings_that_mattered_are_named(folder):
    assert any(line.startswith("what mattered (PED-ANOVA of ") for line in summary(load(folder)))


def test_a_confirmed_winner_is_named_with_the_mean_of_its_retrainings(folder):
    numbers = list(load(folder).completed.index[:2])
    run = changed(folder, confirmed_error_rate=dict(zip(numbers, (0.4, 0.3), strict=True)))
    assert run.best.name == numbers[1]
    assert "(30.0 % on average over 3 more seeds" in summary(run)[0].replace("with test-time augmentation, ", "(")


def confirmed_best_two(folder):
    command = json.loads((folder / "command.json").read_text())
    command["arguments"]["confirm"] = 2
    (folder / "command.json").write_text(json.dumps(command))


def test_a_retraining_that_failed_is_said_to_be_missing(folder):
    confirmed_best_two(folder)
    one, other = load(folder).completed.index[:2]
    failed = load(folder).trials.query("status == 'failed'").index[0]
    run = changed(folder, confirmed_error_rate={one: 0.3}, retrains={failed: str(other)})
    assert f"confirmed: 1 of the best 2; retraining failed for trial {other}" in summary(run)


def test_a_search_that_ended_before_all_were_confirmed_says_so(folder):
    confirmed_best_two(folder)
    numbers = list(load(folder).completed.index[:2])
    [line] = [line for line in summary(changed(folder, confirmed_error_rate={numbers[0]: 0.3})) if "confirmed" in line]
    assert line == "confirmed: 1 of the best 2; the search ended before the others"
    done = summary(changed(folder, confirmed_error_rate=dict.fromkeys(numbers, 0.3)))
    assert not any(line.startswith("confirmed") for line in done)


def test_an_extended_search_whose_new_best_are_not_confirmed_says_so(folder):
    confirmed_best_two(folder)
    best = list(load(folder).completed.index)
    lines = summary(changed(folder, confirmed_error_rate=dict.fromkeys(best[2:4], 0.3)))
    assert "confirmed: 0 of the best 2; the search ended before the others" in lines
    all_four = summary(changed(folder, confirmed_error_rate=dict.fromkeys(best[:4], 0.3)))
    assert not any(line.startswith("confirmed") for line in all_four)


def test_two_confirmed_errors_are_compared_with_each_other(folder):
    run = load(folder)
    winner = next(number for number in run.completed.index if number)
    again = changed(folder, confirmed_error_rate={winner: 0.2, 0: 0.5})
    assert again.lead.startswith("30.0 points better than trial 0")


def test_the_front_is_named_where_seconds_are_an_objective(folder):
    run = changed(folder, front={0: "yes"}, seconds={0: 1.0})
    [front] = [line for line in summary(run) if line.startswith("best for their cost: ")]
    assert "in 1 s (trial 0)" in front and f"(trial {run.best.name})" in front
