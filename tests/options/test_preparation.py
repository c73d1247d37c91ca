"""What is decided before a search begins: names for patterns, what is left out, epochs for the images."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_run import draw_images

from search import check, lr_find
from search.options.arguments import parse_arguments
from search.options.preparation import (
    has_pattern,
    searched_space,
    with_epochs,
    with_metric,
    with_names,
    with_weights,
    without_untrainable,
)
from search.options.search_options import SearchOptions
from search.reporting.test_set import source_of
from search.run import prepare
from search.runs.command import CommandRecord
from search.runs.paths import RunFolder
from trainables.data.held_out_images import WithoutTestImages
from trainables.data.labelled_images import ImageFolder
from trainables.network import architecture_names, pretrained_weights
from trainables.network.pretrained_weights import WeightsError

LITES = tuple(f"tf_efficientnet_lite{number}" for number in range(3))


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("FINETUNE_SEARCH_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def lites(monkeypatch) -> None:
    """All patterns match the three Lites, without a process."""
    monkeypatch.setattr(
        architecture_names, "names_like", lambda patterns: {pattern: list(LITES) for pattern in patterns}
    )


def weights(folder: Path, *archs: str) -> Path:
    folder.mkdir()
    for arch in archs:
        (folder / f"{arch}.safetensors").touch()
    return folder


# --- Which space ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parse", [parse_arguments, check.parse_arguments, lr_find.parse_arguments])
def test_ones_own_images_have_a_space_of_their_own(parse, capsys):
    assert parse(["--data", "photos"]).space == "images"
    assert parse(["--data", "photos", "--space", "pets"]).space == "pets"
    with pytest.raises(SystemExit):
        parse([])
    assert "--space is required without --data: one of imagenette, images, pets" in capsys.readouterr().err


def test_a_resumed_run_knows_its_space():
    assert parse_arguments(["--resume", "--name", "mine", "--data", "photos"]).space is None


# --- Patterns ---------------------------------------------------------------------------------------------------------


def test_a_pattern_becomes_names_beside_those_that_are_given(lites, capsys):
    given = ("epochs=3", "arch=resnet18, tf_*, tf_efficientnet_lite1", "image_size=96,128")
    assert with_names(given) == ("epochs=3", f"arch=resnet18,{','.join(LITES)}", "image_size=96,128")
    assert capsys.readouterr().out == f"architectures: 3 match tf_*: {', '.join(LITES)}\n"
    assert has_pattern(given) and not has_pattern(with_names(given))


def test_names_are_not_looked_up(monkeypatch):
    monkeypatch.setattr(architecture_names, "names_like", lambda patterns: pytest.fail("looked up"))
    assert with_names(["arch=resnet18,resnet34", "mixup_alpha=0,0.1..0.4"]) == (
        "arch=resnet18,resnet34",
        "mixup_alpha=0,0.1..0.4",
    )


def test_looking_up_a_pattern_leaves_timm_out_of_this_process(monkeypatch):
    """The child process is stood in for; nothing else may import it."""
    for name in ("timm", "torch"):
        monkeypatch.setitem(sys.modules, name, None)  # an import raises
    names = {"tf_*": list(LITES)}
    monkeypatch.setattr(architecture_names, "_kept", names.get)
    assert searched_space(SearchOptions(space="quickstart", set=("arch=tf_*",))).dimensions["arch"].values == LITES


def test_what_a_pattern_finds_and_cannot_be_trained_is_left_out(monkeypatch, capsys):
    from search.spaces import architectures

    monkeypatch.setattr(architectures, "untrainable", lambda recipes: {LITES[1]: "it stops.", LITES[2]: "it too."})
    options = SearchOptions(space="quickstart")
    with pytest.raises(ValueError, match=r"^it stops\. it too\.$"):
        without_untrainable(options, searched_space(options), by_pattern=False)
    kept, space = without_untrainable(options, searched_space(options), by_pattern=True)
    assert (kept.set, space.settings["arch"]) == ((f"arch={LITES[0]}",), LITES[0])
    said = f"left out: {LITES[1]}, {LITES[2]}: cannot be trained (the first of them: it stops)\n"
    assert capsys.readouterr().out == said


# --- Weights ----------------------------------------------------------------------------------------------------------


def test_architectures_without_weights_leave_the_space_before_the_search(tmp_path, capsys):
    options = SearchOptions(space="quickstart", weights=weights(tmp_path / "weights", *LITES[1:]))
    options, space = with_weights(options, searched_space(options))
    assert space.dimensions["arch"].values == LITES[1:]
    assert space.first_configs()[0]["arch"] == LITES[1]  # trial 0's own is not there
    assert space == searched_space(options)  # a resumed search has the same
    assert capsys.readouterr().out.startswith(f"left out: {LITES[0]}: no pretrained weights (--weights {tmp_path}")


def test_where_all_have_weights_nothing_changes(tmp_path, capsys):
    options = SearchOptions(space="quickstart", weights=weights(tmp_path / "weights", *LITES))
    assert with_weights(options, searched_space(options))[0] is options
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "asked",
    [
        {"set": (f"arch={LITES[0]}",)},  # the single one
        {"set": (f"arch={LITES[0]},{LITES[1]}",)},  # none is left
        {"recipes": "book"},  # which has recipes for Lite0
        {"resume": True, "name": "mine"},  # another space than before
    ],
)
def test_missing_weights_are_an_error_where_nothing_can_be_left_out(tmp_path, asked):
    options = SearchOptions(space="quickstart", weights=weights(tmp_path / "weights", LITES[2]), **asked)
    with pytest.raises(WeightsError, match=rf"has no weights for {LITES[0]} \(looked for {LITES[0]}\.safetensors"):
        with_weights(options, searched_space(options))


def test_a_training_from_scratch_needs_no_weights(tmp_path):
    options = SearchOptions(space="quickstart", weights=weights(tmp_path / "none"), set=("pretrained=false",))
    assert with_weights(options, searched_space(options))[0] is options


def test_what_the_hub_does_not_have_is_left_out_with_the_reason(monkeypatch, capsys):
    problems = {LITES[1]: "No pretrained weights for it."}
    monkeypatch.setattr(pretrained_weights, "without_weights", lambda archs, folder, given: problems)
    options = SearchOptions(space="quickstart")
    assert with_weights(options, searched_space(options))[0].set == (f"arch={LITES[0]},{LITES[2]}",)
    reason = "no pretrained weights (the first of them: No pretrained weights for it)"
    assert capsys.readouterr().out == f"left out: {LITES[1]}: {reason}\n"


# --- Epochs -----------------------------------------------------------------------------------------------------------


def folder_of(count: int, *, valid: int | None = None) -> ImageFolder:
    split = None if valid is None else tuple(i < valid for i in range(count))
    names = tuple(f"{i}.jpg" for i in range(count))
    return ImageFolder(Path(), "class folders", names, tuple(i % 2 for i in range(count)), ("a", "b"), split)


@pytest.mark.parametrize(("images", "epochs"), [(folder_of(7500), "2..10"), (folder_of(7500, valid=5000), "3..15")])
def test_the_epochs_are_those_for_the_training_images(images, epochs, capsys):
    options = SearchOptions(data=Path("photos"))
    options, space = with_epochs(options, searched_space(options), images)
    assert str(space.dimensions["epochs"]) == epochs
    assert space.epochs_of == 0 and space == searched_space(options)  # a resumed search does not decide again
    assert capsys.readouterr().out.startswith(f"epochs: {epochs}, for ")


@pytest.mark.parametrize("asked", [{"data": Path("photos"), "set": ("epochs=3..5",)}, {"space": "pets"}])
def test_epochs_that_were_asked_for_stay(asked):
    options = SearchOptions(**asked)
    assert with_epochs(options, searched_space(options), folder_of(60))[0] is options


# --- All together -----------------------------------------------------------------------------------------------------


def without_presizing(monkeypatch) -> None:
    monkeypatch.setattr("search.run.presize_here", lambda *args, **kwargs: None)


def test_what_was_decided_is_in_the_options_of_a_run_and_what_was_asked_for_too(lites, tmp_path, monkeypatch, capsys):
    without_presizing(monkeypatch)
    data = draw_images(tmp_path / "images", each=3)
    folder = weights(tmp_path / "weights", *LITES[:2])
    asked = SearchOptions(data=data, weights=folder, set=("arch=tf_*", "presize=64", "image_size=48"))
    prepared = prepare(asked, RunFolder(tmp_path / "run"))
    assert prepared.asked == asked
    assert prepared.space.dimensions["arch"].values == LITES[:2]
    assert prepared.space.name == "images" and str(prepared.space.dimensions["epochs"]) == "10..40"
    said = capsys.readouterr().out
    for line in ("architectures: 3 match tf_*: ", f"left out: {LITES[2]}: ", "epochs: 10..40, for "):
        assert f"\n{line}" in f"\n{said}"
    again = replace(prepared.options, resume=True, name="run")
    assert searched_space(again) == prepared.space


# --- The metric -------------------------------------------------------------------------------------------------------


def images_of(*counts: int) -> ImageFolder:
    """A folder whose classes have so many images."""
    labels = tuple(label for label, count in enumerate(counts) for _ in range(count))
    names = tuple(f"class{label}" for label in range(len(counts)))
    return ImageFolder(Path("photos"), "class folders", tuple(map(str, range(len(labels)))), labels, names)


def decided(counts: tuple[int, ...], *words: str) -> SearchOptions:
    options = parse_arguments(["--data", "photos", *words])
    return with_metric(options, searched_space(options), images_of(*counts))[0]


def test_images_of_a_long_tail_are_judged_and_trained_class_by_class(capsys):
    options = decided((80, 20, 10, 5))
    assert options.metric == "balanced_error"
    assert options.set == ("logit_adjustment=1",)
    assert searched_space(options).full_settings["logit_adjustment"] == 1
    assert "the largest class has 80 images and the median one 10" in capsys.readouterr().out


def test_balanced_images_are_judged_by_their_error_rate_without_a_word(capsys):
    options = decided((80, 60, 50, 40))
    assert (options.metric, options.set) == ("error_rate", ())
    assert capsys.readouterr().out == ""


def test_what_the_user_says_about_metric_and_balance_stays():
    assert decided((80, 20, 10, 5), "--metric", "error_rate").set == ()
    assert decided((80, 60), "--metric", "macro_f1").set == ("logit_adjustment=1",)
    for setting in ("logit_adjustment=0", "class_weights=none,effective", "sampler=balanced"):
        assert decided((80, 20, 10, 5), "--set", setting).set == (setting,)


def test_a_search_that_is_resumed_keeps_its_metric_and_weights():
    options = decided((80, 20, 10, 5))
    again = with_metric(replace(options, resume=True, name="run"), searched_space(options), images_of(80, 20, 10, 5))
    assert (again[0].metric, again[0].set) == (options.metric, options.set)


def test_the_top_five_of_five_classes_are_no_metric():
    with pytest.raises(ValueError, match="5 classes, expected more than 5"):
        decided((10,) * 5, "--metric", "top5_error")


def test_images_with_several_labels_are_judged_by_macro_f1(capsys):
    images = replace(images_of(50, 20, 5), label_sets=((0,),) * 50 + ((0, 1),) * 20 + ((2,),) * 5)

    def metric(*words: str) -> SearchOptions:
        options = parse_arguments(["--data", "photos", *words])
        return with_metric(options, searched_space(options), images)[0]

    assert (metric().metric, metric().set) == ("macro_f1", ())
    assert "metric: macro_f1, since an image may have several labels" in capsys.readouterr().out
    assert metric("--metric", "map").metric == "map"
    with pytest.raises(ValueError, match="balanced_error is of images with one label each"):
        metric("--metric", "balanced_error")
    with pytest.raises(ValueError, match="map is of images with several labels, and each of these has one"):
        decided((80, 60), "--metric", "map")


def test_runs_of_versions_without_other_metrics_minimised_the_error_rate():
    record = SearchOptions(data=Path("photos")).to_record()
    del record["metric"]
    assert SearchOptions.from_record(record).metric == "error_rate"


def test_groups_go_with_a_run_and_an_earlier_run_goes_on_without_them(lites, tmp_path, monkeypatch, capsys):
    without_presizing(monkeypatch)
    data, folder = draw_images(tmp_path / "images", each=6), RunFolder(tmp_path / "run")
    shutil.copy(data / "wren/0.jpg", data / "wren/9.jpg")
    asked = SearchOptions(data=data, weights=weights(tmp_path / "weights", LITES[0]), set=(f"arch={LITES[0]}",))
    prepared = prepare(replace(asked, group=r"/(\d)\."), folder)
    assert prepared.groups == "0 6 12 18;1 7 13;2 8 14;3 9 15;4 10 16;5 11 17" and len(set(prepared.images.groups)) == 6
    assert "groups: 7 of 19 images" in capsys.readouterr().out
    copied = prepare(asked, folder)
    assert copied.groups == "12 18"
    source = source_of("images", 0.2, 5, groups=copied.groups)
    assert source == WithoutTestImages("images", 0.2, 5, groups="12 18")
    assert source_of("images", None, 5) == "images"
    record = CommandRecord(arguments=copied.options, asked=asked, images=copied.known)
    for kept, expected in ((None, ""), ("12 18", "12 18")):
        folder.path.mkdir(exist_ok=True)
        replace(record, groups=kept, files=copied.files).save(folder.path)
        again = replace(copied.options, resume=True, name="run")
        assert prepare(again, folder).groups == expected
    replace(record, groups="", files=copied.files).save(folder.path)
    with pytest.raises(ValueError, match="the groups of its images have changed"):
        prepare(again, folder)
