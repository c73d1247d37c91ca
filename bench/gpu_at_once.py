"""How many trials an hour one GPU trains where several share it, for `gpu.py --at-once`.

Each of so many processes trains trials from begin to end, one after another, with its share of the GPU's memory and of
the threads, as the warm workers of a search do; there is no Ray. All begin together when each has trained an epoch, and
the time counts until the last one has ended.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean
from typing import Any

from common import footer, write

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where the project is not installed

READY = "ready"
KILLED = "a process was killed"
COLUMNS = {  # key of a row: its heading and form
    "trials_per_hour": ("trials an hour", ".0f"),
    "times_alone": ("times one at once", ".2f"),
    "images_per_second": ("images/s together, unfrozen", ".0f"),
    "peak_memory_gb": ("peak memory of each, GB", ".2f"),
}


def measured(recipes: dict[tuple[str, str], dict[str, Any]], counts: list[int], common: dict[str, Any]) -> list[dict]:
    """A row for each architecture and precision, whose recipes these are, and each number of trials at once."""
    rows = []
    for (arch, precision), recipe in recipes.items():
        alone = None
        for count in counts:
            row = {"arch": arch, "precision": precision, "at_once": count, **dict.fromkeys((*COLUMNS, "reason"))}
            row |= together(count, common | {"recipe": recipe, "share": 1 / count})
            alone = row["trials_per_hour"] if count == 1 else alone
            if alone and row["trials_per_hour"]:
                row["times_alone"] = row["trials_per_hour"] / alone
            said = row["reason"] or "  ".join(f"{head} {cell(row, key)}" for key, (head, _) in COLUMNS.items())
            print(f"{arch}  {precision}  {count} at once  {said}", flush=True)
            rows.append(row)
    return rows


def together(count: int, task: dict[str, Any]) -> dict[str, Any]:
    """So many processes on one task: what they reached, or the reason why they did not."""
    task = task | {"threads": max(1, task["threads"] // count)}
    command = [sys.executable, str(Path(__file__).resolve()), json.dumps(task)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(count)]
    try:
        begun = [process.stdout.readline().strip() for process in processes]
        if failed := [line for line in begun if line != READY]:
            return json.loads(failed[0]) if failed[0] else {"reason": KILLED}
        started = time.perf_counter()
        for process in processes:
            process.stdin.write("\n")
            process.stdin.flush()
        lines = [process.stdout.readline() for process in processes]
        seconds = time.perf_counter() - started
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    found = [json.loads(line) if line else {"reason": KILLED} for line in lines]
    if reasons := [one["reason"] for one in found if "reason" in one]:
        return {"reason": reasons[0]}
    peaks = [one["peak_memory_gb"] for one in found if one["peak_memory_gb"] is not None]
    return {
        "trials_per_hour": count * task["trials"] * 3600 / seconds,
        "images_per_second": sum(one["images_per_second"] for one in found),
        "peak_memory_gb": max(peaks, default=None),
    }


def markdown(result: dict[str, Any]) -> str:
    heads = ["arch", "precision", "at once", *(head for head, _ in COLUMNS.values())]
    lines = [[r["arch"], r["precision"], str(r["at_once"]), *(cell(r, key) for key in COLUMNS)] for r in result["rows"]]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in [heads, ["---"] * len(heads), *lines])
    failed = [f"- {r['arch']}, {r['precision']}, {r['at_once']}: {r['reason']}" for r in result["rows"] if r["reason"]]
    used = result["settings"]
    where = result["hardware"]["gpu"] or "the CPU, in small: this shows that the benchmark runs, and no more"
    return f"""# Trials that share a GPU

`{result["command"]}`

On {where}. A trial is 1 frozen and {used["epochs"]} unfrozen epochs of {used["images"]} images, of which a fifth validate, at
{used["image_size"]} px in batches of {used["batch_size"]}; random weights. Each process has its share of the GPU's memory and of
{used["threads"]} threads, and trains {used["trials"]} trials after an epoch that does not count. MPS: {"on" if result["mps"] else "off"}.

{table}
{chr(10).join(["", "Not measured:", "", *failed, ""]) if failed else ""}
{footer(result)}"""  # noqa: E501


def cell(row: dict[str, Any], key: str) -> str:
    return "-" if row[key] is None else f"{row[key]:{COLUMNS[key][1]}}"


def publish(out: Path, result: dict[str, Any]) -> None:
    write(out, "gpu_at_once", result, markdown(result))


# --- One of the processes ---------------------------------------------------------------------------------------------


def work(task: dict[str, Any]) -> None:
    """Says when it is ready, waits for a line, trains its trials, and says how fast."""
    import torch

    from trainables.data.layouts import find_images
    from trainables.data.presize import presize
    from trainables.recipe import Recipe
    from trainables.system.gpu_share import limit_memory
    from trainables.training.fine_tune import FineTune

    device = torch.device(task["device"])
    torch.set_num_threads(task["threads"])
    limit_memory(task["share"], device)
    recipe = Recipe.from_dict(task["recipe"])
    images = presize(find_images(Path(task["folder"])), recipe.presize, cache=Path(task["cache"]))

    def trial(epochs: int) -> list[float]:
        training = FineTune(recipe, images, device=device, num_threads=task["threads"])
        metrics = [training.run_epoch() for _ in range(epochs)]
        training.close()
        return [epoch["images_per_second"] for epoch in metrics if epoch["stage"] == "unfrozen"]

    trial(recipe.freeze_epochs + 1)
    print(READY, flush=True)
    sys.stdin.readline()
    rates = [rate for _ in range(task["trials"]) for rate in trial(recipe.total_epochs)]
    peak = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None
    print(json.dumps({"images_per_second": mean(rates), "peak_memory_gb": peak}), flush=True)


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    try:
        work(given)
    except (RuntimeError, ValueError, AssertionError) as error:  # for want of memory, say
        text = f"{type(error).__name__}: {error}".strip().splitlines()[0].replace(str(given["folder"]), "")
        print(json.dumps({"reason": text[:200]}), flush=True)
