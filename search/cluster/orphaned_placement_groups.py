"""Removes placement groups of this search that no one can use or release any more.

Ray keeps a placement group for as long as its job lives, even when the actor that created it is dead. If its node is
lost, Ray places it on another one. So the reservation of a worker group whose host died with its node takes the
next resources that become free, and the trial's new workers wait for them forever.

Ray Train 2.60 has a process for this (`PlacementGroupCleaner`), which we do not use. It asks the dashboard whether the
controller is alive: its thread dies of a ConnectionError where the cluster has no dashboard or several Rays run on the
machine. It also ignores workers that are waiting for resources or starting.
"""

import time
from typing import Any

import ray
from ray import tune
from ray._private.state import state
from ray.core.generated.gcs_pb2 import PlacementGroupTableData  # type: ignore[attr-defined]  # protobuf makes it
from ray.tune.experiment import Trial
from ray.util.placement_group import PlacementGroup, remove_placement_group

INTERVAL_SECONDS = 5.0


class PlacementGroupCleanup(tune.Callback):
    """Removes orphaned placement groups every few seconds."""

    def __init__(self) -> None:
        self.last_run = time.monotonic()

    def on_step_begin(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        if time.monotonic() - self.last_run >= INTERVAL_SECONDS:
            remove_orphaned_placement_groups()
            self.last_run = time.monotonic()


def remove_orphaned_placement_groups() -> None:
    """Remove the placement groups of this job whose creator, an actor, is dead."""
    for record in state._connect_and_get_accessor().get_placement_group_table():
        group = PlacementGroupTableData.FromString(record)
        if _is_orphaned(group):
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))


def _is_orphaned(group: PlacementGroupTableData) -> bool:
    by_actor = not ray.ActorID(group.creator_actor_id).is_nil()  # not by the search itself, as Tune's are
    is_ours = group.creator_job_id.hex() == ray.get_runtime_context().get_job_id()
    is_gone = group.state == PlacementGroupTableData.REMOVED or group.is_detached
    return is_ours and by_actor and group.creator_actor_dead and not is_gone
