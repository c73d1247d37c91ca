"""The cluster files pass Ray's own check and their clouds' without a network, and say what the comments promise."""

import re
import shlex
import subprocess
import tomllib
from pathlib import Path, PurePosixPath

import pytest
import yaml
from api_fields import GCE, at, mappings, wrong_fields
from jsonschema import ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import cli

from search import export
from search.options.arguments import parse_arguments

ROOT = Path(__file__).resolve().parents[2]
AWS, GCP, LOCAL = "cluster.yaml", "cluster/gcp.yaml", "cluster/local.yaml"
REMOTE = PurePosixPath("~/finetune-search")


def text(file):
    return (ROOT / file).read_text()


def load(file):
    return yaml.safe_load(text(file))


@pytest.fixture(params=[AWS, GCP])
def file(request):
    return request.param


@pytest.fixture
def config(file):
    return load(file)


@pytest.fixture
def prepared(config):
    return prepare_config(config)


def workers(config):
    return {name: kind for name, kind in config["available_node_types"].items() if name != config["head_node_type"]}


def node_configs(config):
    return [kind["node_config"] for kind in config["available_node_types"].values()]


def start_commands(config):
    return {role: config[f"{role}_start_ray_commands"][-1] for role in ("head", "worker")}


def ray_commands(lines):
    """The words of those that begin with `ray`, without what the shell does with them."""
    commands = [shlex.split(line, comments=True)[1:] for line in lines.splitlines() if line.startswith("ray ")]
    return [words[: words.index(">")] if ">" in words else words for words in commands]


def commands_at_the_top(file):
    header = text(file).partition("\ncluster_name:")[0].replace("\\\n#", "")
    return ray_commands(re.sub(r"^#   ", "", header, flags=re.MULTILINE))


def commands_of_the_docs(block):
    return ray_commands(text("docs/clusters.md").partition(f"<!-- {block} -->\n```sh\n")[2].partition("```")[0])


def check_commands(commands, names, file):
    """That `ray` has them, with these options, and that they are about this file."""
    assert [name for name, *_ in commands] == names.split()
    for name, *arguments in commands:
        found = cli.commands[name].make_context(name, list(arguments)).params
        assert found.get("cluster_config_file", file) == file
        if name == "submit":
            assert (ROOT / found["script"]).is_file()
            parse_arguments(list(found["script_args"]))
        if name == "exec":
            check_remote_command(found["cmd"])


def check_remote_command(command):
    """That the head can run it: a job, or a command of this project."""
    words = shlex.split(command.removeprefix("cd ~/finetune-search && "))
    if words[:2] == ["ray", "job"]:
        action, *words = words[2:]
        found = cli.commands["job"].commands[action].make_context(action, words).params
        words = list(found.get("entrypoint", ()))
    if words:
        assert words[:2] == ["python", "-m"]
        parsers = {"search.run": parse_arguments, "search.export": export.parse_arguments}
        parsers[words[2]](words[3:])


# --- both clouds ------------------------------------------------------------------------------------------------------


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
    at(config, path)["no_such_key"] = 1
    with pytest.raises(ValidationError, match="no_such_key"):
        validate_config(prepare_config(config))


def test_a_head_node_type_that_does_not_exist_fails_the_check(config):
    config["head_node_type"] = "missing"
    with pytest.raises(ValueError, match="head_node_type"):
        validate_config(prepare_config(config))


def test_spot_comes_first_and_on_demand_can_stand_in_for_it(prepared):
    assert set(workers(prepared)) == {"ray.worker.gpu", "ray.worker.gpu.ondemand"}
    spot, on_demand = prepared["available_node_types"]["ray.worker.gpu"], workers(prepared)["ray.worker.gpu.ondemand"]
    assert spot["resources"] == on_demand["resources"]  # Equal fit, so that the priority decides.
    assert spot["priority"] > on_demand["priority"]
    for kind in (spot, on_demand):
        assert kind["min_workers"] == 0
        assert 0 < kind["max_workers"] <= prepared["max_workers"]


def test_the_head_is_not_a_training_machine_and_never_a_spot_one(prepared):
    head = prepared["available_node_types"][prepared["head_node_type"]]
    assert head["resources"] == {"CPU": 0}
    assert head["max_workers"] == 0
    assert not head["node_config"].keys() & {"InstanceMarketOptions", "scheduling", "guestAccelerators"}


def test_idle_workers_go_and_leave_no_disk_behind(config):
    assert 0 < config["idle_timeout_minutes"] <= 15
    assert config["provider"].get("cache_stopped_nodes", config["provider"]["type"] == "aws") is False
    for node in node_configs(config):
        assert all(disk.get("autoDelete", True) for disk in node.get("disks", []))


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


def test_the_commands_at_the_top_are_ones_that_ray_has(file):
    check_commands(commands_at_the_top(file), "get-auth-token up exec attach dashboard rsync-down down", file)


def test_the_documented_commands_for_a_cloud_are_ones_that_ray_has():
    check_commands(commands_of_the_docs("cloud"), "up exec attach dashboard rsync-down down", AWS)


# --- cluster.yaml -----------------------------------------------------------------------------------------------------


def ec2_report(node_config):
    """What boto3 says of the request that Ray makes of a `node_config`; empty where all is right."""
    import botocore.session
    from botocore.validate import ParamValidator

    request = botocore.session.Session().get_service_model("ec2").operation_model("RunInstances").input_shape
    return ParamValidator().validate({"MinCount": 1, "MaxCount": 1} | node_config, request).generate_report()


def test_aws_knows_every_field_of_its_nodes():
    for node in node_configs(load(AWS)):
        assert ec2_report(node) == ""


@pytest.mark.parametrize(
    "path",
    [(), ("BlockDeviceMappings", 0), ("BlockDeviceMappings", 0, "Ebs"), ("InstanceMarketOptions",)],
    ids=lambda path: ".".join(map(str, path)) or "node_config",
)
def test_a_field_that_aws_does_not_know_is_found(path):
    node = load(AWS)["available_node_types"]["ray.worker.gpu"]["node_config"]
    at(node, path)["NoSuchKey"] = 1
    assert "NoSuchKey" in ec2_report(node)


def test_workers_on_aws_are_gpu_machines_whose_resources_aws_tells():
    prepared = prepare_config(load(AWS))
    for kind in workers(prepared).values():
        # g and p are AWS's NVIDIA families; a resource written here would override what `ray up` detects.
        assert re.match(r"[gp]\d", kind["node_config"]["InstanceType"])
        assert kind["resources"] == {}
    spot, on_demand = (kind["node_config"] for kind in workers(prepared).values())
    assert spot.pop("InstanceMarketOptions") == {"MarketType": "spot"}
    assert spot == on_demand


def test_one_edit_sets_the_image_of_every_node_on_aws_and_disks_are_large():
    settings = [line for line in text(AWS).splitlines() if "ami-CHANGE-ME" in line and not line.startswith("#")]
    assert len(settings) <= 1  # 0 in a copy where it was set.
    nodes = node_configs(prepare_config(load(AWS)))
    assert len({node["ImageId"] for node in nodes}) == 1
    for node in nodes:
        (disk,) = node["BlockDeviceMappings"]
        assert disk["Ebs"]["VolumeType"] == "gp3"
        assert disk["Ebs"]["VolumeSize"] >= 200


# --- cluster/gcp.yaml -------------------------------------------------------------------------------------------------

SHARED = ("file_mounts", "rsync_exclude", "head_start_ray_commands", "worker_start_ray_commands")
MAPPINGS = [(i, *path) for i, node in enumerate(node_configs(load(GCP))) for path in mappings(node, "Instance", GCE)]


def test_google_cloud_gets_the_same_project_set_up_alike():
    aws, gcp = load(AWS), load(GCP)
    for key in (*SHARED, "setup_commands"):
        assert gcp[key] == aws[key]
    assert [command.replace("google-api-python-client", "boto3") for command in gcp["head_setup_commands"]] == aws[
        "head_setup_commands"
    ]


def test_google_cloud_knows_every_field_of_its_nodes():
    for node in node_configs(prepare_config(load(GCP))):
        assert wrong_fields(node, "Instance", GCE) == []


@pytest.mark.parametrize("path", MAPPINGS, ids=lambda path: ".".join(map(str, path)))
def test_a_field_that_google_cloud_does_not_know_is_found(path):
    nodes = node_configs(load(GCP))
    section = at(nodes, path)
    section["noSuchKey"] = section.pop(next(iter(section)))
    assert any("noSuchKey" in wrong for node in nodes for wrong in wrong_fields(node, "Instance", GCE))


def test_workers_on_google_cloud_are_machines_with_the_gpus_that_ray_is_told_of():
    for kind in workers(load(GCP)).values():
        node = kind["node_config"]
        (gpus,) = node["guestAccelerators"]
        assert kind["resources"]["GPU"] == gpus["acceleratorCount"]
        # The last part of a machine type is the number of its CPUs; Google Cloud tells Ray neither.
        assert kind["resources"]["CPU"] == int(node["machineType"].rpartition("-")[2])
        assert node["scheduling"]["onHostMaintenance"] == "TERMINATE"  # A machine with GPUs is refused otherwise.


def test_a_spot_machine_of_google_cloud_is_deleted_when_it_is_taken_away():
    spot, on_demand = (kind["node_config"] for kind in workers(load(GCP)).values())
    assert spot.pop("scheduling") | {"onHostMaintenance": "TERMINATE"} == {
        "provisioningModel": "SPOT",
        "instanceTerminationAction": "DELETE",
        "onHostMaintenance": "TERMINATE",
        "automaticRestart": False,
    }
    del on_demand["scheduling"]
    assert spot == on_demand


def test_nodes_on_google_cloud_share_one_image_and_zone_and_have_large_disks():
    config = load(GCP)
    provider, nodes = config["provider"], node_configs(config)
    assert provider["availability_zone"].startswith(provider["region"])
    assert len({disk["initializeParams"]["sourceImage"] for node in nodes for disk in node["disks"]}) == 1
    for node in nodes:
        (disk,) = node["disks"]
        assert disk["boot"] and disk["initializeParams"]["diskSizeGb"] >= 200
        assert disk["initializeParams"]["diskType"].startswith(f"zones/{provider['availability_zone']}/diskTypes/")


# --- cluster/local.yaml -----------------------------------------------------------------------------------------------


@pytest.fixture
def local():
    return load(LOCAL)


def test_the_file_for_your_own_machines_passes_the_check_too(local):
    local["provider"]["worker_ips"] = ["192.0.2.1"]
    validate_config(prepare_config(local))
    local["provider"]["no_such_key"] = local["auth"]["no_such_key"] = 1
    with pytest.raises(ValidationError, match="no_such_key"):
        validate_config(prepare_config(local))


def test_own_machines_get_the_same_project_and_start_ray_alike(local):
    aws = load(AWS)
    assert {key: local[key] for key in SHARED} == {key: aws[key] for key in SHARED}
    install, theirs = (next(c for c in one["setup_commands"] if "pip install" in c) for one in (local, aws))
    assert install.replace("'.[quickstart]'", ".") == theirs


def test_the_documented_commands_for_own_machines_are_ones_that_ray_has():
    names = "get-auth-token up submit exec exec exec rsync-down down"
    check_commands(commands_of_the_docs("own machines"), names, LOCAL)
