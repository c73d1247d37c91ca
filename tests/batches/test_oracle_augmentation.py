"""The same parameter gives the same picture as in fastai, and the same parameters are drawn as often."""

from itertools import combinations
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch

from trainables.batches import augmentation, warp_cpu
from trainables.batches.augmentation import Augmentations
from trainables.batches.sampling_grid import to_pixels
from trainables.data import image_file
from trainables.recipe import Recipe

pytestmark = pytest.mark.oracle

IDENTITY = np.arange(256, dtype=np.uint8)
NO_MAP = np.eye(3)[None]
ENOUGH = 40  # dB


@pytest.fixture(scope="module")
def fastai():
    from fastai.vision import augment, core

    return SimpleNamespace(**vars(augment) | {"TensorImage": core.TensorImage, "PILImage": core.PILImage})


@pytest.fixture(scope="module")
def photos() -> list[np.ndarray]:
    """A temple with roof tiles, hard to resample, and a soft flower; 400 x 600."""
    from sklearn.datasets import load_sample_image  # comes with fastai

    return [load_sample_image(name)[:400, 20:620].copy() for name in ("china.jpg", "flower.jpg")]


def squares(photos: list[np.ndarray], side: int) -> list[np.ndarray]:
    if side <= 400:
        return [photo[:side, 100 : 100 + side].copy() for photo in photos]
    return [cv2.resize(photo[:, 100:500], (side, side), interpolation=cv2.INTER_CUBIC) for photo in photos]


def to_fastai(fastai, image: np.ndarray):
    return fastai.TensorImage(torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255)


def pixels(batch) -> np.ndarray:
    return batch[0].permute(1, 2, 0).numpy() * 255


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    """dB over the whole picture."""
    error = np.square(one.astype(np.float64) - other.astype(np.float64)).mean()
    return 10 * np.log10(255**2 / max(error, 1e-9))


def a(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float64)


def ours(
    image: np.ndarray,
    maps: np.ndarray,
    size: int,
    *,
    lighting=IDENTITY,
    crop: float = 1,
    position: float = 0.5,
    pad=False,
):
    return warp_cpu.apply(image, Augmentations(np.float64(position), maps[0], lighting, np.float64(crop), pad), size)


# --- One change -------------------------------------------------------------------------------------------------------


def flip(image):
    return image.flip_batch(p=1.0, draw=1)


def rotate(degrees):
    return lambda image: image.rotate(p=1.0, draw=degrees)


def zoom(factor, x, y):
    return lambda image: image.zoom(p=1.0, draw=factor, draw_x=x, draw_y=y)


def warp(x, y):
    return lambda image: image.warp(p=1.0, draw_x=x, draw_y=y)


ROTATIONS = (-180, -90, -30, -10, -3, 2, 10, 45)
ZOOMS = ((1.1, 0.5, 0.5), (1.1, 0, 0), (1.1, 1, 0.2), (1.5, 0.3, 0.9), (2, 0.1, 0.6), (4, 0.7, 0.5))
WARPS = ((0.2, 0), (-0.2, 0), (0, 0.2), (0, -0.1), (0.1, -0.2), (0.3, 0.3))
CHANGES = (
    [("flip", flip, augmentation.flips(np.array([True])))]
    + [(f"rotate {d}", rotate(d), augmentation.rotations(a(d))) for d in ROTATIONS]
    + [(f"zoom {z}", zoom(*z), augmentation.zooms(a(z[0]), a(2 * z[1] - 1, 2 * z[2] - 1))) for z in ZOOMS]
    + [(f"warp {x, y}", warp(x, y), augmentation.warps(a(x), a(y))) for x, y in WARPS]
)


@pytest.mark.parametrize(("theirs", "maps"), [case[1:] for case in CHANGES], ids=[case[0] for case in CHANGES])
def test_one_change_gives_fastais_picture(fastai, photos, theirs, maps):
    for image in squares(photos, 224):
        assert psnr(pixels(theirs(to_fastai(fastai, image))), ours(image, maps, 224)) > ENOUGH


@pytest.mark.parametrize(
    ("brightness", "contrast"),
    [(0.4, 1), (0.5, 1), (0.6, 1), (0.05, 1), (0.5, 0.8), (0.5, 1.25), (0.5, 5), (0.58, 1.2), (0.42, 0.85)],
)
def test_lighting_gives_fastais_picture(fastai, photos, brightness, contrast):
    table = augmentation.lighting_tables(a(2 * brightness - 1), a(contrast))[0]
    for image in squares(photos, 224):
        theirs = to_fastai(fastai, image).brightness(p=1.0, draw=brightness).contrast(p=1.0, draw=contrast)
        assert psnr(pixels(theirs), ours(image, NO_MAP, 224, lighting=table)) > ENOUGH


def crop_map(side: int, rows: tuple[int, int], columns: tuple[int, int]) -> np.ndarray:
    """To the pixels rows[0]..rows[1] - 1 of a square; -1 and 1 are the centres of the first and the last pixel."""
    half, maps = (side - 1) / 2, NO_MAP.copy()
    for axis, (start, end) in enumerate((columns, rows)):
        maps[0, axis, axis] = (end - 1 - start) / 2 / half
        maps[0, axis, 2] = (start + end - 1) / 2 / half - 1
    return maps


@pytest.mark.parametrize("size", [224, 160, 128])
@pytest.mark.parametrize(
    ("top", "left", "height", "width"),
    [
        (30, 10, 400, 400),
        (3, 4, 455, 455),
        (159, 60, 301, 301),
        (13, 60, 400, 320),
        (100, 20, 320, 430),
        (0, 0, 460, 460),
    ],
)
def test_a_random_crop_gives_fastais_picture(fastai, photos, size, top, left, height, width):
    crop = fastai.RandomResizedCropGPU(size)
    crop.tl, crop.cp_size = (top, left), (height, width)
    maps = crop_map(460, (top, top + height), (left, left + width))
    for image in squares(photos, 460):
        theirs = crop.encodes(to_fastai(fastai, image))
        assert psnr(pixels(theirs), ours(image, maps, size, crop=maps[0, 1, 1])) > ENOUGH


# --- All together -----------------------------------------------------------------------------------------------------


def recorded(monkeypatch, n: int, recipe: Recipe, seed: int = 0) -> tuple[Augmentations, dict[str, np.ndarray]]:
    """A draw of ours and its parameters in fastai's units, seen on their way into the maps and tables."""
    seen = {}

    def watch(name: str, *parameters: str) -> None:
        function = getattr(augmentation, name)

        def watched(*arguments):
            seen.update(zip(parameters, arguments, strict=True))
            return function(*arguments)

        monkeypatch.setattr(augmentation, name, watched)

    with monkeypatch.context() as monkeypatch:
        watch("flips", "flip")
        watch("rotations", "angle")
        watch("zooms", "zoom", "centres")
        watch("warps", "warp_x", "warp_y")
        watch("lighting_tables", "brightness", "contrast")
        drawn = augmentation.draw(np.random.default_rng(seed), n, recipe)
    centres = (seen.pop("centres") + 1) / 2
    seen |= {"zoom_x": centres[:, 0], "zoom_y": centres[:, 1], "brightness": (1 + seen["brightness"]) / 2}
    return drawn, {name: values.astype(float) for name, values in seen.items()}


def fastai_pipeline(fastai, size: int | None, given: dict[str, float]) -> list:
    settings = {"p": 1.0, "size": size}
    return fastai.setup_aug_tfms(
        [
            fastai.Flip(draw=given["flip"], **settings),
            fastai.Warp(draw_x=given["warp_x"], draw_y=given["warp_y"], **settings),
            fastai.Rotate(draw=given["angle"], **settings),
            fastai.Zoom(draw=given["zoom"], draw_x=given["zoom_x"], draw_y=given["zoom_y"], **settings),
            fastai.Brightness(p=1.0, draw=given["brightness"]),
            fastai.Contrast(p=1.0, draw=given["contrast"]),
        ]
    )


@pytest.mark.parametrize(("side", "size"), [(224, 224), (320, 224), (460, 224), (460, 160), (320, 128), (460, 64)])
def test_a_training_picture_is_fastais_for_the_same_draws(fastai, photos, monkeypatch, side, size):
    drawn, parameters = recorded(monkeypatch, 6, Recipe(min_scale=1))
    assert len(np.unique(parameters["flip"])) == 2
    for i in range(6):
        given = {name: values[i] for name, values in parameters.items()}
        for image in squares(photos, side):
            theirs = to_fastai(fastai, image)
            for transform in fastai_pipeline(fastai, size, given):
                theirs = transform(theirs, split_idx=0)
            assert psnr(pixels(theirs), warp_cpu.apply(image, drawn[i], size)) > ENOUGH


# --- Sharpness --------------------------------------------------------------------------------------------------------


def sharpness(picture: np.ndarray) -> float:
    """The variance of the Laplacian."""
    return cv2.Laplacian(picture.astype(np.float32).mean(axis=2), cv2.CV_32F).var()


def supersampled(image: np.ndarray, maps: np.ndarray, size: int, times: int = 6) -> np.ndarray:
    """Each pixel the mean of times x times points, each read by a cubic: what `maps` would show at its best."""
    to_image, to_output = to_pixels(np.array([image.shape[0], size]))
    offset = 0.5 / times - 0.5
    points = np.array([[1 / times, 0, offset], [0, 1 / times, offset], [0, 0, 1]])
    large = cv2.warpPerspective(
        image.astype(np.float32),
        to_image @ maps[0] @ np.linalg.inv(to_output) @ points,
        (size * times, size * times),
        flags=cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REFLECT_101,
    )
    return cv2.resize(large, (size, size), interpolation=cv2.INTER_AREA)


def middle(picture: np.ndarray) -> np.ndarray:
    """Without the edges: a change after another reflects what that one has left, not the image."""
    edge = len(picture) // 5
    return picture[edge:-edge, edge:-edge]


@pytest.mark.parametrize("side", [224, 460])
@pytest.mark.parametrize(
    ("factor", "degrees", "x", "y"), [(1.1, 8, 0.1, -0.15), (1.05, -4, 0.2, 0.1), (1.08, 2, -0.05, 0.05)]
)
def test_one_interpolation_is_sharper_than_one_after_another(fastai, photos, side, factor, degrees, x, y):
    maps = (
        augmentation.zooms(a(factor), a(-0.2, 0.2))
        @ augmentation.rotations(a(degrees))
        @ augmentation.warps(a(x), a(y))
    )
    for image in squares(photos, side):
        one = middle(ours(image, maps, side))
        changes = (zoom(factor, 0.4, 0.6), rotate(degrees), warp(x, y))
        picture = to_fastai(fastai, image)
        for change in changes:
            picture = change(picture)
        sequence, best = middle(pixels(picture)), middle(supersampled(image, maps, side))
        assert psnr(one, sequence) > 25  # the same view
        assert sharpness(one) > 1.8 * sharpness(sequence)
        assert psnr(one, best) > psnr(sequence, best) + 6


@pytest.mark.parametrize(("size", "sharper"), [(224, 1.2), (128, 0.9)])
def test_a_crop_of_a_changed_picture_shows_what_fastais_does(fastai, photos, monkeypatch, size, sharper):
    """fastai interpolates before the crop and again after it, which blurs; here it happens once."""
    drawn, parameters = recorded(monkeypatch, 4, Recipe(affine_p=1, lighting_p=0, min_scale=1))
    maps = crop_map(460, (60, 460), (20, 420))
    crop = fastai.RandomResizedCropGPU(size)
    crop.tl, crop.cp_size = (60, 20), (400, 400)
    for i in range(4):
        given = {name: values[i] for name, values in parameters.items()}
        changes = fastai_pipeline(fastai, None, given)[0]
        for image in squares(photos, 460):
            theirs = pixels(crop.encodes(changes(to_fastai(fastai, image), split_idx=0)))
            mine = ours(image, drawn.maps[i] @ maps, size, crop=maps[0, 1, 1])
            assert psnr(mine, theirs) > 30
            assert sharpness(mine) > sharper * sharpness(theirs)


# --- Resize -----------------------------------------------------------------------------------------------------------


def turned(photos: list[np.ndarray]) -> list[np.ndarray]:
    return photos + [np.rot90(photo).copy() for photo in photos]


def resized(fastai, photo: np.ndarray, size: int, method: str, position: float | None) -> np.ndarray:
    """fastai's Resize; without a `position` as in validation."""
    transform, image = fastai.Resize(size, method=method), fastai.PILImage.create(photo)
    if position is None:
        return np.asarray(transform(image, split_idx=1))
    transform.pcts = (position, position)
    return np.asarray(transform.encodes(image))


def ours_resized(photo: np.ndarray, size: int, method: str, position: float | None) -> np.ndarray:
    image, pad = image_file.resize(photo, size, method), method == "pad"
    if position is None:
        return warp_cpu.apply(image, augmentation.centre(1, method)[0], size)
    return ours(image, NO_MAP, size, position=position, pad=pad)


@pytest.mark.parametrize("size", [480, 240, 160])
@pytest.mark.parametrize("position", [None, 0, 0.25, 1])
@pytest.mark.parametrize("method", ["squish", "crop"])
def test_resizing_gives_fastais_picture(fastai, photos, size, position, method):
    for photo in turned(photos):
        theirs = resized(fastai, photo, size, method, position)
        assert psnr(theirs, ours_resized(photo, size, method, position)) > ENOUGH


@pytest.mark.parametrize("size", [480, 240, 120])
@pytest.mark.parametrize("position", [None, 0, 0.25, 1])
def test_padding_gives_fastais_picture_and_its_reflections_within_a_pixel(fastai, photos, size, position):
    """fastai reflects before it resizes and we after: the mirror lies up to half a pixel beside, the photo does not."""
    side = size * 400 // 600
    start = int((size - side) * (0.5 if position is None else position))
    for photo in turned(photos):
        theirs, mine = (f(photo, size, "pad", position) for f in (lambda *given: resized(fastai, *given), ours_resized))
        inside = (slice(start, start + side),) if photo.shape[0] == 400 else (slice(None), slice(start, start + side))
        assert psnr(theirs[inside], mine[inside]) > ENOUGH
        assert psnr(theirs, mine) > 25


@pytest.mark.parametrize("method", ["crop", "pad"])
@pytest.mark.parametrize("position", [None, 0.3, 0.77])
def test_at_any_size_the_window_lies_within_a_pixel_of_fastais(fastai, method, position):
    """A window starts at a whole pixel, of the original in fastai and of the resized image here."""
    for height, width in ((375, 500), (427, 640), (333, 501)):
        ramps = np.add.outer(np.linspace(0, 100, height), np.linspace(0, 155, width))
        photo = np.repeat(ramps[..., None], 3, axis=2).round().astype(np.uint8)
        for size in (320, 224, 100):
            theirs, mine = resized(fastai, photo, size, method, position), ours_resized(photo, size, method, position)
            per_pixel = 155 / size  # at the most
            assert abs(theirs.astype(float) - mine).max() < per_pixel + 2


# --- What is drawn ----------------------------------------------------------------------------------------------------


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """Kolmogorov and Smirnov's: the largest difference of the two shares of values up to some value."""
    values = np.concatenate([one, other])
    shares = (np.searchsorted(np.sort(each), values, side="right") / len(each) for each in (one, other))
    return abs(np.subtract(*shares)).max()


def fastai_draws(fastai, n: int, **settings) -> dict[str, np.ndarray]:
    affine, lighting = fastai.aug_transforms(size=8, **settings)
    x = torch.zeros(n, 3, 1, 1)
    flip_mat, rotate_mat, zoom_mat = (function(x) for function in affine.aff_fs)
    warp, (brightness, contrast) = affine.coord_fs[0], lighting.fs
    for each in (warp, brightness, contrast):
        each.before_call(x)
    scale = zoom_mat[:, 0, 0]
    draws = {
        "flip": flip_mat[:, 0, 0] < 0,
        "angle": torch.rad2deg(torch.atan2(rotate_mat[:, 0, 1], rotate_mat[:, 0, 0])),
        "zoom": 1 / scale,
        "zoom_x": torch.where(scale < 1, (zoom_mat[:, 0, 2] / (1 - scale) + 1) / 2, torch.nan),
        "zoom_y": torch.where(scale < 1, (zoom_mat[:, 1, 2] / (1 - scale) + 1) / 2, torch.nan),
        "warp_x": -1 - warp.targ_pts[:, 0, 1],
        "warp_y": -1 - warp.targ_pts[:, 0, 0],
        "brightness": brightness.change,
        "contrast": contrast.change,
    }
    return {name: values.double().numpy().round(5) for name, values in draws.items()}


@pytest.mark.parametrize(
    "settings",
    [{}, {"max_rotate": 20, "max_zoom": 1.5, "max_lighting": 0.4, "max_warp": 0.1, "p_affine": 0.5, "p_lighting": 0.9}],
)
def test_parameters_are_drawn_as_often_as_by_fastai(fastai, monkeypatch, settings):
    torch.manual_seed(0)
    theirs = fastai_draws(fastai, 20000, **settings)
    names = {"p_affine": "affine_p", "p_lighting": "lighting_p"}
    recipe = Recipe(**{names.get(name, name): value for name, value in settings.items()})
    _, mine = recorded(monkeypatch, 20000, recipe)
    assert set(mine) == set(theirs)
    for name, values in theirs.items():
        assert distance(values[~np.isnan(values)], mine[name].round(5)) < 0.03, name
    for one, other in combinations(mine, 2):
        assert abs(np.corrcoef(mine[one], mine[other])[0, 1]) < 0.04, (one, other)


@pytest.mark.parametrize(("min_scale", "max_aspect"), [(0.75, 1), (0.35, 1), (0.08, 4 / 3), (0.75, 2)])
def test_crops_are_drawn_as_often_as_by_fastai(fastai, min_scale, max_aspect):
    side = 4096  # fastai's crops are whole pixels
    image = torch.empty(1).expand(1, 1, side, side)
    crop, theirs = fastai.RandomResizedCropGPU(8, min_scale=min_scale, ratio=(1 / max_aspect, max_aspect)), []
    fastai.random.seed(0)
    for _ in range(10000):
        crop.before_call(image, split_idx=0)
        theirs.append((*crop.cp_size, *crop.tl))
    height, width, top, left = np.array(theirs).T / side
    maps = augmentation.random_crops(np.random.default_rng(0), 20000, min_scale, max_aspect)
    my_width, my_height = maps[:, 0, 0], maps[:, 1, 1]
    my_left, my_top = (maps[:, 0, 2] + 1 - my_width) / 2, (maps[:, 1, 2] + 1 - my_height) / 2
    for name, one, other in (
        ("area", height * width, my_height * my_width),
        ("aspect", width / height, my_width / my_height),
        ("height", height, my_height),
        ("top", top, my_top),
        ("left", left, my_left),
    ):
        if max_aspect == 1 and name == "aspect":
            one, other = one.round(2), other.round(2)
        assert distance(one, other) < 0.03, name
