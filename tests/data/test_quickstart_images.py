"""The drawn quickstart set: the same from run to run, complete or absent, and laid out like Pets."""

import re
from itertools import combinations
from pathlib import Path

import cv2
import pytest

from trainables.data import quickstart_images
from trainables.data.quickstart_images import BREEDS, COATS, EARS, MARKINGS, MUZZLES, draw

NUM = 3


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("quickstart") / "set", images_per_breed=NUM)


def contents(root: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (root / "images").iterdir()}


def test_files_are_laid_out_as_in_pets(drawn: Path) -> None:
    names = sorted(contents(drawn))
    assert names == sorted(f"{breed.name}_{n}.jpg" for breed in BREEDS for n in range(1, NUM + 1))
    labels = {re.fullmatch(r"(.+)_\d+\.jpg", name).group(1) for name in names}
    assert labels == {breed.name for breed in BREEDS}


def test_same_seed_gives_the_same_bytes(drawn: Path, tmp_path: Path) -> None:
    assert contents(draw(tmp_path / "again", images_per_breed=NUM)) == contents(drawn)


def test_another_seed_gives_other_images(drawn: Path, tmp_path: Path) -> None:
    first, other = contents(drawn), contents(draw(tmp_path / "other", seed=1, images_per_breed=NUM))
    assert first.keys() == other.keys()
    assert not set(first.values()) & set(other.values())


def test_a_larger_set_starts_with_the_smaller_one(drawn: Path, tmp_path: Path) -> None:
    small = contents(draw(tmp_path / "small", images_per_breed=1))
    assert len(small) == len(BREEDS)
    assert small.items() <= contents(drawn).items()


def test_no_two_images_are_alike(drawn: Path) -> None:
    assert len(set(contents(drawn).values())) == NUM * len(BREEDS)


def test_sides_are_160_to_240_in_portrait_and_landscape(drawn: Path) -> None:
    shapes = [cv2.imread(str(file)).shape[:2] for file in (drawn / "images").iterdir()]
    assert all(160 <= side <= 240 for shape in shapes for side in shape)
    assert any(height > width for height, width in shapes)
    assert any(height < width for height, width in shapes)


def test_a_second_call_does_not_draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = draw(tmp_path / "set", images_per_breed=1)
    monkeypatch.setattr(quickstart_images, "_save", fail)
    assert draw(root, images_per_breed=1) == root


@pytest.mark.parametrize("change", ["seed", "count", "version"])
def test_a_changed_set_is_drawn_again(change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = draw(tmp_path / "set", images_per_breed=2)
    stray = root / "images" / "left_over_1.jpg"
    stray.touch()
    if change == "version":
        monkeypatch.setattr(quickstart_images, "VERSION", quickstart_images.VERSION + 1)
    num = 1 if change == "count" else 2
    draw(root, seed=int(change == "seed"), images_per_breed=num)
    assert not stray.exists()
    assert len(contents(root)) == num * len(BREEDS)


def test_an_interrupted_drawing_leaves_nothing(drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "set"
    with monkeypatch.context() as patch:
        patch.setattr(quickstart_images, "_save", fail_after(5))
        with pytest.raises(OSError, match="disk full"):
            draw(root, images_per_breed=NUM)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    assert contents(draw(root, images_per_breed=NUM)) == contents(drawn)


def test_what_a_killed_drawing_left_is_not_taken_over(drawn: Path, tmp_path: Path) -> None:
    part = tmp_path / ".set.part" / "images"
    part.mkdir(parents=True)
    (part / "Half_drawn_1.jpg").touch()
    assert contents(draw(tmp_path / "set", images_per_breed=NUM)) == contents(drawn)
    assert not part.exists()


def test_a_failed_redraw_keeps_the_old_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = draw(tmp_path / "set", images_per_breed=1)
    before = contents(root)
    monkeypatch.setattr(quickstart_images, "_save", fail)
    with pytest.raises(OSError, match="disk full"):
        draw(root, seed=1, images_per_breed=1)
    assert contents(root) == before


def test_files_of_somebody_else_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not a quickstart image set"):
        draw(tmp_path, images_per_breed=1)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_set_of_no_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="images_per_breed is 0"):
        draw(tmp_path / "set", images_per_breed=0)


def test_no_single_part_gives_a_breed_away() -> None:
    parts = [(breed.ears, breed.muzzle, breed.coat, breed.marking) for breed in BREEDS]
    for kinds, used in zip((EARS, MUZZLES, COATS, MARKINGS), zip(*parts, strict=True), strict=True):
        assert {kind: used.count(kind) for kind in kinds} == dict.fromkeys(kinds, len(BREEDS) // len(kinds))
    assert all(first != second for first, second in combinations(parts, 2))


def fail(*_: object, **__: object) -> None:
    raise OSError("disk full")


def fail_after(num_files: int):
    """A stand-in for _save that writes a few files and then fails."""
    save, calls = quickstart_images._save, []

    def stand_in(*args: object, **kwargs: object) -> None:
        calls.append(args)
        if len(calls) > num_files:
            fail()
        save(*args, **kwargs)

    return stand_in
