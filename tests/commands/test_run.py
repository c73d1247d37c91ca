"""The command line before any search: quick help, and one paragraph on whatever a user got wrong."""

import functools
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from in_process import run_here
from run_tables import write_run
from tiny_run import draw_images, write_json

from search.cluster.resources import Node, shared_sizes, sizes
from search.options.arguments import parse_arguments, resume_command
from search.options.preparation import space_of
from search.options.search_options import SearchOptions
from search.report import write_report
from search.run import announce, conclude, main
from search.runs.command import CommandRecord
from search.runs.paths import RunFolder
from search.runs.resume import words_to_show
from search.runs.run_record import load
from search.runs.trained_model import open_run
from search.tuning.tuner import RunOptions
from trainables.ray.worker_group import GroupSize

ROOT = Path(__file__).parents[2]
SEARCH = ("-m", "search.run")


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    """That of somebody with an empty home."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "XDG_"))}
    environment |= {"HOME": str(tmp_path / "home"), "FINETUNE_SEARCH_CACHE": str(tmp_path / "cache")}
    (tmp_path / "home").mkdir()

    return environment


@pytest.fixture
def process(environment):
    """A function that runs `python -m search.run`, or other code, in a process of its own."""

    def run(*arguments: object, python: tuple[str, ...] = SEARCH) -> subprocess.CompletedProcess:
        words = [sys.executable, *python, *map(str, arguments)]
        return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)

    return run


@pytest.fixture
def command(environment):
    """A function that runs the same in this process."""
    return functools.partial(run_here, main, cwd=ROOT, env=environment)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return draw_images(tmp_path_factory.mktemp("data") / "images", each=3)


def assert_refused(ended: subprocess.CompletedProcess, *expected: str) -> str:
    """Exit code 2 and one paragraph; returns it."""
    assert ended.returncode == 2, ended.stderr
    *usage, message = ended.stderr.rstrip("\n").split("\n")
    assert all(line.startswith(("usage:", "      ")) for line in usage), ended.stderr
    assert "error: " in message
    assert "Traceback" not in ended.stdout + ended.stderr
    for text in expected:
        assert text in message
    return message


def test_help_answers_at_once(process):
    times = []
    for _ in range(3):
        started = time.monotonic()
        ended = process("--help")
        times.append(time.monotonic() - started)
        assert ended.returncode == 0
    assert min(times) < 1.5, times


def test_the_environment_is_ready_before_ray_is_imported(environment):
    """Ray reads it then; a Ray that starts here would listen on all addresses otherwise."""
    code = (
        "import sys; from search import run\n"
        "run.prepare_environment = lambda address: sys.exit('ray' in sys.modules)\n"
        "run.main(['--space', 'quickstart', '--resume', '--name', 'x', '--trials', '9'])"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment).returncode == 0


def test_help_shows_every_option_and_how_to_begin(process):
    text = process("--help").stdout
    options = "space set data weights test-split describe trials time-budget searcher scheduler objective confirm seed "
    options += "target-seconds address workers-per-trial cpus-per-worker gpus-per-worker max-concurrent results name "
    options += "trials-per-gpu resume storage report cache lr-range recipes"
    for option in options.split():
        assert f"--{option}" in text
    assert "python -m search.run --space quickstart" in text
    assert "halving" in text


@pytest.mark.parametrize("arguments", [("--help",), ("--space", "pets", "--describe"), ("--trials", "0")])
def test_neither_help_nor_description_nor_a_mistake_loads_torch_or_ray(process, arguments):
    code = (
        "import atexit, sys; from search import run\n"
        "atexit.register(lambda: print('LOADED', sorted({'torch', 'ray', 'optuna', 'pandas'} & set(sys.modules))))\n"
        "run.run_cli(run.main)"
    )
    assert process(*arguments, python=("-c", code)).stdout.endswith("LOADED []\n")


def test_a_description_names_every_dimension_and_setting(command):
    ended = command("--space", "pets", "--set", "epochs=4..6", "--set", "image_size=160", "--describe")
    assert ended.returncode == 0
    searched, settings = ended.stdout.split("all settings")
    assert "epochs             4..6" in searched
    assert "lr_max             3e-05..0.003 (log)" in searched
    assert "resnet34.tv_in1k" in searched
    assert "image_size         160 " in settings
    for name in ("arch", "smoothing", "weight_decay", "seed"):
        assert f"\n  {name} " in settings


def test_a_wrong_set_is_refused_with_all_of_its_problems(command):
    ended = command("--space", "quickstart", "--set", "epochs=soon", "--set", "epoch=3", "--set", "smoothing=2")
    assert_refused(ended, "epochs='soon' is not a whole number", "unknown setting 'epoch'", "smoothing=2")


def test_an_unknown_space_is_refused(command):
    assert_refused(command("--space", "cats"), "--space cats: there is no such space", "quickstart")


def test_no_space_at_all_is_refused(process):
    assert_refused(process(), "--space is required", "quickstart")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--trials", "0"),
        ("--trials", "-3"),
        ("--trials", "many"),
        ("--time-budget", "soon"),
        ("--time-budget", "0m"),
        ("--time-budget", "-5m"),
        ("--workers-per-trial", "0"),
        ("--max-concurrent", "1.5"),
        ("--cpus-per-worker", "0"),
        ("--cpus-per-worker", "nan"),
        ("--gpus-per-worker", "-1"),
        ("--gpus-per-worker", "1.5"),
        ("--trials-per-gpu", "0"),
        ("--searcher", "grid"),
        ("--seed", "x"),
    ],
)
def test_an_option_with_an_impossible_value_is_refused_by_name(command, option, value):
    assert_refused(command("--space", "quickstart", f"{option}={value}"), f"argument {option}: ", repr(value)[1:-1])


def test_a_seed_that_no_training_can_have_is_refused(command):
    assert_refused(command("--space", "quickstart", "--seed", "-1"), "seed=-1 is out of range")


@pytest.mark.slow
def test_an_architecture_that_does_not_train_is_refused_before_ray_starts(command):
    ended = command("--space", "imagenette", "--set", "arch=resnet81", "--set", "pretrained=false")
    assert_refused(ended, "arch='resnet81' is not a timm architecture. Names like it: resnet")
    assert ended.stdout == "checking that these can be trained: resnet81\n"


def test_a_missing_folder_is_refused(command, tmp_path):
    missing = tmp_path / "nowhere"
    assert_refused(command("--space", "quickstart", "--data", missing), f"There is no folder {missing}")


def test_a_folder_without_images_is_refused(command, tmp_path):
    (tmp_path / "empty" / "cats").mkdir(parents=True)
    (tmp_path / "empty" / "cats" / "notes.txt").touch()
    message = assert_refused(
        command("--space", "quickstart", "--data", tmp_path / "empty"), "There are no images that can be read in"
    )
    assert "class folders (<class>/*.jpg)" in message


def test_a_class_with_one_image_is_refused_by_name(command, tmp_path, images):
    shutil.copytree(images, tmp_path / "data")
    for name in ("1.jpg", "2.jpg"):
        (tmp_path / "data" / "wren" / name).unlink()
    ended = command("--space", "quickstart", "--data", tmp_path / "data")
    assert_refused(ended, "fewer than two images in 1 class ('wren')")


def test_a_missing_weights_folder_is_refused(command, tmp_path, images):
    ended = command("--space", "quickstart", "--data", images, "--weights", tmp_path / "nowhere")
    assert_refused(ended, "--weights", str(tmp_path / "nowhere"), "is not a folder")


def test_weights_that_the_given_folder_lacks_are_refused_before_ray_starts(command, tmp_path, images):
    (tmp_path / "tf_efficientnet_lite0.safetensors").touch()
    archs = "arch=tf_efficientnet_lite1,tf_efficientnet_lite2"
    ended = command("--space", "quickstart", "--data", images, "--weights", tmp_path, "--set", archs)
    message = assert_refused(ended, "looked for tf_efficientnet_lite1.safetensors")
    assert "tf_efficientnet_lite2.safetensors" in message and "for tf_efficientnet_lite0" not in message


def test_the_space_for_ones_own_images_needs_some(command):
    assert_refused(command("--space", "images"), "--space images needs --data DIR, a folder of your own images")


def test_a_description_says_what_the_epochs_depend_on(command):
    assert "epochs             4..17  for 2000 training images; with fewer images more epochs" in (
        command("--space", "images", "--describe").stdout
    )
    pinned = command("--space", "images", "--set", "epochs=3..5", "--describe").stdout
    assert "epochs             3..5\n" in pinned


def test_a_name_that_is_taken_is_refused_and_left_alone(command, tmp_path, images):
    note = tmp_path / "results" / "mine" / "note.txt"
    note.parent.mkdir(parents=True)
    note.touch()
    ended = command("--space", "quickstart", "--data", images, "--results", tmp_path / "results", "--name", "mine")
    assert_refused(ended, f"{tmp_path}/results/mine exists", "--resume", "--name")
    assert [*note.parent.iterdir()] == [note]


@pytest.mark.parametrize("place", ["taken", "taken/deeper", "/proc/results"])
def test_results_that_cannot_be_written_are_refused_before_any_work(command, tmp_path, images, place):
    (tmp_path / "taken").touch()
    ended = command("--space", "quickstart", "--data", images, "--results", tmp_path / place)
    assert_refused(ended, f"{tmp_path / place} cannot be written", "Give another place with --results")
    assert not ended.stdout  # nothing was looked at


def test_resuming_nothing_is_refused(command, tmp_path):
    ended = command("--resume", "--name", "mine", "--results", tmp_path)
    assert_refused(ended, f"{tmp_path}/mine holds no run to resume")
    assert not (tmp_path / "mine").exists()


def test_resuming_without_a_name_is_refused(command):
    assert_refused(command("--resume"), "--resume requires --name")


def test_nothing_is_left_behind_by_a_mistake(command, tmp_path):
    results = tmp_path / "results"
    assert_refused(command("--space", "quickstart", "--data", tmp_path / "nowhere", "--results", results))
    assert not results.exists()


def test_a_machine_without_network_and_data_is_told_the_ways_on(process, tmp_path):
    """The download goes to a proxy that refuses it, so the test needs no particular machine."""
    started = time.monotonic()
    code = (
        "import os; os.environ.update(https_proxy='http://127.0.0.1:9', http_proxy='http://127.0.0.1:9', no_proxy='');"
        "from search import run; run.run_cli(run.main)"
    )
    ended = process("--space", "pets", python=("-c", code))
    assert time.monotonic() - started < 60
    message = assert_refused(ended, "Oxford-IIIT Pet is not available")
    assert "downloading https://www.robots.ox.ac.uk/" in message  # what was tried
    assert f"{tmp_path}/cache/data/pets/oxford-iiit-pet/images/<breed>_<number>.jpg" in message  # where it looks
    for way_on in ("--data DIR", "download it by hand", "--space quickstart"):
        assert way_on in message


def test_an_address_where_no_cluster_is_is_refused(command, images):
    """The last check before a search, and the first that needs Ray."""
    settings = ("pretrained=false", "arch=test_resnet", "presize=32", "image_size=32")
    pinned = [word for setting in settings for word in ("--set", setting)]
    ended = command("--space", "quickstart", "--data", images, *pinned, "--address", "127.0.0.1:9")
    assert_refused(ended, "--address 127.0.0.1:9")


def test_a_search_with_a_damaged_table_is_not_resumed_but_told_what_to_do(command, tmp_path):
    words = ["--space", "quickstart", "--name", "mine", "--results", str(tmp_path), "--data", str(tmp_path / "none")]
    (tmp_path / "mine").mkdir()
    CommandRecord(arguments=parse_arguments(words), asked=parse_arguments(words)).save(tmp_path / "mine")
    (tmp_path / "mine" / "trials.csv").write_text("number,trial_id\n0,t1\n")
    ended = command("--resume", "--trust", "--name", "mine", "--results", tmp_path)
    assert_refused(ended, f"{tmp_path}/mine/trials.csv is damaged: line 1 has no column status", "restore a copy")


def test_curves_of_an_interrupted_finder_do_not_take_the_name_of_a_run(command, tmp_path):
    (tmp_path / "results" / "again" / "lr_find").mkdir(parents=True)
    arguments = ("--space", "pets", "--name", "again", "--results", tmp_path / "results", "--data", tmp_path / "none")
    assert_refused(command(*arguments), "There is no folder")
    (tmp_path / "results" / "again" / "trials.csv").touch()
    assert_refused(command(*arguments), "exists. Add --resume")


def test_workers_for_an_architecture_that_is_not_searched_are_refused():
    args = parse_arguments(["--space", "quickstart", "--workers-per-trial", "resnet_101*=2"])
    with pytest.raises(ValueError, match=r"resnet_101\*=2 matches none of tf_efficientnet_lite0, "):
        sizes(args, [Node(cpus=8, gpus=0)], ["tf_efficientnet_lite0", "tf_efficientnet_lite1"])


def test_trials_of_all_sizes_share_the_cpus_of_a_laptop():
    args = parse_arguments(["--space", "quickstart", "--workers-per-trial", "*lite2=2"])
    size, of_archs = sizes(args, [Node(cpus=2, gpus=0)], ["tf_efficientnet_lite0", "tf_efficientnet_lite2"])
    assert (size.num_workers, size.cpus_per_worker, of_archs) == (1, 1, {"*lite2": 2})


def test_the_command_that_is_shown_has_no_secrets():
    argv = ["--data", "https://me:secret@host/x.tar?Signature=secret", "--weights=s3://key:secret@bucket/w", "--set"]
    assert words_to_show(argv) == ["--data", "https://host/x.tar", "--weights=s3://bucket/w", "--set"]


def test_the_command_that_goes_on_says_where(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here, elsewhere = RunFolder(Path("results/first")), RunFolder(tmp_path / "kept" / "first")
    assert resume_command(here.path, None) == "python -m search.run --resume --name first"
    assert resume_command(elsewhere.path, "auto").endswith(f"--name first --results {tmp_path}/kept --address auto")


# --- Commands to paste ------------------------------------------------------------------------------------------------


def commands_in(text: str) -> dict[str, list[str]]:
    """Module -> words of the commands in some output, as a shell parts them."""
    found = [line.partition("python -m ")[2] for line in text.splitlines() if "python -m " in line]
    return {words[0]: words[1:] for words in map(shlex.split, found)}


def test_commands_that_a_search_prints_can_be_pasted_where_results_has_a_space(tmp_path, capsys):
    path = write_run(tmp_path / "my results" / "it's mine")
    space = replace(space_of("quickstart", ["pretrained=false"]), dimensions={})
    options = SearchOptions(space="quickstart", trials=10, max_concurrent=1, report="tables", metric="error_rate")
    run = RunOptions(
        options=options, space=space, folder=RunFolder(path), data="", labels=[], group_size=GroupSize(), data_digest=""
    )
    announce(run, [Node(2, 0)], num_images=100)
    assert commands_in(capsys.readouterr().out) == {"search.dashboard": [str(path)]}
    assert conclude(run, 60.0, interrupted=False) == 0
    found = commands_in(capsys.readouterr().out)
    assert found == {"search.dashboard": [str(path)], "search.export": [str(path), "--out", "exported"]}
    conclude(run, 60.0, interrupted=True)
    assert commands_in(capsys.readouterr().out)["search.run"][-2:] == ["--results", str(path.parent)]


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, ["1 at once, each on 1 worker of 8 CPUs and 1 GPUs;"]),
        (
            {"trials_per_gpu": "4"},
            ["4 at once, each on 1 worker of 4 CPUs and 1/4 of a GPU;", "GPU: 4 trials share each"],
        ),
        ({"trials_per_gpu": "auto"}, ["1 at once, each on 1 worker of 8 CPUs and 1 GPUs;", "then up to 8 while they"]),
        ({"trials_per_gpu": "auto", "max_concurrent": 5}, ["1 at once, each", "then up to 4 while they"]),
    ],
)
def test_a_search_says_at_its_start_what_shares_a_gpu(tmp_path, capsys, asked, expected):
    options, nodes = SearchOptions(space="quickstart", metric="error_rate", **asked), [Node(16, 1)]
    space = replace(space_of("quickstart", ["pretrained=false"]), dimensions={})
    size, num_workers = sizes(options, nodes, [])
    run = RunOptions(
        options=options, space=space, folder=RunFolder(tmp_path), data="", labels=[], data_digest="",
        group_size=size, num_workers=num_workers, shared_sizes=shared_sizes(options, nodes),
    )  # fmt: skip
    announce(run, nodes, num_images=100)
    said = capsys.readouterr().out
    assert all(text in said for text in expected) and ("GPU: " in said) == (len(expected) > 1)


def test_the_commands_of_reports_and_errors_can_be_pasted_likewise(tmp_path):
    path = write_run(tmp_path / "my results" / "mine")
    command = json.loads((path / "command.json").read_text())
    write_json(path / "command.json", command | {"argv": ["--data", "/my photos", "--name", "mine"]})
    write_report(load(path), tmp_path / "report.html", analysis=False)
    assert "python -m search.run --data &#39;/my photos&#39; --name mine" in (tmp_path / "report.html").read_text()
    shutil.rmtree(path / "best")
    with pytest.raises(ValueError) as error:
        open_run(path)
    words = commands_in(str(error.value))["search.run"]
    assert words == ["--resume", "--name", "mine", "--results", str(path.parent)]
