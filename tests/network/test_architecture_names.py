"""Patterns of architectures: which names they stand for, and that these are looked up once."""

import io
import json
import subprocess

import pytest

from trainables.network import architecture_names
from trainables.network.architecture_names import is_pattern, main, matching, names_like


@pytest.fixture
def calls(tmp_path, monkeypatch, capsys) -> list[list[str]]:
    """The patterns that a child process was asked for, each time; it runs in this process."""
    monkeypatch.setenv("FINETUNE_SEARCH_CACHE", str(tmp_path))
    asked = []

    def run_here(module: str, *, stdin: str) -> subprocess.CompletedProcess[str]:
        asked.append(json.loads(stdin))
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        main()
        return subprocess.CompletedProcess([], 0, stdout=capsys.readouterr().out)

    monkeypatch.setattr(architecture_names, "run_module", run_here)
    return asked


def test_a_name_is_no_pattern():
    assert [is_pattern(name) for name in ("resnet18.tv_in1k", "resnet*", "resnet?8", "resnet[13]*")] == [
        False,
        True,
        True,
        True,
    ]


def test_without_a_dot_each_architecture_comes_once_with_the_tag_of_its_default_weights():
    import timm

    names = matching("resnet18*")
    assert len({name.partition(".")[0] for name in names}) == len(names) >= 2
    for name in names:
        arch, _, tag = name.partition(".")
        assert timm.get_pretrained_cfg(arch).tag == tag


def test_with_a_dot_all_tags_that_match_come():
    names = matching("resnet18.*_in1k")
    assert {"resnet18.tv_in1k", "resnet18.a1_in1k"} <= set(names)
    assert all(name.startswith("resnet18.") and name.endswith("_in1k") for name in names)


def test_what_has_no_weights_no_classifier_or_several_is_left_out():
    import timm

    assert "resnet50_clip_gap" in timm.list_models("resnet50*")  # whose default weights make features only
    assert "deit_tiny_distilled_patch16_224.fb_in1k" in timm.list_models("deit_tiny*", pretrained=True)
    found = matching("deit_tiny*")
    assert [name.partition(".")[0] for name in found] == ["deit_tiny_patch16_224"]
    without = {arch for arch in timm.list_models() if not timm.is_model_pretrained(arch)}
    assert without and without.isdisjoint(name.partition(".")[0] for name in matching("*"))


def test_a_pattern_is_looked_up_once_for_a_version_of_timm(calls, monkeypatch):
    found = names_like(["resnet18d*", "convnext_att?"])
    assert found["resnet18d*"] == ["resnet18d.ra2_in1k"] and found["convnext_att?"] == ["convnext_atto.d2_in1k"]
    assert names_like(["resnet18d*"]) == {"resnet18d*": found["resnet18d*"]}
    assert calls == [["resnet18d*", "convnext_att?"]]
    monkeypatch.setattr(architecture_names, "version", lambda package: "99")
    names_like(["resnet18d*"])
    assert calls[1:] == [["resnet18d*"]]


def test_a_damaged_record_is_looked_up_again(calls, tmp_path):
    names_like(["resnet18d*"])
    (file,) = (tmp_path / "architectures").iterdir()
    file.write_text("{")
    assert names_like(["resnet18d*"]) == {"resnet18d*": ["resnet18d.ra2_in1k"]}
    assert len(calls) == 2


def test_patterns_that_match_nothing_are_refused_together_with_names_like_them(calls, tmp_path):
    with pytest.raises(ValueError) as error:
        names_like(["resnt18*", "resnet18*", "convnxt_tiny.*"])
    assert "arch='resnt18*' matches no architecture that timm" in str(error.value)
    assert "resnet18," in str(error.value) and "convnext_tiny.fb_in1k" in str(error.value)
    assert "'resnet18*'" not in str(error.value)
    assert not (tmp_path / "architectures").exists()


def test_a_process_that_breaks_is_no_answer(tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_SEARCH_CACHE", str(tmp_path))
    ended = subprocess.CompletedProcess([], 9, stdout="")
    monkeypatch.setattr(architecture_names, "run_module", lambda *args, **kwargs: ended)
    with pytest.raises(ValueError, match=r"arch=resnet\* could not be looked up: .* exit code 9"):
        names_like(["resnet*"])
