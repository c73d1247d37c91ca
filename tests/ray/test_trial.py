"""A trial and the hosts of its worker groups, which are played here; real ones are in test_search.py."""

from types import SimpleNamespace

import pytest
import ray

from trainables.ray import trial as module
from trainables.ray.messages import Outcome
from trainables.ray.retry_limits import MAX_HOSTS
from trainables.ray.trial import FineTuneTrial

DONE = Outcome(metrics={"epoch": 1})


class Host:
    """Its node, as the trial picked it, may go away before the host is up; the host may be lost in training."""

    def __init__(self, node: str, *, comes_up: bool = True, trains: bool = True) -> None:
        self.picked = node
        self.node = self._remote(comes_up, node)
        self.begin = self._remote(True, None)
        self.run_epoch = self._remote(trains, DONE)

    @staticmethod
    def _remote(works: bool, value):
        def get():
            if not works:
                raise ray.exceptions.RayActorError
            return value

        return SimpleNamespace(remote=lambda *_: get)


@pytest.fixture
def run_epoch(monkeypatch):
    """The outcome of an epoch on one host after the other, while the nodes that Ray lists are those of each moment."""
    monkeypatch.setattr(module.ray, "get", lambda call: call())

    def run(hosts: list[Host], listed: list[set[str]]) -> Outcome:
        moments = iter(listed)
        monkeypatch.setattr(module, "living_nodes", lambda: {node: {} for node in next(moments)})

        class Trial(FineTuneTrial):
            def __init__(self) -> None:
                self.host, self.handed_over, self.epochs_done, self.files = None, False, 0, None

            def _start_host(self) -> Host:
                self.host = hosts.pop(0)
                self.host_node = self.host.picked
                return self.host

            def _spec(self) -> None:
                pass

        return Trial()._run_epoch()

    return run


def test_a_node_that_takes_one_host_after_another_with_it_costs_the_trial_no_try(run_epoch):
    """Its hosts are gone before Ray lists it as lost, and one that was to start on it never comes up."""
    of_node = [Host("spot", trains=False), Host("spot", comes_up=False)]
    others = [Host("head", trains=False) for _ in range(MAX_HOSTS - 1)]
    listed = [{"head", "spot"}, *MAX_HOSTS * [{"head"}]]
    assert run_epoch([*of_node, *others, Host("head")], listed) == DONE


def test_a_trial_that_loses_host_after_host_on_nodes_that_stay_gives_up(run_epoch):
    outcome = run_epoch(MAX_HOSTS * [Host("head", trains=False)], MAX_HOSTS * [{"head"}])
    assert outcome.failure.startswith(f"lost its worker group {MAX_HOSTS} times")
