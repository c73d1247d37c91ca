"""What bench/startup.py reads: the moments that processes tell, whose CPU seconds are whose, and its medians."""

import os
import subprocess
import sys
from types import ModuleType

import pytest
from searches import ROOT


@pytest.fixture
def startup(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "bench")
    import startup

    return startup


def test_every_process_of_a_search_tells_the_moments_that_it_sees(startup, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(startup.SITECUSTOMIZE)
    package = tmp_path / "trainables"
    package.mkdir()
    (package / "training.py").write_text(
        "class FineTune:\n"
        "    def __init__(self, on_progress): self.on_progress = on_progress\n"
        "    def run_epoch(self): self.on_progress()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "STARTUP_MOMENTS": str(tmp_path / "moments")}
    code = "from trainables.training import FineTune; FineTune(on_progress=print).run_epoch()"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    moments = startup.moments_in(tmp_path / "moments", since=0.0)
    assert list(moments) == ["training", "batch"]
    assert moments["training"] <= moments["batch"]


def test_cpu_seconds_are_those_of_a_process_and_of_all_below_it(startup):
    burn = "import time\nwhile time.process_time() < 0.3: pass\ninput()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burn!r}, 'ray::RayTrainWorker'])"
    with subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE) as process:
        watch = startup.Watch(process.pid)
        while watch.by_kind().get("worker", 0) < 0.2:
            watch.look()
        memory = watch.memory()
        process.communicate(b"\n")
    watch.look()
    kinds = watch.by_kind()  # also when they have ended
    assert kinds.keys() == {"driver", "worker"} and kinds["worker"] >= 0.2
    assert memory["worker"][0] == 1 and 1 < memory["worker"][1] < 100  # MB of an interpreter
    assert not watch.memory()  # they have ended


def test_the_table_has_the_medians_of_both_sides(startup):
    def run(side: str, seconds: float) -> dict:
        return {
            "side": side,
            "moments": dict.fromkeys(startup.MOMENTS, seconds),
            "cpu_seconds": {"worker": 2 * seconds, "driver": 0.0},
            "memory": {"worker": (1, 10 * seconds), "driver": (1, 80.0)},
        }

    runs = [run("before", 30), run("now", 10), run("before", 20), run("now", 11), run("before", 22), run("now", 18)]
    sides = ["before", "now"]
    result = startup.summarise(runs, sides) | {"sides": sides, "command": "", "versions": {"ray": "2.60"}}
    result |= {"cold": {"before": 40.0, "now": 20.0}, "load": [0.0, 1.0], "note": ""}
    table = startup.markdown(result | {"hardware": {"cpu": "none", "cores": 2, "gpu": None}})
    assert "| **the first batch is trained** | 22.0 | 11.0 |" in table
    assert "| worker | 44.0 | 22.0 |" in table and "| **in all** | 44.0 | 22.0 |" in table
    assert "| worker | 1: 220 | 1: 110 |" in table and "| driver | 1: 80 | 1: 80 |" in table
    assert "worker** | 1: 220 | 1: 110 |" in table
    assert "before 20.0 to 30.0; now 10.0 to 18.0" in table
