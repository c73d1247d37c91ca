"""A training on images whose labels a table names, and what opens its images again afterwards."""

import csv
import json
from pathlib import Path

import pytest
from in_process import run_here
from tiny_run import draw_images, make_run

from trainables import interpret
from trainables.data.layouts import find_images, root_of


@pytest.mark.slow
def test_a_network_trains_on_a_table_and_its_errors_are_found_in_the_same_images(tmp_path, search_cache):
    draw_images(tmp_path / "photos", each=8)
    photos = sorted(str(path.relative_to(tmp_path / "photos")) for path in tmp_path.rglob("*.jpg"))
    table = tmp_path / "labels.csv"
    table.write_text("\n".join(["file,kind", *(f"{photo},class {photo[0]}/1" for photo in photos)]))
    given = find_images(f"{table}?path=file&label=kind&images={tmp_path}/photos").given
    run = make_run(tmp_path / "run", Path(given))
    assert json.loads((run / "best/labels.json").read_text()) == ["class b/1", "class r/1", "class w/1"]
    named = ["--data", table, "--columns", "path=file,label=kind", "--images", tmp_path / "photos"]
    ended = run_here(interpret.main, "--model", run, *named, "--out", tmp_path / "out")
    assert ended.returncode == 0, ended.stderr
    assert f"3 classes in {given}" in ended.stderr
    metrics = json.loads((run / "best/metrics.json").read_text())
    assert f"error rate {100 * metrics['error_rate']:.1f} %" in ended.stdout
    with (tmp_path / "out/top_losses.csv").open() as file:
        assert all((root_of(given) / row["path"]).is_file() for row in csv.DictReader(file))
