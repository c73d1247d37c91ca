"""Starts Ray on this machine for one search, faster than `ray.init`.

Ray 2.60 waits for its dashboard, two seconds on two cores, before it starts the processes that run trials. Here the
dashboard starts in parallel with the first trial (see `ray_dashboard`). The log monitor is off: a search does not show
the logs of workers.
"""

import os
from contextlib import suppress
from typing import Any
from unittest.mock import patch

import ray
from ray._private import node, parameter, ray_constants
from ray.experimental import internal_kv

NICENESS = 19
"""Of the dashboard and of Ray's monitor, which are less urgent than the workers with 15."""
CONNECT_RETRIES = {"raylet_client_connect_timeout_milliseconds": 50, "raylet_client_num_connect_attempts": 200}
"""Ray's processes try to connect to each other for 10 s, as by default, but every 50 ms instead of once a second: the
first try often fails."""


def start_own_ray(**options: Any) -> None:
    """`ray.init` on this machine, with `HeadNode`."""
    with patch.object(node, "Node", HeadNode):
        ray.init("local", _system_config=CONNECT_RETRIES, **options)


class HeadNode(node.Node):
    """Ray's head node, without waiting for what trials do not need."""

    def __init__(self, ray_params: parameter.RayParams, **options: Any) -> None:
        ray_params.update(include_log_monitor=False)
        # 0 is any free port. If another Ray uses the default one, this one's agent would retry it for four seconds.
        ray_params.update(dashboard_agent_listen_port=0)
        super().__init__(ray_params, **options)

    def start_monitor(self) -> None:
        super().start_monitor()  # type: ignore[no-untyped-call]  # Ray's
        self._lower_priority(ray_constants.PROCESS_TYPE_MONITOR)

    def start_api_server(self, **options: Any) -> None:
        # Ray would poll its key-value store for the dashboard's address.
        with patch.object(internal_kv, "_internal_kv_get", return_value=b""):
            super().start_api_server(**options)
        self._lower_priority(ray_constants.PROCESS_TYPE_DASHBOARD)

    def _lower_priority(self, process_type: str) -> None:
        for info in self.all_processes.get(process_type, ()):
            with suppress(ProcessLookupError):
                os.setpriority(os.PRIO_PROCESS, info.process.pid, NICENESS)
