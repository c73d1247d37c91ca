"""The keepers of training states on the nodes of a cluster: started as nodes come, ended with the search."""

import time
from typing import Any

import ray
from ray import tune
from ray.tune.experiment import Trial

from search.cli.messages import say
from search.runs.results_table import ResultsTable
from trainables.ray.keeper import folder_of, start_keeper
from trainables.ray.node_states import is_head
from trainables.ray.trial import LOST_EPOCHS, REFITS, table_id
from trainables.ray.worker_group import living_nodes
from trainables.system.text import many

LOOK_SECONDS = 2.0
"""How often the search looks for new nodes."""
END_SECONDS = 5.0
"""How long keepers may take to delete their files at the search's end."""


class StateKeepers(tune.Callback):
    """Has a keeper on each node, once there are others than the head or it has states; says when some were lost."""

    def __init__(self, table: ResultsTable) -> None:
        self.table = table
        self.search = table.folder.run_id
        self.looked = 0.0

    def on_step_begin(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        if time.monotonic() - self.looked >= LOOK_SECONDS:
            self.looked = time.monotonic()
            keepers, nodes = _keepers.setdefault(self.search, {}), living_nodes()
            if keepers or folder_of(self.search).is_dir() or not all(map(is_head, nodes.values())):
                _keepers[self.search] = {n: keepers.get(n) or start_keeper(self.search, n) for n in nodes}

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        if not (lost := result.get(LOST_EPOCHS)):
            return
        row = self.table.rows.get(table_id(trial))
        name = f"trial {row['number']}" if row else "the winner on all images"
        if lost >= result["training_iteration"] - 1:
            say(f"cluster: {name} began again, all copies of its state were lost with their nodes")
        else:
            say(f"cluster: {name} trained {many(lost, 'epoch')} again, the last state was lost with its node")

    def on_experiment_end(self, trials: list[Trial], **info: Any) -> None:
        """What runs keeps its state: the search may be resumed."""
        refits = {table_id(trial) for trial in trials if REFITS in trial.config and not trial.is_finished()}
        kept = [*self.table.running, *refits]
        told = [keeper.retain.remote(kept) for keeper in _keepers.pop(self.search, {}).values()]
        if told:
            ray.wait(told, num_returns=len(told), timeout=END_SECONDS)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"looked": 0.0}


_keepers: dict[str, dict[str, Any]] = {}
"""Of the searches in this process: their handles by node, by the run's id. They end with their handles."""
