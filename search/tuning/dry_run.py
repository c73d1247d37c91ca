"""`--dry-run`: what a search would do, how long it would take here, and what it needs."""

import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ray._private.resource_and_label_spec import ResourceAndLabelSpec

from search.cli.messages import say
from search.cluster.resources import Node, sizes, trials_at_once
from search.options.preparation import setting_values
from search.options.search_options import SearchOptions
from search.runs.paths import RunFolder
from search.runs.time_budget import for_trials
from search.spaces.space import Space
from search.tuning.plan import PROBES, REFITTED, RETRAININGS, TRIALS, Features, Plan, plan_search
from search.tuning.screen import costs_of
from search.tuning.tuner import RunOptions, disk_needs
from search.tuning.warm_start import WarmStart
from trainables.data.labelled_images import ImageFolder
from trainables.data.presize import estimated_bytes, presized_before
from trainables.data.source import folder_of
from trainables.data.splits import train_and_valid
from trainables.probe.feature_files import features_folder
from trainables.ray.worker_group import GroupSize
from trainables.recipe import Recipe
from trainables.system.cache import DamagedCache, read_index
from trainables.system.new_process import in_new_process
from trainables.system.text import duration, many, megabytes
from trainables.training.timing import Measurement, Speed, measure

MEASURE_SECONDS = 30.0
"""After which no further architecture is measured."""
STARTS = 2.0
"""The start of Ray, of a trial and of its worker, by that of one process that imports torch."""
ENDS = {"full": 4.0, "tables": 1.0, "off": 0.5}
"""The end of Ray and the report, likewise; a full one labels the validation images."""
PLANS, PLAN_SECONDS = 5, 10.0
"""Courses of the search, with other errors; no further one is planned after so many seconds."""
SPREAD = 1.2
"""A range of times is said where the longest one is this much longer than the shortest one."""
FINDER_STEPS = 100
"""Of the learning-rate finder, in each stage."""


@dataclass(frozen=True)
class Machine:
    """What this machine has room for."""

    size: GroupSize
    num_workers: Mapping[str, int]
    at_once: int
    memory: float
    """Bytes that are free for workers."""

    @property
    def device(self) -> str:
        return "cuda" if self.size.gpus_per_worker else "cpu"

    @property
    def num_threads(self) -> int:
        return max(1, int(self.size.cpus_per_worker))


@dataclass(frozen=True)
class MeasuredCosts:
    """`Costs` of all architectures of a space, from those that were measured."""

    measurement: Measurement
    relative: Mapping[str, float]
    """Of a forward pass of each architecture, by the size of its weights: for those that were not measured."""
    start: float
    end: float

    @property
    def fitting(self) -> float:
        return self.measurement.fitting

    def forward(self, arch: str, size: int) -> float:
        return self._of_image(arch, size, lambda speed: speed.forward)

    def training(self, arch: str, size: int) -> float:
        return self._of_image(arch, size, lambda speed: speed.training)

    def building(self, arch: str) -> float:
        return self._speed(arch).building

    def judging(self, arch: str) -> float:
        return self._speed(arch).judging

    def _of_image(self, arch: str, size: int, seconds: Callable[[Speed], float]) -> float:
        speed = self._speed(arch)
        return seconds(speed) * self.relative[arch] / self.relative[speed.arch] * (size / speed.image_size) ** 2

    def _speed(self, arch: str) -> Speed:
        """Of the architecture, or of the dearest one that was measured."""
        speeds = self.measurement.speeds
        own = [speed for speed in speeds if speed.arch == arch]
        return own[0] if own else max(speeds, key=lambda speed: self.relative[speed.arch])


class NoCosts:
    """`Costs` where nothing is known of the speed."""

    start = end = fitting = 0.0

    def forward(self, arch: str, size: int) -> float:
        return 0.0

    training = forward

    def building(self, arch: str) -> float:
        return 0.0

    judging = building


def say_plan(
    options: SearchOptions, space: Space, images: ImageFolder, folder: RunFolder, warm_start: WarmStart | None
) -> None:
    """Say what a search would do. Measures this machine, unless the search is for a cluster."""
    archs = setting_values(space, "arch")
    machine = this_machine(options, archs) if options.address is None else None
    run = RunOptions(
        options=options, space=space, folder=folder, data="", labels=list(images.classes), warm_start=warm_start,
        group_size=machine.size if machine else GroupSize(),
    )  # fmt: skip
    if warm_start:
        say(warm_start.line(space))
    split = train_and_valid(images.labels, images.valid, images.groups, seed=space.split_seed)
    counts = len(split[0]), len(split[1])
    cached = cached_features(space, images, options.cache) if machine else Features()
    costs: MeasuredCosts | NoCosts = measured_costs(run, machine, images, counts[0]) if machine else NoCosts()
    at_once = machine.at_once if machine else options.max_concurrent or 1
    limit = for_trials(options.time_budget) if machine else None
    plans: list[Plan] = []
    began = time.monotonic()
    while len(plans) < PLANS and (not plans or time.monotonic() - began < PLAN_SECONDS):
        plan = plan_search(run, costs, counts, at_once=at_once, limit=limit, features=cached, seed=len(plans))
        plans.append(plan)
    plans.sort(key=lambda plan: plan.seconds)
    for line in (*work_lines(run, plans, cached), *time_lines(run, plans, machine, costs, at_once)):
        say(line)
    say(disk_needs(run, at_once, len(images.paths)) + presized_bytes(space, images, options.cache))
    if machine and isinstance(costs, MeasuredCosts):
        say(memory_line(machine, costs))


# --- What there is ----------------------------------------------------------------------------------------------------


def this_machine(options: SearchOptions, archs: list[str]) -> Machine:
    """As a Ray that starts here would see it. Raises `ValueError` where a trial has no room."""
    found = ResourceAndLabelSpec(None, None, None, None, {}).resolve(is_head=True).to_resource_dict()
    nodes = [Node(cpus=found.get("CPU", 1), gpus=found.get("GPU", 0), memory=found.get("memory"))]
    size, num_workers = sizes(options, nodes, archs)
    at_once = options.max_concurrent or trials_at_once(nodes, size, None)
    return Machine(size, num_workers, at_once, nodes[0].memory or 0.0)


def cached_features(space: Space, images: ImageFolder, storage: str) -> Features:
    """The features that this machine keeps of these images, by what their index says of them."""
    found = Features()
    for size, method in itertools.product(*(setting_values(space, name) for name in ("presize", "resize_method"))):
        presized = presized_before(images, size, method, storage=storage)
        if presized is None:
            continue
        for path in features_folder().glob("*/"):
            try:
                index = read_index(path)
                is_of = index["root"], index["size"], index["resize_method"]
                if is_of == (str(presized.root), size, method):
                    found[index["arch"], index["image_size"], index["augmented"], index["num_images"]] += 1
            except (DamagedCache, KeyError):
                continue
    return found


def measured_costs(run: RunOptions, machine: Machine, images: ImageFolder, num_train: int) -> MeasuredCosts:
    """What this machine takes, measured in a process of its own, the cheapest architecture first."""
    space, options = run.space, run.options
    archs = setting_values(space, "arch")
    weights = folder_of(run.weights) if run.weights and True in setting_values(space, "pretrained") else None
    relative = dict(zip(archs, costs_of(archs, weights), strict=True))
    archs = sorted(archs, key=lambda arch: relative[arch])
    say(f"measuring this machine with {archs[0]}{', and others while there is time' if len(archs) > 1 else ''}")
    began = time.time()
    found = in_new_process(
        measure,
        images,
        [space.full_settings | {"arch": arch} for arch in archs],
        num_train=num_train,
        device=machine.device,
        num_threads=machine.num_threads,
        storage=options.cache,
        seconds=MEASURE_SECONDS,
    )
    if not found.speeds:
        raise ValueError(f"{archs[0]} cannot be measured: the GPU has too little free memory for a batch")
    ready = found.ready - began
    presizing = sum(found.presizing * len(images.paths) for _ in _to_presize(space, images, options.cache))
    costs = MeasuredCosts(found, relative, start=presizing + STARTS * ready, end=ENDS[options.report] * ready)
    if options.lr_range == "space":
        return costs
    return MeasuredCosts(
        found, relative, start=costs.start + finder_seconds(space, costs) / machine.at_once, end=costs.end
    )


def finder_seconds(space: Space, costs: MeasuredCosts) -> float:
    """Of the learning-rate finder, which begins with the probe and the frozen epochs."""
    recipe = Recipe.from_dict(space.full_settings)
    size, steps = recipe.image_size, FINDER_STEPS * recipe.batch_size
    archs = setting_values(space, "arch")
    return sum(costs.building(arch) + steps * costs.training(arch, size) for arch in archs)


def _to_presize(space: Space, images: ImageFolder, storage: str) -> list[tuple[int, str]]:
    """The sizes and methods that are not cached yet."""
    ways = itertools.product(*(setting_values(space, name) for name in ("presize", "resize_method")))
    return [way for way in ways if presized_before(images, *way, storage=storage) is None]


# --- What is said -----------------------------------------------------------------------------------------------------


def work_lines(run: RunOptions, plans: list[Plan], cached: Features) -> list[str]:
    """How many trainings, epochs and image passes: of the middle course, where they differ."""
    middle = plans[len(plans) // 2]
    counts, total = middle.counts, middle.total
    parts = [many(counts[PROBES], "probe")] * bool(counts[PROBES])
    parts.append(f"{counts[TRIALS]} of {run.num_trials} trials" if counts[TRIALS] < run.num_trials else "")
    parts[-1] = parts[-1] or many(counts[TRIALS], "trial")
    parts += [many(counts[RETRAININGS], "retraining")] * bool(counts[RETRAININGS])
    parts += ["the winner again on all images"] * bool(counts[REFITTED])
    about = "" if len({plan.total.epochs for plan in plans}) == 1 else "about "
    lines = [f"plan: {', '.join(parts)}; {about}{many(total.epochs, 'epoch')} in all, if no trial stops early"]
    exact = len({(plan.total.forward, plan.total.training) for plan in plans}) == 1
    about = "" if exact else "about "
    lines.append(f"image passes: {about}{total.training:,} of training, {about}{total.forward:,} forward alone")
    if cached:
        lines.append(f"cached: {many(cached.total(), 'set')} of features, which are not computed again")
    return lines


def time_lines(
    run: RunOptions, plans: list[Plan], machine: Machine | None, costs: "MeasuredCosts | NoCosts", at_once: int
) -> list[str]:
    if machine is None or isinstance(costs, NoCosts):
        budget = (
            f" The time budget of {duration(run.options.time_budget)} may end it earlier."
            if run.options.time_budget
            else ""
        )
        return [
            "time: not known, because the speed of the cluster's nodes is not; the image passes tell how much there is "
            f"to do.{budget}"
        ]
    seconds = [plan.seconds for plan in plans]
    middle = plans[len(plans) // 2]
    named = {PROBES: "probes", TRIALS: "trials", RETRAININGS: "retrainings", REFITTED: "the refit"}
    parts = [f"{about(costs.start)} until the first training begins"]
    parts += [
        f"{about(middle.work[kind].seconds / min(at_once, middle.counts[kind]))} for {name}"
        for kind, name in named.items()
        if kind in middle.work
    ]
    total = f"about {about(statistics.median(seconds))}"
    if seconds[-1] > SPREAD * seconds[0]:
        total += f" ({about(seconds[0])} to {about(seconds[-1])}, by which architectures do best)"
    if run.options.time_budget:
        total += f" of the time budget of {duration(run.options.time_budget)}"
    lines = [f"time: {total}: {', '.join(parts)}; {at_once} at once"]
    if run.options.time_budget:
        fit = sorted(plan.counts[TRIALS] for plan in plans)
        some = f"{fit[0]} to {fit[-1]}" if fit[0] < fit[-1] else str(fit[0])
        lines.append(f"trials: {some} of {run.num_trials} fit into the time budget")
    return [*lines, measured_line(costs)]


def measured_line(costs: MeasuredCosts) -> str:
    speeds, others = costs.measurement.speeds, len(costs.relative) - len(costs.measurement.speeds)
    first = speeds[0]
    also = f"; {many(len(speeds) - 1, 'other')} likewise" if len(speeds) > 1 else ""
    scaled = f"; {many(others, 'other')} by the size of their weights" if others else ""
    return (
        f"measured: {first.arch} at {first.image_size} px takes {1000 * first.forward:.2g} ms an image forward and "
        f"{1000 * first.training:.2g} ms in training{also}{scaled}"
    )


def memory_line(machine: Machine, costs: MeasuredCosts) -> str:
    largest = max(costs.measurement.speeds, key=lambda speed: speed.memory)
    what = "GPU memory" if machine.device == "cuda" else "memory"
    known = "" if len(costs.measurement.speeds) == len(costs.relative) else "; larger architectures take more"
    free = f", {megabytes(machine.memory)} free" if machine.device == "cpu" else ""
    of = f"{largest.arch} at {largest.image_size} px"
    return f"{what}: about {megabytes(largest.memory)} a worker with {of}{known}{free}"


def presized_bytes(space: Space, images: ImageFolder, storage: str) -> str:
    """What presizing adds to the cache; empty if it is there."""
    ways = _to_presize(space, images, storage) if storage != "off" else []
    total = sum(estimated_bytes(images, *way) for way in ways)
    return f"; about {megabytes(total)} more in the cache for presized images" if total else ""


def about(seconds: float) -> str:
    """A duration in the two digits that an estimate has, such as 8 s, 3.5 min or 12 h."""
    unit, size = next(
        (name, size) for name, size in (("s", 1), ("min", 60), ("h", 3600)) if seconds < 90 * size or name == "h"
    )
    number = seconds / size
    return f"{number:.0f} {unit}" if unit == "s" or number >= 10 else f"{number:.1f} {unit}"
