"""A Ray that a search starts for itself on this machine, so that its first trial trains soon.

Ray 2.60 waits for its dashboard, two seconds on two cores, before it starts what runs trials. Here the dashboard comes
up beside the first trial (see `ray_dashboard`). Nothing reads the logs of workers either: a search shows none.
"""

import os
from contextlib import suppress
from typing import Any
from unittest.mock import patch

import ray
from ray._private import node, parameter, ray_constants
from ray.experimental import internal_kv

NICENESS = 19
"""Of the dashboard and of Ray's monitor, which may wait: workers have 15."""
CONNECTING = {"raylet_client_connect_timeout_milliseconds": 50, "raylet_client_num_connect_attempts": 200}
"""Ray's processes try to reach each other for 10 s, as by default, but not once a second: the first try often fails."""


def start_own_ray(**options: Any) -> None:
    """`ray.init` for a Ray on this machine."""
    with patch.object(node, "Node", HeadNode):
        ray.init("local", _system_config=CONNECTING, **options)


class HeadNode(node.Node):
    """Ray's, which waits for nothing that trials do not need."""

    def __init__(self, ray_params: parameter.RayParams, **options: Any) -> None:
        ray_params.update(include_log_monitor=False)
        # Any port. Where another Ray has the usual one, this one's agent would try to get it for four seconds.
        ray_params.update(dashboard_agent_listen_port=0)
        super().__init__(ray_params, **options)

    def start_monitor(self) -> None:
        super().start_monitor()  # type: ignore[no-untyped-call]
        self._give_way(ray_constants.PROCESS_TYPE_MONITOR)

    def start_api_server(self, **options: Any) -> None:
        # Ray asks its key-value store for the dashboard's address until it is there.
        with patch.object(internal_kv, "_internal_kv_get", return_value=b""):
            super().start_api_server(**options)
        self._give_way(ray_constants.PROCESS_TYPE_DASHBOARD)

    def _give_way(self, process_type: str) -> None:
        for started in self.all_processes.get(process_type, ()):
            with suppress(ProcessLookupError):
                os.setpriority(os.PRIO_PROCESS, started.process.pid, NICENESS)
