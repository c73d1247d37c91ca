"""A long search whose trials differ in size: some train with one worker, some with two.

    python tests/cluster/soak.py

Three nodes of one CPU each on this machine, by `ray.cluster_utils.Cluster`. Each change of size starts workers anew, so
it takes about 15 minutes on two cores. Exit code 0 if the search ended and its tables are complete.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from processes import descendants, left_after
from searches import PINNED, Search, settings, tables
from tiny_run import draw_images

SETTINGS = f"{PINNED} weight_decay=0.01 tta_views=0 arch=test_resnet.r160_in1k,test_vit.r160_in1k epochs=1..3"
LARGE = "test_vit*"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=30, help="the search counts as hanging then")
    args = parser.parse_args()
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    for _ in range(args.nodes - 1):
        cluster.add_node(num_cpus=1)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as root:
        search = Search(
            Path(root) / "soak", "--space", "quickstart", "--data", draw_images(Path(root) / "data"), "--report", "off",
            "--address", cluster.address, "--cpus-per-worker", 1, "--workers-per-trial", f"{LARGE}=2", "--trials",
            args.trials, "--searcher", "random", *settings(SETTINGS),
        )  # fmt: skip
        try:
            code, problems = search.wait(60 * args.minutes), []
        except subprocess.TimeoutExpired:
            search.process.kill()
            code, problems = None, ["it hangs"]
        print(search.text)
        problems += problems_of(search.folder, args.trials)
    below = descendants(cluster.head_node.all_processes["raylet"][0].process.pid)
    cluster.shutdown()
    problems += [f"still there: {line}" for line in left_after(20, below)]
    print(f"exit code {code} after {time.monotonic() - started:.0f} s", *problems or ["everything held"], sep="\n")
    return 1 if code or problems else 0


def problems_of(folder: Path, num_trials: int):
    trials, epochs = tables(folder)
    sizes = Counter("two workers" if row["arch"].startswith(LARGE[:-1]) else "one worker" for row in trials)
    print(f"trials: {dict(Counter(row['status'] for row in trials))}, {dict(sizes)}, {len(epochs)} epochs")
    if sorted(int(row["number"]) for row in trials) != list(range(num_trials)):
        yield f"{len(trials)} rows of {num_trials}"
    if len(sizes) < 2 or min(sizes.values()) < num_trials // 5:
        yield "hardly a mixture"
    for row in trials:
        mine = [int(epoch["epoch"]) for epoch in epochs if epoch["trial_id"] == row["trial_id"]]
        if row["status"] not in ("completed", "stopped early") or mine != [*range(1, int(row["epochs_done"]) + 1)]:
            yield f"trial {row['number']}: {row['status']} {row['reason']}, epochs {mine} of {row['epochs_done']}"


if __name__ == "__main__":
    sys.exit(main())
