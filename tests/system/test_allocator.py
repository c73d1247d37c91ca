"""Freed memory stays with a process that computes, in whichever thread it does."""

import os
import subprocess
import sys

import pytest

from trainables.system.allocator import ENVIRONMENT, keep_freed_memory

COMPUTE = """
import resource, sys, threading
import numpy as np

def compute():
    def step():
        return [np.ones(100_000_000, np.uint8).sum() for _ in range(2)]
    step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        step()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

thread = threading.Thread(target=compute)
thread.start()
thread.join()
"""
KEEP = "from trainables.system.allocator import keep_freed_memory; keep_freed_memory()"
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs glibc")


def page_faults(code: str, **environment: str) -> int:
    """Of steps that allocate and free as much as the one before them, in a process of their own."""
    bare = {name: value for name, value in os.environ.items() if name not in ENVIRONMENT}
    child = subprocess.run(
        [sys.executable, "-c", code], env=bare | environment, capture_output=True, text=True, check=True
    )
    return int(child.stdout)


def test_a_step_asks_the_system_for_no_page_that_the_one_before_it_had():
    assert page_faults(COMPUTE) > 2_000  # or there would be nothing to gain
    assert page_faults(f"{KEEP}\n{COMPUTE}") < 200
    assert page_faults(COMPUTE, **ENVIRONMENT) < 200  # as the workers of a search begin


def test_what_the_user_has_set_stays(monkeypatch):
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MALLOC_ARENA_MAX", "4")
    keep_freed_memory()
    assert os.environ["MALLOC_ARENA_MAX"] == "4" and "MALLOC_TRIM_THRESHOLD_" not in os.environ
