"""A search over machines that share nothing, one of which is lost in the middle.

    python tests/cluster/two_hosts.py

Namespaces stand for the machines (see hosts.py). The head and one more train with two DDP workers, one on each; the
images are an archive that each machine fetches once. Then the second machine vanishes in the middle of an epoch and a
third one joins. Needs root, Debian's iproute2, and 5 to 10 minutes. Exit code 0 if everything held.
"""

import argparse
import csv
import functools
import http.server
import re
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

from hosts import OUTSIDE, Host, Hosts, arguments_of, network, ray_start, require, wait_until
from outcome import expect, say

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

PINNED = "pretrained=false presize=40 image_size=32 batch_size=8 freeze_epochs=1 epochs=5 bn_momentum=0.3 tta_views=0"
SETTINGS = f"arch=test_resnet.r160_in1k lr_max=0.003..0.01 {PINNED}".split()
TRIALS = 2
WORKER = "ray::RayTrainWorker"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    require()
    with tempfile.TemporaryDirectory(dir="/var/tmp") as temporary, network(Path(temporary)) as hosts:
        uri, fetched = serve_images(Path(temporary))
        head, second = hosts.add("head"), hosts.add("second")
        start_cluster(hosts, head, second)
        alone = Run(head, uri, "alone", workers=1).wait()
        both = Run(head, uri, "both", workers=2)
        both.wait_for(r"trial 0 .*epoch 2/")
        expect([host.count(WORKER) for host in (head, second)] == [1, 1], "a worker runs on each machine")
        expect(not (second_results := second.run("ls", str(head.home)).split()), f"no results there: {second_results}")
        both.wait()
        expect_same_losses(alone, both, 1e-3, "2 workers on 2 machines learn what 1 worker learns")

        disturbed = Run(head, uri, "disturbed", workers=2)
        disturbed.wait_for(r"trial 0 .*epoch 3/")
        time.sleep(0.3)
        second.vanish()
        say("the second machine is gone")
        third = hosts.add("third")
        join_cluster(hosts, head, third)
        disturbed.wait()
        expect_same_losses(both, disturbed, 1e-6, "losses as if nothing had happened")
        expect(disturbed.repeated() == [], f"no finished epoch was trained again: {disturbed.repeated()}")
        expect("best" not in third.run("ls", str(head.home)), "the third machine has no results either")
        for run in (alone, both, disturbed):
            wanted = ("trials.csv", "epochs.csv", "study.journal", "best/model.safetensors", "best/recipe.json")
            missing = [name for name in wanted if not (run.folder / name).is_file()]
            expect(not missing, f"{run.name}: tables and the best checkpoint are on the head; missing: {missing}")
        counts = {host.name: fetched[host.address] for host in (head, second, third)}
        expect(set(counts.values()) == {1}, f"each machine fetched the images once: {counts}")
    print("everything held")
    return 0


def serve_images(folder: Path) -> tuple[str, Counter]:
    """The URI of an archive of drawn images, and who fetched it how often."""
    from tiny_run import draw_images

    site = folder / "site"
    site.mkdir()
    with tarfile.open(site / "birds.tar.gz", "w:gz") as archive:
        archive.add(draw_images(folder / "birds"), "birds")
    fetched: Counter = Counter()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            fetched[self.client_address[0]] += 1
            super().do_GET()

        def log_message(self, *line: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer((OUTSIDE, 0), functools.partial(Handler, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://{OUTSIDE}:{server.server_port}/birds.tar.gz", fetched


def start_cluster(hosts: Hosts, head: Host, second: Host) -> None:
    head.run("ray", "get-auth-token", "--generate")
    ray_start(head, "--head", "--port=6379", "--dashboard-host=0.0.0.0")
    join_cluster(hosts, head, second)


def join_cluster(hosts: Hosts, head: Host, host: Host) -> None:
    hosts.copy(".ray/auth_token", head, host)
    ray_start(host, f"--address={head.address}:6379")
    say(f"{host.name} ({host.address}) has joined the cluster")


class Run:
    """One search, started on the head."""

    def __init__(self, head: Host, uri: str, name: str, *, workers: int) -> None:
        self.name = name
        self.started = time.monotonic()
        # What the head's processes see as home lies here for this one.
        self.folder = head.home.parent / "hosts" / head.name / "home" / "results" / name
        options = f"--data {uri} --trials {TRIALS} --workers-per-trial {workers} --cpus-per-worker 1 --report off"
        options += " --max-concurrent 1 --searcher random --scheduler none --seed 1 --address auto"
        where = ["--results", str(head.home / "results"), "--name", name]
        self.process = head.start(
            sys.executable, "-m", "search.run", "--space", "quickstart", *options.split(), *where,
            *arguments_of(SETTINGS), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        self.lines: list[str] = []
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            print(f"    {line.rstrip()}", flush=True)

    def wait_for(self, pattern: str) -> None:
        def seen() -> bool:
            if self.process.poll() is not None:
                sys.exit(f"error: {self.name} ended before {pattern!r}")
            return any(re.search(pattern, line) for line in self.lines)

        wait_until(seen, 300, f"{self.name}: {pattern!r}")

    def wait(self) -> "Run":
        code = self.process.wait(600)
        self.reader.join(5)
        expect(code == 0, f"{self.name} ended with exit code {code} after {time.monotonic() - self.started:.0f} s")
        return self

    def losses(self) -> list[tuple[str, str, float, float]]:
        with (self.folder / "epochs.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        return [(r["number"], r["epoch"], float(r["train_loss"]), float(r["valid_loss"])) for r in rows]

    def repeated(self) -> list[str]:
        """Epochs that were reported more than once."""
        found = Counter(match[0] for line in self.lines if (match := re.search(r"trial +\d+ +epoch \d+/", line)))
        return [epoch for epoch, count in found.items() if count > 1]


def expect_same_losses(one: Run, other: Run, tolerance: float, what: str) -> None:
    pairs = list(zip(one.losses(), other.losses(), strict=True))
    expect(len(pairs) == 6 * TRIALS and all(a[:2] == b[:2] for a, b in pairs), f"{len(pairs)} epochs in both tables")
    largest = max(abs(x - y) / abs(x) for a, b in pairs for x, y in zip(a[2:], b[2:], strict=True))
    expect(largest <= tolerance, f"{what}: largest relative difference {largest:.1e}")


if __name__ == "__main__":
    sys.exit(main())
