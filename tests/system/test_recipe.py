"""A recipe refuses what cannot be trained, and says all that is wrong with it at once."""

import dataclasses
import math

import pytest

from trainables.recipe import Recipe, checked_value, parse_value, spec_of

FIELDS = dataclasses.fields(Recipe)


def test_the_defaults_are_a_valid_recipe_that_survives_being_saved():
    recipe = Recipe()
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert recipe.lr_min == pytest.approx(recipe.lr_max / recipe.lr_ratio)
    assert recipe.total_epochs == recipe.freeze_epochs + recipe.epochs


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_every_setting_says_what_it_is_and_which_values_it_takes(field):
    assert len(field.metadata["doc"]) > 10
    if field.type in (int, float):
        assert field.metadata["low"] <= field.default <= field.metadata["high"]
    assert checked_value(field.name, field.default) == field.default


def test_an_unknown_name_is_refused_and_the_known_ones_are_listed():
    with pytest.raises(ValueError, match=r"unknown setting 'learning_rate'.*lr_max"):
        Recipe.from_dict({"learning_rate": 1e-3})
    with pytest.raises(ValueError, match="unknown setting 'epoch'"):
        spec_of("epoch")
    with pytest.raises(ValueError, match="unknown setting 'epoch'"):
        parse_value("epoch", "3")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("epochs", "3", "a whole number"),
        ("epochs", 2.5, "a whole number"),
        ("epochs", True, "a whole number"),
        ("epochs", None, "a whole number"),
        ("epochs", math.nan, "a whole number"),
        ("epochs", math.inf, "a whole number"),
        ("lr_max", "0.1", "a number"),
        ("lr_max", False, "a number"),
        ("flip", 1, "true or false"),
        ("arch", 18, "text"),
    ],
)
def test_a_value_of_another_type_is_refused_by_name(name, value, expected):
    with pytest.raises(ValueError) as error:
        Recipe(**{name: value})
    assert f"{name}={value!r} is not {expected}" in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr_max", math.nan),
        ("lr_max", math.inf),
        ("lr_max", 0.0),
        ("lr_max", -1e-3),
        ("smoothing", 0.95),
        ("batch_size", 1),
        ("epochs", -1),
        ("max_warp", 0.4),
        ("seed", 2**31),
    ],
)
def test_a_value_out_of_range_is_refused_with_the_range(name, value):
    low, high = spec_of(name).metadata["low"], spec_of(name).metadata["high"]
    with pytest.raises(ValueError) as error:
        Recipe(**{name: value})
    assert f"{name}={value!r} is out of range, expected {low:g} to {high:g}" in str(error.value)


@pytest.mark.parametrize("field", [field for field in FIELDS if field.type in (int, float)], ids=lambda f: f.name)
def test_the_ends_of_a_range_belong_to_it(field):
    for end in ("low", "high"):
        assert checked_value(field.name, field.metadata[end]) == field.metadata[end]


def test_a_choice_that_does_not_exist_is_refused_with_the_choices():
    with pytest.raises(ValueError, match=r"head='conv' is not one of linear, mlp"):
        Recipe(head="conv")


def test_all_problems_are_reported_together():
    with pytest.raises(ValueError) as error:
        Recipe(epochs=-1, lr_max=math.nan, head="conv", flip="no")
    for name in ("epochs=-1", "lr_max=nan", "head='conv'", "flip='no'"):
        assert name in str(error.value)


def test_unknown_names_and_bad_values_are_reported_together():
    with pytest.raises(ValueError) as error:
        Recipe.from_dict({"learning_rate": 1e-3, "epoch": 3, "smoothing": 2})
    for name in ("'learning_rate'", "'epoch'", "smoothing=2"):
        assert name in str(error.value)


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match="epochs and freeze_epochs are both 0"):
        Recipe(epochs=0, freeze_epochs=0)
    with pytest.raises(ValueError, match="image_size=224 is larger than presize=128; raise presize"):
        Recipe(presize=128)


def test_whole_floats_are_whole_numbers_and_whole_numbers_are_floats():
    recipe = Recipe(epochs=3.0, lr_max=1)
    assert (recipe.epochs, type(recipe.epochs)) == (3, int)
    assert (recipe.lr_max, type(recipe.lr_max)) == (1.0, float)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("epochs", "3", 3),
        ("epochs", "1e1", 10),
        ("lr_max", "1e-3", 1e-3),
        ("lr_max", "1", 1.0),
        ("flip", "false", False),
        ("flip", "Yes", True),
        ("arch", "resnet18.tv_in1k", "resnet18.tv_in1k"),
        ("head", "mlp", "mlp"),
        ("seed", "2147483647", 2**31 - 1),
    ],
)
def test_text_from_a_command_line_becomes_a_value_of_the_right_type(name, text, value):
    parsed = parse_value(name, text)
    assert (parsed, type(parsed)) == (value, type(value))


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("epochs", "three", "epochs='three' is not a whole number"),
        ("epochs", "2.5", "epochs=2.5 is not a whole number"),
        ("epochs", "inf", "epochs=inf is not a whole number"),
        ("epochs", "5000", "out of range"),
        ("lr_max", "", "lr_max='' is not a number"),
        ("lr_max", "nan", "out of range"),
        ("flip", "maybe", "flip='maybe' is not true or false"),
        ("head", "conv", "not one of linear, mlp"),
    ],
)
def test_text_that_means_no_value_is_refused(name, text, problem):
    with pytest.raises(ValueError, match=problem):
        parse_value(name, text)


def test_a_recipe_cannot_be_changed_in_flight():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().epochs = 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start_size": 8}, "start_size=8 is out of range"),
        ({"start_size": 256, "image_size": 224}, "expected 0 .off. or 16 to image_size=224"),
        ({"start_size": 128, "start_batch_size": 1}, "start_batch_size=1 is too small"),
    ],
)
def test_a_start_of_progressive_resizing_that_cannot_be_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**settings)


def test_smaller_images_come_in_larger_batches_unless_told_otherwise():
    recipe = Recipe(start_size=112, image_size=224, batch_size=32, start_share=0.5, freeze_epochs=0, epochs=3)
    assert [recipe.batch_size_at(epoch) for epoch in range(3)] == [64, 32, 32]
    assert [recipe.image_size_at(epoch) for epoch in range(3)] == [112, 224, 224]
