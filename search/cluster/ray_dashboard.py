"""Where Ray's dashboard is: said as soon as it is up, and noted with the run for `search.dashboard`."""

from dataclasses import replace
from typing import Any

from ray import tune
from ray._private import ray_constants, worker
from ray.experimental import internal_kv

from search.cli.messages import say
from search.cluster.own_ray import HeadNode
from search.runs.command import CommandRecord
from search.runs.paths import RunFolder


class RayDashboard(tune.Callback):
    """Looks for the dashboard until it is up."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.told = False

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if not self.told and (address := dashboard_address()):
            self.told = True
            say(f"Ray's dashboard: http://{address}")
            if self.folder.command.is_file():
                replace(CommandRecord.load(self.folder.path), ray_dashboard=address).save(self.folder.path)


def dashboard_address() -> str:
    """host:port of the dashboard of the Ray that this process is connected to; empty before it is up."""
    ours: Any = worker._global_node
    if not ours.webui_url and isinstance(ours, HeadNode):
        namespace = ray_constants.KV_NAMESPACE_DASHBOARD
        if found := internal_kv._internal_kv_get(ray_constants.DASHBOARD_ADDRESS, namespace=namespace):
            internal_kv._internal_kv_put("webui:url", found, namespace=namespace)  # where Ray's own commands look
            ours._webui_url = found.decode()
    return ours.webui_url or ""
