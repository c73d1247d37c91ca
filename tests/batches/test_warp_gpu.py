"""A whole batch in torch shows the pixels that OpenCV makes of each image."""

import cv2
import numpy as np
import pytest
import torch

from trainables.batches import augmentation, warp_cpu, warp_gpu
from trainables.batches.augmentation import Augmentations
from trainables.recipe import Recipe

IDENTITY = np.arange(256, dtype=np.uint8)
RAGGED = [(230, 230), (230, 307), (345, 230), (150, 230), (40, 50), (33, 200)]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TINY = [(3, 5), (5, 3), (1, 1), (1, 9), (16, 1), (2, 2)]


def photo(number: int, height: int, width: int) -> np.ndarray:
    """Smooth noise with some hard edges, as in photographs."""
    rng = np.random.default_rng(number)
    image = np.full((height, width, 3), 128.0)
    for sigma, contrast in ((1, 40), (3, 60), (12, 60)):
        image += contrast * sigma * cv2.GaussianBlur(rng.normal(size=image.shape), (0, 0), sigma)
    for bottom, right in rng.integers(1, (height + 1, width + 1), (6, 2)):
        image[bottom // 2 : bottom, right // 2 : right] *= rng.uniform(0.5, 1.2)
    return image.clip(0, 255).astype(np.uint8)


def photos(shapes: list[tuple[int, int]]) -> list[np.ndarray]:
    return [photo(number, *shape) for number, shape in enumerate(shapes)]


def drawn(n: int, seed: int = 0, **settings) -> Augmentations:
    return augmentation.draw(np.random.default_rng(seed), n, Recipe(**settings))


def mapped(maps: np.ndarray, lighting: np.ndarray = IDENTITY, *, crop: float = 1.0, pad: bool = False) -> Augmentations:
    n = len(maps)
    return Augmentations(np.full(n, 0.5), maps, np.broadcast_to(lighting, (n, 256)), np.full(n, crop), pad)


def buffer(images: list[np.ndarray]) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    """The images one after another, where each starts, and their heights and widths."""
    sizes = np.array([image.size for image in images])
    pixels = torch.from_numpy(np.concatenate([image.ravel() for image in images])).to(DEVICE)
    return pixels, np.cumsum(sizes) - sizes, np.array([image.shape[:2] for image in images])


def by_torch(images: list[np.ndarray], augmentations: Augmentations, size: int) -> np.ndarray:
    return warp_gpu.apply(*buffer(images), augmentations, size).permute(0, 2, 3, 1).cpu().numpy()


def by_opencv(images: list[np.ndarray], augmentations: Augmentations, size: int) -> np.ndarray:
    return np.stack([warp_cpu.apply(image, augmentations[row], size) for row, image in enumerate(images)])


def assert_alike(images: list[np.ndarray], augmentations: Augmentations, size: int) -> None:
    """Nearly the same pixels: OpenCV rounds what it averages, and before version 5 places to 1/32 px."""
    error = by_torch(images, augmentations, size).astype(float) - by_opencv(images, augmentations, size)
    psnr = 10 * np.log10(255**2 / np.square(error).mean(axis=(1, 2, 3)).clip(min=1e-9))
    assert psnr.min() > 45, psnr
    assert abs(error).mean(axis=(1, 2, 3)).max() < 1


# --- As by OpenCV -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("size", [24, 64, 110, 256])  # shrinks much, some, a little, not at all
def test_training_draws(size, seed):
    assert_alike(photos(RAGGED), drawn(6, seed, presize=460), size)


@pytest.mark.parametrize("method", ["crop", "pad", "squish"])
@pytest.mark.parametrize("size", [24, 110, 230, 256])
def test_centre_views(size, method):
    assert_alike(photos(RAGGED), augmentation.centre(6, method), size)


@pytest.mark.parametrize("method", ["crop", "pad", "squish"])
@pytest.mark.parametrize("size", [24, 64, 200])
def test_small_crops_of_any_aspect(size, method):
    assert_alike(photos(RAGGED), drawn(6, resize_method=method, min_scale=0.08, max_aspect=4), size)


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("size", [40, 200])
def test_extreme_rotations_zooms_and_reflections(size, pad):
    zooms = augmentation.zooms(np.array([5.0, 0.7, 0.4, 1.0, 0.3, 2.0]), np.linspace(-1, 1, 12).reshape(6, 2))
    turns = augmentation.rotations(np.array([180.0, 45.0, -30.0, 90.0, 120.0, 3.0]))
    warps = augmentation.warps(np.linspace(-0.3, 0.3, 6), np.linspace(0.3, 0, 6))
    for crop in (1.0, 0.4):
        assert_alike(photos(RAGGED), mapped(warps @ turns @ zooms, crop=crop, pad=pad), size)


@pytest.mark.parametrize("method", ["crop", "pad"])
def test_images_of_a_few_pixels(method):
    assert_alike(photos(TINY), drawn(6, resize_method=method), 32)
    assert_alike(photos(TINY), augmentation.centre(6, method), 32)


# --- To the pixel -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["crop", "pad"])
def test_nothing_changes_where_nothing_is_interpolated(method):
    shapes = [(64, 64), (64, 90), (100, 64)] if method == "crop" else [(64, 64), (64, 30), (5, 64)]
    same = augmentation.centre(3, method)
    np.testing.assert_array_equal(by_torch(photos(shapes), same, 64), by_opencv(photos(shapes), same, 64))


def test_flips_turns_and_zooms_to_whole_pixels():
    image = photo(0, 65, 65)
    flip, turn = augmentation.flips(np.array([True])), augmentation.rotations(np.array([90.0]))
    flipped, turned = by_torch([image] * 2, mapped(np.concatenate([flip, turn])), 65)
    np.testing.assert_array_equal(flipped, image[:, ::-1])
    np.testing.assert_array_equal(turned, np.rot90(image, -1))


@pytest.mark.parametrize("crop", [0.25, 1.0])
def test_a_crop_or_zoom_shown_pixel_for_pixel_is_not_averaged_however_large_the_image(crop):
    image = photo(0, 129, 129)
    corner = augmentation.zooms(np.array([4.0]), np.array([[-1.0, -1.0]]))
    np.testing.assert_array_equal(by_torch([image], mapped(corner, crop=crop), 33)[0], image[:33, :33])


def test_images_reflect_as_often_as_needed():
    image = photo(0, 17, 17)
    far = by_torch([image], mapped(np.diag([5.0, 5.0, 1.0])[None]), 81)[0]
    np.testing.assert_array_equal(far, np.pad(image, ((32, 32), (32, 32), (0, 0)), mode="reflect"))


def test_each_image_gets_its_lighting():
    images = photos([(40, 40)] * 5)
    changes = augmentation.lighting_tables(np.linspace(-0.5, 0.5, 5), np.linspace(0.5, 2, 5))
    lit = by_torch(images, mapped(np.tile(np.eye(3), (5, 1, 1)), changes), 40)
    np.testing.assert_array_equal(lit, [table[image] for table, image in zip(changes, images, strict=True)])


@pytest.mark.parametrize(("side", "size"), [(230, 112), (230, 64), (200, 25), (97, 16)])
def test_skipped_pixels_are_averaged_as_by_torch(side, size):
    image = photo(1, side, side)
    bins = int(side / (side / (2 * size)) + 1e-6)
    pooled = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(image).permute(2, 0, 1)[None].float(), bins)
    small = torch.nn.functional.interpolate(pooled, (size, size), mode="bilinear", align_corners=True)
    error = by_torch([image], augmentation.centre(1), size) - small.permute(0, 2, 3, 1).numpy()
    assert abs(error).max() < 0.51  # rounding


# --- The batch --------------------------------------------------------------------------------------------------------


def test_the_batch_is_laid_out_as_the_loaders():
    batch = warp_gpu.apply(*buffer(photos(RAGGED)), drawn(6), 48)
    assert batch.shape == (6, 3, 48, 48)
    assert batch.dtype == torch.uint8
    assert batch.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("step", [1, 70_000, 2**22])  # one image at a time, a few, all
def test_any_images_of_the_buffer_in_any_order_and_any_steps(step, monkeypatch):
    monkeypatch.setattr(warp_gpu, "STEP", step)
    images, rows = photos(RAGGED), np.array([4, 0, 5, 5, 2, 0, 1])
    pixels, starts, shapes = buffer(images)
    pixels = torch.cat([pixels[:7], pixels])  # starts need not be multiples of 3
    augmentations = drawn(7)
    batch = warp_gpu.apply(pixels, starts[rows] + 7, shapes[rows], augmentations, 64)
    for i, row in enumerate(rows):
        alone = by_torch([images[row]], augmentations[i : i + 1], 64)[0]
        np.testing.assert_array_equal(batch[i].permute(1, 2, 0).cpu(), alone)


def test_a_buffer_may_be_larger_than_32_bits_can_address():
    image, start = photo(0, 32, 32), 2**31 + 5
    pixels = torch.empty(
        start + image.size, dtype=torch.uint8, device=DEVICE
    )  # what is not written takes no memory on CPUs
    pixels[start:] = torch.from_numpy(image).flatten()
    batch = warp_gpu.apply(pixels, np.array([start]), np.array([[32, 32]]), augmentation.centre(1), 32)
    np.testing.assert_array_equal(batch[0].permute(1, 2, 0).cpu(), image)


@pytest.mark.parametrize("pad", [False, True])
def test_a_horizon_in_the_picture_reads_nothing_from_outside(pad):
    edge_on = np.array([[[1.0, 0, 0], [0, 1, 0], [1, 0, 0]], [[1, 0, 0], [0, 1, 0], [0.9, 0.9, 1e-9]]])
    batch = by_torch(photos([(20, 30), (1, 7)]), mapped(edge_on, pad=pad), 33)  # torch checks every index
    assert batch.shape == (2, 33, 33, 3)


@pytest.mark.parametrize("augmentations", [drawn(64), drawn(64, resize_method="pad"), augmentation.centre(64)])
def test_the_host_never_waits_for_the_device(augmentations):
    """On the meta device, which holds no data, every way to read some back raises."""
    nothing = torch.empty(64 * 460 * 480 * 3, dtype=torch.uint8, device="meta")
    batch = warp_gpu.apply(nothing, np.arange(64) * 460 * 480 * 3, np.tile([460, 480], (64, 1)), augmentations, 224)
    assert batch.device.type == "meta"
    assert batch.shape == (64, 3, 224, 224)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_the_host_never_waits_for_a_gpu():
    pixels, starts, shapes = buffer(photos(RAGGED))
    torch.cuda.set_sync_debug_mode("error")
    try:
        warp_gpu.apply(pixels, starts, shapes, drawn(6), 64)
    finally:
        torch.cuda.set_sync_debug_mode("default")
