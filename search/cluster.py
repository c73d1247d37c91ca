"""Starting Ray on this machine, or connecting to a cluster."""

import os

from search.cli import say
from search.reach import ADDRESS, why_unreachable


def prepare_environment(address: str | None) -> None:
    """The environment of Ray and its workers, before Ray is imported. Our own lines tell what happens, not Ray's."""
    if address is None:
        if ignored := os.environ.pop("RAY_ADDRESS", None):
            say(f"RAY_ADDRESS={ignored} is ignored: --address auto is what connects to it")
        # A Ray that starts here listens on 127.0.0.1 alone, whatever the system is.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
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


def start_ray(address: str | None) -> tuple[list, str]:
    """Connect to a cluster or start Ray here: the nodes that a search can have, and host:port of Ray's dashboard."""
    import logging

    import ray

    from search.resources import present_nodes, reachable_nodes

    for name in ("ray", "ray.tune", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    say("starting Ray on this machine" if address is None else f"connecting to Ray at {address}")
    context = ray.init(
        address=address or "local",
        log_to_driver=False,
        logging_level=logging.ERROR,
        runtime_env={"env_vars": environment_of_workers()} if address else None,
    )
    if context.dashboard_url:
        say(f"Ray's dashboard: http://{context.dashboard_url}")
    check_place()
    return reachable_nodes(present_nodes(), launched=address is not None), context.dashboard_url or ""


def environment_of_workers() -> dict[str, str]:
    """What workers of a cluster must be told. Those of a Ray that starts here have this process's environment; with one
    of their own they could not take the processes that Ray starts ahead."""
    return {name: value for name, value in os.environ.items() if name.startswith(("RAY_TRAIN_", "OMP_WAIT"))}


def check_place() -> None:
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
    """Raises `ValueError` where a search cannot join the cluster at `address`, within seconds and before any work."""
    if address is None:
        return
    given, meant = f"--address {address}", address
    if address == "auto" and (meant := os.environ.get("RAY_ADDRESS") or address) != address:
        given = f"--address auto, which is RAY_ADDRESS={meant}"
    if meant.startswith("ray://"):
        raise ValueError(
            f"{given}: a search writes its results where it runs, which is the head node. Start it there: "
            "ray job submit -- python -m search.run --address auto ..., or ray submit with the cluster's file."
        )
    host, _, port = meant.rpartition(":")
    if meant != "auto" and not (host and port.isdigit() and 1024 <= int(port) < 65536 and "/" not in host):
        raise ValueError(
            f"{given} is no address of a Ray cluster. Expected auto, or host:port, such as 10.0.0.5:6379. {ADDRESS}"
        )
    if problem := why_unreachable(meant):
        raise ValueError(f"{given}: {problem}")
