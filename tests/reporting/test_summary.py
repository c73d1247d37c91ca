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
    first, *both, noise, _ = summary(run)
    assert first.startswith(f"best: trial {run.best.name} with ")
    assert [line.split("  ")[1] for line in both] == [
        "trial 0, the space's recipe",
        f"trial {run.best.name}, the winner",
    ]
    assert noise == f"noise: {run.lead}" and " points better than trial 0 (95 % interval " in noise


@pytest.mark.parametrize(("known", "words"), [
    ({}, "on all 100 images; its"),
    ({"averaged": 3}, "on all 100 images and averaged with 2 trials; its"),
    ({"averaged": 2, "epochs": 1}, "on all 100 images for 1 epoch and averaged with 1 trial; its"),
])  # fmt: skip
def test_what_best_is_made_of_is_told(folder, known, words):
    metrics = {"number": 3, "error_rate": 0.1, "refit": {"train_images": 100, "error_rate": 0.0} | known}
    (folder / "best").mkdir(exist_ok=True)
    (folder / "best" / "metrics.json").write_text(json.dumps(metrics))
    [line] = [line for line in summary(load(folder)) if line.startswith("refit: ")]
    assert line.startswith(f"refit: best/ is trial 3, trained again {words} own error cannot be known")


def test_named_recipes_are_not_compared_with_trial_0(folder):
    command = json.loads((folder / "command.json").read_text())
    (folder / "command.json").write_text(json.dumps(command | {"arguments": {"recipes": "book"}}))
    lines = summary(load(folder))
    assert not any("trial 0" in line for line in lines) and not any(line.startswith("noise") for line in lines)


def test_the_best_probe_trial_0_and_the_winner_stand_side_by_side_with_their_intervals(tmp_path):
    run = load(write_run(tmp_path / "run", probes=(0.5, 0.45, 0.6)))
    _, *rows, fine_tuning, noise, _ = summary(run)
    low, high = run.interval(run.probe)
    assert rows[0] == (
        f"  probe 2, the best probe      45.0 %  95 % interval {100 * low:.1f} to {100 * high:.1f} %  "
        "resnet34 at 224 px, trained in 9 s"
    )
    assert [row.split(",")[0].strip() for row in rows] == ["probe 2", "trial 0", f"trial {run.best.name}"]
    assert len({row.index("95 %") for row in rows}) == 1  # they are columns
    assert fine_tuning == f"fine-tuning: {run.fine_tuning}" and noise.startswith("noise: ")
    assert run.fine_tuning.startswith("15.0 points better than the best probe (95 % interval -23.3 to 48.0, ")
    assert run.fine_tuning.endswith("corrected for the choice among 7 trials): this may be noise")
    assert "corrected for the choice among 3 probes and 6 trials" in noise


def test_where_the_best_probe_wins_fine_tuning_is_said_to_be_no_better_in_how_short_a_time(tmp_path):
    best, *rows, fine_tuning, _, _ = summary(load(write_run(tmp_path / "run", probes=(0.1, 0.15, 0.3))))
    assert best == "best: probe 3 with 10.0 % validation error"
    assert [row.split("  ")[1] for row in rows] == [
        "probe 3, the best probe, the winner",
        "trial 0, the space's recipe",
    ]
    assert fine_tuning == "fine-tuning: no better than the best probe, which trained in 9 s"


def test_a_lead_over_the_probe_that_is_more_than_noise_is_said_to_be(tmp_path):
    folder = write_run(tmp_path / "run", probes=(0.95, 0.9, 0.95), shift=-0.4)
    assert load(folder).fine_tuning.endswith("corrected for the choice among 7 trials): more than noise")


def test_without_probes_or_without_fine_tuned_trials_nothing_is_said_of_fine_tuning(folder, tmp_path):
    assert load(folder).fine_tuning == "" and not any(line.startswith("fine-tuning") for line in summary(load(folder)))
    probes = load(write_run(tmp_path / "probes", num_trials=0, probes=(0.1, 0.15)))
    assert probes.fine_tuning == "" and summary(probes)[0].startswith("best: probe 2 with ")


def test_probes_and_unfinished_trials_are_not_waited_for_to_be_confirmed(tmp_path):
    folder = write_run(tmp_path / "run", probes=(0.1, 0.15, 0.3))
    confirmed_best_two(folder)
    numbers = list(load(folder).whole.index[:2])
    assert numbers == [number for number in load(folder).completed.index if 0 <= number != 9][:2]
    done = summary(changed(folder, confirmed_error_rate=dict.fromkeys(numbers, 0.3)))
    assert not any(line.startswith("confirmed") for line in done)


def test_a_winner_that_was_better_at_an_earlier_epoch_is_said_to_be(tmp_path):
    folder = write_run(tmp_path / "run")
    best = load(folder).best.name
    run = changed(folder, best_epoch={best: 1}, best_error_rate={best: 0.05})
    assert summary(run)[0].endswith("validation error (5.0 % at epoch 1)")


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
