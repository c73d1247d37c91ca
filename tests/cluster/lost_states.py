"""Searches on a cluster whose nodes go with the training states that they keep, and one that is killed and resumed.

    python tests/cluster/lost_states.py

Several raylets on this machine stand for the nodes; what is on the disk of one that goes is deleted. Each search has
the seeds of an undisturbed one and must end with the same tables, to the last digit, and the same best weights. Needs
5 to 10 minutes on 2 cores. Exit code 0 if everything held.
"""

import argparse
import contextlib
import hashlib
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from outcome import expect, say
from ray.cluster_utils import Cluster

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from searches import EPOCH_TIMES, PINNED, TIMES, Search, settings, tables, without
from tiny_run import draw_images

SETTINGS = f"{PINNED} arch=test_resnet.r160_in1k weight_decay=0.01 lr_max=0.001..0.01 epochs=4 tta_views=0"
TRIALS = 2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/var/tmp") as temporary, nodes(Path(temporary)) as cluster:
        wanted = exactly(cluster.search("undisturbed").wait_for_end())

        search = cluster.search("node")
        search.wait_for_epoch(2)
        search.expect_nothing_on_the_head()
        cluster.lose(1, search)
        cluster.add(1)
        expect(exactly(search.wait_for_end()) == wanted, "a lost node: tables and weights as undisturbed")

        search = cluster.search("copies")
        search.wait_for_epoch(2)
        cluster.lose(len(cluster.workers), search)
        cluster.add(2)
        expect(exactly(search.wait_for_end()) == wanted, "all copies lost: tables and weights as undisturbed")
        expect("began again, all copies of its state were lost" in search.text, "and the search says so")

        search = cluster.search("killed")
        search.wait_for_epoch(3)
        search.process.kill()
        search.process.wait()
        search.expect_nothing_on_the_head()
        expect(search.states(), f"the nodes have the states of the killed search: {search.states()}")
        search = cluster.search("killed", "--resume")
        expect(exactly(search.wait_for_end()) == wanted, "killed and resumed: tables and weights as undisturbed")
        expect("began again" not in search.text, "it found its states")
        expect(list(cluster.cache.glob("states/*")) == [], "and no states are left")

        search = cluster.search("interrupted")
        search.wait_for_epoch(3)
        search.process.send_signal(signal.SIGINT)
        search.wait(60)
        expect(
            (search.folder / "best/model.safetensors").is_file(), "interrupted: the running trial's model is the best"
        )
        expect(search.states(), f"the nodes have the states of the interrupted search: {search.states()}")
        search = cluster.search("interrupted", "--resume")
        expect(exactly(search.wait_for_end()) == wanted, "interrupted and resumed: tables and weights as undisturbed")
    print("everything held")
    return 0


class Nodes:
    def __init__(self, folder: Path) -> None:
        self.folder, self.cache = folder, folder / "cache"
        told = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5", "RAY_worker_niceness": "0"}
        os.environ |= told | {"FINETUNE_SEARCH_CACHE": str(self.cache)}
        self.data = draw_images(folder / "data", each=20)
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self.workers = []
        self.add(2)

    def add(self, count: int) -> None:
        self.workers += [self.cluster.add_node(num_cpus=1) for _ in range(count)]

    def lose(self, count: int, search: "OnNodes") -> None:
        lost = [self.workers.pop(0) for _ in range(count)]
        for node in lost:
            self.cluster.remove_node(node, allow_graceful=False)
            for states in self.cache.glob(f"states/*/{node.node_id}"):
                shutil.rmtree(states)
        say(f"{count} nodes are gone")

    def search(self, name: str, *options: object) -> "OnNodes":
        self.cluster.wait_for_nodes()
        common = ("--address", self.cluster.address, "--cpus-per-worker", 1, "--report", "off", "--seed", 1)
        common += ("--space", "quickstart", "--searcher", "random", "--scheduler", "none", "--max-concurrent", 1)
        given = ("--data", self.data, "--trials", TRIALS, *common, *settings(SETTINGS))
        return OnNodes(self.folder / "results" / name, *given, *options)


@contextlib.contextmanager
def nodes(folder: Path) -> Iterator[Nodes]:
    found = Nodes(folder)
    try:
        yield found
    finally:
        found.cluster.shutdown()


class OnNodes(Search):
    """A search whose states the nodes keep."""

    def wait_for_epoch(self, epoch: int) -> None:
        self.wait_for(rf"trial 0 .*epoch {epoch}/")
        time.sleep(0.2)

    def wait_for_end(self) -> "OnNodes":
        code = self.wait(600)
        expect(code == 0, f"{self.folder.name} ended with exit code {code}")
        reported = re.findall(r"trial +\d+ +epoch \d+/", self.text)
        expect(len(reported) == len(set(reported)), "no epoch was reported twice")
        expect(not list(self.folder.glob("tune/*/error.txt")), "no trial began again because of an error")
        for line in self.lines:
            if line.startswith("cluster:"):
                say(f"    {line}")
        return self

    def states(self) -> list[str]:
        return sorted(
            str(p.relative_to(p.parents[2])) for p in Path(os.environ["FINETUNE_SEARCH_CACHE"]).glob("states/*/*/*/*")
        )

    def expect_nothing_on_the_head(self) -> None:
        states = [path for path in self.folder.glob("checkpoints/*/*/*") if path.suffix != ".json"]
        expect(not states, f"the head has no states: {states}")


def exactly(search: OnNodes) -> tuple:
    trials, epochs = tables(search.folder)
    weights = hashlib.sha256((search.folder / "best" / "model.safetensors").read_bytes()).hexdigest()
    return without(trials, TIMES), without(epochs, EPOCH_TIMES), weights


if __name__ == "__main__":
    sys.exit(main())
