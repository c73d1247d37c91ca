"""Checks in a separate process that a Ray cluster can be joined from here: Ray would try for minutes, or abort."""

import os
import socket
import subprocess
import sys
from typing import Any

TIMEOUT_SECONDS = 40
"""Of the whole check. It takes 2 s if a cluster answers, and 10 s if something else listens."""
TCP_SECONDS = 5
RAY_TIMEOUTS = {"RAY_py_gcs_connect_timeout_s": "4", "RAY_gcs_rpc_server_connect_timeout_s": "2"}
"""Ray's defaults are 30 and 5 s, and it retries 20 times."""
ADDRESS = (
    "Give the address that `ray start` printed on the head node, or auto on the head node itself, or omit --address "
    "to start Ray on this machine."
)
VERSIONS = "Install the cluster's versions here, or these versions on all of its nodes, and restart it."
TOKEN = (
    "Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the token that the cluster was started with "
    "(on its head node: ray get-auth-token)."
)


def why_unreachable(address: str) -> str:
    """Why a search cannot join the cluster at `address` (auto, or host:port) and what to do, or an empty string."""
    command = [sys.executable, "-m", "search.cluster.reach", address]
    env = os.environ | RAY_TIMEOUTS
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, env=env)
    except subprocess.TimeoutExpired:
        return f"no Ray cluster answers there within {TIMEOUT_SECONDS} s. {ADDRESS}"
    if ended.returncode:
        return f"Ray cannot connect ({(ended.stderr.strip().splitlines() or ['no message'])[-1]})."
    return ended.stdout.strip()


def main(address: str) -> str:
    """The check itself, in that process. Its steps are those of `ray.init`."""
    import ray
    from ray._private import services
    from ray._private.authentication import authentication_token_setup as authentication

    try:
        at = services.canonicalize_bootstrap_address(address)
    except ConnectionError:
        return f"Ray is not running on this machine. {ADDRESS}"
    assert at is not None  # only for address=None
    try:
        socket.create_connection(services.extract_ip_port(at), timeout=TCP_SECONDS).close()
    except OSError as error:
        return f"no Ray cluster answers at {at} ({error}). {ADDRESS}"
    if address == "auto":
        authentication.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    try:
        authentication.ensure_token_if_auth_enabled(create_token_if_missing=False)
        cython: Any = ray._raylet
        client = cython.GcsClient(address=at)
        services.get_node_to_connect_for_driver(client, timeout_seconds=TCP_SECONDS)
    except ray.exceptions.AuthenticationError:
        return f"the cluster at {at} expects a different token. {TOKEN}"
    except ray.exceptions.RpcError as error:
        return f"{at} is not a Ray cluster ({error}). {ADDRESS}"
    except RuntimeError as error:
        return f"this machine is not a node of the cluster at {at} ({error}). Start the search on its head node."
    return version_mismatch(client)


def version_mismatch(client: Any) -> str:
    """Ray requires the same versions of Ray and Python on all machines."""
    from ray._common.usage.usage_lib import get_cluster_metadata
    from ray._private.utils import check_version_info

    if (metadata := get_cluster_metadata(client)) is None:  # the head is still starting
        return ""
    try:
        check_version_info(metadata, "this machine")
    except RuntimeError as error:
        return f"{' '.join(str(error).split())}. {VERSIONS}"
    return ""


if __name__ == "__main__":
    print(main(sys.argv[1]))
