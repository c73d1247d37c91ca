"""The manifests for Kubernetes name fields that KubeRay and Kubernetes have, and fit each other, Ray and the image."""

import re
import shlex
import tomllib
from pathlib import Path, PurePosixPath

import pytest
import yaml
from api_fields import KUBERNETES, at, mappings, wrong_fields
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.scripts.scripts import cli

from search.cluster import resources
from search.options.arguments import parse_arguments

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "cluster" / "kubernetes"
FILES = ("raycluster.yaml", "rayjob.yaml", "results.yaml", "fetch.yaml")
HOME = PurePosixPath("/home/ray")


def text(file):
    return (FOLDER / file).read_text()


def load(file):
    return yaml.safe_load(text(file))


def wrong(manifest):
    return wrong_fields(manifest, manifest["kind"], KUBERNETES)


@pytest.fixture
def spec():
    return load("raycluster.yaml")["spec"]


@pytest.fixture
def dockerfile():
    """Its instructions, a line each, without comments."""
    lines = (FOLDER / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def pods(spec):
    return [group["template"]["spec"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]


def autoscaling(spec):
    """What Ray's autoscaler makes of a cluster."""
    return _derive_autoscaling_config_from_ray_cr({"metadata": {"name": "any", "namespace": "any"}, "spec": spec})


@pytest.mark.parametrize("file", FILES)
def test_every_field_is_one_that_the_api_has(file):
    assert wrong(load(file)) == []


@pytest.mark.parametrize(
    ("file", "path"),
    [(file, path) for file in FILES for path in mappings(load(file), load(file)["kind"], KUBERNETES)],
    ids=lambda part: part if isinstance(part, str) else ".".join(map(str, part)) or "top",
)
def test_a_misspelt_field_is_found_wherever_it_is(file, path):
    manifest = load(file)
    for name in list(at(manifest, path)):
        if (path, name) == ((), "kind"):
            continue
        section = at(manifest, path)
        section[f"{name}x"] = section.pop(name)
        assert any(f".{name}x: " in line for line in wrong(manifest))
        section[name] = section.pop(f"{name}x")
    assert wrong(manifest) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "enableInTreeAutoscaling"), "true"),
        (("spec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (("spec", "workerGroupSpecs", 0, "maxReplicas"), "8"),
        (("spec", "workerGroupSpecs", 0, "template", "spec", "containers", 0, "resources", "limits", "cpu"), 7),
        (("spec", "workerGroupSpecs"), {"groupName": "gpu"}),
        (("spec", "headGroupSpec", "template", "spec", "containers"), [{"name": "ray-head"}]),
    ],
)
def test_a_value_of_another_type_is_found(path, value):
    manifest = load("raycluster.yaml")
    at(manifest, path[:-1])[path[-1]] = value
    assert wrong(manifest)


def test_a_job_makes_the_cluster_of_the_other_file(spec):
    assert load("rayjob.yaml")["spec"]["rayClusterSpec"] == spec


def test_the_cluster_runs_the_pinned_ray_and_lets_nobody_in_without_its_token(spec):
    assert f"ray=={spec['rayVersion']}" in (ROOT / "constraints.txt").read_text().splitlines()
    assert spec["authOptions"] == {"mode": "token"}
    assert "serviceType" not in spec["headGroupSpec"]  # ClusterIP: not reachable from outside.


@pytest.mark.parametrize("group", ["head", "worker"])
def test_pods_start_ray_with_options_that_it_has(spec, group):
    params = (spec["headGroupSpec"] if group == "head" else spec["workerGroupSpecs"][0])["rayStartParams"]
    arguments = [f"--{name}={value}" for name, value in params.items()]
    where = "--head" if group == "head" else "--address=head:6379"
    options = cli.commands["start"].make_context("start", [where, *arguments]).params
    assert options["num_cpus"] == (0 if group == "head" else None)


def test_the_autoscaler_starts_and_deletes_gpu_workers_and_leaves_the_head_alone(spec):
    config = autoscaling(spec)
    head, gpu = (config["available_node_types"][name] for name in ("headgroup", "gpu"))
    assert head["resources"]["CPU"] == 0 and "GPU" not in head["resources"]
    assert gpu["resources"]["GPU"] == 1
    assert gpu["min_workers"] == 0 < gpu["max_workers"]
    assert spec["enableInTreeAutoscaling"] is True
    assert 0 < config["idle_timeout_minutes"] <= 15


def test_a_search_waits_for_the_workers_that_the_autoscaler_can_start(spec, tmp_path, monkeypatch):
    annotations = spec["headGroupSpec"]["template"]["metadata"]["annotations"]
    (told,) = (value for name, value in annotations.items() if name == "finetune-search/nodes")
    (tmp_path / "nodes").write_text(told)
    monkeypatch.setattr(resources, "AUTOSCALER_CONFIG", tmp_path / "nodes")
    gpu = autoscaling(spec)["available_node_types"]["gpu"]
    node = resources.Node(cpus=gpu["resources"]["CPU"], gpus=gpu["resources"]["GPU"])
    nodes = resources._nodes_of_launcher()
    assert nodes == [node] * gpu["max_workers"]
    size = resources.group_size(nodes, num_workers=1, cpus_per_worker=None, gpus_per_worker=1)
    assert resources.trials_at_once(nodes, size, None) == gpu["max_workers"]


def test_the_head_has_that_annotation_as_the_file_that_a_search_reads(spec):
    pod = spec["headGroupSpec"]["template"]["spec"]
    (mount,) = (mount for mount in pod["containers"][0]["volumeMounts"] if mount["name"] == "nodes")
    (item,) = next(volume for volume in pod["volumes"] if volume["name"] == "nodes")["downwardAPI"]["items"]
    assert mount["mountPath"] == str(HOME / resources.AUTOSCALER_CONFIG.relative_to("~"))
    assert mount["subPath"] == item["path"]
    assert item["fieldRef"]["fieldPath"] == "metadata.annotations['finetune-search/nodes']"


def test_mounts_and_volumes_belong_together(spec):
    for pod in (*pods(spec), load("fetch.yaml")["spec"]):
        volumes = [volume["name"] for volume in pod["volumes"]]
        assert sorted(volumes) == sorted(mount["name"] for mount in pod["containers"][0]["volumeMounts"])
    claims = re.findall(r"claimName: (\S+?)\}", "".join(map(text, FILES)))
    assert set(claims) == {load("results.yaml")["metadata"]["name"]}
    assert len(claims) == 3  # Each head and the pod that fetches: a disk that one node at a time can have.


def test_workers_have_shared_memory_within_their_own(spec):
    _, worker = pods(spec)
    (volume,) = worker["volumes"]
    (mount,) = worker["containers"][0]["volumeMounts"]
    assert mount["mountPath"] == "/dev/shm" and volume["emptyDir"]["medium"] == "Memory"
    sizes = (volume["emptyDir"]["sizeLimit"], worker["containers"][0]["resources"]["limits"]["memory"])
    shared, whole = (int(size.removesuffix("Gi")) for size in sizes)
    assert 0 < shared < whole


@pytest.mark.parametrize("file", ["raycluster.yaml", "rayjob.yaml"])
def test_one_edit_sets_the_image_of_every_pod(file):
    body = "".join(line for line in text(file).splitlines(keepends=True) if not line.startswith("#"))
    assert body.count("IMAGE-CHANGE-ME") <= 1  # 0 in a copy where it was set.
    manifest = load(file)["spec"]
    assert len({pod["containers"][0]["image"] for pod in pods(manifest.get("rayClusterSpec", manifest))}) == 1


def test_the_jobs_search_runs_on_the_head_and_keeps_its_results_on_the_disk(spec):
    job = load("rayjob.yaml")["spec"]
    python, m, module, *arguments = shlex.split(job["entrypoint"])
    assert (python, m, module) == ("python", "-m", "search.run")
    options = parse_arguments(arguments)
    assert (options.space, options.address, options.gpus_per_worker) == ("pets", "auto", 1)
    disk = spec["headGroupSpec"]["template"]["spec"]["containers"][0]["volumeMounts"][0]
    assert options.results.is_relative_to(disk["mountPath"])
    # Ray starts a job's driver on the head node as long as it asks for no resources.
    assert job["submissionMode"] == "K8sJobMode" and not any(
        name.startswith("entrypoint") for name in job.keys() - {"entrypoint"}
    )
    assert job["backoffLimit"] == 3 and job["shutdownAfterJobFinishes"] is True


@pytest.mark.parametrize("file", ["raycluster.yaml", "rayjob.yaml"])
def test_the_commands_at_the_top_name_what_is_there(file):
    header = text(file).partition("\napiVersion:")[0].replace("\\\n#", "")
    commands = re.findall(r"^#   (.+?)(?:  +#.*)?$", header, re.MULTILINE)
    for path in re.findall(r"(?:-f|--file) (cluster/\S+)", "\n".join(commands)):
        assert (ROOT / path).is_file(), path
    objects = {load(one)["metadata"]["name"] for one in FILES}
    named = re.findall(r"(?:pod/|job/|rayjob |secret |cluster=|service/)(finetune-search[a-z-]*)", "\n".join(commands))
    assert named and {name.removesuffix("-head-svc") for name in named} <= objects
    copies = [re.search(r"kubectl cp .*?:(\S+) results$", command) for command in commands if "kubectl cp" in command]
    assert [copy[1] for copy in copies] == [
        {"raycluster.yaml": "/home/ray/disk/results", "rayjob.yaml": "/disk/results"}[file]
    ]
    for command in commands:
        if "-- ray job " in command:
            _, _, action, *words = shlex.split(command.partition(" -- ")[2])
            found = cli.commands["job"].commands[action].make_context(action, words).params
            if action == "submit":
                assert parse_arguments(list(found["entrypoint"])[3:]).results == Path("/home/ray/disk/results")


def test_the_image_has_this_project_in_the_pinned_versions(dockerfile):
    (install,) = (line for line in dockerfile if "pip install" in line)
    assert "-c constraints.txt -e ." in install
    copied = [name for line in dockerfile if line.startswith("COPY") for name in line.split()[1:-1]]
    mounts = yaml.safe_load((ROOT / "cluster.yaml").read_text())["file_mounts"]
    assert sorted(copied) == sorted(local for remote, local in mounts.items() if "finetune-search" in remote)


def test_the_image_runs_a_python_that_the_project_supports_as_a_user_that_may_write_to_the_disk(dockerfile, spec):
    (python,) = (re.search(r"python:3\.(\d+)-slim", line) for line in dockerfile if line.startswith("FROM"))
    least = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert int(python[1]) >= int(least.removeprefix(">=3."))
    assert dockerfile[-1] == f"USER {HOME.name}"
    group = spec["headGroupSpec"]["template"]["spec"]["securityContext"]["fsGroup"]
    assert f"RUN useradd --uid {group} --create-home {HOME.name}" in dockerfile


def test_the_documented_commands_are_those_of_the_manifest():
    block = (ROOT / "docs" / "clusters.md").read_text().partition("<!-- kubernetes -->\n```sh\n")[2].partition("```")[0]
    commands = [line.partition("   #")[0].strip() for part in block.splitlines() for line in part.split(" && ")]
    header = re.sub(r" {3,}#.*", "", text("rayjob.yaml"))
    known = [line.removeprefix("#   ") for line in header.splitlines() if line.startswith("#   ")]
    assert len(commands) == 10
    assert [command for command in commands if command not in known] == []
    files = re.findall(r"cluster/kubernetes/[a-z]+\.yaml|cluster/kubernetes/Dockerfile", block)
    assert files and all((ROOT / file).is_file() for file in files)
