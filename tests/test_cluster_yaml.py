"""The cluster files pass Ray's own check without network or AWS packages, and say what the comments in them promise."""

import re
import shlex
import subprocess
import tomllib
from pathlib import Path, PurePosixPath

import pytest
import yaml
from jsonschema import ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import cli

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "cluster.yaml").read_text()
REMOTE = PurePosixPath("~/finetune-search")


@pytest.fixture
def config():
    return yaml.safe_load(TEXT)


@pytest.fixture
def prepared(config):
    return prepare_config(config)


def workers(config):
    return {name: kind for name, kind in config["available_node_types"].items() if name != config["head_node_type"]}


def start_commands(config):
    return {role: config[f"{role}_start_ray_commands"][-1] for role in ("head", "worker")}


def test_passes_rays_own_check_offline(config, monkeypatch):
    def refuse(*args):
        raise AssertionError("the check must not need a network")

    monkeypatch.setattr("socket.socket.connect", refuse)
    validate_config(prepare_config(config))


@pytest.mark.parametrize(
    "path",
    [(), ("auth",), ("available_node_types", "ray.worker.gpu"), ("available_node_types", "head")],
    ids=lambda path: ".".join(path) or "top level",
)
def test_a_wrong_key_fails_the_check(config, path):
    section = config
    for key in path:
        section = section[key]
    section["no_such_key"] = 1
    with pytest.raises(ValidationError, match="no_such_key"):
        validate_config(prepare_config(config))


def test_a_head_node_type_that_does_not_exist_fails_the_check(config):
    config["head_node_type"] = "missing"
    with pytest.raises(ValueError, match="head_node_type"):
        validate_config(prepare_config(config))


def test_worker_types_are_gpu_machines_whose_resources_aws_tells(prepared):
    assert set(workers(prepared)) == {"ray.worker.gpu", "ray.worker.gpu.ondemand"}
    for kind in workers(prepared).values():
        # g and p are AWS's NVIDIA families; a resource written here would override what `ray up` detects.
        assert re.match(r"[gp]\d", kind["node_config"]["InstanceType"])
        assert kind["resources"] == {}
        assert kind["min_workers"] == 0
        assert 0 < kind["max_workers"] <= prepared["max_workers"]


def test_spot_comes_first_and_on_demand_can_stand_in_for_it(prepared):
    spot, on_demand = prepared["available_node_types"]["ray.worker.gpu"], workers(prepared)["ray.worker.gpu.ondemand"]
    assert spot["node_config"].pop("InstanceMarketOptions") == {"MarketType": "spot"}
    assert spot["node_config"] == on_demand["node_config"]  # Equal fit, so that the priority decides.
    assert spot["priority"] > on_demand["priority"]


def test_the_head_is_not_a_training_machine_and_never_a_spot_one(prepared):
    head = prepared["available_node_types"][prepared["head_node_type"]]
    assert head["resources"] == {"CPU": 0}
    assert head["max_workers"] == 0
    assert "InstanceMarketOptions" not in head["node_config"]


def test_one_edit_sets_the_image_of_every_node_and_disks_are_large(prepared):
    settings = [line for line in TEXT.splitlines() if "ami-CHANGE-ME" in line and not line.startswith("#")]
    assert len(settings) <= 1  # 0 in a copy where it was set.
    nodes = [kind["node_config"] for kind in prepared["available_node_types"].values()]
    assert len({node["ImageId"] for node in nodes}) == 1
    for node in nodes:
        (disk,) = node["BlockDeviceMappings"]
        assert disk["Ebs"]["VolumeType"] == "gp3"
        assert disk["Ebs"]["VolumeSize"] >= 200


def test_idle_workers_go_and_leave_no_disk_behind(config):
    assert 0 < config["idle_timeout_minutes"] <= 15
    assert config["provider"]["cache_stopped_nodes"] is False


def test_mounts_hold_what_the_install_needs_and_no_results(config):
    mounts = {PurePosixPath(remote): local for remote, local in config["file_mounts"].items()}
    tree = {remote: ROOT / local for remote, local in mounts.items() if remote.is_relative_to(REMOTE)}
    for remote, local in tree.items():
        assert remote == REMOTE / local.relative_to(ROOT)
        assert local.exists(), f"{local.name} is mounted but missing"
    kept_home = [ROOT / name for name in ("results", ".git", ".venv")]
    for local in tree.values():
        assert not any(path.is_relative_to(local) or local.is_relative_to(path) for path in kept_home)

    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {pattern.rstrip("*") for pattern in pyproject["tool"]["setuptools"]["packages"]["find"]["include"]}
    files = {pyproject["project"]["readme"], *pyproject["project"]["license-files"]}
    assert {local.name for local in tree.values()} == packages | files | {"pyproject.toml", "constraints.txt"}


def test_rsync_down_is_not_robbed_of_results(config):
    # Ray applies the same patterns when it brings files back.
    assert config["rsync_exclude"] == ["__pycache__"]
    assert "rsync_filter" not in config


def test_every_node_installs_the_pinned_versions_and_none_of_rays_defaults(prepared):
    for role in ("head", "worker"):
        commands = prepared[f"{role}_setup_commands"]
        installs = [command for command in commands if "pip install" in command]
        assert any(command.endswith("-e .") for command in installs)
        for command in installs:
            assert command.startswith(f"cd {REMOTE} && ")
            assert " -c constraints.txt " in command
        assert not any("ray-wheels" in command or "conda" in command for command in commands)


def test_every_node_has_the_token_and_starts_only_with_it(prepared):
    assert prepared["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    for command in start_commands(prepared).values():
        assert " RAY_AUTH_MODE=token ~/venv/bin/ray start " in command
    assert any("RAY_AUTH_MODE=token" in command for command in prepared["setup_commands"])


def test_commands_are_valid_shell(prepared):
    for key in ("head_setup_commands", "worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands"):
        for command in prepared[key]:
            subprocess.run(["bash", "-n", "-c", command], check=True)


@pytest.mark.parametrize("role", ["head", "worker"])
def test_start_commands_use_options_that_ray_has(config, role):
    arguments = shlex.split(start_commands(config)[role].partition("ray start ")[2])
    options = cli.commands["start"].make_context("start", arguments).params
    assert options["head"] is (role == "head")
    assert options["object_manager_port"] == 8076


def test_the_commands_at_the_top_are_ones_that_ray_has():
    header = TEXT.partition("\ncluster_name:")[0].replace("\\\n#", "")
    commands = [shlex.split(line, comments=True) for line in re.findall(r"^#   ray (.+)$", header, re.MULTILINE)]
    names = [name for name, *_ in commands]
    assert names == ["get-auth-token", "up", "exec", "attach", "dashboard", "rsync-down", "down"]
    for name, *arguments in commands:
        if ">" in arguments:
            arguments = arguments[: arguments.index(">")]
        cli.commands[name].make_context(name, arguments)


# --- cluster/local.yaml -----------------------------------------------------------------------------------------------

LOCAL = (ROOT / "cluster" / "local.yaml").read_text()
SHARED = ("file_mounts", "rsync_exclude", "head_start_ray_commands", "worker_start_ray_commands")


@pytest.fixture
def local():
    return yaml.safe_load(LOCAL)


def test_the_file_for_your_own_machines_passes_the_check_too(local):
    local["provider"]["worker_ips"] = ["192.0.2.1"]
    validate_config(prepare_config(local))
    local["provider"]["no_such_key"] = local["auth"]["no_such_key"] = 1
    with pytest.raises(ValidationError, match="no_such_key"):
        validate_config(prepare_config(local))


def test_own_machines_get_the_same_project_and_start_ray_alike(config, local):
    assert {key: local[key] for key in SHARED} == {key: config[key] for key in SHARED}
    install, theirs = (next(c for c in one["setup_commands"] if "pip install" in c) for one in (local, config))
    assert install.replace("'.[quickstart]'", ".") == theirs


def test_the_commands_at_its_top_are_ones_that_ray_has():
    from search.arguments import parse_arguments

    header = LOCAL.partition("\ncluster_name:")[0]
    lines = [shlex.split(line, comments=True) for line in re.findall(r"^#   ray (.+)$", header, re.MULTILINE)]
    assert [name for name, *_ in lines] == ["get-auth-token", "up", "submit", "exec", "rsync-down", "down"]
    for name, *arguments in lines:
        arguments = arguments[: arguments.index(">")] if ">" in arguments else arguments
        found = cli.commands[name].make_context(name, list(arguments)).params
        if name == "submit":
            assert (ROOT / found["script"]).is_file()
            assert parse_arguments(list(found["script_args"])).space == "quickstart"
