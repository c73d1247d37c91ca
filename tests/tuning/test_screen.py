"""The screen: what is probed in which order, what is left to fine-tune, and how it ends."""

import math
import pickle
from dataclasses import replace

import pytest

from search.spaces.space import Choice, Range, Space
from search.tuning.screen import Screen, new_screen
from trainables.ray.trial import SCREENS

SPACE = Space(
    name="small",
    doc="for tests",
    dataset="quickstart",
    settings={"arch": "a", "head_init": "probe", "freeze_epochs": 0, "epochs": 3, "image_size": 96},
    dimensions={"arch": Choice(("a", "b", "c", "d")), "image_size": Choice((128, 96)), "lr_max": Range(1e-4, 1e-2)},
)


@pytest.fixture
def weights(tmp_path):
    """Files of weights, the dearest architecture first in the space."""
    for arch, size in {"a": 400, "b": 300, "c": 200, "d": 100}.items():
        (tmp_path / f"{arch}.safetensors").write_bytes(bytes(size))
    return tmp_path


def probed(screen: Screen, errors: dict[tuple[str, int], float | None]) -> None:
    """Run all probes that are left."""
    while (place := screen.next_place) is not None:
        config = screen.config(place)
        trial_id = f"t{len(screen.begun)}"
        screen.begin(trial_id, place)
        error = errors.get((config["arch"], config["image_size"]), 0.9)
        screen.end(trial_id, {"failure": "no weights"} if error is None else outcome(error))


def error_of_the_probe(pair, probe) -> float:
    return probe.expected_objective


def outcome(error: float, seconds: float = 10.0) -> dict:
    metrics = {"error_rate": error, "objective": error, "valid_loss": 2 * error, "train_images": 80, "valid_images": 20}
    return {"epoch": 0, "epochs_total": 0, "failure": "", "seconds": seconds, "feature_seconds": seconds, **metrics}


def test_every_architecture_is_probed_at_its_smallest_size_and_then_the_best_ones_at_the_others(weights):
    screen, order = new_screen(SPACE, None, weights), []
    errors = {"a": 0.2, "b": 0.1, "c": None, "d": 0.3}
    while (place := screen.next_place) is not None:
        config = screen.config(place)
        order.append((config["arch"], config["image_size"], config[SCREENS]))
        assert (config["epochs"], config["freeze_epochs"]) == (0, 0)
        screen.begin(f"t{len(order)}", place)
        error = errors[config["arch"]]
        screen.end(f"t{len(order)}", {"failure": "no weights"} if error is None else outcome(error))
    # By cost, 100 * 96 ** 2 < 100 * 128 ** 2 < 200 * 96 ** 2 < ...
    assert order[:4] == [("d", 96, -8), ("c", 96, -6), ("b", 96, -5), ("a", 96, -3)]
    assert order[4:] == [("b", 128, -2), ("a", 128, -1), ("d", 128, -7), ("c", 128, -4)]


def test_probes_begin_before_others_have_ended(weights):
    screen = new_screen(SPACE, None, weights)
    while (place := screen.next_place) is not None:
        screen.begin(f"t{place}", place)
    assert len(screen.begun) == 8 and not screen.is_over


def test_without_known_weights_the_spaces_own_order_says_what_is_cheap():
    screen = new_screen(SPACE, None, None)
    assert screen.pairs[0] == {"arch": "a", "image_size": 96}


def test_a_range_of_sizes_is_probed_at_its_ends_and_in_the_middle(weights):
    space = replace(SPACE, dimensions=SPACE.dimensions | {"image_size": Range(96, 224)})
    screen = new_screen(space, None, weights)
    assert {config["image_size"] for config in screen.pairs} == {96, 160, 224}


def test_a_space_that_searches_neither_is_probed_once(weights):
    space = replace(SPACE, dimensions={"lr_max": Range(1e-4, 1e-2)})
    assert new_screen(space, None, weights).pairs == [{"arch": "a", "image_size": 96}]


@pytest.mark.parametrize("settings", [{"head_init": "zeros"}, {"pretrained": False}])
def test_there_is_no_screen_where_no_trial_starts_from_a_probe(weights, settings):
    assert new_screen(replace(SPACE, settings=SPACE.settings | settings), None, weights) is None


def test_the_best_third_and_at_least_three_architectures_are_fine_tuned_around_the_best_probe(weights):
    screen = new_screen(SPACE, None, weights)
    probed(screen, {("b", 128): 0.1, ("d", 96): 0.2, ("c", 96): 0.3})
    narrowed = screen.narrowed(SPACE, error_of_the_probe)
    assert screen.is_over
    assert narrowed.dimensions["arch"].values == ("b", "c", "d")
    assert narrowed.dimensions["image_size"] == SPACE.dimensions["image_size"]
    assert narrowed.first_configs()[0] == {"arch": "b", "image_size": 128, "lr_max": 1e-3}


def test_trial_0_is_at_the_pair_that_promises_most_whose_architecture_is_among_the_best_then(weights):
    screen = new_screen(SPACE, 1, weights)
    probed(screen, {("b", 128): 0.1, ("d", 96): 0.2})
    narrowed = screen.narrowed(SPACE, lambda pair, probe: (pair["arch"] != "d", probe.objective))
    assert narrowed.first_configs()[0] == {"arch": "d", "image_size": 96, "lr_max": 1e-3}
    assert narrowed.dimensions["arch"].values == ("b", "d")


def test_a_number_of_architectures_can_be_asked_for(weights):
    screen = new_screen(SPACE, 1, weights)
    probed(screen, {("b", 128): 0.1})
    assert screen.narrowed(SPACE, error_of_the_probe).dimensions["arch"].values == ("b",)


def test_an_architecture_whose_probes_failed_is_left_out_and_none_where_all_did(weights):
    screen = new_screen(SPACE, None, weights)
    probed(screen, {(arch, size): None for arch in "ab" for size in (96, 128)})
    assert screen.narrowed(SPACE, error_of_the_probe).dimensions["arch"].values == ("c", "d")
    screen = new_screen(SPACE, None, weights)
    probed(screen, {(arch, size): None for arch in "abcd" for size in (96, 128)})
    assert screen.narrowed(SPACE, error_of_the_probe) == SPACE


def test_equal_probes_are_told_apart_by_their_loss(weights):
    screen = new_screen(SPACE, 1, weights)
    probed(screen, dict.fromkeys(((arch, size) for arch in "abcd" for size in (96, 128)), 0.5))
    for place, probe in screen.ended.items():
        screen.ended[place] = replace(probe, valid_loss=0.1 if place == 5 else 0.2)
    assert screen.probes[0][0] == screen.pairs[5]


def test_the_seconds_of_the_next_probe_follow_from_the_dearest_that_has_ended(weights):
    screen = new_screen(SPACE, None, weights)
    assert screen.expected_seconds(0) == 0  # nothing is known before the first
    screen.begin("t0", 0)
    screen.end("t0", outcome(0.5, seconds=10.0))
    assert screen.expected_seconds(1) == pytest.approx(10 / 100 * (128 / 96) ** 2)


def test_a_probe_that_the_searchs_end_has_cut_off_is_repeated_under_its_number(weights):
    screen = new_screen(SPACE, None, weights)
    for place, trial_id in enumerate(("t0", "t1")):
        screen.begin(trial_id, place)
    screen.end("t1", outcome(0.5))
    screen.forget_running(begun_again=True)
    screen = pickle.loads(pickle.dumps(screen))
    assert screen.next_place == 0
    screen.begin("t2", 0)
    assert screen.next_place == 2
    assert math.isclose(screen.probes[0][1].objective, 0.5)


def test_the_best_pair_is_probed_once_more_with_augmented_views_when_all_others_have_ended(weights):
    space = replace(SPACE, settings=SPACE.settings | {"probe_views": 2})
    screen = new_screen(space, None, weights)
    while (place := screen.next_place) is not None:
        assert screen.config(place)[SCREENS] == place - 9
        assert screen.config(place)["probe_views"] == 0
        screen.begin(f"t{place}", place)
    assert screen.next_place is None
    assert not screen.is_over
    for place in range(8):
        screen.end(f"t{place}", outcome(0.2 if place == 3 else 0.5))
    last = screen.config(screen.next_place)
    assert last == screen.pairs[3] | {"epochs": 0, "freeze_epochs": 0, "probe_views": 2, SCREENS: -1}
    assert screen.expected_seconds(8) == pytest.approx(2 * 0.1)
    screen.begin("t8", 8)
    screen.end("t8", outcome(0.1))
    assert screen.is_over
    assert screen.probes[0] == (screen.pairs[3], screen.ended[8])
    assert screen.narrowed(space, error_of_the_probe).full_settings["probe_views"] == 2


def test_what_a_time_budget_skips_is_left_out_and_a_longer_one_begins_it_again(weights):
    screen = new_screen(replace(SPACE, settings=SPACE.settings | {"probe_views": 2}), None, weights)
    screen.begin("t0", 0)
    screen.skip(1)
    assert screen.next_place is None
    screen.end("t0", outcome(0.5))
    assert screen.next_place == 8
    screen.skip(8)
    assert screen.is_over
    screen.forget_running(begun_again=True)
    assert screen.next_place == 2  # the next architecture
