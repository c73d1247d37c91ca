"""Every command that reads a folder of images says the same of it. The files are empty, so none goes on to train."""

import sys
from pathlib import Path

import pytest
from files import fill
from folder_layouts import DEEPER, ERRORS, PARTS, PARTS_WITH_TEST

from search import check, lr_find, run
from trainables import finetune
from trainables.data.labelled_images import DataError
from trainables.data.layouts import find_images

SPLITS = {f"{train} and {other}": (train, other) for train, other in (*PARTS[3:7], *PARTS_WITH_TEST)}
FOLDERS = {case: [*names, *others] for case, (names, others) in DEEPER.items()}
TOO_SMALL = ("one class", "classes with one image", "validation class never trained")  # read alike, judged in own words
FOLDERS |= {case: names for case, (names, given, _) in ERRORS.items() if given == "." and case not in TOO_SMALL}
FOLDERS |= {
    case: [f"{part}/{name}/{n}.jpg" for part in parts for name in ("cat", "dog") for n in (1, 2)]
    for case, parts in SPLITS.items()
}
FOLDERS |= {
    "loose images": [*(f"{name}/{n}.bmp" for name in ("cat", "dog") for n in range(30)), "a_1.jpg", "b_1.jpg"],
    "a system's folder": [*(f"{name}/{n}.JFIF" for name in ("cat", "dog") for n in (1, 2)), "@eaDir/1.jpg"],
    "two spellings": ["caf\u00e9/1.jpg", "cafe\u0301/2.jpg", "tea/1.jpg", "tea/2.jpg"],
}


@pytest.mark.parametrize("case", FOLDERS)
def test_all_commands_read_a_folder_alike(tmp_path, search_cache, monkeypatch, capsys, case):
    root = fill(tmp_path / "data", *FOLDERS[case])
    assert_alike(root, tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize("row", ["a.jpg,True,train", "a.jpg,cat,train", "c.jpg,,train"])
def test_all_commands_read_a_table_alike(tmp_path, search_cache, monkeypatch, capsys, row):
    names = [f"{name}.jpg" for name in "abcd"]
    (fill(tmp_path, *names) / "labels.csv").write_text(
        "\n".join(["file,kind,part", *(f"{name},{name < 'c.jpg'},train" for name in names), row])
    )
    given = Path(f"{tmp_path}/labels.csv?path=file&label=kind&split=part")
    assert_alike(given, tmp_path, monkeypatch, capsys)


def assert_alike(root: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        expected = f"data: {find_images(root).describe()}"
    except DataError as error:
        expected = str(error)
    for name, command in COMMANDS.items():
        with pytest.raises((ValueError, SystemExit)) as caught:
            raise SystemExit(command(root, monkeypatch))
        said = capsys.readouterr()
        text = " ".join(f"{said.out} {said.err} {caught.value}".split())
        assert " ".join(expected.split()) in text, name


def run_search(root: Path, monkeypatch) -> int:
    monkeypatch.setattr(sys, "argv", ["search.run", "--space", "quickstart", "--data", str(root)])
    return run.main()


def run_finetune(root: Path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["finetune", "--data", str(root), "--set", "arch=test_resnet.r160_in1k"])
    finetune.main()


COMMANDS = {
    "search.check": lambda root, _: check.main(["--space", "quickstart", "--data", str(root)]),
    "search.run": run_search,
    "search.lr_find": lambda root, _: lr_find.main(["--space", "quickstart", "--data", str(root)]),
    "trainables.finetune": run_finetune,
}
