"""A Ray that a search starts for itself: its dashboard comes up beside the first trial, and all of it ends with it."""

import os
import re
import socket
import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from processes import command_line, descendants, left_after
from searches import ROOT

pytestmark = pytest.mark.ray

STARTS = """
import time
from search.cluster.connect import prepare_environment, start_ray
prepare_environment(None)
start_ray(None)
from search.cluster.ray_dashboard import dashboard_address
print("up", repr(dashboard_address()), flush=True)
while not dashboard_address():
    time.sleep(0.05)
from ray._private.worker import _global_node
from ray.util.state import list_nodes
print("dashboard", len(list_nodes(_global_node.gcs_address)), _global_node.get_logs_dir_path(), flush=True)
time.sleep(600)
"""
"""`list_nodes` asks the dashboard, whose address it has from where Ray's own commands have it."""
AGENT_PORT = 52365
"""Ray's default."""


def test_nothing_waits_for_its_dashboard_which_comes_up_and_ends_with_the_search():
    with ExitStack() as stack:
        with suppress(OSError):  # or another Ray has it
            stack.enter_context(socket.create_server(("127.0.0.1", AGENT_PORT)))
        search = subprocess.Popen([sys.executable, "-c", STARTS], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        stack.callback(search.wait)
        stack.callback(search.kill)
        assert read(search, "up") == ["''"]
        nodes, logs = read(search, "dashboard")
        assert nodes == "1"
        assert "Failed to bind" not in Path(logs, "dashboard_agent.log").read_text()

        lines = {pid: command_line(pid) for pid in descendants(search.pid)}
        assert not any("log_monitor.py" in line for line in lines.values())
        [dashboard] = [pid for pid, line in lines.items() if "dashboard/dashboard.py" in line]
        below = descendants(dashboard)
        assert below and {os.getpriority(os.PRIO_PROCESS, pid) for pid in {dashboard, *below}} == {19}

        search.kill()  # it cannot end the others itself
        search.wait()
        # Ray's agents take a minute to notice.
        assert left_after(30, {pid for pid, line in lines.items() if not re.match("ray::.*Agent", line)}) == []


def read(process: subprocess.Popen, word: str) -> list[str]:
    """The rest of the next line that begins with a word."""
    return next(rest for first, *rest in map(str.split, process.stdout) if first == word)
