"""The host between a trial and its workers: commands are repeated when workers are lost, and not for ever.

The workers are played by the tests; real ones are in test_search.py.
"""

import asyncio
from types import SimpleNamespace

import pytest

from trainables.ray import worker, worker_group
from trainables.ray.messages import Outcome, TrialSpec
from trainables.ray.retry_limits import MAX_LOST_NODES, MAX_TRIES
from trainables.ray.worker_group import GroupEnded, GroupHost, GroupReleased, GroupSize

GOOD = Outcome(metrics={"epoch": 1}, state={"model.safetensors": b"weights"})
SOON = 5  # seconds


class Host(GroupHost):
    """Without Ray Train below it."""

    def _run_trainer(self, size, myself) -> None:
        pass


@pytest.fixture
def play(monkeypatch):
    """Runs a coroutine that is given a host with a trial."""
    monkeypatch.setattr(worker_group.ray, "get_runtime_context", lambda: SimpleNamespace(current_actor=None))
    monkeypatch.setattr(worker_group, "living_nodes", lambda: {"node": {}})

    async def with_host(scene) -> None:
        host = Host(GroupSize(num_workers=2))
        await host.begin(trial("first"), 0, None)
        await asyncio.wait_for(scene(host), 4 * SOON)

    return lambda scene: asyncio.run(with_host(scene))


def trial(name: str) -> TrialSpec:
    return TrialSpec(trial_id=name, recipe={}, data="")


class Worker:
    """An actor, as far as a host knows it."""

    killed = False


async def take(host: Host, *, rank: int = 0, after: int = 0):
    return await asyncio.wait_for(host.next_command(rank, after), SOON)


async def started(host: Host) -> asyncio.Task:
    """An epoch that the trial waits for."""
    task = asyncio.create_task(host.run_epoch())
    await asyncio.sleep(0)
    return task


def test_a_command_goes_to_every_worker_and_its_outcome_to_the_trial(play):
    async def scene(host):
        epoch = await started(host)
        commands = [await take(host, rank=rank) for rank in (0, 1)]
        assert [(c.trial.trial_id, c.epochs_done) for c in commands] == [("first", 0)] * 2
        await host.deliver(commands[0].number, GOOD)
        assert await epoch == GOOD
        assert await host.state() == GOOD.state
        second = await started(host)
        command = await take(host, after=commands[0].number)
        assert command.epochs_done == 1
        await host.deliver(command.number, GOOD)
        await second

    play(scene)


def test_a_worker_that_comes_early_waits_for_the_trial(play):
    async def scene(host):
        await host.join(0, "node")
        waiting = asyncio.create_task(host.next_command(0, 0))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        epoch = await started(host)
        command = await asyncio.wait_for(waiting, SOON)
        await host.deliver(command.number, GOOD)
        assert await epoch == GOOD

    play(scene)


def test_a_lost_group_gets_the_same_command_again_from_the_same_state(play):
    async def scene(host):
        await host.begin(trial("first"), 3, {"model.safetensors": b"third"})
        epoch = await started(host)
        command = await take(host)
        await host.join(0, "node")  # it is back, knowing nothing
        assert await take(host) == command
        assert (command.epochs_done, await host.state()) == (3, {"model.safetensors": b"third"})
        await host.deliver(command.number, GOOD)
        assert await epoch == GOOD

    play(scene)


def test_a_command_that_loses_its_workers_again_and_again_fails_and_the_group_serves_the_next_trial(play):
    async def scene(host):
        await host.join(0, "node")
        epoch = await started(host)
        for _ in range(MAX_TRIES):
            command = await take(host)
            await host.join(0, "node")
        outcome = await asyncio.wait_for(epoch, SOON)
        assert outcome.failure == f"lost its workers {MAX_TRIES} times in epoch 1"
        await host.begin(trial("second"), 0, None)
        epoch = await started(host)
        command = await take(host, after=command.number)
        assert command.trial.trial_id == "second"
        await host.deliver(command.number, GOOD)
        assert await epoch == GOOD

    play(scene)


def test_one_loss_less_is_survived(play):
    async def scene(host):
        epoch = await started(host)
        await host.join(0, "node")  # its first start is no loss
        for _ in range(MAX_TRIES - 1):
            await take(host, rank=1)
            await take(host)
            await host.join(1, "node")
            await host.join(0, "node")
        await host.deliver((await take(host)).number, GOOD)
        assert await epoch == GOOD

    play(scene)


def test_losses_count_anew_for_every_epoch(play):
    async def scene(host):
        number = 0
        for _ in range(3):
            epoch = await started(host)
            for _ in range(MAX_TRIES - 1):
                await take(host, after=number)
                await host.join(0, "node")
            number = (await take(host, after=number)).number
            await host.deliver(number, GOOD)
            assert await epoch == GOOD

    play(scene)


def test_workers_that_a_node_took_away_do_not_count_against_the_trial(play):
    async def scene(host):
        await host.join(0, "spot 0")
        epoch = await started(host)
        for number in range(1, MAX_TRIES + 1):
            await take(host)
            await host.join(0, f"spot {number}")
        await host.deliver((await take(host)).number, GOOD)
        assert await epoch == GOOD

    play(scene)


def test_a_trial_that_takes_one_node_after_another_with_it_fails(play):
    async def scene(host):
        await host.join(0, "spot 0")
        epoch = await started(host)
        for number in range(1, MAX_LOST_NODES + 1):
            await take(host)
            await host.join(0, f"spot {number}")
        assert (await asyncio.wait_for(epoch, SOON)).failure == f"lost its workers {MAX_LOST_NODES} times in epoch 1"

    play(scene)


def test_workers_start_together_once_all_of_them_have_the_images(play):
    async def scene(host):
        for _ in range(2):  # in every command anew
            epoch = await started(host)
            command = await take(host, after=host._taken)
            first = asyncio.create_task(host.meet(0, host._numbers))
            await asyncio.sleep(0.01)
            assert not first.done()
            await asyncio.wait_for(host.meet(1, host._numbers), SOON)
            await asyncio.wait_for(first, SOON)
            await host.deliver(command.number, GOOD)
            await epoch

    play(scene)


def test_a_worker_that_was_lost_is_waited_for_again(play):
    async def scene(host):
        epoch = await started(host)
        before = asyncio.create_task(host.meet(1, host._numbers))
        await asyncio.sleep(0.01)
        before.cancel()
        await host.join(1, "node")
        first = asyncio.create_task(host.meet(0, host._numbers))
        await asyncio.sleep(0.01)
        assert not first.done()
        await host.meet(1, host._numbers)
        await asyncio.wait_for(first, SOON)
        epoch.cancel()

    play(scene)


@pytest.mark.parametrize("trained", [False, True])
def test_workers_without_work_leave_their_cpus_to_others(play, monkeypatch, trained):
    monkeypatch.setattr(worker_group, "IDLE_SECONDS", 0.25)

    async def scene(host):
        if trained:
            epoch = await started(host)
            await asyncio.sleep(0.5)  # no matter how long
            await host.deliver((await take(host)).number, GOOD)
            await epoch
        assert await take(host, after=1) is None
        with pytest.raises(GroupReleased):
            await host.run_epoch()
        with pytest.raises(GroupReleased):
            await host.begin(trial("second"), 0, None)

    play(scene)


def test_a_late_answer_to_an_old_command_is_ignored(play):
    async def scene(host):
        first = await started(host)
        number = (await take(host)).number
        await host.deliver(number, Outcome(failure="diverged"))
        await host.deliver(number, GOOD)
        assert (await first).failure == "diverged"
        second = await started(host)
        await host.deliver(number, GOOD)
        await asyncio.sleep(0.01)
        assert not second.done()
        second.cancel()

    play(scene)


def test_a_failed_epoch_leaves_the_trial_where_it_was(play):
    async def scene(host):
        await host.begin(trial("first"), 2, {"model.safetensors": b"second"})
        epoch = await started(host)
        await host.deliver((await take(host)).number, Outcome(failure="diverged"))
        await epoch
        assert await host.state() == {"model.safetensors": b"second"}

    play(scene)


def test_the_trial_hears_of_the_groups_end_while_it_waits_and_later(play):
    async def scene(host):
        epoch = await started(host)
        host._end("no more nodes")
        with pytest.raises(GroupEnded, match="no more nodes"):
            await asyncio.wait_for(epoch, SOON)
        with pytest.raises(GroupEnded, match="no more nodes"):
            await asyncio.wait_for(host.run_epoch(), SOON)

    play(scene)


def test_workers_leave_when_the_group_is_closed(play):
    async def scene(host):
        waiting = [asyncio.create_task(host.next_command(rank, 0)) for rank in (0, 1)]
        await asyncio.sleep(0.01)
        await host.close()
        assert [await asyncio.wait_for(task, SOON) for task in waiting] == [None, None]

    play(scene)


def test_a_broken_collective_is_the_loss_of_a_worker_and_other_errors_are_not():
    import torch

    gloo = RuntimeError(
        "[.../third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:46"
    )
    assert worker.is_of_lost_worker(gloo)
    assert worker.is_of_lost_worker(torch.distributed.DistBackendError("NCCL communicator was aborted"))
    with pytest.raises(ValueError) as ended:  # the group was, before the collective began
        torch.distributed.get_rank()
    assert worker.is_of_lost_worker(ended.value)
    assert not worker.is_of_lost_worker(RuntimeError("CUDA out of memory"))
    assert not worker.is_of_lost_worker(ValueError("no weights"))


def test_where_memory_runs_out_the_same_epoch_is_tried_in_more_parts(play):
    async def scene(host):
        epoch = await started(host)
        command = await take(host)
        for parts in (2, 4):
            await host.deliver(command.number, Outcome(split_batches=True))
            await host.deliver(command.number, Outcome(split_batches=True))  # another worker had the same
            again = await take(host, after=command.number)
            assert (again.trial, again.epochs_done, again.batch_parts) == (command.trial, 0, parts)
            command = again
        await host.deliver(command.number, GOOD)
        assert await epoch == GOOD
        second = await started(host)
        command = await take(host, after=command.number)
        assert (command.epochs_done, command.batch_parts) == (1, 4)  # it is not found out anew
        await host.deliver(command.number, GOOD)
        await second
        await host.begin(trial("second"), 0, None)
        third = await started(host)
        command = await take(host, after=command.number)
        assert command.batch_parts == 1
        third.cancel()

    play(scene)


def test_workers_that_restart_for_want_of_memory_are_not_lost_ones(play):
    async def scene(host):
        await host.join(0, "node")
        epoch = await started(host)
        for _ in range(MAX_TRIES + 1):
            command = await take(host)
            await host.deliver(command.number, Outcome(split_batches=True))
            await host.join(0, "node")
        await host.deliver((await take(host)).number, GOOD)
        assert await epoch == GOOD

    play(scene)


@pytest.mark.slow
def test_workers_without_progress_are_killed_and_their_trial_fails_in_the_end(play, monkeypatch):
    monkeypatch.setattr(worker_group.ray, "kill", lambda worker: setattr(worker, "killed", True))

    async def scene(host):
        host._stall_timeout = 1.0
        epoch = await started(host)
        for _ in range(MAX_TRIES):
            workers = [Worker(), Worker()]
            for rank, actor in enumerate(workers):
                await host.join(rank, "node", actor)
            command = await take(host)
            for _ in range(6):
                await host.progress(command.number)
                await asyncio.sleep(0.2)
            assert not any(actor.killed for actor in workers)
            await asyncio.sleep(1.6)
            assert all(actor.killed for actor in workers)
        await host.join(0, "node", Worker())
        failure = (await asyncio.wait_for(epoch, SOON)).failure
        assert failure == f"lost its workers {MAX_TRIES} times in epoch 1 (the last time: no progress for 1 s)"

    play(scene)


def test_a_worker_that_hangs_before_its_first_sign_is_killed_and_one_that_is_awaited_is_not(play, monkeypatch):
    monkeypatch.setattr(worker_group.ray, "kill", lambda worker: setattr(worker, "killed", True))

    async def scene(host):
        host._stall_timeout = 0.5
        actor = Worker()
        epoch = await started(host)
        await asyncio.sleep(1.0)  # nodes may take any time to come
        await host.join(0, "node", actor)
        await asyncio.sleep(1.0)
        assert not actor.killed
        await take(host)
        await asyncio.sleep(1.0)
        assert actor.killed
        epoch.cancel()

    play(scene)


def test_memory_that_runs_out_is_told_from_other_errors():
    import torch

    assert worker.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert worker.is_out_of_memory(raised.value)
    assert worker.is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"))
    assert not worker.is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
