"""Starting Ray on this machine, or connecting to a cluster."""

import atexit
import os
import secrets
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from search.cli.messages import say
from search.cluster.reach import ADDRESS, why_unreachable
from trainables.system.full_disk import require_writable
from trainables.system.machine import private_folder

if TYPE_CHECKING:
    from search.cluster.resources import Node

MAX_TEMPORARY_PATH = 31
"""Bytes of a temporary folder's path. Ray adds up to 72 (/ray/session_<time>_<pid>/sockets/dash_MetricsHead), and a
socket's path has at most 107, on macOS 103. With more, Ray does not start, or loses its dashboard and a minute."""
SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")
WORKERS_VARIABLES = ("RAY_TRAIN_", "OMP_WAIT", "MALLOC_")
"""How the variables of this environment begin that the workers of a cluster get as well."""


def prepare_environment(address: str | None) -> None:
    """The environment of Ray and its workers, before Ray is imported. Our own lines tell what happens, not Ray's."""
    if address is None:
        if ignored := os.environ.pop("RAY_ADDRESS", None):
            say(f"RAY_ADDRESS={ignored} is ignored: --address auto is what connects to it")
        prepare_folders()
        provide_token()
        # A Ray that starts here listens on 127.0.0.1 alone, whatever the system is.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    # Under `uv run` Ray would pack the current folder and run `uv` for each worker, where all of it is installed.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # see Interruptible
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")  # failed trials have no metric
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "1")  # what a kill of this process can make Tune forget
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    # For how long workers wait for room: a new machine takes minutes, and a lost one may never come back.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "86400")
    os.environ.setdefault("RAY_TRAIN_COLLECTIVE_TIMEOUT_S", "600")
    # One process less for each trial: its state is safe after each epoch, whether it hears of a node's end or not.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    # Threads that spin while they wait made an epoch 4 times as long where another process wanted the CPU, too.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


def prepare_folders() -> None:
    """Set up folders for the sockets and logs of a Ray that starts here. Raises `ValueError` if none can be used."""
    avoid_folders_of_other_users()
    for variable in ("RAY_TMPDIR", "TMPDIR"):
        path = os.environ.get(variable, "")
        if len(os.fsencode(path)) > MAX_TEMPORARY_PATH:
            require_writable(Path(path), variable)
            os.environ[variable] = short_link(path, variable)
    require_writable(temporary_folder(), "RAY_TMPDIR")


def provide_token() -> None:
    """Ray stores the token of a cluster that it starts in the home folder, which may be read-only."""
    token = Path("~/.ray/auth_token").expanduser()
    if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys() and not token.is_file():
        try:
            require_writable(token.parent, "HOME")
        except ValueError:
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def temporary_folder() -> Path:
    """The folder in which Ray makes its own."""
    default = os.environ.get("TMPDIR", "/tmp") if sys.platform.startswith("linux") else "/tmp"
    return Path(os.environ.get("RAY_TMPDIR", default))


def avoid_folders_of_other_users() -> None:
    """Use a private folder if another user's Ray owns the shared ones: Tune needs locks there to resume a search."""
    shared = [temporary_folder() / name for name in ("ray", "_ray_lockfiles")]
    closed = any(folder.exists() and not os.access(folder, os.W_OK) for folder in shared)
    if closed and (own := private_folder()):
        os.environ["RAY_TMPDIR"] = str(own)


def short_link(path: str, variable: str) -> str:
    """A link to a folder whose path is too long for Ray's sockets; it is removed when this process exits."""
    for folder in SHORT_FOLDERS:
        try:
            own = Path(tempfile.mkdtemp(prefix="ray-", dir=folder))
            atexit.register(shutil.rmtree, own, ignore_errors=True)
            (own / "t").symlink_to(Path(path).absolute())
        except OSError:
            continue
        return str(own / "t")
    raise ValueError(
        f"{variable}={path} is too long for the sockets that Ray makes there, and no link to it can be made in "
        f"{' or '.join(SHORT_FOLDERS)}. Set RAY_TMPDIR to a folder whose path has at most {MAX_TEMPORARY_PATH} bytes."
    )


def start_ray(address: str | None) -> "list[Node]":
    """Connect to a cluster or start Ray here: the nodes that a search can have."""
    import logging

    import ray

    from search.cluster.own_ray import start_own_ray
    from search.cluster.resources import present_nodes, reachable_nodes

    for name in ("ray", "ray.tune", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    say("starting Ray on this machine" if address is None else f"connecting to Ray at {address}")
    if address is None:
        start_own_ray(log_to_driver=False, logging_level=logging.ERROR)
    else:
        environment = {"env_vars": worker_environment()}
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, runtime_env=environment)
    avoid_folders_of_other_users()  # which a cluster's address is looked for in
    require_head_node()
    return reachable_nodes(present_nodes(), launched=address is not None)


def worker_environment() -> dict[str, str]:
    """Variables for the workers of a cluster. Those of a Ray that starts here inherit this environment; with one of
    their own they could not use the processes that Ray starts in advance."""
    return {name: value for name, value in os.environ.items() if name.startswith(WORKERS_VARIABLES)}


def require_head_node() -> None:
    """Raises `ValueError` unless this is the head node, where trials leave their checkpoints."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    head = next((node for node in ray.nodes() if "node:__internal_head__" in node["Resources"]), None)
    if head is not None and head["NodeID"] != here:
        raise ValueError(
            f"This is not the cluster's head node ({head['NodeManagerAddress']} is). A search keeps its results and "
            "checkpoints there: start it there."
        )


def check_address(address: str | None) -> None:
    """Raises `ValueError` within seconds, before any work, if a search cannot join the cluster at `address`."""
    if address is None:
        return
    option, meant = f"--address {address}", address
    if address == "auto" and (meant := os.environ.get("RAY_ADDRESS") or address) != address:
        option = f"--address auto, which is RAY_ADDRESS={meant}"
    if meant.startswith("ray://"):
        raise ValueError(
            f"{option}: a search writes its results where it runs, which is the head node. Start it there: "
            "ray job submit -- python -m search.run --address auto ..., or ray submit with the cluster's file."
        )
    host, _, port = meant.rpartition(":")
    if meant != "auto" and not (host and port.isdigit() and 1024 <= int(port) < 65536 and "/" not in host):
        raise ValueError(
            f"{option} is not an address of a Ray cluster. Expected auto, or host:port such as 10.0.0.5:6379. {ADDRESS}"
        )
    if problem := why_unreachable(meant):
        raise ValueError(f"{option}: {problem}")
