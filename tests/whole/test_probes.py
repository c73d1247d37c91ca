"""A search that begins with probes: it always has a model, and none of its probes is better than that."""

import json

from searches import Search, settings, tables
from weights import draw_weights

from search.options.arguments import parse_arguments
from search.options.preparation import searched_space
from search.runs.paths import RunFolder
from search.tuning.dry_run import NoCosts
from search.tuning.plan import PROBES, TRIALS, Plan, plan_search
from search.tuning.tuner import RunOptions
from trainables.data.layouts import find_images
from trainables.data.splits import train_and_valid
from trainables.ray.worker_group import GroupSize

ARCHS = ("test_resnet.r160_in1k", "test_vit.r160_in1k")
SMALL = f"arch={','.join(ARCHS)} presize=40 image_size=32 batch_size=4 lr_max=1e-3 lr_ratio=10 epochs=1..2"


def probed_search(folder, data, ray_head, *arguments: object) -> Search:
    common = ("--max-concurrent", 1, "--cpus-per-worker", 1, "--report", "off", "--address", ray_head)
    weights = ("--weights", draw_weights(folder.parent / "weights", *ARCHS))
    return Search(folder, "--space", "quickstart", "--data", data, *weights, *common, *settings(SMALL), *arguments)


def planned(folder, data, *arguments: object) -> Plan:
    """What `--dry-run` would have said of such a search."""
    words = ["--space", "quickstart", "--data", data, "--weights", folder.parent / "weights", *settings(SMALL)]
    options = parse_arguments([str(word) for word in (*words, "--metric", "error_rate", *arguments)])
    images = find_images(data)
    split = train_and_valid(images.labels, images.valid, images.groups, seed=0)
    run = RunOptions(
        options=options, space=searched_space(options), folder=RunFolder(folder), data="",
        labels=list(images.classes),
        group_size=GroupSize(),
    )  # fmt: skip
    return plan_search(run, NoCosts(), (len(split[0]), len(split[1])), at_once=1, limit=None, seed=0)


def numbers_and_kinds(folder) -> list[tuple[str, str]]:
    return [(row["number"], row["kind"]) for row in tables(folder)[0]]


def test_the_screen_comes_first_and_no_probe_is_better_than_the_best_model(data, ray_head, tmp_path):
    folder = tmp_path / "probed"
    search = probed_search(folder, data, ray_head, "--trials", 2)
    assert search.wait() == 0, search.text
    probes = [("-3", "probe"), ("-2", "probe"), ("-1", "probe")]  # of each architecture, then of the best with views
    assert numbers_and_kinds(folder) == [*probes, ("0", "trial"), ("1", "trial")]
    rows, epochs = tables(folder)
    assert {row["arch"] for row in rows[:2]} == set(ARCHS)
    assert [row["epoch"] for row in epochs if row["number"] == "0"] == [
        "0",
        *map(str, range(1, 1 + int(rows[3]["epochs"]))),
    ]
    best = json.loads((folder / "best" / "metrics.json").read_text())
    assert best["error_rate"] == min(float(row["error_rate"]) for row in rows)
    assert "best probe" in search.text
    plan = planned(folder, data, "--trials", 2)
    made = [row for row in epochs if row["stage"] == "unfrozen"]
    assert (plan.counts[PROBES], plan.counts[TRIALS]) == (3, 2)
    assert plan.work[TRIALS].epochs == len(made)
    assert plan.work[TRIALS].training == sum(int(row["train_images"]) // 4 * 4 for row in made)
    assert search.lines[-1] == "False"  # no torch in the driver

    again = Search(folder, "--resume", "--trials", 3, "--address", ray_head)
    assert again.wait() == 0, again.text
    assert numbers_and_kinds(folder) == [*probes, ("0", "trial"), ("1", "trial"), ("2", "trial")]
    assert tables(folder)[0][:5] == rows


def test_a_time_budget_leaves_a_model_and_exit_code_0(data, ray_head, tmp_path):
    folder = tmp_path / "budgeted"
    search = probed_search(folder, data, ray_head, "--trials", 500, "--time-budget", "25s", "--keep-epoch", "best")
    assert search.wait() == 0, search.text
    assert "the time budget of 25 s" in search.text
    rows, _ = tables(folder)
    assert {row["status"] for row in rows} <= {"completed", "unfinished", "stopped early"}
    best = json.loads((folder / "best" / "metrics.json").read_text())
    ranked = [row for row in rows if row["error_rate"] and row["status"] != "stopped early"]
    assert best["error_rate"] == min(float(row["error_rate"]) for row in ranked)
