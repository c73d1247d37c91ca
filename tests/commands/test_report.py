"""The report as a file: it is there, small, of one piece, and says what the tables say, whatever state a run is in."""

import base64
import io
import json
import re
import shutil
import time
from html.parser import HTMLParser

import numpy as np
import pytest
from in_process import run_here
from PIL import Image
from run_tables import write_run
from tiny_run import SETTINGS, draw_images, make_run
from weights import draw_weights

from search import report
from search.reporting import error_analysis, run_facts, trials_table
from search.reporting.summary import summary
from search.runs.result_rows import COMPLETED
from search.runs.run_record import load
from trainables.inference.heat_maps import save_heat_maps
from trainables.inference.suspects import Suspect, write_suspects


class Page(HTMLParser):
    """The texts of one of a page's tables, and every address that is loaded."""

    def __init__(self, html: str, table: str = "trials-table") -> None:
        super().__init__()
        self.table = table
        self.addresses: list[str] = []
        self.rows: list[list[str]] = []
        self.in_table = False
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.addresses += [given[name] for name in ("src", "href") if name in given]
        if tag == "table":
            self.in_table = given.get("id") == self.table
        elif tag == "tr" and self.in_table:
            self.rows.append([])
        elif tag in ("td", "th") and self.in_table:
            self.rows[-1].append("")

    def handle_data(self, data):
        if self.in_table and self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip()

    def handle_endtag(self, tag):
        if tag == "table":
            self.in_table = False


def pixels_of(url: str) -> np.ndarray:
    """The picture of a data URL."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB")).astype(int)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return load(write_run(tmp_path_factory.mktemp("runs") / "ten"))


def test_the_table_has_a_row_per_trial_best_first_and_failures_come_with_reasons(run):
    html = report.render(run)
    header, *rows = Page(html).rows
    assert header[:4] == ["trial", "status", "epochs", "error"] and header[-1] == "reason"
    assert sorted(int(row[0]) for row in rows) == list(range(10))
    assert int(rows[0][0]) == run.best.name
    errors = [float(row[3].removesuffix(" %")) for row in rows if row[3]]
    assert errors == sorted(errors)
    assert rows[-1][1] == "failed" and rows[-1][-1] == "loss is nan"
    assert "<li>trial 5: loss is nan</li>" in html


def test_the_winner_stands_beside_trial_0_with_both_intervals(run):
    html = report.render(run)
    low, high = run.interval(run.best)
    assert f"95 % interval {100 * low:.1f} % to {100 * high:.1f} %" in html
    assert 'id="best-card"' in html and 'id="first-card"' in html
    assert "this may be noise" in html
    assert "best of 7 trials on the same 20 images" in html


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    return load(write_run(tmp_path_factory.mktemp("runs") / "probed", probes=(0.1, 0.15, 0.3)))


def test_the_best_probe_has_a_card_and_whether_fine_tuning_was_worth_it_is_said(tmp_path):
    html = report.render(load(write_run(tmp_path / "run", probes=(0.5, 0.45, 0.6))))
    assert 'id="probe-card"' in html and "validation error, probe 2: resnet34 at 224 px, trained in 9 s" in html
    assert "Fine-tuning is 15.0 points better than the best probe (95 % interval -23.3 to 48.0, " in html
    assert "best of 3 probes and 7 trials on the same 20 images" in html
    assert "3 probes and 10 trials in 5 min 27 s: 9 completed, 1 unfinished, 2 stopped early, 1 failed" in html


def test_a_probe_that_wins_is_called_one_everywhere(probed):
    html = report.render(probed)
    assert "The winner: probe 3" in html and "trial -3" not in html and 'id="probe-card"' not in html
    assert "Fine-tuning is no better than the best probe, which trained in 9 s." in html
    assert report.render(probed).count("<dt>lr_max</dt>") == 0  # it has none


def test_a_probes_row_has_only_what_it_depends_on_and_a_trials_its_best_epoch(probed):
    header, *rows = Page(report.render(probed)).rows
    by_trial = {row[0]: dict(zip(header, row, strict=True)) for row in rows}
    first, second = by_trial["probe 3"], by_trial["2"]
    assert (first["arch"], first["lr_max"], first["best epoch"]) == ("resnet18", "", "")
    assert (second["best epoch"], second["error then"], second["error"]) == ("0", "15.0 %", "30.0 %")
    assert by_trial["1"]["best epoch"] == ""  # its last epoch is its best one


def test_without_a_better_epoch_the_table_has_no_columns_for_it(run):
    assert not {"best epoch", "error then", "kind", "best_epoch"} & {
        column.name for column in trials_table.columns(run)
    }


def test_a_best_epoch_that_was_kept_is_said_to_be_chosen(probed, tmp_path):
    folder = write_run(tmp_path / "run", probes=(0.1, 0.15, 0.3))
    command = json.loads((folder / "command.json").read_text())
    (folder / "command.json").write_text(json.dumps(command | {"arguments": {"keep_epoch": "best"}}))
    assert "which also chose the best epoch of each trial" in run_facts.verdict(load(folder))
    assert "which also chose" not in run_facts.verdict(probed)


def test_what_ran_can_be_run_again(run):
    html = report.render(run)
    assert "python -m search.run --space pets --set arch=resnet18,resnet34" in html
    assert "python 3.11.7, ray 2.60.0" in html


def test_what_an_extended_search_ran_is_how_it_was_begun_and_then_extended(tmp_path):
    folder = write_run(tmp_path / "run")
    command = json.loads((folder / "command.json").read_text())
    resumes = [{"argv": ["--resume", "--name", "run"], "started_at": "2026-01-02T00:00:00+00:00", "changed": []}]
    resumes += [resumes[0] | {"argv": ["--resume", "--name", "run", "--trials", "40"], "changed": ["trials"]}]
    (folder / "command.json").write_text(json.dumps(command | {"resumes": resumes}))
    html = report.render(load(folder))
    assert (
        '<pre id="command">python -m search.run --space pets --set arch=resnet18,resnet34\n'
        "python -m search.run --resume --name run --trials 40</pre>"
    ) in html
    assert "2026-01-01 00:00 +0000" in html  # when it was begun
    assert "AMD EPYC, 2 CPUs, 24 GiB; Ray: 1 node of 2 CPUs<" in html
    assert "80 to train on, 20 to validate of 3 classes; seed 0" in html


def test_it_is_one_file_under_8_mb_that_loads_nothing(run, tmp_path):
    out = tmp_path / "now.html"
    report.write_report(run, out, analysis=False)
    assert out.stat().st_size < 8e6
    addresses = Page(out.read_text()).addresses
    assert addresses and all(address.startswith("data:") for address in addresses)
    assert "default-src &#39;none&#39;; script-src &#39;sha256-" in out.read_text()


def test_top_losses_show_the_image_where_it_is_here(run):
    found = error_analysis.read_analysis(run)
    assert found.most_confused() == [("cat", "dog", 2)]
    here, gone = found.losses
    assert here.image.startswith("data:image/jpeg;base64,") and gone.image == ""
    assert (here.actual, here.predicted, here.loss) == ("cat", "dog", 2.5)
    html = report.render(run)
    assert html.count('<img src="data:image/jpeg') == 1 and "gone.jpg" in html


def test_each_class_has_its_error_with_an_interval_the_worst_one_first(run):
    rows = Page(report.render(run), "classes").rows[1:]
    assert rows[0] == ["cat", "", "7", "2", "28.6 %", "8.2 to 64.1 %", "dog (2)"]
    assert [row[0] for row in rows] == ["cat", "dog", "emu"] and rows[1][3:5] == ["0", "0.0 %"]


def test_it_says_on_how_many_images_of_a_class_the_winner_was_trained(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "interpretation" / "classes.csv").write_text("class,train_images\ndog,40\nemu,2\n")
    assert [row[1] for row in Page(report.render(load(folder)), "classes").rows[1:]] == ["0", "40", "2"]


def test_classes_that_the_winner_never_predicts_are_named(tmp_path):
    folder = write_run(tmp_path / "run")
    assert "never predicts" not in report.render(load(folder)) + "".join(summary(load(folder)))
    (folder / "interpretation" / "confusion_matrix.csv").write_text(
        "actual,cat,dog,emu\ncat,9,0,0\ndog,2,0,0\nemu,1,0,0"
    )
    assert "The winner never predicts 2 of 3 classes (&#39;dog&#39;, &#39;emu&#39;)." in report.render(load(folder))
    assert "the winner never predicts 2 of 3 classes ('dog', 'emu')" in summary(load(folder))


def test_a_top_loss_has_its_heat_maps_beside_it(tmp_path):
    folder = write_run(tmp_path / "run")
    heat = np.zeros((2, 2, 3, 3), np.float32)
    heat[:, 0, 0, 0] = heat[:, 1, 2, 2] = 1  # upper left for the predicted class, lower right for the actual one
    save_heat_maps(folder / "interpretation" / "heat_maps.json", ["0.jpg", "gone.jpg"], heat)
    here, gone = error_analysis.read_analysis(load(folder)).losses
    plain, predicted, actual = (pixels_of(url) for url in (here.image, *here.heat))
    assert gone.heat == ()
    assert predicted[:40, :40, 1].mean() > plain[:40, :40, 1].mean() + 50
    assert np.abs(predicted[60:, 60:] - plain[60:, 60:]).max() < 20
    assert actual[-40:, -40:, 1].mean() > plain[-40:, -40:, 1].mean() + 50
    html = report.render(load(folder))
    assert html.count('<img src="data:image/jpeg') == 3 and "Beside each image is what speaks for" in html
    table = folder / "interpretation" / "top_losses.csv"
    table.write_text(table.read_text().replace("0.jpg,dog,cat", "0.jpg,cat,cat"))
    assert len(error_analysis.read_analysis(load(folder)).losses[0].heat) == 1  # right, and both maps are the same


def test_without_heat_maps_the_report_has_the_images_and_says_why(tmp_path):
    folder = write_run(tmp_path / "run")  # as an earlier version left it
    assert "heat maps" not in report.render(load(folder)) and "Beside each" not in report.render(load(folder))
    save_heat_maps(folder / "interpretation" / "heat_maps.json", [], None, "the features of vit are <no> map")
    html = report.render(load(folder))
    assert "no heat maps of what the model looks at: the features of vit are &lt;no&gt; map." in html
    assert html.count('<img src="data:image/jpeg') == 1


def test_the_winners_probabilities_are_judged_with_what_abstaining_costs(run, tmp_path):
    html = report.render(run)
    assert "The expected calibration error is" in html and "on 20 validation images" in html
    assert '<figure id="reliability">' in html
    answers = re.findall(r"<td>([\d.]+)</td><td>([\d.]+ %)</td><td>([\d.]+ %)?</td><td>(\d+)</td>", html)
    assert answers[0] == ("0.5", "100.0 %", "20.0 %", "20") and answers[-1] == ("0.99", "0.0 %", "", "0")
    shutil.copytree(run.path, tmp_path / "run")
    (tmp_path / "run/interpretation/calibration.json").unlink()  # as an earlier version left it
    assert "calibration" not in report.render(load(tmp_path / "run")).replace("calibration_error", "")


def test_names_of_others_are_shown_not_run(tmp_path):
    labels = ["<script>alert(1)</script>", 'a"b', "</td>"]
    html = report.render(
        load(write_run(tmp_path / "run", labels=labels, reason="</script><img src=x onerror=alert(2)>"))
    )
    assert "<script>alert" not in html and "<img src=x" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    scripts = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', html, flags=re.DOTALL)
    found = [json.loads(script) for script in scripts]
    assert found[-1] == [] and all(chart["data"] for chart in found[:-1])  # the last one has a long table's later rows


def test_names_that_are_no_valid_utf8_do_not_cost_the_report(tmp_path):
    folder = write_run(tmp_path / "run")
    for name in ("confusion_matrix.csv", "top_losses.csv"):
        file = folder / "interpretation" / name
        file.write_bytes(file.read_bytes().replace(b"dog", b"d\xffg"))
    report.write_report(load(folder), tmp_path / "now.html", analysis=False)
    assert "d\\udcffg" in (tmp_path / "now.html").read_text()


def test_of_named_recipes_the_first_is_not_called_the_spaces_own(tmp_path):
    folder = write_run(tmp_path / "run")
    command = json.loads((folder / "command.json").read_text())
    (folder / "command.json").write_text(json.dumps(command | {"arguments": {"recipes": "book"}}))
    html = report.render(load(folder))
    assert 'id="first-card"' in html and "the space&#39;s own recipe" not in html


@pytest.mark.parametrize("num_trials", [0, 1, 4])
def test_an_early_report_says_what_is_missing(tmp_path, num_trials):
    html = report.render(load(write_run(tmp_path / "run", num_trials=num_trials)))
    assert ("No trial has started yet." in html) == (num_trials == 0)
    assert ('id="winner"' in html) == (num_trials > 0)


def test_a_search_in_which_nothing_completed_has_a_report_without_a_winner(tmp_path):
    folder = write_run(tmp_path / "run", num_trials=6)
    table = (folder / "trials.csv").read_text()
    (folder / "trials.csv").write_text(table.replace(COMPLETED, "running"))
    html = report.render(load(folder))
    assert "No trial has completed, so there is no winner yet." in html
    assert "The search was still running when this was written" in html


def test_a_thousand_trials_are_still_one_small_file_in_seconds(tmp_path):
    run = load(write_run(tmp_path / "run", num_trials=1000))
    started = time.monotonic()
    html = report.render(run)
    assert time.monotonic() - started < 60  # 2 s here; a search of a thousand trials has a thousand-row table
    assert len(html) < 8e6 and len(Page(html).rows) == 1 + trials_table.NUM_SHOWN
    [later] = re.findall(r'id="later-rows">(.*?)</script>', html)
    numbers = [int(cells[0][1]) for _, _, cells in json.loads(later)]
    assert sorted([*numbers, *(int(row[0]) for row in Page(html).rows[1:])]) == list(range(1000))
    assert "the 250 best, and some of all others" in html
    assert re.search(r"<li>\d+ trials, such as \d+: loss is nan</li>", html)  # failures are many as well


def test_a_long_table_cannot_be_left_by_a_trials_reason(tmp_path):
    reason = "</script><img src=x onerror=alert(2)>"
    html = report.render(load(write_run(tmp_path / "run", num_trials=400, reason=reason)))
    [later] = re.findall(r'id="later-rows">(.*?)</script>', html)
    assert reason in {cells[-1][1] for _, _, cells in json.loads(later)} and "<img src=x" not in html


def test_an_analysis_of_an_earlier_winner_is_not_shown(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "best" / "metrics.json").write_text('{"trial_id": "t99"}')
    assert error_analysis.read_analysis(load(folder)) is None
    (folder / "best" / "metrics.json").write_bytes((folder / "interpretation" / "metrics.json").read_bytes())
    (folder / "interpretation" / "confusion_matrix.csv").write_text("actual,cat\ncat,")  # cut short by a kill
    assert error_analysis.read_analysis(load(folder)) is None


@pytest.mark.slow
def test_the_winners_errors_are_looked_at_once_with_the_images_of_its_validation(tmp_path, cache, data, capfd):
    folder = write_run(tmp_path / "run")
    for made in ("best", "interpretation"):
        (folder / made).rename(tmp_path / made)
    command = json.loads((folder / "command.json").read_text())
    make_run(folder, data)  # a real model
    (folder / "command.json").write_text(json.dumps(command | {"data": str(data), "split_seed": 3}))
    assert report.main([str(folder)]) == 0
    assert "labelling the validation images with trial" in capfd.readouterr().out
    found = error_analysis.read_analysis(load(folder))
    metrics = json.loads((folder / "best" / "metrics.json").read_text())
    assert found.counts.sum() == 12
    assert found.counts.sum() - found.counts.trace() == round(12 * metrics["error_rate"])
    assert all(loss.image for loss in found.losses)
    assert found.calibration.images == 12
    assert found.calibration.error == pytest.approx(metrics["calibration_error"], abs=1e-4)
    before = (folder / "interpretation" / "top_losses.csv").stat().st_mtime_ns
    assert report.main([str(folder)]) == 0
    assert "labelling" not in capfd.readouterr().out
    assert (folder / "interpretation" / "top_losses.csv").stat().st_mtime_ns == before


@pytest.mark.slow
def test_wrong_labels_are_looked_for_once_and_again_if_that_is_asked_for(tmp_path, cache, capfd):
    data = draw_images(tmp_path / "birds", each=24)
    (data / "robin" / "1.jpg").rename(data / "wren" / "robin_1.jpg")
    weights = draw_weights(tmp_path / "weights", SETTINGS["arch"])
    folder = write_run(tmp_path / "run")
    for made in ("best", "interpretation"):
        (folder / made).rename(tmp_path / made)
    command = json.loads((folder / "command.json").read_text())
    make_run(folder, data, weights=weights, pretrained=True, head_init="probe", epochs=0)
    command |= {"data": str(data), "split_seed": 3, "weights": str(weights)}
    (folder / "command.json").write_text(json.dumps(command))
    assert report.main([str(folder)]) == 0
    assert "and looking for wrong labels for the report" in capfd.readouterr().out
    file = folder / "suspects.csv"
    header, first, *_ = before = file.read_text().splitlines()
    assert first.startswith("wren/robin_1.jpg,wren,robin,")
    assert "<strong>robin</strong>?" in (folder / "report.html").read_text()
    file.write_text(f"{header}\n")  # by somebody who finds all labels right
    assert report.main([str(folder)]) == 0
    assert "looking" not in capfd.readouterr().out and file.read_text() == f"{header}\n"
    assert report.main([str(folder), "--suspects"]) == 0
    assert file.read_text().splitlines() == before


def test_suspects_are_shown_with_the_given_and_the_suggested_label(tmp_path):
    folder = write_run(tmp_path / "run")
    assert 'id="suspects"' not in report.render(load(folder))
    write_suspects(
        folder / "suspects.csv",
        [
            Suspect(path="0.jpg", label="<cat>", suggested="dog", score=0.07, kind="label", split="train"),
            Suspect(path="gone.jpg", label="dog", suggested="", score=0.2, kind="outlier", split="valid"),
        ],
    )
    html = report.render(load(folder))
    assert 'id="suspects"' in html and "1 image may be labelled wrongly, 1 image is like no other, see " in html
    assert (
        "&lt;cat&gt; &rarr; <strong>dog</strong>?" in html and "dog &rarr; <strong>like no other</strong><br>" in html
    )
    assert 'alt="0.jpg: &lt;cat&gt;"' in html and 'alt="gone.jpg' not in html


def test_without_the_images_the_report_says_why_it_has_no_confusion_matrix(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "interpretation" / "metrics.json").unlink()
    (folder / "images").rename(tmp_path / "elsewhere")
    assert report.main([str(folder)]) == 0
    html = (folder / "report.html").read_text()
    assert "are not on this machine" in html and 'id="confusion"' not in html


def test_what_is_no_run_is_one_paragraph_and_exit_code_2(tmp_path):
    child = run_here(report.main, tmp_path)
    assert child.returncode == 2
    assert child.stderr.startswith(f"error: {tmp_path} is no run") and child.stderr.count("\n") == 1


def test_a_report_that_cannot_be_written_is_refused_before_images_are_labelled(run, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "analyse", lambda *found: pytest.fail("labels the images first"))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot be written \(it is a file\)"):
        report.main([str(run.path), "--out", str(tmp_path / "file" / "now.html"), "--no-analysis"])


def test_a_report_is_written_whatever_keeps_the_winners_errors_from_being_looked_at(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "interpretation" / "top_losses.csv").write_text("path,predicted,actual,loss,probability\n0.jpg,cat\n")
    (folder / "best" / "metrics.json").unlink()
    report.write_report(load(folder), folder / "report.html", analysis=True)
    assert "could not be analysed: " in (folder / "report.html").read_text()
