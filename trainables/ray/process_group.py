"""Starts the workers of a group and their process group, which uses only the address of their node in the cluster.

gloo listens on the address of the host name, which is 127.0.1.1 on many Linux systems (Debian's /etc/hosts), where
workers on other machines cannot reach it. NCCL looks at the network interfaces itself.

Ray Train's own `TorchTrainer` does the rest, but more slowly: the process that starts a group and the one that watches
it import torch before the workers can, another process waits for data sets that do not exist, and another one asks the
dashboard every second whether the group is alive (see `search.cluster.orphaned_placement_groups`).
"""

import asyncio
import os
import socket
import struct
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from unittest.mock import patch

import ray
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import state, worker_group
from ray.train.v2.api.callback import RayTrainCallback
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.result import Result

INTERFACE = "GLOO_SOCKET_IFNAME"
COLLECTIVE_SECONDS = 1800.0
"""How long a worker waits for the others in a collective."""
LEAVE_SECONDS = 30.0
"""How long workers may take to leave their process group."""


class GroupTrainer(DataParallelTrainer):
    """Ray Train's trainer without the parts that a warm group does not need.

    These are Ray Data, the placement group cleaner, and three processes: one for the controller, which runs in this
    process instead; one for requests to the autoscaler, which sees the placement group anyway; and one for
    `ray.train.report`.
    """

    def _initialize_and_run_controller(self, **arguments: Any) -> Result:
        arguments["scaling_policy"] = _FixedSize(self.scaling_config)  # type: ignore[arg-type]  # Ray has two classes of that name
        with (
            patch.object(worker_group, "SynchronizationActor", _NoReports),
            patch.object(state, "_shutdown_sync_actor"),
        ):
            controller = _Controller(**arguments)
            asyncio.run(controller.run())  # type: ignore[no-untyped-call]  # Ray's
        return controller.get_result()

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        unwanted = DatasetsCallback | PlacementGroupCleanerCallback
        callbacks = super()._create_default_callbacks()
        return [FreesFailedStart(), *(callback for callback in callbacks if not isinstance(callback, unwanted))]


class _FixedSize(FixedScalingPolicy):
    """Requests no resources in addition to the placement group."""

    def after_controller_start(self, train_run_context: object) -> None:
        pass

    def _maybe_send_resource_request(self) -> None:
        pass


class _NoReports:
    """Replaces the actor that synchronises the reports of workers. Ours report to the group's host instead."""

    @classmethod
    def options(cls, **unused: object) -> "type[_NoReports]":
        return cls

    @classmethod
    def remote(cls, **unused: object) -> "_NoReports":
        return cls()


class _WorkerGroup(worker_group.WorkerGroup):
    """Its workers inherit this process's environment, which has Ray Train's variables. With an environment of their own
    they could not use the processes that Ray starts in advance."""

    @staticmethod
    def _get_worker_runtime_env(custom_runtime_env: object) -> None:  # type: ignore[override]  # None inherits
        return None


class _Controller(TrainController):
    worker_group_cls = _WorkerGroup


class FreesFailedStart(WorkerGroupCallback):
    """Frees the resources of workers that were lost while joining their process group, before others start.

    Ray Train 2.60 does not: `WorkerGroup._start` cleans up only what has not "started", which it sets before the
    backend has started. It then waits for those very resources. Must precede the callback that starts the backend.
    """

    _reservation: Any = None

    def after_worker_group_start(self, worker_group: Any) -> None:
        self._reservation = worker_group.get_worker_group_state().placement_group_handle

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        if self._reservation is not None:
            self._reservation.shutdown()  # safe to repeat if the workers have ended since
            self._reservation = None


@dataclass
class ProcessGroup(BackendConfig):
    """The backend of torch's process group: gloo or nccl. A group of one worker has none."""

    backend: str

    @property
    def backend_cls(self) -> type[Backend]:
        return _ProcessGroupBackend

    @property
    def train_func_context(self) -> Callable[[], AbstractContextManager[None]]:
        return on_own_device


class _ProcessGroupBackend(Backend):
    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        assert isinstance(backend_config, ProcessGroup)
        if len(worker_group) == 1:  # it has nobody to talk to; NCCL would refuse a GPU that others use, too
            return
        address, port = worker_group.execute_single(0, get_address_and_port)
        rendezvous = {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
        backend, size, start = backend_config.backend, len(worker_group), worker_group.execute_single_async
        ray.get([start(rank, enter, backend, rank, size, rendezvous) for rank in range(size)])

    def on_shutdown(self, worker_group: Any, backend_config: BackendConfig) -> None:
        left = worker_group.execute_async(leave, len(worker_group) > 1)
        ray.wait(left, num_returns=len(left), timeout=LEAVE_SECONDS)


def on_own_device() -> AbstractContextManager[None]:
    """A context in which this worker's GPU is torch's default device."""
    from ray.train.torch.config import TorchConfigContextManager

    context: AbstractContextManager[None] = TorchConfigContextManager()
    return context


def enter(backend: str, rank: int, size: int, rendezvous: dict[str, str]) -> None:
    """Join the process group at the address and port in `rendezvous`."""
    import torch.distributed as dist
    from ray.train.torch import config

    use_node_interface()
    os.environ.update(rendezvous)
    config._set_torch_distributed_env_vars()
    timeout = timedelta(seconds=COLLECTIVE_SECONDS)
    address, port = rendezvous["MASTER_ADDR"], int(rendezvous["MASTER_PORT"])
    store = new_store(address, port, rank, size, timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)


def new_store(address: str, port: int, rank: int, size: int, timeout: timedelta) -> Any:
    """torch's store, listening only on `address`; by default it would listen on all addresses of its machine."""
    import torch.distributed as dist

    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.create_server((address, port), family=family).detach() if rank == 0 else None
    return dist.TCPStore(address, port, size, rank == 0, timeout, master_listen_fd=listener)  # type: ignore[attr-defined]  # hints without gloo


def leave(several: bool) -> None:
    from ray.train.torch import config

    config._shutdown_torch(destroy_process_group=several)


def use_node_interface() -> None:
    """Set the interface that gloo uses in this worker, unless the user has."""
    if INTERFACE not in os.environ and (name := interface_of(ray.util.get_node_ip_address())):
        os.environ[INTERFACE] = name


def interface_of(address: str) -> str | None:
    """The name of the network interface with this IPv4 address; None if there is none or the system is not Linux."""
    try:
        import fcntl
    except ImportError:
        return None
    get_address = 0x8915  # SIOCGIFADDR, see netdevice(7)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                found = fcntl.ioctl(probe, get_address, struct.pack("256s", name.encode()[:15]))
            except OSError:  # it is down, or has no IPv4 address
                continue
            if socket.inet_ntoa(found[20:24]) == address:
                return name
    return None
