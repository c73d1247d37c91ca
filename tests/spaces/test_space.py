"""Spaces and `--set`: what is searched, what is pinned, what is tried first, and what a mistake is answered."""

import itertools
from dataclasses import replace

import pytest

from search.spaces.space import Choice, Range, Space, ends, load_space, space_names
from trainables.recipe import Recipe, spec_of

SPACE = Space(
    name="small",
    doc="for tests",
    dataset="quickstart",
    settings={"arch": "resnet18", "epochs": 5, "lr_max": 1e-3, "presize": 160, "image_size": 128},
    dimensions={
        "arch": Choice(("resnet18", "resnet34")),
        "epochs": Range(2, 8),
        "lr_max": Range(1e-4, 1e-2, log=True),
    },
    first=({"arch": "resnet34", "epochs": 8}, {"lr_max": 5e-3}),
)


@pytest.mark.parametrize("name", space_names())
def test_every_corner_of_a_shipped_space_is_a_valid_recipe(name):
    space = load_space(name)
    for corner in itertools.product(*map(ends, space.dimensions.values())):
        Recipe.from_dict(space.settings | dict(zip(space.dimensions, corner, strict=True)))


@pytest.mark.parametrize("name", space_names())
def test_the_first_recipe_of_a_shipped_space_is_its_default_and_lies_inside(name):
    space = load_space(name)
    defaults = Recipe.from_dict(space.settings).to_dict()
    assert space.first_configs()[0] == {key: defaults[key] for key in space.dimensions}
    for config in space.first_configs():
        assert Recipe.from_dict(space.settings | config)
        for key, value in config.items():
            assert space.dimensions[key].clip(value) == value


def test_the_spaces_of_the_readme_are_there():
    assert {"quickstart", "pets", "imagenette", "images"} <= set(space_names())


def test_an_unknown_space_is_answered_with_those_that_there_are():
    with pytest.raises(ValueError, match=r"--space cats: .* images, pets, quickstart") as error:
        load_space("cats")
    assert "\n" not in str(error.value)


def test_a_pinned_dimension_is_searched_no_more():
    space = SPACE.with_settings(["epochs=3"])
    assert "epochs" not in space.dimensions
    assert space.settings["epochs"] == 3
    assert "epochs" not in space.first_configs()[0]


def test_what_a_pinned_setting_leaves_without_effect_is_not_searched():
    space = load_space("pets")
    assert "hidden" in space.dimensions and "hidden" in space.with_settings(["head=mlp"]).dimensions
    assert "hidden" not in space.with_settings(["head=linear"]).dimensions
    with pytest.raises(ValueError, match="--set hidden: has no effect with head=linear"):
        space.with_settings(["head=linear", "hidden=256,512"])


def test_a_pinned_setting_keeps_the_dimensions():
    space = SPACE.with_settings(["batch_size=8", "pretrained=false", "smoothing=0.1"])
    assert space.dimensions == SPACE.dimensions
    assert [space.settings[name] for name in ("batch_size", "pretrained", "smoothing")] == [8, False, 0.1]


def test_a_narrowed_dimension_keeps_its_scale():
    space = SPACE.with_settings(["lr_max=3e-4..3e-3", "epochs=3..4"])
    assert space.dimensions["lr_max"] == Range(3e-4, 3e-3, log=True)
    assert space.dimensions["epochs"] == Range(3, 4)
    assert isinstance(space.dimensions["epochs"].low, int)


def test_a_setting_becomes_a_dimension_on_the_scale_that_suits_it():
    space = SPACE.with_settings(["lr_ratio=3..300", "mixup_alpha=0..0.4", "image_size=64,96"])
    assert space.dimensions["lr_ratio"] == Range(3, 300, log=True)
    assert space.dimensions["mixup_alpha"] == Range(0, 0.4)
    assert space.dimensions["image_size"] == Choice((64, 96))


def test_choices_take_the_type_of_their_setting():
    assert SPACE.with_settings(["epochs=3,5"]).dimensions["epochs"] == Choice((3, 5))
    assert SPACE.with_settings(["flip=true,no"]).dimensions["flip"] == Choice((True, False))
    assert SPACE.with_settings(["arch=resnet50.tv_in1k,vit"]).dimensions["arch"] == Choice(("resnet50.tv_in1k", "vit"))


def test_the_same_value_twice_is_one_value():
    assert SPACE.with_settings(["epochs=3,5,3"]).dimensions["epochs"] == Choice((3, 5))
    assert SPACE.with_settings(["epochs=3,3"]).settings["epochs"] == 3


def test_blanks_around_names_and_values_do_not_count():
    space = SPACE.with_settings(["arch=resnet18, resnet34 ", " epochs = 3 .. 6", "flip=true, no", "lr_max= 1e-3"])
    assert space.dimensions["arch"] == Choice(("resnet18", "resnet34"))
    assert space.dimensions["epochs"] == Range(3, 6)
    assert space.dimensions["flip"] == Choice((True, False))
    assert space.settings["lr_max"] == 1e-3
    assert SPACE.with_settings(["mixup_alpha=0, 0.1 .. 0.4"]).dimensions["mixup_alpha"] == Range(0.1, 0.4, off=True)


def test_the_last_word_on_a_setting_counts():
    space = SPACE.with_settings(["epochs=3", "epochs=4..6"])
    assert space.dimensions["epochs"] == Range(4, 6)
    assert "epochs" not in SPACE.with_settings(["epochs=4..6", "epochs=3"]).dimensions


def test_the_space_itself_stays_as_it_is():
    before = repr(SPACE)
    SPACE.with_settings(["epochs=3", "lr_max=1e-3..2e-3"])
    assert repr(SPACE) == before


def test_settings_that_depend_on_each_other_may_come_in_any_order():
    """128 px images do not fit 64 px ones, but by the time all is said they need not."""
    for texts in (["presize=64", "image_size=48"], ["image_size=48", "presize=64"]):
        assert SPACE.with_settings(texts).settings["presize"] == 64
    assert SPACE.with_settings(["presize=64", "image_size=32,48"]).first_configs()[0]["image_size"] == 32
    assert SPACE.with_settings(["epochs=0", "freeze_epochs=2"]).settings["epochs"] == 0


@pytest.mark.parametrize(
    ("texts", "problem"),
    [
        (["image_size=96,256"], "image_size=256 is larger than presize=160"),
        (["presize=100"], "image_size=128 is larger than presize=100"),
        (["epochs=0..3", "freeze_epochs=0..1"], "epochs and freeze_epochs are both 0"),
    ],
)
def test_values_that_cannot_meet_in_one_recipe_are_refused_before_the_search(texts, problem):
    with pytest.raises(ValueError, match=problem):
        SPACE.with_settings(texts)


def test_what_is_tried_first_moves_into_narrowed_dimensions():
    space = SPACE.with_settings(["epochs=6..7", "lr_max=2e-3..4e-3", "arch=resnet50,resnet34"])
    assert space.first_configs() == [
        {"arch": "resnet50", "epochs": 6, "lr_max": 2e-3},
        {"arch": "resnet34", "epochs": 7, "lr_max": 2e-3},
        {"arch": "resnet50", "epochs": 6, "lr_max": 4e-3},
    ]


def test_nothing_is_tried_first_twice():
    assert SPACE.with_settings(["arch=resnet34", "epochs=8", "lr_max=1e-3..2e-3"]).first_configs() == [
        {"lr_max": 1e-3},
        {"lr_max": 2e-3},
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("epochs", "--set epochs: expected NAME=VALUE, NAME=LOW..HIGH, NAME=0,LOW..HIGH or NAME=A,B"),
        ("mixup_alpha=0,0..0.4", "--set mixup_alpha=0,0..0.4: the numbers after 0, which is off, must be above it"),
        ("lr_max=0,1e-3..1e-2", "lr_max=0.0 is out of range"),
        ("epochs=", "--set epochs=: expected NAME=VALUE"),
        ("arch=resnet18,", "--set arch=resnet18,: expected NAME=VALUE"),
        ("epoch=3", "unknown setting 'epoch', expected one of: arch, pretrained"),
        ("epochs=many", "epochs='many' is not a whole number"),
        ("epochs=2.5", "epochs=2.5 is not a whole number"),
        ("epochs=3..x", "epochs='x' is not a whole number"),
        ("epochs=5..3", "--set epochs=5..3: the first number must be the smaller one"),
        ("epochs=3..3", "the first number must be the smaller one; epochs=3 is a single value"),
        ("lr_max=1e-4...1e-2", "--set lr_max=1e-4...1e-2: expected two dots between two numbers"),
        ("lr_max=1e-3 ... 1e-2", "expected two dots between two numbers"),
        ("smoothing=0...1", "Write a number below 1 with its 0: 0.5, not .5"),
        ("epochs=3..5..7", "--set epochs=3..5..7: expected NAME=VALUE, NAME=LOW..HIGH"),
        ("epochs=3..", "--set epochs=3..: expected NAME=VALUE, NAME=LOW..HIGH"),
        ("epochs= .. 5", "--set epochs= .. 5: expected NAME=VALUE, NAME=LOW..HIGH"),
        ("epochs=3..5,8", "--set epochs=3..5,8: expected NAME=VALUE, NAME=LOW..HIGH"),
        ("mixup_alpha=0.05,0.1..0.4", "only 0, which is off, can be combined with a range"),
        ("arch=resnet18, ,resnet34", "--set arch=resnet18, ,resnet34: expected NAME=VALUE"),
        ("epochs=inf", "epochs=inf is not a whole number"),
        ("lr_max=1e-3..inf", "lr_max=inf is out of range"),
        ("weight_decay=nan..1", "weight_decay=nan is out of range"),
        ("presize=140..200", "each size that a trial has makes a lasting cache"),
        ("presize=140..200", "Give the few sizes to try, such as presize=140,170,200"),
        ("lr_max=nan", "lr_max=nan is out of range, expected 1e-07 to 10"),
        ("lr_max=1e-3..1e6", "lr_max=1000000.0 is out of range"),
        ("flip=perhaps", "flip='perhaps' is not true or false"),
        ("head=conv", "head='conv' is not one of linear, mlp"),
        ("seed=-1", "seed=-1 is out of range"),
    ],
)
def test_a_bad_set_is_answered_with_what_was_expected(text, problem):
    with pytest.raises(ValueError) as error:
        SPACE.with_settings([text])
    assert problem in str(error.value)
    assert "\n" not in str(error.value)


def test_all_bad_sets_are_answered_together():
    with pytest.raises(ValueError) as error:
        SPACE.with_settings(["epochs=many", "batch_size=16", "head=conv", "lr_max=99"])
    for problem in ("epochs='many'", "head='conv'", "lr_max=99"):
        assert problem in str(error.value)
    assert "batch_size" not in str(error.value)


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: Range(5, 5), "a range from 5 to 5: the first number must be the smaller one"),
        (lambda: Range(5, 3), "the first number must be the smaller one"),
        (lambda: Range(float("nan"), 3), "a range from nan to 3"),
        (lambda: Range(0, float("inf")), "a range from 0 to inf"),
        (lambda: Range("1", "2"), "a range from '1' to '2': expected two numbers"),
        (lambda: Range(0, 1, log=True), "a logarithmic range from 0 to 1: both numbers must be above 0"),
        (lambda: Range(0, 1, off=True), "a range with 0, which is off, from 0 to 1: both numbers must be above 0"),
        (lambda: Choice(()), "a choice of (): expected a tuple of values"),
        (lambda: Choice("resnet18"), "a choice of 'resnet18': expected a tuple of values"),
        (lambda: Choice((3, 5, 3)), "a choice of 3, 5, 3: expected each value once"),
    ],
)
def test_a_dimension_that_nothing_could_be_drawn_from_cannot_be_made(make, problem):
    with pytest.raises(ValueError) as error:
        make()
    assert problem in str(error.value)


def test_a_space_that_searches_a_range_of_presize_cannot_be_made():
    sizes = {"presize": 160, "image_size": 64}
    with pytest.raises(ValueError, match=r"presize=100..200: each size .* such as presize=100,150,200"):
        Space(name="x", doc="", dataset="pets", settings=sizes, dimensions={"presize": Range(100, 200)})
    Space(name="x", doc="", dataset="pets", settings=sizes, dimensions={"presize": Choice((100, 150, 200))})


def test_a_space_with_impossible_values_cannot_be_made():
    with pytest.raises(ValueError, match=r"smoothing=2"):
        Space(name="x", doc="", dataset="pets", settings={}, dimensions={"smoothing": Range(0, 2)})
    with pytest.raises(ValueError, match="unknown setting"):
        Space(name="x", doc="", dataset="pets", settings={"learning_rate": 1}, dimensions={})


def test_every_setting_explains_itself():
    for name in Recipe().to_dict():
        assert spec_of(name).metadata["doc"]


# --- Recipes by name --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in space_names() if load_space(name).recipes])
def test_the_books_recipes_become_the_trials_of_the_space(name):
    space = load_space(name).of_recipes("book")
    found = [Recipe.from_dict(space.settings | config) for config in space.first_configs()]
    assert found == [Recipe.from_dict(recipe.settings) for recipe in space.recipes["book"]]
    assert space.num_trials == len(found)


def test_the_books_recipes_for_pets_are_its_runs():
    space = load_space("pets").of_recipes("book")
    recipes = {recipe.name: Recipe.from_dict(recipe.settings) for recipe in space.recipes["book"]}
    finder = recipes["rate of the finder, 3e-3"]
    assert (finder.lr_max_frozen, finder.lr_max, finder.lr_min) == (3e-3, 1.5e-3, pytest.approx(1.5e-5))
    low = recipes["3 frozen + 6 at 1e-5"]
    assert (low.freeze_epochs, low.epochs, low.lr_max, low.lr_min) == (3, 6, 1e-5, 1e-5)
    discriminative = recipes["3 + 12, 1e-6 to 1e-4"]
    assert (discriminative.epochs, discriminative.lr_max, discriminative.lr_min) == (12, 1e-4, pytest.approx(1e-6))
    assert discriminative.pct_start == discriminative.pct_start_frozen == 0.25  # of `fit_one_cycle`
    assert recipes["ResNet-50, mixed precision, 3 + 6"].arch == "resnet50.tv_in1k"
    assert {recipe.layer_groups for recipe in recipes.values()} == {"fastai"}


def test_what_is_pinned_holds_in_all_recipes():
    space = load_space("pets").of_recipes("book", ["arch=resnet18", "image_size=96", "epochs=1"])
    recipes = [recipe.settings for recipe in space.recipes["book"]]
    assert {(r["arch"], r["image_size"], r["epochs"]) for r in recipes} == {("resnet18", 96, 1)}
    assert not {"arch", "image_size", "epochs"} & set(space.dimensions)


def test_recipes_that_pins_make_equal_are_run_once():
    pinned = ["arch=tf_efficientnet_lite0", "epochs=1", "lr_max=1e-4", "lr_ratio=1"]
    space = load_space("quickstart").of_recipes("book", pinned)
    configs = space.first_configs()
    assert space.num_trials == len(configs) == len({tuple(config.items()) for config in configs}) < 7


@pytest.mark.parametrize(
    ("name", "texts", "message"),
    [
        ("boook", [], r"no such recipes. It has: book"),
        ("book", ["epochs=1..3"], r"--set epochs=... gives several values"),
        ("book", ["arch=resnet18,resnet34"], r"--set arch=... gives several values"),
    ],
)
def test_recipes_that_cannot_be_run_are_refused(name, texts, message):
    with pytest.raises(ValueError, match=message):
        load_space("pets").of_recipes(name, texts)


def test_the_first_trial_of_imagenette_is_chapter_7s_combination():
    recipe = Recipe.from_dict(load_space("imagenette").settings)
    assert not recipe.pretrained
    assert recipe.mixup_alpha > 0
    assert recipe.smoothing > 0
    assert [recipe.image_size_at(epoch) for epoch in range(recipe.epochs)] == [128] * 4 + [224] * 6
    assert [recipe.batch_size_at(epoch) for epoch in (0, 9)] == [128, 64]


def test_what_the_user_pinned_is_remembered_until_it_is_searched():
    space = SPACE.with_settings(["batch_size=8", "epochs=3"])
    assert space.pinned == ("batch_size", "epochs")
    assert space.with_settings(["epochs=2..4"]).pinned == ("batch_size",)


def test_coordinates_go_from_low_to_high_as_a_dimension_is_searched():
    assert Range(1, 5).coordinate(2) == 0.25
    assert Range(1e-4, 1e-2, log=True).coordinate(1e-3) == pytest.approx(0.5)
    assert [Choice((96, 112, 128)).coordinate(size) for size in (96, 112, 128)] == [0, 0.5, 1]
    assert Choice((96,)).coordinate(96) == 0


@pytest.mark.parametrize("log", [False, True])
def test_what_is_off_is_where_the_lowest_is(log):
    dimension = Range(0.1, 0.4, log, off=True)
    assert dimension.coordinate(0) == dimension.coordinate(0.1) == 0 and dimension.coordinate(0.4) == 1


def test_a_config_has_no_coordinate_where_it_has_no_value():
    space = replace(SPACE, dimensions={"epochs": Range(1, 3), "lr_max": Range(1e-4, 1e-2)})
    assert space.coordinates({"epochs": 3, "seed": 1}) == [1, None]
