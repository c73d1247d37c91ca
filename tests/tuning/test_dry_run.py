"""`--dry-run` in this process: it measures tiny networks on drawn images, says what would be, and leaves nothing."""

import tempfile
import time
from dataclasses import replace

import pytest
from run_tables import write_run
from searches import settings
from tiny_run import draw_images
from weights import draw_weights

from search.options.arguments import parse_arguments
from search.options.preparation import searched_space
from search.options.search_options import SearchOptions
from search.run import main
from search.runs.paths import RunFolder
from search.spaces.space import Space
from search.tuning import dry_run
from search.tuning.dry_run import MeasuredCosts, about, cached_features, say_plan
from trainables.data.layouts import find_images
from trainables.data.presize import presize, presized_before
from trainables.recipe import Recipe
from trainables.training.fine_tune import FineTune
from trainables.training.timing import Measurement, Speed, measure

ARCHS = ("test_resnet.r160_in1k", "test_vit.r160_in1k")
TINY = f"arch={','.join(ARCHS)} presize=40 image_size=32 batch_size=4 epochs=2 lr_max=0.001 probe_views=1"
EACH = 10
"""Images of each of three classes: six of 30 validate, and 24 train."""
SPEEDS = tuple(
    Speed(
        arch=arch, image_size=32, forward=0.001 * cost, training=0.003 * cost, building=0.5, judging=0.1,
        memory=900_000_000 * cost, num_features=64,
    )
    for cost, arch in enumerate(ARCHS, start=1)
)  # fmt: skip
MEASUREMENT = Measurement(ready=0.0, presizing=0.01, fitting=0.5, speeds=SPEEDS)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> None:
    """The processes that measure, and try the architectures out, are this one, which has torch already."""
    monkeypatch.setenv("FINETUNE_SEARCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(dry_run, "in_new_process", lambda function, *args, **how: function(*args, **how))
    monkeypatch.setattr(dry_run, "PLAN_SECONDS", 1000.0)
    monkeypatch.setattr("search.run.without_untrainable", lambda options, space, **how: (options, space))


@pytest.fixture
def words(tmp_path) -> list[str]:
    data, weights = draw_images(tmp_path / "images", each=EACH), draw_weights(tmp_path / "weights", *ARCHS)
    given = {"--data": data, "--weights": weights, "--results": tmp_path / "results", "--trials": 3, "--name": "first"}
    plain = [word for option, value in given.items() for word in (option, str(value))]
    return ["--space", "quickstart", "--dry-run", *plain, *settings(TINY)]


@pytest.fixture
def measured(monkeypatch) -> None:
    """In no time, and always the same."""

    def measure(images: object, recipes: list[dict], **how: object) -> Measurement:
        known = zip(SPEEDS, recipes, strict=False)
        speeds = tuple(replace(speed, arch=recipe["arch"]) for speed, recipe in known)
        return replace(MEASUREMENT, ready=time.time() + 4, speeds=speeds)

    monkeypatch.setattr(dry_run, "measure", measure)
    monkeypatch.setattr(dry_run, "PLANS", 2)


def said(capsys) -> dict[str, str]:
    """The lines of the output, by what stands before their colon."""
    lines = capsys.readouterr().out.splitlines()
    return {name: rest for name, _, rest in (line.partition(": ") for line in lines)}


def space_and_images(words: list[str]) -> tuple[SearchOptions, Space, object]:
    options = parse_arguments(words)
    return options, searched_space(options), find_images(options.data)


# --- The whole command ------------------------------------------------------------------------------------------------


def test_it_measures_says_what_the_search_would_do_and_leaves_nothing(words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    assert main(words) == 0
    lines = said(capsys)
    assert lines["plan"] == (
        "3 probes, 3 trials, the winner again on all images; 8 epochs in all, if no trial stops early"
    )
    # Of 24 images, the refit of 30: batches of four; features, views, validation of two epochs and of five views.
    assert lines["image passes"].startswith(f"about {3 * 2 * 24 + 2 * 28} of training, ")
    for part in ("until the first training begins", "for probes", "for trials", "for the refit", "1 at once"):
        assert part in lines["time"]
    assert lines["measured"].startswith(f"{ARCHS[1]} at 32 px takes ") and "1 other likewise" in lines["measured"]
    assert "in the cache for presized images" in lines["disk"] and "a worker with test_" in lines["memory"]
    assert not (tmp_path / "results").exists() and not any((tmp_path / "temporary").iterdir())
    assert not {"presized", "features"} & {path.name for path in (tmp_path / "cache").glob("*")}


def test_what_is_cached_is_not_counted_again(words, capsys, measured):
    options, space, images = space_and_images(words)
    presized = presize(images, 40)
    for arch in ARCHS:
        training = FineTune(
            Recipe.from_dict(space.full_settings | {"arch": arch, "epochs": 0}), presized, weights=options.weights
        )
        training.run_epoch()
        training.close()
    assert cached_features(space, images, "auto") == {
        (arch, 32, augmented, count): 1 for arch in ARCHS for augmented, count in ((False, 30), (True, 24))
    }
    assert main(words) == 0
    lines = said(capsys)
    assert lines["cached"] == "4 sets of features, which are not computed again"
    assert lines["image passes"].endswith(f", {4 * 7 * 6 + 6} forward alone")  # a refit's views of those for validation
    assert "presized" not in lines["disk"]


def test_a_time_budget_says_how_many_trials_fit(words, capsys, measured):
    assert main([*words, "--trials", "500", "--time-budget", "40s"]) == 0
    lines = said(capsys)
    low, _, high = lines["trials"].partition(" of 500 fit into the time budget")[0].partition(" to ")
    assert 3 < int(low) <= int(high or low) < 100
    assert "of the time budget of 40 s: " in lines["time"] and " of 500 trials" in lines["plan"]


def test_several_trials_at_once_take_less_time(words, capsys, measured):
    words += ["--set", f"arch={ARCHS[0]}", "--trials", "20", "--cpus-per-worker", "0.5", "--report", "off"]
    lines = []
    for at_once in ("1", "2"):
        assert main([*words, "--max-concurrent", at_once]) == 0
        lines.append(said(capsys))
    one, two = (line["time"].removeprefix("about ").partition(" s: ")[0] for line in lines)
    assert lines[0]["image passes"] == lines[1]["image passes"] and "2 at once" in lines[1]["time"]
    assert 0.5 < (float(two) - 10) / (float(one) - 10) < 0.7  # the start and the end take 10 s


def test_earlier_runs_are_counted_in(words, tmp_path, capsys, measured):
    run = write_run(tmp_path / "earlier")
    assert main([*words, "--set", "arch=resnet18,resnet34", "--set", "pretrained=false", "--warm-start", str(run)]) == 0
    assert said(capsys)["warm start"].startswith("3 configs of ")


def test_on_a_cluster_the_work_is_told_and_no_time(words, tmp_path, capsys):
    options, space, images = space_and_images([*words, "--address", "auto", "--time-budget", "1h"])
    say_plan(replace(options, metric="error_rate"), space, images, RunFolder(tmp_path / "run"), None)
    lines = said(capsys)
    assert lines["plan"].startswith("3 probes, 3 trials, the winner again on all images; 8 epochs in all")
    assert lines["time"].startswith("not known, because the speed of the cluster's nodes is not")
    assert "time budget of 1 h 0 min" in lines["time"] and "memory" not in lines


# --- Refused ----------------------------------------------------------------------------------------------------------


def test_a_name_that_is_taken_is_refused_as_the_search_would_do_it(words, tmp_path):
    (tmp_path / "results" / "first").mkdir(parents=True)
    (tmp_path / "results" / "first" / "trials.csv").touch()
    with pytest.raises(ValueError, match=r"first exists\. Add --resume to resume it, or give another --name"):
        main(words)


def test_a_search_that_has_begun_is_not_planned():
    with pytest.raises(ValueError, match="--dry-run plans a new search"):
        SearchOptions(dry_run=True, resume=True, name="first")


def test_what_the_search_would_refuse_is_refused(words, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"--warm-start: .*none does not exist"):
        main([*words, "--warm-start", str(tmp_path / "none")])


# --- Its parts --------------------------------------------------------------------------------------------------------


def test_what_was_not_measured_is_scaled_from_the_dearest_that_was():
    costs = MeasuredCosts(MEASUREMENT, {ARCHS[0]: 1.0, ARCHS[1]: 2.0, "large": 10.0}, start=0.0, end=0.0)
    assert costs.forward(ARCHS[0], 32) == 0.001 and costs.forward(ARCHS[0], 64) == 0.004
    assert costs.training("large", 32) == pytest.approx(5 * 0.006)
    assert costs.building("large") == 0.5


@pytest.mark.parametrize(("seconds", "count"), [(0.0, 1), (600.0, 2)])
def test_at_least_the_cheapest_is_measured_and_others_while_there_is_time(words, tmp_path, seconds, count):
    _, space, images = space_and_images(words)
    how = {"num_train": 24, "device": "cpu", "num_threads": 1, "storage": "auto", "seconds": seconds}
    found = measure(images, [space.full_settings | {"arch": arch} for arch in ARCHS], **how)
    assert [speed.arch for speed in found.speeds] == list(ARCHS[:count])
    assert all(0 < speed.forward < speed.training for speed in found.speeds)
    assert found.fitting > 0 and found.presizing > 0 and found.speeds[0].memory > 100_000_000


def test_images_with_several_labels_and_a_split_of_their_own_are_measured_as_well(words):
    _, space, images = space_and_images(words)
    several = replace(images, label_sets=((0, 1),) * 30, valid=(True, False) * 15)
    how = {"num_train": 15, "device": "cpu", "num_threads": 1, "storage": "off", "seconds": 0.0}
    assert measure(several, [space.full_settings], **how).speeds


def test_images_are_looked_for_and_not_presized(words):
    *_, images = space_and_images(words)
    assert presized_before(images, 40) is None
    built = presize(images, 40)
    assert presized_before(images, 40).path == built.path
    assert presized_before(images, 41) is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(7.6, "8 s"), (64, "64 s"), (100, "1.7 min"), (700, "12 min"), (9000, "2.5 h"), (4e5, "111 h")],
)
def test_durations_have_the_digits_of_an_estimate(seconds, text):
    assert about(seconds) == text
