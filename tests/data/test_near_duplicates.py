"""Which images look the same: one photo in several crops, shades and qualities, and none of different photos."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from trainables.data.groups import grouped
from trainables.data.labelled_images import ImageFolder
from trainables.data.layouts import find_images
from trainables.data.near_duplicates import SIDE, find_duplicates, pairs_among, picture


def photos(count: int, seed: int = 0) -> list[Image.Image]:
    """Pieces of noise fields with the spectrum of photographs, 200 x 150 px."""
    rng = np.random.default_rng(seed)
    frequencies = np.hypot(np.fft.fftfreq(150)[:, None], np.fft.rfftfreq(200)) + 1 / 200
    fields = (np.fft.irfft2(np.fft.rfft2(rng.normal(size=(150, 200))) / frequencies) for _ in range(3 * count))
    channels = [120 + 55 * field / field.std() for field in fields]
    return [
        Image.fromarray(np.clip(np.stack(channels[i : i + 3], axis=2), 0, 255).astype(np.uint8))
        for i in range(0, 3 * count, 3)
    ]


def look(*images: Image.Image) -> set[tuple[int, int]]:
    pictures = np.stack([picture(np.asarray(image)) for image in images])
    return {(pair.first, pair.second) for pair in pairs_among(pictures)}


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two classes of ten photos, and of the first two another crop; a file that is no image."""
    for label, name in enumerate(("robin", "wren")):
        (tmp_path / name).mkdir()
        for number, photo in enumerate(photos(10, seed=label)):
            photo.save(tmp_path / name / f"{number}.jpg")
            if number < 2:
                photo.crop((6, 3, 194, 144)).save(tmp_path / name / f"{number}_again.jpg", quality=80)
    (tmp_path / "wren/bad.jpg").write_bytes(b"no image")
    return tmp_path


def test_photos_of_different_scenes_are_no_pairs():
    assert look(*photos(200)) == set()


@pytest.mark.parametrize(
    "change",
    [
        lambda photo: photo.crop((12, 0, 188, 150)),
        lambda photo: photo.crop((0, 0, 190, 142)),
        lambda photo: photo.resize((80, 60)),
        lambda photo: ImageEnhance.Brightness(photo).enhance(0.7),
        lambda photo: ImageEnhance.Contrast(photo).enhance(0.6),
        lambda photo: photo.convert("L").convert("RGB"),
    ],
)
def test_crops_sizes_and_shades_of_one_photo_are_pairs(change):
    first, second, third = photos(3)
    assert look(first, second, change(first), third) == {(0, 2)}


def test_pictures_without_details_are_like_none():
    rng = np.random.default_rng(0)
    shades = [
        np.clip(np.linspace(60, 90, 64)[:, None, None] + rng.normal(0, 2, (64, 64, 3)), 0, 255) for _ in range(20)
    ]
    assert look(*(Image.fromarray(shade.astype(np.uint8)) for shade in shades)) == set()
    assert look(*(Image.new("RGB", (64, 64), (i, 90, 120)) for i in range(0, 200, 20))) == set()


def test_the_most_alike_come_first_and_a_picture_is_like_itself():
    first, second = photos(2)
    images = [first, first.crop((12, 0, 188, 150)), first, second]
    pairs = pairs_among(np.stack([picture(np.asarray(image)) for image in images]))
    assert (pairs[0].first, pairs[0].second) == (0, 2)
    assert pairs[0].likeness == pytest.approx(1, abs=1e-5)
    assert len(pairs) == 3


def test_more_pictures_than_are_compared_at_a_time(monkeypatch):
    monkeypatch.setattr("trainables.data.near_duplicates.ROWS", 3)
    several = photos(5)
    assert look(*several, *several) == {(i, i + 5) for i in range(5)}


def test_all_files_of_a_folder_are_opened_and_unreadable_ones_are_like_none(folder, monkeypatch):
    monkeypatch.setattr("trainables.data.near_duplicates.ROWS", 8)
    seen = []
    images = find_images(folder)
    pairs = find_duplicates(images, progress=lambda done, total: seen.append((done, total)))
    names = {tuple(sorted((images.paths[pair.first], images.paths[pair.second]))) for pair in pairs}
    assert names == {(f"{name}/{i}.jpg", f"{name}/{i}_again.jpg") for name in ("robin", "wren") for i in range(2)}
    assert seen == [(8, 25), (16, 25), (24, 25), (25, 25)]


def test_grouped_as_duplicates_they_are_in_one_split(folder):
    found = grouped(find_images(folder), "duplicates")
    assert found.lines == ("groups: 4 pairs of near-duplicates among 8 images; they stay in one split",)
    names = found.images.paths
    same = {name: {group for path, group in zip(names, found.images.groups, strict=True) if path.startswith(name)}
            for name in ("robin/0", "wren/1")}  # fmt: skip
    assert same == {"robin/0": {"robin/0.jpg"}, "wren/1": {"wren/1.jpg"}}
    assert len(set(found.images.groups)) == 21


def test_no_images_are_no_pairs():
    empty = ImageFolder(Path("/nowhere"), "class folders", (), (), ())
    assert pairs_among(np.empty((0, SIDE, SIDE), dtype=np.uint8)) == find_duplicates(empty) == []
