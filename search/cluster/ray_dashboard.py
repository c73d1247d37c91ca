"""Shows the address of Ray's dashboard as soon as it is up, and saves it in the run for `search.dashboard`."""

from dataclasses import replace
from typing import Any

from ray import tune
from ray._private import ray_constants, worker
from ray.experimental import internal_kv
from ray.tune.experiment import Trial

from search.cli.messages import say
from search.cluster.own_ray import HeadNode
from search.runs.command import CommandRecord
from search.runs.paths import RunFolder


class RayDashboard(tune.Callback):
    """Polls for the dashboard until it is up."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.reported = False

    def on_step_begin(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        if not self.reported and (address := dashboard_address()):
            self.reported = True
            say(f"Ray's dashboard: http://{address}")
            if self.folder.command.is_file():
                replace(CommandRecord.load(self.folder.path), ray_dashboard=address).save(self.folder.path)


def dashboard_address() -> str:
    """host:port of the dashboard of the connected Ray; empty until it is up."""
    node: Any = worker._global_node
    if not node.webui_url and isinstance(node, HeadNode):
        namespace = ray_constants.KV_NAMESPACE_DASHBOARD
        if found := internal_kv._internal_kv_get(ray_constants.DASHBOARD_ADDRESS, namespace=namespace):
            internal_kv._internal_kv_put("webui:url", found, namespace=namespace)  # for Ray's own commands
            node._webui_url = found.decode()
    return node.webui_url or ""
