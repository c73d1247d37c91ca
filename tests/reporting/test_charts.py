"""The charts of a report: they draw what the tables say, and their captions say it in words."""

import json
from dataclasses import replace

import numpy as np
import optuna
import pandas as pd
import pytest
from run_tables import DISTRIBUTIONS, write_run

from search.reporting import chart_parts, charts, winner_charts
from search.reporting.importance import importances, study_importances
from search.runs.command import Resume
from search.runs.kinds import PROBE
from search.runs.run_record import load
from search.spaces.space import dimension_text
from trainables.recipe import Recipe

SWITCHED = optuna.distributions.CategoricalDistribution([True, False])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return load(write_run(tmp_path_factory.mktemp("runs") / "ten"))


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    """A search that began with three probes; no trial has the architecture of the last one."""
    return load(write_run(tmp_path_factory.mktemp("runs") / "probed", probes=(0.35, 0.45, 0.3)))


def trace(chart, name):
    return next(trace for trace in chart.figure.data if trace.name == name)


def test_the_incumbent_only_ever_gets_better_and_ends_at_the_winner(run):
    chart = charts.incumbent(run)
    errors = trace(chart, "best so far").y
    assert list(errors) == sorted(errors, reverse=True)
    assert errors[-1] == run.best["error_rate"] < errors[0]
    assert f"the best so far is trial {run.best.name} with {100 * run.best['error_rate']:.1f} %" in chart.caption


def test_time_counts_from_the_start_of_the_first_epoch(run):
    assert charts.end_times(run)[0] == pytest.approx(20 / 60)  # two epochs of ten seconds


def test_the_days_between_a_search_and_its_extension_do_not_count(tmp_path):
    run = load(write_run(tmp_path / "run"))
    before = charts.end_times(run)
    later = pd.to_datetime(run.epochs["finished_at"]) + pd.to_timedelta((run.epochs["number"] >= 5) * 86400, unit="s")
    run.epochs["finished_at"] = [moment.isoformat() for moment in later]
    assert charts.end_times(run)[9] > 24 * 60
    begun = later[run.epochs["number"] >= 5].min() - pd.Timedelta(seconds=10)
    resume = Resume(started_at=begun.isoformat(), argv=(), changed=("trials",))
    run.command = replace(run.command, resumes=(resume,))
    assert charts.end_times(run).tolist() == pytest.approx(before.tolist())
    idle = Resume(started_at=(begun - pd.Timedelta(hours=9)).isoformat(), argv=(), changed=())  # found nothing to do
    run.command = replace(run.command, resumes=(idle, resume))
    assert charts.end_times(run).tolist() == pytest.approx(before.tolist())


def test_every_trial_has_a_curve_and_the_stopped_ones_end_in_a_cross_with_the_rung(run):
    chart = charts.learning_curves(run)
    drawn = sum(len(t.x) - list(t.x).count(None) for t in chart.figure.data if t.mode == "lines+markers")
    assert drawn == len(run.epochs)
    crosses = trace(chart, "where it was stopped")
    assert list(crosses.text) == [f"trial {n}: error_rate 0.5000 above the cut-off 0.4000 of rung 50 %" for n in (3, 8)]
    assert "2 trials ended early: 2 at rung 50 % of the unfrozen stage" in chart.caption


def test_the_first_incumbent_is_a_probe_and_an_unfinished_trial_has_its_own_marker(probed):
    chart = charts.incumbent(probed)
    assert list(trace(chart, "probe").text) == ["probe 3", "probe 2", "probe 1"]
    assert list(trace(chart, "unfinished").text) == ["trial 9"]
    assert (
        trace(chart, "best so far").y[0] == 0.35 and "The first model was that of probe 3 with 35.0 %" in chart.caption
    )
    drawn = sum(len(t.x) for t in chart.figure.data if t.mode == "markers")
    assert drawn == probed.trials["error_rate"].notna().sum()


def test_the_curve_of_a_trial_with_a_probe_begins_at_epoch_0_and_those_of_the_screen_are_none(probed):
    chart = charts.learning_curves(probed)
    texts = {text for t in chart.figure.data if t.mode == "lines+markers" for text in t.text if text}
    best = {"probe 1"} if probed.best.name == -1 else set()
    assert texts == {f"trial {number}" for number in range(10)} | best
    xs = {x for t in chart.figure.data if t.mode == "lines+markers" for x in t.x}
    assert 0 in xs and "of 10 trials. Epoch 0 is the probe that a trial starts from." in chart.caption


def test_probes_stand_against_what_fine_tuning_made_of_them(probed):
    chart = charts.probes_and_fine_tuned(probed)
    points = [t for t in chart.figure.data if t.mode == "markers"]
    found = {text: (x, y) for t in points for text, x, y in zip(t.text, t.x, t.y, strict=True)}
    tuned = probed.tuned
    assert set(found) == {f"trial {number}" for number in tuned.index} | {"probe 1"}
    for number, row in tuned.iterrows():
        assert found[f"trial {number}"] == ({"resnet18": 0.35, "resnet34": 0.45}[row["arch"]], row["error_rate"])
    assert found["probe 1"] == (0.3, 0.3)  # on the diagonal: nothing was fine-tuned from it
    diagonal = trace(chart, "as good as its probe")
    assert list(diagonal.x) == list(diagonal.y) and diagonal.x[1] >= max(x for x, _ in found.values())
    below = sum(y < x for x, y in found.values())
    above = sum(y > x for x, y in found.values())
    assert f"Of 7 fine-tuned trials, {below} ended below the diagonal" in chart.caption
    assert f"{above} ended above it" in chart.caption and "1 probe that no trial was fine-tuned from" in chart.caption


def test_trials_with_a_probe_of_their_own_need_no_screen(tmp_path):
    run = load(write_run(tmp_path / "run", probes=(0.35, 0.45)))
    run.trials = run.trials[run.trials["kind"] != PROBE]
    chart = charts.probes_and_fine_tuned(run)
    points = {text for t in chart.figure.data if t.mode == "markers" for text in t.text}
    own = run.tuned.index.intersection(charts.own_probes(run).index)
    assert len(own) and points == {f"trial {number}" for number in own}


def test_a_trials_own_epoch_0_comes_before_the_screens_probe(probed, tmp_path):
    run = load(write_run(tmp_path / "run", probes=(0.35, 0.45, 0.3)))
    own = (run.epochs["number"] == 2) & (run.epochs["epoch"] == 0)
    run.epochs.loc[own, "error_rate"] = 0.4  # its head is another one: it has augmentations, or another seed
    assert charts.own_probes(run)[2] == 0.4 and charts.own_probes(run)[0] == 0.45
    assert charts.own_probes(probed)[1] == 0.35  # an odd one, without an epoch 0
    run = load(run.path)
    run.trials.loc[-1, "arch"] = "resnet18"  # probed again, with another error: the better one counts
    assert charts.own_probes(run)[1] == 0.3


def test_probes_are_in_the_chart_of_costs_but_not_in_those_of_settings(probed):
    assert len(trace(charts.cost(probed), "probes").x) == 3
    texts = {text for t in charts.parallel_coordinates(probed).figure.data for text in t.text if text}
    assert texts and not any(text.startswith("probe") for text in texts)
    assert "resnet50" not in {note.text for note in charts.parallel_coordinates(probed).figure.layout.annotations}
    assert "of 6 completed trials" in charts.importance(probed).caption


def test_of_probes_alone_there_is_the_incumbent_and_their_cost(tmp_path):
    run = load(write_run(tmp_path / "run", num_trials=0, probes=(0.35, 0.45, 0.3)))
    assert [chart.name for chart in charts.search_charts(run)] == ["incumbent", "cost"]


def test_parallel_coordinates_pass_the_best_trial_last_and_name_both_ends_of_an_axis(run):
    chart = charts.parallel_coordinates(run)
    best = trace(chart, "best quarter")
    assert {text for text in best.text if text} >= {f"trial {run.best.name}"}
    scored = run.trials["error_rate"].dropna()
    said = {note.text for note in chart.figure.layout.annotations}
    assert {f"{scored.min():.3g}", f"{scored.max():.3g}", "resnet18", "resnet34"} <= said
    assert all(0 <= y <= 1 for t in chart.figure.data for y in t.y if y is not None)
    assert list(chart.figure.layout.xaxis.ticktext) == [*run.dimensions, "error_rate"]


def test_a_run_of_an_earlier_version_has_its_charts_without_rungs_and_logarithms(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "rungs.json").write_text(json.dumps({"reasons": {"t3": "bad"}}))
    space = json.loads((folder / "space.json").read_text())
    texts = {name: dimension_text(saved) for name, saved in space["dimensions"].items()}
    (folder / "space.json").write_text(json.dumps(space | {"dimensions": texts}))
    run = load(folder)
    assert texts["lr_max"] == "0.0001..0.01 (log)" and not run.is_log("lr_max")
    assert charts.learning_curves(run).caption.endswith("of 10 trials. 2 trials ended early.")
    assert charts.parallel_coordinates(run) is not None


def test_a_logarithmic_range_is_drawn_as_such(run):
    chart = charts.parallel_coordinates(run)
    rates = run.trials["lr_max"][run.trials["error_rate"].notna()]
    drawn = sorted(y for t in chart.figure.data for x, y in zip(t.x, t.y, strict=True) if x == 2)
    logs = np.sort(np.log(rates))
    assert drawn == pytest.approx(((logs - logs[0]) / (logs[-1] - logs[0])).tolist())


def test_what_moves_the_error_is_the_most_important(tmp_path):
    shares = importances(load(write_run(tmp_path / "run", num_trials=60)))
    assert next(iter(shares)) == "lr_max"
    assert sum(shares.values()) == pytest.approx(1)


def test_ten_trials_are_enough_to_see_that_the_network_decides():
    params = [{"arch": ("resnet18", "resnet34")[n % 2], "lr_max": 10 ** (-4 + 0.2 * n)} for n in range(10)]
    study = study_of(params, [0.5 - 0.3 * (n % 2) + 0.001 * (3 * n % 10) for n in range(10)])
    assert study_importances(study)["arch"] > 0.9
    assert study_importances(study, best_share=0.1)["arch"] < 0.1  # Optuna's own: a single trial


def study_of(params: list[dict], errors: list[float]) -> optuna.Study:
    study = optuna.create_study()
    for given, error in zip(params, errors, strict=True):
        searched = {name: DISTRIBUTIONS.get(name, SWITCHED) for name in given}
        study.add_trial(optuna.trial.create_trial(params=given, distributions=searched, value=error))
    return study


def test_where_the_worst_error_is_that_of_many_the_better_ones_are_told_from_them():
    params = [{"arch": "resnet34" if n < 3 else "resnet18", "epochs": 1 + n % 3} for n in range(10)]
    assert study_importances(study_of(params, [0.02, 0.03, 0.02] + 7 * [0.5]))["arch"] > 0.8
    with pytest.raises(ValueError, match="the same error"):
        study_importances(study_of(params, 10 * [0.0]))


def test_whether_a_setting_is_off_is_part_of_what_it_matters():
    off, on = {"mixup_alpha > 0": False}, {"mixup_alpha > 0": True, "mixup_alpha": 0.2}
    params = [{"epochs": 1 + n % 3} | (off if n % 2 else on) for n in range(12)]
    shares = study_importances(study_of(params, [0.2 + 0.2 * (n % 2) + 0.001 * n for n in range(12)]))
    assert list(shares) == ["mixup_alpha", "epochs"] and sum(shares.values()) == pytest.approx(1)


def test_a_winner_by_its_mean_is_not_taken_for_the_lowest_error(tmp_path):
    folder = write_run(tmp_path / "run")
    lowest, second = load(folder).completed.index[:2]
    table = pd.read_csv(folder / "trials.csv", keep_default_na=False, na_values=[""], index_col=0)
    table.loc[[lowest, second], "confirmed_error_rate"] = 0.4, 0.3
    table.to_csv(folder / "trials.csv")
    run = load(folder)
    assert run.best.name == second and f"trial {lowest} with" in charts.incumbent(run).caption


def test_the_front_holds_no_trial_that_another_beats_in_both(run):
    front = run.pareto_front
    for _, row in run.completed.iterrows():
        better = front[(front["seconds"] <= row["seconds"]) & (front["error_rate"] <= row["error_rate"])]
        assert len(better)
    assert (front["error_rate"].diff().dropna() < 0).all() and (front["seconds"].diff().dropna() > 0).all()


def test_rates_and_momentum_are_those_of_the_one_cycle_schedule():
    recipe = Recipe.from_dict({"freeze_epochs": 1, "epochs": 3, "lr_max": 0.01, "lr_ratio": 100, "pct_start": 0.3})
    epochs, earliest, head, momentum = map(np.asarray, winner_charts.schedule_curves(recipe, points=1000))
    unfrozen = epochs >= 1
    assert head[unfrozen].max() == pytest.approx(0.01, rel=1e-3)
    assert earliest[unfrozen].max() == pytest.approx(0.0001, rel=1e-3)
    assert epochs[unfrozen][head[unfrozen].argmax()] == pytest.approx(1 + 0.3 * 3, abs=0.01)
    assert head[~unfrozen].max() == pytest.approx(recipe.lr_max_frozen, rel=1e-3)
    assert momentum.min() == pytest.approx(recipe.mom_low, abs=1e-4) and momentum[0] == recipe.mom_high


def test_without_a_frozen_stage_the_schedule_starts_unfrozen():
    recipe = Recipe.from_dict({"freeze_epochs": 0, "epochs": 2})
    epochs, *_ = winner_charts.schedule_curves(recipe)
    assert epochs[0] == 0 and max(epochs) < 2
    assert "frozen up to" not in winner_charts.schedule(recipe).caption.replace("unfrozen up to", "")


def test_a_confusion_matrix_of_many_classes_shows_those_with_the_most_errors():
    counts = 3 * np.eye(100, dtype=np.int64)
    counts[7, 93] = 5
    names = [f"class {i}" for i in range(100)]
    chart = winner_charts.confusion(counts, names)
    shown = list(chart.figure.layout.xaxis.ticktext)
    assert len(shown) == 40 and {"class 7", "class 93"} <= set(shown)
    wrong = trace(chart, "wrong")
    assert wrong.z[shown.index("class 7")][shown.index("class 93")] == 5 / 8
    assert "5 of 305 validation images are wrong" in chart.caption


def test_names_are_text_not_markup(tmp_path):
    run = load(write_run(tmp_path / "run", arch="<b>bold</b>"))
    for chart in [*charts.search_charts(run), winner_charts.confusion(np.eye(1, dtype=np.int64), ["<a href='x'>"])]:
        assert "<b>" not in chart.figure.to_json().replace("\\u003c", "<")
        assert "<a " not in chart.figure.to_json().replace("\\u003c", "<")


@pytest.mark.parametrize("num_trials", [0, 1, 2])
def test_of_few_trials_is_drawn_what_there_is(tmp_path, num_trials):
    names = [chart.name for chart in charts.search_charts(load(write_run(tmp_path / "run", num_trials=num_trials)))]
    expected = {0: [], 1: ["incumbent", "learning-curves", "cost"]}
    assert names == expected.get(num_trials, ["incumbent", "learning-curves", "parallel", "cost"])


def test_long_names_are_shortened_where_they_differ():
    assert chart_parts.shortened(["tf_efficientnet_lite0", "tf_efficientnet_lite2"]) == ["…0", "…2"]
    assert chart_parts.shortened(["resnet18", "resnet34"]) == ["resnet18", "resnet34"]
    assert chart_parts.shortened(["a_very_long_architecture"]) == ["a_very_long_…"]
