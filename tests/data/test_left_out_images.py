"""`--leave-out`: images that a file names are used by nobody, on any node, in any later command."""

import json
from pathlib import Path

import pytest
from in_process import run_here
from tiny_run import draw_images, make_run

from search import check, export
from search.options.arguments import parse_arguments
from search.options.preparation import find_data
from search.options.search_options import SearchOptions
from search.reporting.test_set import hold_out, source_of
from search.runs.command import CommandRecord
from search.runs.paths import RunFolder
from search.runs.resume import left_out_images, saved_options
from search.spaces.space import load_space
from trainables import finetune, interpret
from trainables.data.labelled_images import DataError
from trainables.data.layouts import find_images
from trainables.data.left_out_images import leave_out_for_training, read_left_out
from trainables.data.source import images_digest, images_of
from trainables.inference.split_record import read_split

GONE = ("robin/3.jpg", "wren/0.jpg", "wren/11.jpg")


@pytest.fixture
def birds(cache, tmp_path) -> Path:
    return draw_images(tmp_path / "birds", each=16)


def table(file: Path, paths=GONE, header: str = "path,label,suggested") -> Path:
    file.write_text("\n".join([header, *(f"{path},a,b" for path in paths)]) + "\n")
    return file


def test_the_images_that_the_file_names_are_gone_and_the_others_are_as_before(birds, tmp_path, capsys):
    found, paths = find_images(birds), read_left_out(table(tmp_path / "edited.csv"))
    assert paths == GONE
    kept = find_data(load_space("images"), birds, paths)
    assert set(found.paths) - set(kept.paths) == set(GONE) and kept.classes == found.classes
    assert all(path.startswith(kept.classes[label]) for path, label in zip(kept.paths, kept.labels, strict=True))
    assert "left out: 3 images; 45 are used" in capsys.readouterr().out
    assert find_data(load_space("images"), birds, read_left_out(None)) == found


def test_a_file_that_a_spreadsheet_wrote_is_read(tmp_path):
    file = tmp_path / "excel.csv"
    file.write_bytes("\ufefflabel,path\r\nwren,wren/ü 1.jpg\r\nwren,\r\nwren,wren/ü 1.jpg\r\n".encode())
    assert read_left_out(file) == ("wren/ü 1.jpg",)


def test_what_cannot_be_left_out_is_said_in_words(birds, tmp_path):
    images = find_images(birds)
    with pytest.raises(DataError, match=r"gone\.csv cannot be read .*column path, such as the suspects.csv"):
        read_left_out(tmp_path / "gone.csv")
    with pytest.raises(DataError, match=r"has 2 columns \('file', 'label'\), none of them called path"):
        read_left_out(table(tmp_path / "a.csv", header="file,label"))
    with pytest.raises(DataError, match=r"names 2 paths \('owl/1.jpg', 'wren/99.jpg'\) that no image in .*birds has"):
        leave_out_for_training(images, ("robin/0.jpg", "wren/99.jpg", "owl/1.jpg"))
    with pytest.raises(DataError, match=r"fewer than two images \(15 images left out\) in 1 class \('wren'\)"):
        leave_out_for_training(images, [f"wren/{i}.jpg" for i in range(15)])


def test_every_node_leaves_them_out_and_none_is_a_test_image(birds):
    kept = find_data(load_space("images"), birds, GONE)
    known = hold_out(kept, 0.25, 7)
    assert images_of(source_of(str(birds), 0.25, 7, GONE), images_digest(known)) == known
    assert images_of(source_of(str(birds), None, 7, GONE), images_digest(kept)) == kept
    assert len(known.paths) == 33 and source_of(str(birds), None, 7) == str(birds)


# --- Of a run ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def begun(birds, tmp_path) -> tuple[RunFolder, SearchOptions]:
    """A run that left images out, and the options that resume it."""
    folder = RunFolder(tmp_path / "results" / "mine")
    folder.path.mkdir(parents=True)
    file = table(tmp_path / "edited.csv")
    words = ["--data", str(birds), "--name", "mine", "--results", str(folder.path.parent), "--leave-out", str(file)]
    options = parse_arguments(words)
    assert options.leave_out == file and left_out_images(options, folder) == GONE
    CommandRecord(arguments=options, asked=options, left_out=GONE).save(folder.path)
    return folder, parse_arguments([*words, "--resume"])


def test_a_resumed_run_leaves_out_the_same_images_wherever_their_file_is(begun, tmp_path):
    folder, options = begun
    assert CommandRecord.load(folder.path).arguments.leave_out == options.leave_out
    assert left_out_images(saved_options(folder, options), folder) == GONE
    elsewhere = table(tmp_path / "moved.csv", reversed(GONE))
    options.leave_out.unlink()
    assert left_out_images(saved_options(folder, options), folder) == GONE  # as on another head node
    moved = parse_arguments(["--name", "mine", "--results", str(folder.path.parent), "--resume"])
    assert left_out_images(saved_options(folder, moved), folder) == GONE
    moved = parse_arguments(
        ["--name", "mine", "--results", str(folder.path.parent), "--resume", "--leave-out", str(elsewhere)]
    )
    assert saved_options(folder, moved).leave_out == elsewhere


def test_a_run_is_not_resumed_with_other_images_left_out(begun):
    folder, options = begun
    table(options.leave_out, ("robin/3.jpg", "robin/4.jpg"))
    with pytest.raises(
        ValueError, match=r"it names 2 images instead of 3, 1 of them others\. Restore it, move it away"
    ):
        left_out_images(options, folder)


def test_a_run_that_left_none_out_does_not_begin_to(begun, tmp_path):
    folder, options = begun
    record = json.loads(folder.command.read_text())
    for part in (record, record["arguments"], record["asked"]):  # as an earlier version wrote it
        del part["left_out" if part is record else "leave_out"]
    folder.command.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"--leave-out is not given there and .*edited.csv here"):
        saved_options(folder, options)


def test_its_model_knows_its_validation_images_without_telling_names(birds, tmp_path, capsys):
    run = make_run(tmp_path / "run", birds, epochs=1, test_share=0.25, left_out=GONE)
    record = (run / "best" / "split.json").read_text()
    assert len(read_split(run / "best").left_out) == 3 and "robin" not in record
    assert interpret.main(["--model", str(run), "--data", str(birds), "--out", str(tmp_path / "out")]) == 0
    assert "7 images of" in capsys.readouterr().out


@pytest.mark.usefixtures("no_new_process")
def test_its_export_is_checked_on_them(birds, tmp_path, capsys):
    run = make_run(tmp_path / "run", birds, epochs=1, left_out=GONE)
    export.export(run, tmp_path / "exported")
    assert "check passed" in capsys.readouterr().out


# --- Other commands ---------------------------------------------------------------------------------------------------


def test_the_check_leaves_them_out_and_its_next_command_does(birds, tmp_path, capsys):
    file, small = table(tmp_path / "edited.csv"), ["--set", "presize=32", "--set", "image_size=32"]
    words = ["--data", str(birds), "--leave-out", str(file), "--out", str(tmp_path / "look"), *small]
    assert check.main(words) == 0
    said = capsys.readouterr().out
    assert "left out: 3 images" in said and f"--leave-out {file}" in said.splitlines()[-1]
    (birds / "wren" / "0.jpg").write_bytes(b"")  # one that is left out may be damaged
    assert check.main(words) == 0


def test_a_training_without_a_search_leaves_them_out(birds, tmp_path):
    file = table(tmp_path / "edited.csv", ["robin/0.jpg", "owl/1.jpg"])
    child = run_here(finetune.main, "--data", birds, "--leave-out", file, "--set", "arch=test_vit")
    assert child.returncode == 2 and "names 1 path ('owl/1.jpg') that no image" in child.stderr
