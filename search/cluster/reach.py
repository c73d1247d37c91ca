"""Whether a Ray cluster can be joined from here, asked in a process of its own: Ray tries for minutes, or aborts."""

import os
import socket
import subprocess
import sys

SECONDS = 40
"""For all of it. It takes 2 s where a cluster answers, and 10 s where something else listens."""
TCP_SECONDS = 5
PATIENCE = {"RAY_py_gcs_connect_timeout_s": "4", "RAY_gcs_rpc_server_connect_timeout_s": "2"}
"""Ray's own are 30 and 5 s, and it tries 20 times."""
ADDRESS = (
    "Give the address that `ray start` printed on the head node, or auto on the head node itself, or leave --address "
    "out to start Ray on this machine."
)
VERSIONS = "Install its versions here, or these on all of its nodes, and start it anew."
TOKEN = (
    "Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the token that the cluster was started with "
    "(on its head node: ray get-auth-token)."
)


def why_unreachable(address: str) -> str:
    """What keeps a search from joining the cluster at `address` (auto, or host:port), and what to do; or nothing."""
    command = [sys.executable, "-m", "search.cluster.reach", address]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=os.environ | PATIENCE)
    except subprocess.TimeoutExpired:
        return f"no Ray cluster answers there within {SECONDS} s. {ADDRESS}"
    if ended.returncode:
        return f"Ray cannot connect ({(ended.stderr.strip().splitlines() or ['it says nothing'])[-1]})."
    return ended.stdout.strip()


def main(address: str) -> str:
    """The same, in that process. The steps are those of `ray.init`."""
    import ray
    from ray._private import services
    from ray._private.authentication import authentication_token_setup as authentication

    try:
        at = services.canonicalize_bootstrap_address(address)
    except ConnectionError:
        return f"no Ray runs on this machine. {ADDRESS}"
    try:
        socket.create_connection(services.extract_ip_port(at), timeout=TCP_SECONDS).close()
    except OSError as error:
        return f"no Ray cluster answers at {at} ({error}). {ADDRESS}"
    if address == "auto":
        authentication.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    try:
        authentication.ensure_token_if_auth_enabled(create_token_if_missing=False)
        client = ray._raylet.GcsClient(address=at)
        services.get_node_to_connect_for_driver(client, timeout_seconds=TCP_SECONDS)
    except ray.exceptions.AuthenticationError:
        return f"the cluster at {at} wants another token than this process has. {TOKEN}"
    except ray.exceptions.RpcError as error:
        return f"what answers at {at} is no Ray cluster ({error}). {ADDRESS}"
    except RuntimeError as error:
        where = "Start the search on its head node."
        return f"this machine is not found among the nodes of the cluster at {at} ({error}). {where}"
    return why_other_versions(client)


def why_other_versions(client) -> str:
    """Ray wants its own version and that of Python to be the same on all machines."""
    from ray._common.usage.usage_lib import get_cluster_metadata
    from ray._private.utils import check_version_info

    if (metadata := get_cluster_metadata(client)) is None:  # a head that is coming up
        return ""
    try:
        check_version_info(metadata, "this machine")
    except RuntimeError as error:
        return f"{' '.join(str(error).split())}. {VERSIONS}"
    return ""


if __name__ == "__main__":
    print(main(sys.argv[1]))
