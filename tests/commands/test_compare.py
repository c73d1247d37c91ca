"""Runs side by side: the figures are the runs' own, and what is not comparable is said."""

import json
from dataclasses import replace

import pytest
from in_process import run_here
from run_tables import write_run

from search import compare
from search.runs.run_record import load


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two runs on the same images: one of ten trials, one of 40 that do worse."""
    root = tmp_path_factory.mktemp("runs")
    first, second = write_run(root / "a" / "pets"), write_run(root / "b" / "pets", num_trials=40, shift=0.2)
    command = json.loads((second / "command.json").read_text())
    (second / "command.json").write_text(json.dumps(command | {"data": str(first / "images")}))
    return first, second


def cells(table, row):
    return dict(zip(table[0], table[row], strict=True))


def test_each_run_has_its_best_error_and_its_budget(folders):
    runs = [load(folder) for folder in folders]
    table = compare.tables(runs, ["a", "b"])["Best error and budget"]
    for i, run in enumerate(runs, 1):
        shown = cells(table, i)
        assert shown["best"] == f"{100 * run.best['error_rate']:.1f} % (trial {run.best.name})"
        assert shown["epochs"] == str(len(run.epochs))
        assert shown["trial 0"].startswith(f"{100 * run.first['error_rate']:.1f} % (")
        assert shown["best probe"] == ""
    assert cells(table, 1)["trials"] == "10: 7 completed, 2 stopped early, 1 failed"
    assert cells(table, 1)["trained"] == "4 min 20 s"  # 26 epochs of ten seconds


def test_importance_and_recipes_stand_side_by_side(folders):
    runs = [load(folder) for folder in folders]
    importance, recipes = list(compare.tables(runs, ["a", "b"]).values())[1:]
    assert importance[0] == recipes[0] == ["setting", "a", "b"]
    assert [row[0] for row in recipes[1:]] == runs[0].dimensions
    assert recipes[1][1:] == [run.best["arch"] for run in runs]
    assert sum(int(row[2].removesuffix(" %")) for row in importance[1:]) == pytest.approx(100, abs=2)


def test_the_best_probe_stands_beside_the_winner_and_whether_fine_tuning_was_worth_it(folders, tmp_path):
    runs = [load(folders[0]), load(write_run(tmp_path / "run", probes=(0.1, 0.15, 0.3)))]
    found = compare.tables(runs, ["a", "probed"])
    shown = cells(found["Best error and budget"], 2)
    assert shown["best"] == "10.0 % (probe 3)" and shown["epochs"] == "25"
    assert shown["best probe"] == "10.0 % (2.8 % to 30.1 %): resnet18 at 224 px, trained in 9 s"
    assert shown["trials"] == "3 probes and 10 trials: 9 completed, 1 unfinished, 2 stopped early, 1 failed"
    worth = found["Fine-tuning against the best probe"]
    assert worth[1:] == [["a", ""], ["probed", "no better than the best probe, which trained in 9 s"]]
    assert dict(found["The winners' recipes"][1:][i][::2] for i in range(3)) == {
        "arch": "resnet18",
        "epochs": "",
        "lr_max": "",
    }


def test_the_command_prints_it_and_writes_a_page(folders, tmp_path):
    out = tmp_path / "compare.html"
    child = run_here(compare.main, *folders, "--out", out)
    assert child.returncode == 0, child.stderr
    assert "a/pets" in child.stdout and "b/pets" in child.stdout and "warning" not in child.stdout
    html = out.read_text()
    assert html.count('<td class="text">a/pets</td>') == 1
    assert 'id="incumbents"' in html and 'id="importances"' in html


def test_runs_on_other_images_are_not_comparable_and_that_is_said(folders, tmp_path):
    other = write_run(tmp_path / "other")
    said = compare.warnings([load(folders[0]), load(other)], ["a", "other"])
    assert len(said) == 1 and "not comparable" in said[0] and str(other / "images") in said[0]
    assert compare.warnings([load(folder) for folder in folders], ["a", "b"]) == []


def test_runs_whose_splits_keep_other_groups_together_are_not_comparable(folders):
    grouped = load(folders[1])
    options = replace(grouped.command.arguments, group="parent")
    grouped.command = replace(grouped.command, arguments=options, groups="0-3")
    (said,) = compare.warnings([load(folders[0]), grouped], ["a", "b"])
    assert "not comparable" in said and said.endswith("images, grouped by parent)")


def test_a_run_without_a_winner_is_shown_as_such(folders, tmp_path):
    empty = load(write_run(tmp_path / "empty", num_trials=0))
    table = compare.tables([load(folders[0]), empty], ["a", "empty"])["Best error and budget"]
    assert cells(table, 2)["best"] == "none completed" and cells(table, 2)["trials"] == "0"
    assert "empty" in compare.render([load(folders[0]), empty], ["a", "empty"])


def test_the_same_run_twice_and_a_run_alone_are_refused(folders, capsys):
    with pytest.raises(ValueError, match="is given twice"):
        compare.main([str(folders[0]), str(folders[0])])
    with pytest.raises(SystemExit):
        compare.main([str(folders[0])])
    assert "needs two or more runs" in capsys.readouterr().err


def test_a_comparison_that_cannot_be_written_is_refused_before_it_is_made(folders, tmp_path, capsys):
    (tmp_path / "taken").touch()
    with pytest.raises(ValueError, match=r"cannot be written .* --out"):
        compare.main([*map(str, folders), "--out", str(tmp_path / "taken" / "compare.html")])
    assert not capsys.readouterr().out


def test_names_are_text_not_markup(tmp_path, capsys):
    folders = [write_run(tmp_path / name) for name in ("[bold]a", "<b>b")]
    assert compare.main([*map(str, folders), "--out", str(tmp_path / "out.html")]) == 0
    assert "[bold]a" in capsys.readouterr().out
    html = (tmp_path / "out.html").read_text()
    assert "<b>b" not in html and "&lt;b&gt;b" in html
