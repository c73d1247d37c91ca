"""What earlier runs give to a search: trials where their errors say something here, else the best of their configs."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState
from run_tables import write_run
from tiny_run import draw_images

from search.options.arguments import parse_arguments
from search.options.search_options import SearchOptions
from search.options.strategy import Strategy
from search.reporting.importance import importances
from search.run import prepare
from search.runs.command import CommandRecord, FilesRecord, ImagesRecord
from search.runs.paths import RunFolder
from search.runs.resume import saved_options
from search.runs.run_record import load
from search.runs.study_journal import WARM_START, open_journal
from search.spaces.space import Choice, Range, Space
from search.tuning.screen import Screen
from search.tuning.searcher import OptunaSearcher
from search.tuning.warm_start import NUM_CONFIGS, WarmStart, new_warm_start

SPACE = Space(
    name="small",
    doc="as the runs of run_tables",
    dataset="quickstart",
    settings={"arch": "resnet18", "image_size": 224, "epochs": 2, "lr_max": 1e-3},
    dimensions={
        "arch": Choice(("resnet18", "resnet34")),
        "epochs": Range(1, 3),
        "lr_max": Range(1e-4, 1e-2, log=True),
        "mixup_alpha": Range(0.0, 0.4),
    },
)
DEFAULT = {"arch": "resnet18", "epochs": 2, "lr_max": 1e-3, "mixup_alpha": 0.0}
IMAGES = ImagesRecord(digest="a", names_digest="n", count=100, classes=("cat", "dog", "emu"))
OTHER_IMAGES = replace(IMAGES, digest="b")


def earlier_run(folder: Path, *, images: ImagesRecord | None = IMAGES, num_trials: int = 10, **changes) -> Path:
    """Of ten trials, seven have completed, two were stopped early and one has failed."""
    write_run(folder, num_trials=num_trials)
    replace(CommandRecord.load(folder), images=images, groups="", format=2, **changes).save(folder)
    return folder


def warm(*runs: Path, space: Space = SPACE, **options) -> WarmStart:
    options = SearchOptions(**{"space": "quickstart", "metric": "error_rate", "warm_start": runs} | options)
    found = new_warm_start(options, space, IMAGES, "", FilesRecord())
    assert found
    return found


def made(journal: Path, warm_start: WarmStart | None, *, space: Space = SPACE, screen=None, num_trials=None, **method):
    strategy = Strategy(**method)
    more = {"screen": screen, "num_trials": num_trials, "warm_start": warm_start}
    return OptunaSearcher(space, journal, seed=0, strategy=strategy, **more)


def run_trial(searcher: OptunaSearcher, trial_id: str, error: float = 0.5) -> dict:
    config = searcher.suggest(trial_id)
    result = {"epoch": 2, "epochs_total": 2, "progress": 100, "error_rate": error, "objective": error}
    searcher.on_trial_complete(trial_id, result | {"seconds": 10.0, "valid_loss": error, "failure": ""})
    return config


def in_study(journal: Path) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name="small", storage=open_journal(journal)).trials


def best_configs(run: Path) -> list[dict]:
    """As the study has them: the table has fewer digits."""
    trials = optuna.load_study(study_name="pets", storage=open_journal(run / "study.journal")).trials
    params = {int(trial.user_attrs["trial_id"]): trial.params for trial in trials}
    return [params[number] for number in load(run).whole["number"]]


@pytest.fixture
def journal(tmp_path) -> Path:
    return tmp_path / "study.journal"


# --- On the same images -----------------------------------------------------------------------------------------------


def test_trials_of_the_same_images_are_known_before_the_first_proposal(tmp_path, journal):
    run = earlier_run(tmp_path / "first")
    searcher = made(journal, warm(run), num_trials=2)
    assert run_trial(searcher, "a") == DEFAULT
    *earlier, own = in_study(journal)
    assert [trial.state for trial in earlier] == [TrialState.COMPLETE] * 7 + [TrialState.PRUNED] * 2
    assert [trial.params for trial in earlier[:7]] == best_configs(run)
    assert all(trial.user_attrs[WARM_START].startswith(f"{RunFolder(run)} trial ") for trial in earlier)
    assert earlier[-1].intermediate_values.keys() == {50}
    assert WARM_START not in own.user_attrs and own.user_attrs["trial_id"] == "a"


def test_they_are_no_trials_of_the_search(tmp_path, journal):
    """Neither of its number, nor among the best that are trained again, which has none of its own number."""
    searcher = made(journal, warm(earlier_run(tmp_path / "first")), num_trials=2, confirm=1)
    assert searcher.max_remaining() == 2 + 3
    run_trial(searcher, "a", 0.9)
    second = run_trial(searcher, "b", 0.8)
    retrained = searcher.suggest("c")
    assert retrained["retrains"] == "tb" and {name: retrained[name] for name in second} == second


def test_the_sampler_learns_from_them(tmp_path):
    """The earlier run has lower errors at lower rates, and has no need of random proposals any more."""
    run = earlier_run(tmp_path / "first", num_trials=40)
    rates = {}
    for name, warm_start in (("cold", None), ("warm", warm(run))):
        searcher = made(tmp_path / name, warm_start)
        configs = [run_trial(searcher, str(number), 0.3) for number in range(8)]
        rates[name] = float(np.mean([np.log10(config["lr_max"]) for config in configs[1:]]))
    assert rates["warm"] < rates["cold"] - 0.3


def test_random_proposals_are_not_those_of_a_run_with_the_same_seed(tmp_path):
    run = earlier_run(tmp_path / "first", num_trials=2)
    cold, warmed = made(tmp_path / "cold", None), made(tmp_path / "warm", warm(run))
    proposals = [[run_trial(searcher, str(number)) for number in range(3)] for searcher in (cold, warmed)]
    assert proposals[0][0] == proposals[1][0] == DEFAULT
    assert all(config not in proposals[0] for config in proposals[1][1:])


def test_of_more_choices_those_of_this_space_count(tmp_path, journal):
    run = earlier_run(tmp_path / "first")
    space = replace(SPACE, dimensions=SPACE.dimensions | {"arch": Choice(("resnet34", "resnet50"))})
    run_trial(made(journal, warm(run, space=space), space=space), "a")
    *earlier, _ = in_study(journal)
    completed = [config for config in best_configs(run) if config["arch"] == "resnet34"]
    assert {trial.params["arch"] for trial in earlier} == {"resnet34"}
    assert sum(trial.state == TrialState.COMPLETE for trial in earlier) == len(completed) > 0


def test_trials_outside_of_a_narrower_range_do_not_count(tmp_path):
    space = SPACE.with_settings(["epochs=1..2"])
    found = warm(earlier_run(tmp_path / "first"), space=space).trials(space, Strategy())
    assert {trial.params["epochs"] for trial in found} == {1, 2}


def test_a_setting_that_was_pinned_then_and_is_searched_now_is_no_hindrance(tmp_path):
    space = SPACE.with_settings(["image_size=160..288"])
    found = warm(earlier_run(tmp_path / "first"), space=space).trials(space, Strategy())
    assert len(found) == 9 and {trial.params["image_size"] for trial in found} == {224}


def test_after_a_screen_those_of_its_architectures_count(tmp_path, journal):
    pairs = [{"arch": arch, "image_size": 224} for arch in ("resnet18", "resnet34")]
    screen = Screen(pairs=pairs, costs=[1.0, 2.0], keep=1)
    searcher = made(journal, warm(earlier_run(tmp_path / "first")), screen=screen)
    for trial_id, error in (("p0", 0.4), ("p1", 0.2)):
        searcher.suggest(trial_id)
        result = {"objective": error, "error_rate": error, "valid_loss": error, "feature_seconds": 1.0, "seconds": 1.0}
        result |= {"train_seconds": 1.0, "valid_seconds": 0.0, "train_images": 80, "valid_images": 20}
        searcher.on_trial_complete(trial_id, result | {"stage": "probe"})
    assert run_trial(searcher, "a")["arch"] == "resnet34"
    *earlier, _ = in_study(journal)
    assert len(earlier) > 2 and {trial.params["arch"] for trial in earlier} == {"resnet34"}


def test_seconds_of_earlier_trials_count_where_quick_ones_are_preferred(tmp_path):
    found = warm(earlier_run(tmp_path / "first")).trials(SPACE, Strategy(target_seconds=25.0))
    seconds = [10.0 * (trial.params["epochs"] + (trial.state == TrialState.COMPLETE)) for trial in found]
    assert [trial.constraints["seconds"] for trial in found] == [each - 25 for each in seconds]


def test_what_mattered_is_told_by_a_runs_own_trials(tmp_path):
    run = earlier_run(tmp_path / "first", num_trials=30)
    before = importances(load(run))
    study = optuna.load_study(study_name="pets", storage=open_journal(run / "study.journal"))
    for trial in made(tmp_path / "other", warm(earlier_run(tmp_path / "more", num_trials=40))).warm_start.trials(
        SPACE, Strategy()
    ):
        study.add_trial(trial)
    assert before and importances(load(run)) == before


# --- Where the errors say nothing here --------------------------------------------------------------------------------


def test_of_other_images_the_best_configs_are_tried_after_trial_0(tmp_path, journal):
    run = earlier_run(tmp_path / "first", images=OTHER_IMAGES)
    searcher = made(journal, warm(run))
    proposed = [run_trial(searcher, str(number)) for number in range(5)]
    assert proposed[:4] == [DEFAULT, *best_configs(run)[:NUM_CONFIGS]]
    assert all(WARM_START not in trial.user_attrs for trial in in_study(journal))
    assert proposed[4] not in proposed[:4]


def test_configs_of_several_runs_are_tried_once_each(tmp_path):
    runs = [earlier_run(tmp_path / name, images=OTHER_IMAGES) for name in ("first", "again")]
    assert warm(*runs).configs(SPACE) == best_configs(runs[0])[:NUM_CONFIGS]
    assert len(warm(runs[0], runs[0]).runs) == 1


def test_settings_that_differ_make_other_errors(tmp_path):
    run, space = earlier_run(tmp_path / "first"), SPACE.with_settings(["image_size=160"])
    found = warm(run, space=space)
    assert found.trials(space, Strategy()) == [] and len(found.configs(space)) == NUM_CONFIGS
    assert found.line(space).endswith("3 configs of " + str(RunFolder(run)) + " (same images, but other settings)")


def test_numbers_are_clipped_to_this_space_and_other_choices_left_out(tmp_path):
    run = earlier_run(tmp_path / "first", images=OTHER_IMAGES)
    space = SPACE.with_settings(["epochs=4..8", "arch=resnet34,resnet50"])
    assert [(config["arch"], config["epochs"]) for config in warm(run).configs(space)] == [("resnet34", 4)] * 3
    elsewhere = SPACE.with_settings(["arch=resnet50,resnet101"])
    assert warm(run).configs(elsewhere) == []
    assert warm(run).line(elsewhere).startswith(f"warm start: nothing of {RunFolder(run)} (other images")


@pytest.mark.parametrize(
    ("of_run", "of_search", "why"),
    [
        ({"images": OTHER_IMAGES}, {}, "other images"),
        ({"images": None}, {}, "other images"),
        ({"split_seed": 5}, {}, "same images, but another split"),
        ({}, {"metric": "macro_f1"}, "same images, but it minimised error, not 1 - macro F1"),
        ({}, {"objective": "error,seconds"}, "same images, but it has 1 objective, not 2"),
        ({}, {"searcher": "random"}, "same images, but --searcher random does not learn from them"),
        ({"files": FilesRecord(weights={"resnet18": "c"})}, {}, "same images, but other weights"),
    ],
)
def test_a_run_whose_errors_mean_something_else_gives_configs_and_says_why(tmp_path, of_run, of_search, why):
    found = warm(run := earlier_run(tmp_path / "first", **of_run), **of_search)
    assert found.line(SPACE) == f"warm start: 3 configs of {RunFolder(run)} ({why})"


def test_what_was_taken_is_said(tmp_path, monkeypatch):
    earlier_run(tmp_path / "results" / "a")
    earlier_run(tmp_path / "results" / "b", images=OTHER_IMAGES)
    monkeypatch.chdir(tmp_path)
    assert warm(Path("results/a"), Path("results/b")).line(SPACE) == (
        "warm start: 9 trials of results/a (same images), 3 configs of results/b (other images)"
    )


# --- Refused ----------------------------------------------------------------------------------------------------------


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    (tmp_path / "photos").mkdir()
    for name, problem in (("photos", "is no run: it has no command.json"), ("none", "does not exist")):
        with pytest.raises(ValueError, match=f"--warm-start: .*{name} {problem}. Expected the folder of a run"):
            warm(tmp_path / name)


def test_a_run_without_a_trial_that_ended_is_refused(tmp_path):
    run = earlier_run(tmp_path / "first")
    (run / "study.journal").unlink()
    with pytest.raises(ValueError, match=r"--warm-start: no trial of .*first has completed or was stopped early"):
        warm(run)


def test_named_recipes_leave_nothing_to_learn():
    with pytest.raises(ValueError, match="--warm-start cannot be combined with --recipes"):
        SearchOptions(space="pets", recipes="book", warm_start=(Path("a"),))


# --- Resuming ---------------------------------------------------------------------------------------------------------


def test_a_resumed_search_has_what_it_was_begun_with(tmp_path):
    run = earlier_run(tmp_path / "first")
    found, folder = warm(run), RunFolder(tmp_path)
    assert WarmStart.load(folder) is None
    found.save(folder)
    (run / "command.json").unlink()  # it is not read again
    assert WarmStart.load(folder) == found
    folder.warm_start.write_text(json.dumps({"runs": [{}]}))
    with pytest.raises(ValueError, match=r"warm_start\.json is damaged"):
        WarmStart.load(folder)


def test_trials_are_added_once_however_often_a_search_is_killed(tmp_path, journal):
    found = warm(earlier_run(tmp_path / "first"))
    study = made(journal, found).study
    for trial in found.trials(SPACE, Strategy())[:4]:  # and then it was killed
        study.add_trial(trial)
    searcher = made(journal, found)
    searcher.suggest("a")
    assert len(in_study(journal)) == 9 + 1
    searcher.save(str(tmp_path / "state"))
    later = made(journal, found)
    later.restore(str(tmp_path / "state"))
    run_trial(later, "b")
    assert len(in_study(journal)) == 9 + 2


def test_a_run_that_learned_from_another_gives_its_own_trials_alone(tmp_path):
    first, second = earlier_run(tmp_path / "first"), earlier_run(tmp_path / "second")
    study = optuna.load_study(study_name="pets", storage=open_journal(second / "study.journal"))
    study.add_trials(warm(first).trials(SPACE, Strategy()))
    assert len(warm(second).trials(SPACE, Strategy())) == 9


def test_the_option_takes_several_runs_and_stays_with_a_run(tmp_path):
    words = ["--space", "pets", "--warm-start", "a", "b", "--warm-start", "c", "--results", str(tmp_path)]
    options = parse_arguments([*words, "--name", "mine"])
    assert [path.name for path in options.warm_start] == ["a", "b", "c"]
    assert options.warm_start[0].is_absolute()
    (tmp_path / "mine").mkdir()
    CommandRecord(arguments=options, asked=options).save(tmp_path / "mine")
    resume = ["--resume", "--name", "mine", "--results", str(tmp_path)]
    folder = RunFolder(tmp_path / "mine")
    assert saved_options(folder, parse_arguments(resume)).warm_start == options.warm_start
    with pytest.raises(ValueError, match=r"--warm-start is .*/a .*/b .*/c there and .*/d here"):
        saved_options(folder, parse_arguments([*resume, "--warm-start", "d"]))


# --- From the command -------------------------------------------------------------------------------------------------


def test_a_search_finds_out_by_itself_whether_the_images_are_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_SEARCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("search.run.presize_here", lambda *args, **kwargs: None)
    settings = ("pretrained=false", "arch=resnet18,resnet34", "presize=64", "image_size=48", "head_init=zeros")
    options = SearchOptions(space="quickstart", data=draw_images(tmp_path / "images", each=3), set=settings)
    folder = RunFolder(tmp_path / "run")
    known = prepare(options, folder)
    run = earlier_run(tmp_path / "first", images=known.known)
    again = replace(options, warm_start=(run,))
    assert [each.differs for each in prepare(again, folder).warm_start.runs] == [""]
    (tmp_path / "images" / "wren" / "0.jpg").unlink()
    assert [each.differs for each in prepare(again, folder).warm_start.runs] == ["other images"]
