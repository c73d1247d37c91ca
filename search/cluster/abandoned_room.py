"""Room on the cluster that a worker group of this search reserved, and that nobody can use or give back any more.

Ray keeps a placement group for as long as its job lives, even when the actor that created it is dead. If its node is
lost, Ray places it on another one. So the reservation of a worker group whose host went away with its node takes the
next room that becomes free, and the trial's new workers wait for that room forever.

Ray Train 2.60 has a process for this (`PlacementGroupCleaner`), which we leave out. It asks the dashboard whether the
controller is alive: its thread dies of a ConnectionError where the cluster has no dashboard or several Rays run on the
machine. It also knows nothing of workers that wait for room or start.
"""

import time
from typing import Any

import ray
from ray import tune
from ray._private.state import state
from ray.core.generated.gcs_pb2 import PlacementGroupTableData
from ray.util.placement_group import PlacementGroup, remove_placement_group

LOOK_SECONDS = 5.0


class AbandonedRoom(tune.Callback):
    """Frees abandoned room every few seconds."""

    def __init__(self) -> None:
        self.looked = time.monotonic()

    def on_step_begin(self, iteration: int, trials: list, **info: Any) -> None:
        if time.monotonic() - self.looked >= LOOK_SECONDS:
            free_abandoned_room()
            self.looked = time.monotonic()


def free_abandoned_room() -> None:
    """Remove the placement groups of this job whose creator, an actor, is dead."""
    for record in state._connect_and_get_accessor().get_placement_group_table():
        group = PlacementGroupTableData.FromString(record)
        if _is_abandoned(group):
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))


def _is_abandoned(group: PlacementGroupTableData) -> bool:
    by_actor = not ray.ActorID(group.creator_actor_id).is_nil()  # and not by the search itself, as Tune's are
    mine = group.creator_job_id.hex() == ray.get_runtime_context().get_job_id()
    gone = group.state == PlacementGroupTableData.REMOVED or group.is_detached
    return mine and by_actor and group.creator_actor_dead and not gone
