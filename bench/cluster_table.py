"""The table of `cluster_model`."""

from typing import Any

from common import footer

WHERE = {
    "driver": "one process, `python -m search.run`, takes all results one by one; most of its time goes to `{part}`",
    "cores": "trials' actors, Ray's processes and the driver share the head's cores",
    "memory": "each trial's actor is a process on the head and holds its trial's last checkpoint",
    "disk": "each trial's actor writes a checkpoint to the head's disk after each epoch",
    "network": "each checkpoint comes to the head after each epoch",
    "starts": "Tune's loop starts one trial's actor at a time, and drops it where another trial ends meanwhile",
    "places": "Ray's resource `node:__internal_head__`, of which each trial's actor takes 0.001",
}


def markdown(result: dict[str, Any]) -> str:
    head, load, costs = result["head"], result["load"], result["costs"]
    first, rows = result["first_bottleneck"], result["rows"]
    largest_part = max(rows[-1]["parts"], key=rows[-1]["parts"].get)
    where = WHERE[first].format(part=largest_part)
    threads = result["measured"]["calibration"]["phases"][0]["threads_per_actor"]
    return f"""# Many trials at once on one head: a model

`{result["command"]}`

A head with {head["cores"]} cores, {head["memory_gb"]:.0f} GB of memory, a disk of {head["disk_mb"]:.0f} MB/s and a
network of {head["network_mb"]:.0f} MB/s, the hosts and workers of all trials on other nodes. A trial has
{load["epochs"]} epochs of {load["epoch_seconds"]:g} s (± 10 %) and after each a checkpoint of
{load["checkpoint_mb"]:.0f} MB ({result["arch"]}: weights and AdamW's two moments in fp32); {load["search"]} trials or
more are in the tables. Simulated in virtual time from costs measured on the machine below, seed {result["seed"]}.

**First bottleneck: {first}, above {result["largest"][first]} trials at once.** There, {where}.

{table(["", *(f"{row['running']} trials" for row in rows)], simulated(rows))}

A delay is from the end of an epoch on its worker until the driver is done with its result; where something is above
100 %, trials wait and epochs are farther apart. Writes by the driver overwrite the same files, so less of them
reaches the disk. Tune starts one trial's actor after the other ({costs["start_seconds"]:.1f} s each); when
another trial ends meanwhile, its actor takes the trial that waits, and the one that was starting is dropped. The
figures above are for when all trials run.

The most trials at once for which there is enough of each:

{table(["resource", "trials at once", "where"], limits(result, largest_part))}

What takes the driver's time, in milliseconds (running + all in the tables); a trial's end and the next one's start are
shared out among its results, and Tune's state is saved once a second:

{table(["part", *(size_of(row) for row in result["measured"]["driver"])], driver(result))}

The actor of a trial has {threads:.0f} threads, takes {costs["actor_mb"]:.0f} MB of its own and holds
{costs["checkpoint_copies"]:.2f} times its checkpoint. Its CPU time: {milliseconds(costs["actors"])}.
Ray's own processes take {costs["ray_mb"]:.0f} MB. Their CPU time: {milliseconds(costs["ray"])}.

## Check: {result["measured"]["check"]["trials"]} real trials at once

The product's search with its own trial actors, through Ray. One actor on the same machine stands in for all hosts and
workers, which would be elsewhere, and answers when an epoch's time is over: it is what a head sees of a cluster, but
for the network. The model has its costs from other runs, with {result["measured"]["calibration"]["trials"]} actors or
none, and this machine as its head. Predicted / measured = ratio:

{table(*check(result))}

The actors came {result["measured"]["check"]["start_seconds"]:.1f} s apart, predicted {costs["start_seconds"]:.1f} s.
Checkpoints go through the object store to a disk of {result["measured"]["disk_mb"]:.0f} MB/s. The report that a search
renews while it runs, a process of its own on the head, is off everywhere here.
{footer(result)}"""


def table(heads: list[str], lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [heads, ["---"] * len(heads), *lines])


def simulated(rows: list[dict[str, Any]]) -> list[list[str]]:
    def line(name: str, text) -> list[str]:
        return [name, *(text(row) for row in rows)]

    return [
        line("results per second (of those wanted)",
             lambda r: f"{r['results_per_second']:.2f} ({100 * r['of_wanted']:.0f} %)"),
        line("delay of a result, median, s", lambda r: f"{r['delay_p50']:.2f}"),
        line("95th percentile, s", lambda r: f"{r['delay_p95']:.2f}"),
        *(line(f"{name}, % wanted", lambda r, name=name: f"{100 * r['demands'][name]:.0f}") for name in WHERE),
        line("memory, GB", lambda r: f"{sum(r['memory_mb'].values()) / 1000:.1f}"),
        line("of it trials' actors, GB", lambda r: f"{r['memory_mb']['actors'] / 1000:.1f}"),
        line("of it checkpoints that they hold, GB", lambda r: f"{r['memory_mb']['checkpoints'] / 1000:.1f}"),
        line("checkpoints to the disk, MB/s", lambda r: f"{r['checkpoint_mb_per_second']:.0f}"),
        line("tables, journal, state, MB/s", lambda r: f"{r['driver_mb_per_second']:.2f}"),
        line("writes per second", lambda r: f"{r['writes_per_second']:.0f}"),
        line("seconds of a save of Tune's state", lambda r: f"{r['save_seconds']:.2f}"),
        line("shortest epoch with which the driver keeps up, s", lambda r: f"{r['shortest_epoch']:.2f}"),
        line("minutes until all trials run", lambda r: minutes(r["seconds_to_start"])),
    ]  # fmt: skip


def milliseconds(work: dict[str, float]) -> str:
    alone, trial, result, mb = (f"{1000 * work[key]:.1f}" for key in ("alone", "per_trial", "per_result", "per_mb"))
    return f"{alone} ms a second, {trial} ms more for each trial, {result} ms a result, {mb} ms a MB of checkpoint"


def minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f}" if seconds < 10**6 else "weeks"


def limits(result: dict[str, Any], largest_part: str) -> list[list[str]]:
    most = sorted(result["largest"].items(), key=lambda pair: pair[1])
    return [[name, f"{number}", WHERE[name].format(part=largest_part)] for name, number in most]


def size_of(row: dict[str, Any]) -> str:
    return f"{row['running']} + {row['known']}"


def driver(result: dict[str, Any]) -> list[list[str]]:
    measured = result["measured"]["driver"]
    epochs = result["load"]["epochs"]
    lines = [
        [f"{part}, a result", *(f"{1000 * row['result'].get(part, 0):.2f}" for row in measured)]
        for part in measured[0]["result"]
    ]
    lines += [
        [f"{part}, a trial / {epochs}", *(f"{1000 * row['trial'].get(part, 0) / epochs:.2f}" for row in measured)]
        for part in measured[0]["trial"]
    ]
    calls = {row["running"]: f"{1000 * row['seconds']:.2f}" for row in result["measured"]["calls"]}
    lines.append(["Ray's calls, a result", *(calls.get(row["running"], "-") for row in measured)])
    for key, name in (("state", "Tune's state, a save"), ("copy", "files copied after a save, by another thread")):
        lines.append([name, *(f"{1000 * row['save'].get(key, 0):.1f}" for row in measured)])
    return lines


def check(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    phases = result["check"]
    heads = [f"epochs of {p['phase']['epoch_seconds']:g} s, {p['phase']['checkpoint_mb']:g} MB" for p in phases]
    lines = []
    for name in phases[0]["pairs"]:
        pairs = [phase["pairs"][name] for phase in phases]
        lines.append([name, *(f"{p:.3g} / {m:.3g} = {p / m:.2f}" if m else f"{p:.3g} / 0" for p, m in pairs)])
    return ["", *heads], lines
