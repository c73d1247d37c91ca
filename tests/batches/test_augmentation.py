"""Augmentations move pixels where they say, in their ranges, and depend on the seed alone."""

from dataclasses import replace

import numpy as np
import pytest

from trainables.batches import augmentation, warp_cpu
from trainables.batches.augmentation import Augmentations
from trainables.recipe import Recipe

IDENTITY = np.arange(256, dtype=np.uint8)
NOTHING = {"min_scale": 1, "flip": False, "affine_p": 0, "lighting_p": 0}


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def mapped(image: np.ndarray, maps: np.ndarray, size: int) -> np.ndarray:
    """`image` through the first of `maps`, without any other change."""
    return warp_cpu.apply(image, Augmentations(np.float64(0.5), maps[0], IDENTITY, np.float64(1)), size)


def at(maps: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Where the points (n, 2) of the output come from: each map applied to each point, (maps, n, 2)."""
    homogeneous = np.concatenate([points, np.ones((len(points), 1))], axis=1)
    moved = np.einsum("mij,nj->mni", maps, homogeneous)
    return moved[..., :2] / moved[..., 2:]


CORNERS = np.array([[-1, -1], [-1, 1], [1, -1], [1, 1]], float)


# --- One image --------------------------------------------------------------------------------------------------------


def test_validation_sees_the_centre_square_as_it_is():
    centre = augmentation.centre(2)[1]
    image = noise(32, 32)
    np.testing.assert_array_equal(warp_cpu.apply(image, centre, 32), image)
    wide, tall = noise(32, 52), noise(52, 32)
    np.testing.assert_array_equal(warp_cpu.apply(wide, centre, 32), wide[:, 10:42])
    np.testing.assert_array_equal(warp_cpu.apply(tall, centre, 32), tall[10:42])


def test_the_window_slides_along_the_longer_side_from_end_to_end():
    wide, tall = noise(20, 50), noise(50, 20)
    for position, start in ((0.0, 0), (0.5, 15), (1.0, 30)):
        view = replace(augmentation.centre(1), window=np.array([position]))[0]
        np.testing.assert_array_equal(warp_cpu.apply(wide, view, 20), wide[:, start : start + 20])
        np.testing.assert_array_equal(warp_cpu.apply(tall, view, 20), tall[start : start + 20])


def test_a_flip_mirrors_left_and_right_to_the_pixel():
    image = noise(33, 33)
    np.testing.assert_array_equal(mapped(image, augmentation.flips(np.array([True])), 33), image[:, ::-1])
    np.testing.assert_array_equal(mapped(image, augmentation.flips(np.array([False])), 33), image)


def test_positive_degrees_turn_the_picture_clockwise():
    image = noise(33, 33)
    np.testing.assert_array_equal(mapped(image, augmentation.rotations(np.array([90.0])), 33), np.rot90(image, -1))
    np.testing.assert_array_equal(mapped(image, augmentation.rotations(np.array([-90.0])), 33), np.rot90(image))


def test_a_zoom_enlarges_around_its_centre():
    image = noise(65, 65)
    top_left = augmentation.zooms(np.array([2.0]), np.array([[-1.0, -1.0]]))
    np.testing.assert_array_equal(mapped(image, top_left, 33), image[:33, :33])
    bottom_right = augmentation.zooms(np.array([2.0]), np.array([[1.0, 1.0]]))
    np.testing.assert_array_equal(mapped(image, bottom_right, 33), image[32:, 32:])


def test_warped_corners_land_where_the_warp_puts_them():
    x, y = np.array([0.1, 0.0, -0.2]), np.array([0.2, 0.2, 0.1])
    maps = augmentation.warps(x, y)
    for i in range(3):
        moved = np.array(
            [
                [-1 - y[i], -1 - x[i]],
                [-1 + y[i], 1 + x[i]],
                [1 + y[i], -1 + x[i]],
                [1 - y[i], 1 - x[i]],
            ]
        )
        np.testing.assert_allclose(at(maps[i : i + 1], moved)[0], CORNERS, atol=1e-5)


def test_a_warp_narrows_one_side_and_widens_the_other():
    image = np.zeros((101, 101, 3), np.uint8)
    image[:, :5] = 255  # a bar along the left edge
    warped = mapped(image, augmentation.warps(np.array([0.0]), np.array([0.2])), 101)
    assert warped[0].max() == 0  # pushed out at the top
    assert warped[-1, 8:13].min() > 200  # drawn in by 0.2 of the half width, 10 px, at the bottom


def test_beyond_the_edge_the_image_is_reflected():
    image = noise(33, 33)
    twice = np.diag([2.0, 2.0, 1.0])[None]
    np.testing.assert_array_equal(mapped(image, twice, 65)[16:49, 16:49], image)
    np.testing.assert_array_equal(mapped(image, twice, 65)[16:49, :16], image[:, 16:0:-1])
    white = np.full((32, 32, 3), 255, np.uint8)
    assert mapped(white, augmentation.rotations(np.array([45.0])), 32).min() == 255


def test_shrinking_averages_pixels_instead_of_skipping_them():
    board = np.indices((256, 256)).sum(axis=0) % 2 * 255
    image = np.repeat(board.astype(np.uint8)[..., None], 3, axis=2)
    small = warp_cpu.apply(image, augmentation.centre(1)[0], 32)
    assert small.shape == (32, 32, 3)
    assert abs(small.mean() - 127.5) < 2
    assert small.std() < 2


def test_a_crop_shown_pixel_for_pixel_is_not_averaged_however_large_the_image():
    image = noise(129, 129)
    maps = augmentation.zooms(np.array([4.0]), np.array([[-1.0, -1.0]]))
    for crop in (0.25, 1.0):  # a crop, or a zoom that shows as little
        part = Augmentations(np.float64(0.5), maps[0], IDENTITY, np.float64(crop))
        np.testing.assert_array_equal(warp_cpu.apply(image, part, 33), image[:33, :33])


def test_shrinking_a_crop_averages_it_in_its_place():
    ramp = np.linspace(0, 255, 256)
    image = np.repeat(np.add.outer(ramp, ramp)[..., None] / 2, 3, axis=2).astype(np.uint8)
    maps = augmentation.zooms(np.array([2.0]), np.array([[1.0, -1.0]]))
    small = warp_cpu.apply(image, Augmentations(np.float64(0.5), maps[0], IDENTITY, np.float64(0.5)), 16).astype(float)
    expected = np.add.outer(ramp[:128:8] + 3.5, ramp[128::8] + 3.5) / 2
    assert abs(small[..., 0] - expected).max() < 5


def test_shrinking_keeps_the_picture_in_its_place():
    ramp = np.linspace(0, 255, 256)
    image = np.repeat(np.add.outer(ramp, ramp)[..., None] / 2, 3, axis=2).astype(np.uint8)
    small = warp_cpu.apply(image, augmentation.centre(1)[0], 32).astype(float)
    expected = np.add.outer(ramp[::8] + 3.5, ramp[::8] + 3.5) / 2
    assert abs(small[..., 0] - expected).max() < 5


def test_lighting_tables_keep_the_order_of_tones_and_do_nothing_where_nothing_changes():
    brightness, contrast = np.array([0, 0.2, -0.2, 0.9, 0]), np.array([1, 1.25, 0.8, 1, 1 / 0.1])
    tables = augmentation.lighting_tables(brightness, contrast)
    assert tables.dtype == np.uint8
    np.testing.assert_array_equal(tables[0], IDENTITY)
    assert (np.diff(tables.astype(int), axis=1) >= 0).all()
    assert (tables[:, 0] == 0).all()
    assert (tables[:, 255] == 255).all()


def test_brightness_moves_mid_grey_and_contrast_spreads_tones_around_it():
    brighter, darker, stronger = augmentation.lighting_tables(np.array([0.2, -0.2, 0]), np.array([1, 1, 1.25]))
    assert abs(brighter[128] - 0.6 * 255) <= 1
    assert abs(darker[127] - 0.4 * 255) <= 1
    assert abs(int(stronger[128]) - 128) <= 1
    assert stronger[64] < 64
    assert stronger[192] > 192


def test_lighting_reaches_the_image():
    image = noise(16, 16)
    negative = Augmentations(np.float64(0.5), np.eye(3), IDENTITY[::-1].copy(), np.float64(1))
    np.testing.assert_array_equal(warp_cpu.apply(image, negative, 16), 255 - image)


# --- What is drawn ----------------------------------------------------------------------------------------------------


def drawn(n: int = 2000, **settings) -> Augmentations:
    return augmentation.draw(np.random.default_rng(0), n, Recipe(**(NOTHING | settings)))


def test_the_same_seed_draws_the_same_and_another_seed_something_else():
    first, again, other = (augmentation.draw(np.random.default_rng(seed), 16, Recipe()) for seed in (1, 1, 2))
    for name in ("window", "maps", "lighting", "crop"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
        assert (getattr(first, name) != getattr(other, name)).any()


def test_a_part_of_a_batch_is_augmented_as_in_the_whole_batch():
    whole = augmentation.draw(np.random.default_rng(0), 9, Recipe())
    for rows in (slice(3, 7), np.array([5, 0, 5])):
        part = whole[rows]
        for name in ("window", "maps", "lighting", "crop"):
            np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[rows])
    image = noise(40, 40)
    np.testing.assert_array_equal(warp_cpu.apply(image, whole[3:7][2], 24), warp_cpu.apply(image, whole[5], 24))


def test_each_image_of_a_batch_gets_its_own_draw():
    whole = augmentation.draw(np.random.default_rng(0), 64, Recipe())
    assert len(np.unique(whole.maps.reshape(64, 9).round(6), axis=0)) == 64
    assert len(np.unique(whole.window)) == 64


def test_with_everything_switched_off_only_the_window_varies():
    nothing = drawn()
    np.testing.assert_array_equal(nothing.maps, np.broadcast_to(np.eye(3), nothing.maps.shape))
    np.testing.assert_array_equal(nothing.lighting, np.broadcast_to(IDENTITY, nothing.lighting.shape))
    assert 0 <= nothing.window.min() < 0.01 < 0.99 < nothing.window.max() <= 1


def test_crops_keep_their_share_of_the_area_and_stay_inside():
    maps = drawn(min_scale=0.5).maps
    area = maps[:, 0, 0] * maps[:, 1, 1]
    assert 0.5 <= area.min() < 0.51
    assert 0.99 < area.max() <= 1
    assert abs(area.mean() - 0.75) < 0.02  # uniform in area, not in side
    seen = at(maps, CORNERS)
    assert abs(seen).max() <= 1 + 1e-9
    assert seen.min() < -0.99


def test_rotations_stay_within_their_range_and_use_it():
    maps = drawn(affine_p=1, max_rotate=10, max_zoom=1, max_warp=0).maps
    degrees = np.rad2deg(np.arctan2(maps[:, 1, 0], maps[:, 0, 0]))
    assert -10 <= degrees.min() < -9.8
    assert 9.8 < degrees.max() <= 10
    np.testing.assert_allclose(np.linalg.det(maps), 1)


def test_zooms_stay_within_their_range_and_inside_the_image():
    maps = drawn(affine_p=1, max_rotate=0, max_zoom=1.5, max_warp=0).maps
    factors = 1 / maps[:, 0, 0]
    assert 1 <= factors.min() < 1.01
    assert 1.49 < factors.max() <= 1.5
    assert abs(at(maps, CORNERS)).max() <= 1 + 1e-9


@pytest.mark.parametrize("max_warp", [0.2, 0.3])
def test_warps_stay_within_their_range_and_never_show_the_horizon(max_warp):
    maps = drawn(affine_p=1, max_rotate=0, max_zoom=1, max_warp=max_warp).maps
    moved = at(np.linalg.inv(maps), CORNERS)  # where the corners of the image land
    shift = abs(moved - CORNERS)
    assert max_warp * 0.98 < shift.max() <= max_warp + 1e-5
    depth = np.einsum("mj,nj->mn", maps[:, 2], np.c_[CORNERS, np.ones(4)])
    assert depth.min() > 0.2


def test_half_of_the_images_are_flipped_or_none():
    flipped = drawn(flip=True).maps[:, 0, 0] < 0
    assert 0.45 < flipped.mean() < 0.55
    assert not (drawn(flip=False).maps[:, 0, 0] < 0).any()


def test_lighting_stays_within_its_range_and_uses_it():
    tables = drawn(lighting_p=1, max_lighting=0.2).lighting / 255
    dark, light = (np.log(tables[:, v] / (1 - tables[:, v])) for v in (64, 191))
    contrast = (light - dark) / (2 * np.log(191 / 64))
    assert 0.79 < contrast.min() < 0.82
    assert 1.22 < contrast.max() < 1.27
    middle = 1 / (1 + np.exp(-(light + dark) / 2 / contrast))
    assert 0.395 < middle.min() < 0.41
    assert 0.59 < middle.max() < 0.605


def test_each_change_happens_to_its_share_of_the_images():
    turned = drawn(affine_p=0.3, max_rotate=10, max_zoom=1, max_warp=0).maps[:, 1, 0] != 0
    assert 0.26 < turned.mean() < 0.34
    changed = (drawn(lighting_p=0.5, max_lighting=0.3).lighting != IDENTITY).any(axis=1)
    assert 0.7 < changed.mean() < 0.8  # brightness or contrast: 1 - 0.5 * 0.5


def test_the_height_of_a_crop_is_known_and_is_1_without_one():
    assert (drawn(flip=True, affine_p=1).crop == 1).all()
    np.testing.assert_array_equal((cropped := drawn(min_scale=0.5, max_aspect=1.5)).crop, cropped.maps[:, 1, 1])


@pytest.mark.parametrize("max_aspect", [4 / 3, 4])
@pytest.mark.parametrize("min_scale", [0.08, 0.75])
def test_crops_keep_their_area_and_aspect_and_stay_inside(min_scale, max_aspect):
    maps = augmentation.random_crops(np.random.default_rng(0), 2000, min_scale, max_aspect)
    width, height = maps[:, 0, 0], maps[:, 1, 1]
    assert min_scale <= (width * height).min() < min_scale + 0.02
    assert (width * height).max() <= 1
    assert abs(at(maps, CORNERS)).max() <= 1 + 1e-9
    aspect = np.log(width / height)
    limit = min(np.log(max_aspect), -np.log(min_scale))  # beyond it no such crop fits inside
    assert 0.85 * limit < aspect.max() <= limit + 1e-9
    assert -0.85 * limit > aspect.min() >= -limit - 1e-9
    assert abs(aspect.mean()) < 0.1 * limit


def test_padding_makes_a_square_that_reflects_what_it_holds():
    wide = noise(20, 50)
    for position, start in ((0.0, 0), (0.5, 15), (1.0, 30)):
        view = replace(augmentation.centre(1, "pad"), window=np.array([position]))[0]
        square = warp_cpu.apply(wide, view, 50)
        np.testing.assert_array_equal(square[start : start + 20], wide)
        np.testing.assert_array_equal(warp_cpu.apply(wide.swapaxes(0, 1), view, 50), square.swapaxes(0, 1))
    middle = warp_cpu.apply(wide, augmentation.centre(1, "pad")[0], 50)
    np.testing.assert_array_equal(middle[:15], wide[15:0:-1])
    np.testing.assert_array_equal(middle[35:], wide[18:3:-1])


def test_a_padded_draw_shows_the_whole_image():
    image = noise(20, 50)
    np.testing.assert_array_equal(warp_cpu.apply(image, augmentation.centre(1, "pad")[0], 50)[15:35], image)
    assert drawn(resize_method="pad").pad
    assert not drawn().pad
